"""Predicted rates beside the ones training survives; the same as `batchlr sweep`."""

from batchlr.cli import main

if __name__ == "__main__":
    import sys

    main(["sweep", *sys.argv[1:]])

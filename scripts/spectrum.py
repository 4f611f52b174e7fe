"""``batchlr spectrum`` as a script, for ``torchrun --nproc-per-node N scripts/spectrum.py ...``."""

import sys

from batchlr.cli import main

if __name__ == "__main__":
    main(["spectrum", *sys.argv[1:]])

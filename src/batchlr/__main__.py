"""``python -m batchlr``: the same as the ``batchlr`` command."""

from batchlr.cli import main

if __name__ == "__main__":
    main()

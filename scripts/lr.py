"""``batchlr lr`` as a script, for ``torchrun --nproc-per-node N scripts/lr.py ...``."""

import sys

from batchlr.cli import main

if __name__ == "__main__":
    main(["lr", *sys.argv[1:]])

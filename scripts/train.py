"""``batchlr train`` as a script, for ``torchrun --nproc-per-node N scripts/train.py ...``."""

import sys

from batchlr.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])

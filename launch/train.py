"""Train a recipe: `python launch/train.py --recipe NAME`, also under deepspeed or torchrun."""

import sys

from ort_train.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

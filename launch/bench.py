"""Measure a recipe over several backends: `python launch/bench.py quickstart --batch-sizes 1,2`."""

import sys

from ort_train.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))

"""The command `ort-train merge`."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ort-train merge`."""
    add = parser.add_argument
    add("folder", metavar="RUN", help="the run's folder")
    add("--out", required=True, metavar="DIR", help="a new or empty folder")
    add(
        "--base",
        choices=("dequantized", "original"),
        help="of a QLoRA run: the weights that it trained beside (default), or those before "
        "quantization",
    )


def main(args: argparse.Namespace) -> int:
    """Run `ort-train merge`. Returns 0."""
    from ort_train.merge import merge
    from ort_train.quiet import quiet_transformers

    quiet_transformers()
    print(merge(args.folder, args.out, args.base))
    return 0

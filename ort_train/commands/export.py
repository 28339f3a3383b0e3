"""The command `ort-train export`."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ort-train export`."""
    add = parser.add_argument
    add("source", metavar="RUN_OR_MODEL_DIR", help="the folder of a run or a transformers model")
    add("--out", required=True, metavar="DIR", help="a new or empty folder")
    add(
        "--precision",
        choices=("fp32", "fp16", "int8", "int4"),
        default="fp32",
        help="of weights, computation and cache; int8 and int4: of the weights, as ort-train "
        "quantize does unless told otherwise",
    )
    add(
        "--graph",
        choices=("auto", "fused", "traced"),
        default="auto",
        help="fused operators, torch.onnx, or the first that the model can have",
    )


def main(args: argparse.Namespace) -> int:
    """Run `ort-train export`. Returns 0."""
    from ort_train.inference.decoder.export import describe, export_model
    from ort_train.quiet import quiet_transformers

    quiet_transformers()
    exported = export_model(
        args.source, args.out, args.precision, args.graph, show_progress=sys.stderr.isatty()
    )
    print(describe(exported))
    return 0

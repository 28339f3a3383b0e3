"""The command `ort-train generate`."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ort-train generate`."""
    add = parser.add_argument
    add("folder", metavar="DIR", help="written by ort-train export")
    add("--prompt", action="append", metavar="TEXT", help="several make a batch; - reads stdin")
    add("--chat", action="store_true", help="apply the tokenizer's chat template")
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="tokens after each prompt (default: the folder's, or 128, or as many as fit)",
    )
    add("--greedy", action="store_true", help="always the likeliest token")
    sampling = parser.add_argument_group("sampling", "each of these turns it on").add_argument
    sampling("--temperature", type=float, metavar="T", help="above 0; below 1 the likely gain")
    sampling("--top-k", type=int, metavar="N", help="likeliest tokens to choose from, 0 for all")
    sampling(
        "--top-p", type=float, metavar="P", help="joint probability of the tokens to choose from"
    )
    sampling("--seed", type=int, metavar="N", help="of the draws (default: another each time)")
    add("--repetition-penalty", type=float, metavar="X", help="above 1: against repeated tokens")
    add("--stop", action="append", metavar="TEXT", help="end after this text")
    add("--threads", type=int, metavar="N", help="of ONNX Runtime (default: one a core)")


def main(args: argparse.Namespace) -> int:
    """Run `ort-train generate`. Returns 0."""
    from ort_train.quiet import quiet_transformers

    quiet_transformers()
    from ort_train.inference.generation import console

    console.generate(args)
    return 0

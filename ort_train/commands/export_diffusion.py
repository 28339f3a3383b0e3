"""The command `ort-train export-diffusion`."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ort-train export-diffusion`."""
    add = parser.add_argument
    add("source", metavar="DIR", help="a folder of diffusers', or a hub name")
    add("--out", required=True, metavar="DIR", help="a new or empty folder")


def main(args: argparse.Namespace) -> int:
    """Run `ort-train export-diffusion`. Returns 0."""
    from ort_train.inference.diffusion.export import export_pipeline
    from ort_train.quiet import quiet_transformers

    quiet_transformers()
    export_pipeline(args.source, args.out, on_event=print)
    print(f"wrote {args.out}")
    return 0

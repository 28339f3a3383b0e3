"""The command `ort-train plan`."""

from __future__ import annotations

import argparse

from ort_train.overrides import add_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ort-train plan`."""
    add_recipe(parser)
    add = parser.add_argument
    add("--gpus", type=int, default=1, metavar="N", help="GPUs of a node")
    add("--nodes", type=int, default=1, metavar="N", help="nodes")
    add("--gpu-mem-gib", type=float, required=True, metavar="GIB", help="memory of each GPU")


def main(args: argparse.Namespace) -> int:
    """Run `ort-train plan`. Returns 0, or 1 where the recipe fits in no way."""
    from ort_train import plan
    from ort_train.recipes import load_recipe

    config = load_recipe(args.recipe, args.overrides)
    return 0 if plan.show(config, args.gpus, args.nodes, args.gpu_mem_gib) else 1

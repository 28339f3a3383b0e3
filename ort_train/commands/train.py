"""The command `ort-train train`."""

from __future__ import annotations

import argparse

from ort_train.overrides import add_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ort-train train`."""
    add = parser.add_argument
    add("--recipe", required=True, metavar="NAME_OR_PATH", help="a shipped recipe, or a YAML file")
    add_overrides(parser, "changes to the recipe (recipes/README.md lists the keys)")
    add("--tiny", action="store_true", help="shrink all sizes, download nothing")
    # What the deepspeed launcher adds; the rank itself is in the environment.
    add("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> int:
    """Run `ort-train train`. Returns 0."""
    from ort_train import job
    from ort_train.recipes import load_recipe

    job.run(load_recipe(args.recipe, args.overrides, tiny=args.tiny))
    return 0

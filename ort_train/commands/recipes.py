"""The command `ort-train recipes`."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ort-train recipes`."""
    parser.add_argument(
        "name", nargs="?", metavar="NAME_OR_PATH", help="show this recipe, resolved"
    )


def main(args: argparse.Namespace) -> int:
    """Run `ort-train recipes`. Returns 0."""
    from ort_train.config import to_yaml
    from ort_train.recipes import list_recipes, load_recipe

    if args.name is not None:
        print(to_yaml(load_recipe(args.name)), end="")
        return 0
    infos = list_recipes()
    width = max(len(info.name) for info in infos)
    model_width = max(len(info.architecture) for info in infos)
    for info in infos:
        method = "full" if info.method == "none" else info.method
        memory = "" if info.state_gib is None else f"{info.state_gib:.1f} GiB"
        print(
            f"{info.name:<{width}}  {info.architecture:<{model_width}}  {method:<5}  {memory:>9}  "
            f"{info.description}"
        )
    print("\nMemory is that of weights, gradients and optimizer, unsharded, without activations.")
    return 0

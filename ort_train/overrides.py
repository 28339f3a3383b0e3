"""Words of a command line that change a recipe: `section.key=value`."""

from __future__ import annotations

import argparse


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names a recipe, and changes to it."""
    parser.add_argument("recipe", metavar="NAME_OR_PATH", help="a shipped recipe, or a YAML file")
    add_overrides(parser, "changes to the recipe")


def add_overrides(
    parser: argparse.ArgumentParser, what: str, metavar: str = "section.key=value"
) -> None:
    """Add the changes alone.

    Args:
        what: they are, for the help.
        metavar: how one of them looks.
    """
    parser.add_argument("overrides", nargs="*", default=[], metavar=metavar, help=what)


def is_override(word: str) -> bool:
    """Whether a word of a command line is one of them, and no option."""
    return "=" in word and not word.startswith("-")

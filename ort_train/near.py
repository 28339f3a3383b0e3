"""What an unknown name was probably meant to be, for the error that names it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, options: Iterable[str], cutoff: float = 0.6) -> str:
    """``did you mean X or Y?``; empty where nothing is near.

    Args:
        cutoff: how alike two names must be, from 0 to 1 (`difflib.get_close_matches`).
    """
    near = difflib.get_close_matches(name, sorted(options), n=2, cutoff=cutoff)
    return f"did you mean {' or '.join(near)}?" if near else ""


def near_matches(name: str, options: Iterable[str]) -> str:
    """:func:`did_you_mean`, or ``there are A, B, C`` where nothing is near."""
    options = sorted(options)
    there_are = f"there are {', '.join(options)}" if options else "there are none"
    return did_you_mean(name, options) or there_are

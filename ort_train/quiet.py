"""Transformers without a word, for commands that say themselves what they do."""

from __future__ import annotations


def quiet_transformers() -> None:
    """Its hints are about code, and its bars about reading files; the commands have their own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

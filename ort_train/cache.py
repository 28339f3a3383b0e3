"""The folder for what is made once and kept between runs: tokenizers, builds, graphs."""

from __future__ import annotations

import os
from pathlib import Path


def root() -> Path:
    """What ORT_TRAIN_CACHE names, or ~/.cache/ort_train. It may be deleted at any time."""
    return Path(os.environ.get("ORT_TRAIN_CACHE") or "~/.cache/ort_train").expanduser()

"""The folder for what is made once and kept between runs: tokenizers, builds, graphs."""

from __future__ import annotations

import os
from pathlib import Path

from ort_train.errors import ConfigError
from ort_train.files import expanded


def root() -> Path:
    """What ORT_TRAIN_CACHE names, or ~/.cache/ort_train. It may be deleted at any time.

    Raises:
        ConfigError: where there is no home folder, and nothing else is named.
    """
    try:
        return expanded(os.environ.get("ORT_TRAIN_CACHE") or "~/.cache/ort_train")
    except ConfigError as error:
        raise ConfigError(f"{error}; ORT_TRAIN_CACHE names another folder for the cache") from None

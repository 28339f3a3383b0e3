"""From a trained model to an ONNX decoder that runs on the same ONNX Runtime as the training.

`export_model` writes a folder (its contract is in `folder.py`), `OrtGenerator` generates from one.
Importing this package imports neither torch nor onnxruntime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "OrtGenerator": "ort_train.inference.generation.generate",
    "export_model": "ort_train.inference.decoder.export",
    "load_folder": "ort_train.inference.folder",
}

__all__ = ["OrtGenerator", "export_model", "load_folder"]

if TYPE_CHECKING:
    from ort_train.inference.decoder.export import export_model
    from ort_train.inference.folder import load_folder
    from ort_train.inference.generation.generate import OrtGenerator


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""Train Hugging Face models through ONNX Runtime's ORTModule, and prove the gain by measuring.

The public names load on first use: importing this package imports neither torch nor onnxruntime
and changes nothing in them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "DistillationTrainer": "ort_train.distillation",
    "ORTTrainer": "ort_train.trainer",
    "ORTSeq2SeqTrainer": "ort_train.trainer",
    "ORTTrainingArguments": "ort_train.training_args",
    "ORTSeq2SeqTrainingArguments": "ort_train.training_args",
    "ORTOptimizerNames": "ort_train.training_args",
    "OrtOptions": "ort_train.ortmodule.options",
    "accumulating": "ort_train.backends",
    "wrap": "ort_train.backends",
    "unwrap": "ort_train.backends",
    "decision": "ort_train.backends",
    "available": "ort_train.backends",
}

__all__ = [
    "DistillationTrainer",
    "ORTOptimizerNames",
    "ORTSeq2SeqTrainer",
    "ORTSeq2SeqTrainingArguments",
    "ORTTrainer",
    "ORTTrainingArguments",
    "OrtOptions",
    "__version__",
    "accumulating",
    "available",
    "decision",
    "unwrap",
    "wrap",
]

if TYPE_CHECKING:
    from ort_train.backends import accumulating, available, decision, unwrap, wrap
    from ort_train.distillation import DistillationTrainer
    from ort_train.ortmodule.options import OrtOptions
    from ort_train.trainer import ORTSeq2SeqTrainer, ORTTrainer
    from ort_train.training_args import (
        ORTOptimizerNames,
        ORTSeq2SeqTrainingArguments,
        ORTTrainingArguments,
    )


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""What a recipe's optimizer and trackers need beside this package, asked of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from ort_train.near import near_matches

if TYPE_CHECKING:
    from ort_train.config import TrainConfig


def problems(train: TrainConfig) -> list[str]:
    """Why transformers would refuse the optimizer or a tracker, after the model is loaded."""
    return [*_of_optimizer(train.optimizer), *_of_trackers(train.report_to)]


def _of_optimizer(name: str) -> Iterator[str]:
    from transformers import Trainer, TrainingArguments

    if name == "adamw_ort_fused":  # comes with onnxruntime
        return
    # Real arguments would join the ranks of a launch.
    defaults = {each.name: each.default for each in fields(TrainingArguments)}
    args = SimpleNamespace(**{**defaults, "optim": name})
    try:
        Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.Linear(1, 1))
    except (ImportError, ValueError) as error:
        yield f"train.optimizer {name}: {error}. Or set train.optimizer=adamw_torch_fused"


def _of_trackers(names: list[str]) -> Iterator[str]:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK as TRACKERS

    if names in (["none"], ["all"]):
        return
    for name in names:
        if name not in TRACKERS:
            yield f"train.report_to {name} is unknown: {near_matches(name, TRACKERS)}"
            continue
        try:
            TRACKERS[name]()
        except (ImportError, RuntimeError) as error:
            yield f"train.report_to {name}: {error} Or leave it out of train.report_to"

"""Adapters: low-rank updates beside frozen weights (LoRA, https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch

from ort_train.config import AdapterConfig
from ort_train.data.tasks import Task, peft_type
from ort_train.errors import ModelError
from ort_train.near import near_matches

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def apply_adapter(
    model: PreTrainedModel, adapter: AdapterConfig, task: Task = "causal-lm"
) -> PreTrainedModel | PeftModel:
    """Adds the adapter to the model and freezes everything else.

    Args:
        model: changed in place: its target modules are replaced by ones with an adapter.
        adapter: with method ``none`` the model stays as it is.
        task: of the model.

    Returns:
        The model itself, or the PeftModel around it.

    Raises:
        ModelError: a target matches no module, or modules that can't take an adapter.
    """
    if adapter.method == "none":
        return model
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    targets = adapter.target_modules
    candidates = _linear_modules(model, (torch.nn.Linear, Conv1D))
    if isinstance(targets, list):
        _check_targets(model, targets, set(candidates))
    config = LoraConfig(
        task_type=peft_type(task),
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        # GPT-2's Conv1D stores its weight transposed.
        fan_in_fan_out=any(
            issubclass(kind, Conv1D)
            for name, kind in candidates.items()
            if targets == "all-linear" or name in targets
        ),
    )
    try:
        with warnings.catch_warnings():
            # peft asks transformers 5 by an older name.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(
            f"adapter.target_modules {targets} can't all take an adapter: {error} "
            f"Linear modules of this model: {', '.join(sorted(candidates))}"
        ) from error
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
    return adapted


def trainable_summary(model: torch.nn.Module) -> tuple[int, int]:
    """Counts parameters, tied ones once, 4-bit ones as the weights that are packed in them.

    Returns:
        (trainable, total) numbers of elements.
    """
    sizes = [(_num_weights(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)


def _num_weights(parameter: torch.nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def _linear_modules(model: torch.nn.Module, kinds: tuple[type, ...]) -> dict[str, type[Any]]:
    """The last parts of the linear modules' names, such as q_proj, and their types."""
    return {
        name.rpartition(".")[2]: type(module)
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    }


def _check_targets(model: torch.nn.Module, targets: list[str], candidates: set[str]) -> None:
    """Refuses every target that peft would match with nothing, also beside ones that match."""
    if not targets:
        raise ModelError(
            "adapter.target_modules is empty: name modules, or set it to all-linear; "
            f"linear modules of this model: {', '.join(sorted(candidates))}"
        )
    names = [name for name, _ in model.named_modules()]
    unmatched = [
        target
        for target in targets
        if not any(name == target or name.endswith(f".{target}") for name in names)
    ]
    if unmatched:
        hints = "; ".join(f"{target}: {near_matches(target, candidates)}" for target in unmatched)
        raise ModelError(
            f"adapter.target_modules match no module of {type(model).__name__}: {hints} "
            f"(linear modules: {', '.join(sorted(candidates))})"
        )

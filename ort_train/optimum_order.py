"""Positional arguments of a trainer in the order of Optimum's former ORTTrainer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def without_optimums_order(
    positional: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Name what stands behind `model_init`, where it stands in Optimum's order.

    Optimum (v1.16 to 1.27) has compute_metrics, callbacks, optimizers there, Trainer has
    compute_loss_func, compute_metrics, callbacks, optimizers. Optimum's tokenizer stands where
    Trainer has processing_class.

    Args:
        positional: what a trainer was given behind `args`.
        kwargs: what it was given by name.

    Returns:
        both, as Trainer takes them
    """
    first, rest = positional[:5], positional[5:]
    names = ("compute_metrics", "callbacks", "optimizers", "preprocess_logits_for_metrics")
    if len(rest) > 1:
        is_optimums = isinstance(rest[1], list) or (len(rest) > 2 and isinstance(rest[2], tuple))
    else:
        is_optimums = bool(rest) and rest[0] is not None and _num_required(rest[0]) == 1
    if not is_optimums:
        return positional, kwargs
    return first, {**dict(zip(names, rest, strict=False)), **kwargs}


def _num_required(function: Callable[..., Any]) -> int:
    parameters = inspect.signature(function).parameters.values()
    return sum(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        for p in parameters
    )

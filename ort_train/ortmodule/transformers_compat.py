"""What transformers' models need while they are exported, and only then.

The exporter traces one batch: whatever a forward decides in Python (which experts were hit, how
long the sequence is) would hold for every later batch. Each patch here names the place that does
so and puts a form there that the graph computes anew for each batch.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ort_train.ortmodule import operators  # noqa: F401  # grouped_linear


@contextlib.contextmanager
def export_scope(module: torch.nn.Module) -> Iterator[None]:
    """Everything that the export of a module needs of transformers, taken back at the end."""
    if "transformers" not in sys.modules:  # then the module is not one of its models
        yield
        return
    with contextlib.ExitStack() as stack:
        for config in _configs(module):
            # No graph can return a cache, and no training step has a use for one.
            _set(stack, config, "use_cache", False)
            # "eager" loops over the experts that this batch hits (`integrations/moe.py`, 5.0 and
            # later); the grouped form sorts the tokens by expert, for any routing.
            _set(stack, config, "_experts_implementation_internal", "grouped_mm")
        _patch(stack, "integrations.moe", "_grouped_linear", _grouped_linear)
        span = "compute_attention_span"
        _patch(stack, "models.deberta.modeling_deberta", span, _compute_attention_span)
        if (4, 53) <= _version() < (5, 0):
            _patch(stack, "masking_utils", "_vmap_for_bhqkv", _broadcast_mask)
            _patch(stack, "masking_utils", "TransformGetItemToIndex", contextlib.nullcontext)
        yield


def _version() -> tuple[int, int]:
    major, minor = importlib.metadata.version("transformers").split(".")[:2]
    return int(major), int(minor)


def _configs(module: torch.nn.Module) -> list[Any]:
    """The configs of a module's parts, each once."""
    transformers = importlib.import_module("transformers")
    base = getattr(transformers, "PreTrainedConfig", transformers.PretrainedConfig)
    configs = (getattr(part, "config", None) for part in module.modules())
    found = {id(config): config for config in configs if isinstance(config, base)}
    for config in list(found.values()):
        for name in getattr(config, "sub_configs", {}):
            part = getattr(config, name, None)
            if isinstance(part, base):
                found.setdefault(id(part), part)
    return list(found.values())


def _set(stack: contextlib.ExitStack, config: Any, name: str, value: Any) -> None:
    """Set an attribute of a config that has one, until the stack unwinds."""
    if getattr(config, name, None) is not None:
        stack.callback(setattr, config, name, getattr(config, name))
        setattr(config, name, value)


def _patch(stack: contextlib.ExitStack, module_name: str, name: str, value: Any) -> None:
    """Replace a function of a module of transformers that is loaded and has it."""
    module = sys.modules.get(f"transformers.{module_name}")
    if module is not None and hasattr(module, name):
        stack.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, value)


def _grouped_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    offs: torch.Tensor,
    bias: torch.Tensor | None = None,
    is_transposed: bool = False,
) -> torch.Tensor:
    """In place of `integrations/moe.py::_grouped_linear`, whose product ONNX doesn't have."""
    output = torch.ops.ort_train.grouped_linear(input, weight, offs, is_transposed)
    return output if bias is None else output + bias


def _compute_attention_span(
    query_layer: torch.Tensor, key_layer: torch.Tensor, max_relative_positions: int
) -> torch.Tensor:
    """In place of `modeling_deberta.py::compute_attention_span`, which traces to a constant.

    Query and key have the same length wherever a graph is trained.
    """
    length: Any = query_layer.size(-2)
    if isinstance(length, torch.Tensor):  # while tracing
        return torch.clamp(length, max=max_relative_positions)
    return torch.tensor(min(length, max_relative_positions))


def _broadcast_mask(
    mask_function: Callable[..., torch.Tensor], bh_indices: bool = True
) -> Callable[..., torch.Tensor]:
    """In place of `masking_utils.py::_vmap_for_bhqkv`: the tracer can't look into torch.vmap."""

    def broadcast(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return mask_function(
            batch[:, None, None, None],
            head[None, :, None, None],
            query[None, None, :, None],
            key[None, None, None, :],
        )

    return broadcast

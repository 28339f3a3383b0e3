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

from ort_train.ortmodule.export import experts
from ort_train.ortmodule.kernels import operators  # noqa: F401  # grouped_linear


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
        for part in module.modules():
            for key, hook in part._forward_hooks.items():
                if getattr(hook, "__name__", "") == "neftune_post_forward_hook":
                    stack.callback(part._forward_hooks.__setitem__, key, hook)
                    part._forward_hooks[key] = _noisy_embeddings
        _patch(stack, "integrations.moe", "_grouped_linear", _grouped_linear)
        for replacement in experts.replacements(module, _version()):
            _replace(stack, *replacement)
        for name in {type(part).__module__ for part in module.modules()}:
            if name.startswith("transformers.models."):
                _unscript(stack, sys.modules[name])
        deberta = "models.deberta.modeling_deberta"
        _patch(stack, deberta, "compute_attention_span", _compute_attention_span)
        _patch(stack, "models.xmod.modeling_xmod", "XmodOutput.lang_adapter", _lang_adapter)
        rotary = "RotaryEmbedding._update_cos_sin_tables"
        _patch(stack, "models.esm.modeling_esm", rotary, _update_cos_sin_tables)
        if (4, 53) <= _version() < (5, 0):
            _patch(stack, "masking_utils", "_vmap_for_bhqkv", _broadcast_mask)
            _patch(stack, "masking_utils", "TransformGetItemToIndex", contextlib.nullcontext)
        yield


def _noisy_embeddings(module: Any, inputs: Any, embeddings_BTH: torch.Tensor) -> torch.Tensor:
    """`integrations/neftune.py`, neftune_post_forward_hook, with the noise of each batch's length.

    That one's would be of the first batch's, in numbers that no graph draws (`uniform_` between
    tensors).
    """
    if not module.training:
        return embeddings_BTH
    num = embeddings_BTH.new_ones(()) * embeddings_BTH.shape[1] * embeddings_BTH.shape[2]
    bound = module.neftune_noise_alpha / torch.sqrt(num)
    noise = torch.rand(embeddings_BTH.shape, device=embeddings_BTH.device) * 2 - 1
    return embeddings_BTH + noise.to(embeddings_BTH.dtype) * bound


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
        _replace(stack, config, name, value)


def _replace(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Replace an attribute until the stack unwinds."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _patch(stack: contextlib.ExitStack, module_name: str, path: str, value: Any) -> None:
    """Replace a function, or a class's method, of a module of transformers that is loaded."""
    *classes, name = path.split(".")
    owner = sys.modules.get(f"transformers.{module_name}")
    for class_name in classes:
        owner = getattr(owner, class_name, None)
    if owner is not None and hasattr(owner, name):
        _replace(stack, owner, name, value)


def _unscript(stack: contextlib.ExitStack, module: Any) -> None:
    """Have a module's scripted functions (DeBERTa's in 4.57) traced as the Python they are: what
    they branch on would come to the exporter as branches, which have no gradient."""
    for name, value in list(vars(module).items()):
        if isinstance(value, torch.jit.ScriptFunction):
            _replace(stack, module, name, value._torchdynamo_inline)  # set by torch.jit.script


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


def _lang_adapter(self: Any, lang_ids: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """In place of `modeling_xmod.py::XmodOutput.lang_adapter`: 4.57 splits the batch by Python
    numbers, and 5 gives adapters that this batch has no use for products of no rows."""
    residual = hidden_states
    if self.adapter_layer_norm is not None:
        hidden_states = self.adapter_layer_norm(hidden_states)
    elif self.adapter_reuse_layer_norm:
        hidden_states = self.LayerNorm(hidden_states)
    if self.ln_before_adapter:
        residual = hidden_states
    adapters, selected = self.adapter_modules.values(), lang_ids.long()[:, None]
    adapted = experts.through_selected(adapters, hidden_states, selected).squeeze(1)
    return self.dropout(adapted) + residual


def _update_cos_sin_tables(
    self: Any, x: torch.Tensor, seq_dimension: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of `modeling_esm.py::RotaryEmbedding._update_cos_sin_tables`, 4.57, which keeps the
    tables of the last length: a trace would have them as constants."""
    self._seq_len_cached = None  # the traced ones are not to be used again
    positions = torch.arange(x.shape[seq_dimension], device=x.device).type_as(self.inv_freq)
    angles = torch.outer(positions, self.inv_freq)
    angles = torch.cat((angles, angles), dim=-1)[None, None]
    return angles.cos(), angles.sin()


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

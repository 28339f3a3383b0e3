"""Mixtures of experts that ask in Python which experts a batch hits, in a form for any batch.

transformers 5 has such a form of its own for most (`integrations/moe.py`, "grouped_mm"). The models
of 4.57, and JetMoe in 5 too, loop over the experts that are hit, or take their loads as Python
numbers: a trace would route every later batch as it did its own. Here the tokens are sorted by
expert instead, and each expert gets its part of them.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from ort_train.ortmodule.kernels import operators  # noqa: F401  # split_groups, grouped_linear

_ROUTED = "_ort_train_routed"
#: The loops that `_routed` stands in for. Of transformers 4.57, Mixtral, MiniMax, Qwen 2, 3
#: and 3 Next, HunYuan and Ernie 4.5 have the first form, OLMoE and FlexOlmo the second. A loop that
#: says anything else is left as it is, and refused by name where it is traced (tracing.py).
_LOOP = """\
for expert_idx in {experts}:
    expert_layer = self.experts[expert_idx]
    idx, top_x = torch.where({mask})
    current_state = hidden_states[None, top_x].reshape(-1, hidden_dim)
    current_hidden_states = expert_layer(current_state) * routing_weights[top_x, idx, None]
    final_hidden_states.index_add_(0, top_x, current_hidden_states.to(hidden_states.dtype))
"""
_LOOPS = tuple(
    ast.unparse(ast.parse(_LOOP.format(experts=experts, mask=mask)))
    for experts, mask in (
        ("expert_hit", "expert_mask[expert_idx].squeeze(0)"),
        ("range(self.num_experts)", "expert_mask[expert_idx]"),
    )
)
_ROUTED_CALL = (
    "final_hidden_states = final_hidden_states"
    f" + {_ROUTED}(self, hidden_states, selected_experts, routing_weights)"
)
#: `*TopKGating.forward` of JetMoe and the GraniteMoe family.
_LOADS_IN_PYTHON = "expert_size = expert_size.tolist()"


class Replacement(NamedTuple):
    """A method of a class, and what stands in for it during an export."""

    owner: type
    name: str
    function: Callable[..., Any]


def replacements(module: torch.nn.Module, version: tuple[int, int]) -> Iterator[Replacement]:
    """What the mixtures of experts among a module's parts need.

    Args:
        version: of transformers, major and minor.
    """
    kinds = {kind for part in module.modules() for kind in type(part).__mro__}
    for kind in kinds:
        if not kind.__module__.startswith("transformers.models."):
            continue
        forward = kind.__dict__.get("forward")
        if "expert_size" in _parameters(forward):
            yield Replacement(kind, "forward", _parallel_experts)
        elif kind.__name__ == "GptOssExperts" and version < (5, 0):
            yield Replacement(kind, "forward", _gpt_oss_experts)
        elif {"topk_weights", "topk_weight"} & _parameters(kind.__dict__.get("moe")):
            yield Replacement(kind, "moe", _routed)
        elif forward is not None and (traceable := _traceable(forward)) is not None:
            yield Replacement(kind, "forward", traceable)


def _parameters(function: Callable[..., Any] | None) -> set[str]:
    return set() if function is None else set(inspect.signature(function).parameters)


class _Groups(NamedTuple):
    """(token, expert) pairs sorted by expert.

    Attributes:
        order: (pairs,) which pair stands where.
        inverse: (pairs,) where each pair stands.
        loads: (experts,) how many pairs each expert has.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    loads: torch.Tensor

    @classmethod
    def of(cls, selected: torch.Tensor, num_experts: int) -> _Groups:
        """Of the pairs' experts, (pairs,)."""
        by_expert, order = torch.sort(selected)
        # histc counts floats alone on CPUs, and integers alone on GPUs where it must repeat itself.
        counted = by_expert.float() if selected.device.type == "cpu" else by_expert.int()
        loads = torch.histc(counted, bins=num_experts, min=0, max=num_experts - 1)
        _, inverse = torch.sort(order)
        return cls(order, inverse, loads.long())


def through_selected(
    experts: Iterable[Callable[..., Any]], inputs: torch.Tensor, selected: torch.Tensor
) -> torch.Tensor:
    """Each row through the modules that it has selected, whatever modules they are.

    Args:
        experts: modules that keep a row's shape.
        inputs: (rows, ...)
        selected: (rows, per row), indices of experts, int64.

    Returns:
        (rows, per row, ...)
    """
    experts = list(experts)
    num_rows, num_selected = inputs.shape[0], selected.shape[-1]
    # Each expert gets one row more, whose output is left out: ONNX Runtime refuses the products of
    # matrices with no rows that the gradients of an expert with no rows would be (Gemm), or leaves
    # their results unset (MatMul).
    spare = torch.arange(len(experts), device=selected.device)
    groups = _Groups.of(torch.cat([selected.reshape(-1), spare]), len(experts))
    rows = torch.clamp(groups.order // num_selected, max=num_rows - 1)
    parts = torch.ops.ort_train.split_groups(inputs[rows], groups.loads, len(experts))
    outputs = torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)])
    outputs = outputs[groups.inverse[: -len(experts)]]
    return outputs.reshape(-1, num_selected, *inputs.shape[1:])


def _routed(
    block: Any, hidden_states: torch.Tensor, selected: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """In place of the loops, and of `*MoE.moe` in DeepSeek's family, 4.57.

    Args:
        block: `experts` is its list of modules.
        hidden_states: (tokens, size)
        selected: (tokens, per token), indices of experts.
        weights: (tokens, per token), of the experts' outputs in the sum.

    Returns:
        (tokens, size)
    """
    outputs = through_selected(block.experts, hidden_states, selected)
    return (outputs * weights[..., None]).sum(1).to(hidden_states.dtype)


def _grouped_linear(
    inputs: torch.Tensor, weight: torch.Tensor, loads: torch.Tensor, is_transposed: bool
) -> torch.Tensor:
    offsets = torch.cumsum(loads, 0)
    return torch.ops.ort_train.grouped_linear(inputs, weight, offsets, is_transposed)


def _parallel_experts(self: Any, inputs: torch.Tensor, expert_size: torch.Tensor) -> torch.Tensor:
    """In place of `*ParallelExperts.forward`, which splits the rows by Python numbers."""
    return _grouped_linear(inputs, self.weight, expert_size, False)


def _gpt_oss_experts(
    self: Any,
    hidden_states: torch.Tensor,
    router_indices: torch.Tensor,
    routing_weights: torch.Tensor,
) -> torch.Tensor:
    """In place of `modeling_gpt_oss.py::GptOssExperts.forward`, 4.57.

    Args:
        hidden_states: (batch, length, size)
        router_indices: (tokens, per token)
        routing_weights: (tokens, experts)
    """
    shape, num_selected = hidden_states.shape, router_indices.shape[-1]
    selected = router_indices.reshape(-1)
    groups = _Groups.of(selected, self.num_experts)
    expert = selected[groups.order]
    inputs = hidden_states.reshape(-1, self.hidden_size)[groups.order // num_selected]
    gate_up = _grouped_linear(inputs, self.gate_up_proj, groups.loads, True)
    gate_up = gate_up + self.gate_up_proj_bias[expert]
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    gate = gate.clamp(min=None, max=self.limit)
    up = up.clamp(min=-self.limit, max=self.limit)
    gated = (up + 1) * gate * torch.sigmoid(gate * self.alpha)
    outputs = _grouped_linear(gated, self.down_proj, groups.loads, True)
    outputs = (outputs + self.down_proj_bias[expert])[groups.inverse]
    weights = routing_weights.gather(1, router_indices)
    outputs = outputs * weights.reshape(-1, 1)
    return outputs.reshape(-1, num_selected, self.hidden_size).sum(1).reshape(shape)


@functools.cache
def _traceable(forward: Callable[..., Any]) -> Callable[..., Any] | None:
    """The same forward without Python numbers of the routing; None where it has none that is known.

    Routing differs between the models (softmax, shared experts, corrections), and is theirs.
    """
    try:
        source = textwrap.dedent(inspect.getsource(forward))
    except (OSError, TypeError):  # not written in a file
        return None
    if "self.experts[" not in source and _LOADS_IN_PYTHON not in source:
        return None
    tree = ast.parse(source)
    rewriter = _WithoutPythonRouting()
    tree = ast.fix_missing_locations(rewriter.visit(tree))
    if not rewriter.num_rewritten:
        return None
    code = forward.__code__
    ast.increment_lineno(tree, code.co_firstlineno - 1)
    names = {**forward.__globals__, _ROUTED: _routed}
    exec(compile(tree, code.co_filename, "exec"), names)
    return names[forward.__name__]


class _WithoutPythonRouting(ast.NodeTransformer):
    """Replaces the known loops, and leaves the loads of the experts tensors."""

    def __init__(self) -> None:
        self.num_rewritten = 0

    def visit_For(self, node: ast.For) -> ast.AST:
        if ast.unparse(node) not in _LOOPS:
            return self.generic_visit(node)
        self.num_rewritten += 1
        return ast.copy_location(ast.parse(_ROUTED_CALL).body[0], node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        if ast.unparse(node) != _LOADS_IN_PYTHON:
            return node
        self.num_rewritten += 1
        return None

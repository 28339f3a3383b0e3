"""Attention and its gradient as one node each, which torch runs: for long sequences.

As nodes of ONNX Runtime's, attention holds the softmax of every pair of tokens, twice. torch's
fused kernel (FlashAttention on CPUs) holds none, leaves out what a causal mask hides, and is the
faster from 1024 tokens on, in bf16 from 512. On shorter sequences its gradient is the slower one,
so attention stays with ONNX Runtime there. A graph that was built for long sequences computes short
ones by products and a softmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from ort_train.ortmodule.kernels.aten import BF16_SUFFIX
from ort_train.ortmodule.kernels.direct import direct

#: What the exporter writes, by whether there is a mask.
OPERATORS = {False: "ort_train::attention", True: "ort_train::masked_attention"}
GRADIENTS = {name: f"{name}_grad" for name in OPERATORS.values()}
#: What a mask shows, which is found out once a step for all layers.
KIND = "ort_train::mask_kind"
ALL, CAUSAL, OTHER = range(3)
#: By precision, from how many tokens on a graph leaves attention to torch.
_MIN_TOKENS = {"fp32": 1024, "bf16": 512}
#: From how many tokens on such a graph takes the fused kernel.
_MIN_FUSED_TOKENS = 256

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_gradient = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def is_faster(precision: str, tensors: Iterable[torch.Tensor]) -> bool:
    """Whether torch's is the faster attention for a batch, by its longest row of integers."""
    rows = (t.shape[-1] for t in tensors if t.dim() > 1 and not t.is_floating_point())
    return max(rows, default=0) >= _MIN_TOKENS[precision]


@direct(KIND)
def mask_kind(mask: torch.Tensor) -> torch.Tensor:
    """ALL, CAUSAL or OTHER, a number, of a mask (..., queries, keys), bool."""
    visible = mask.view(torch.bool)
    if bool(visible.all()):
        return torch.tensor(ALL)
    is_square = visible.dim() > 1 and visible.shape[-2] == visible.shape[-1]
    is_causal = is_square and bool((visible == _lower(*visible.shape[-2:])).all())
    return torch.tensor(CAUSAL if is_causal else OTHER)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor,
    kind: torch.Tensor | int,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(query · keyᵀ · scale + mask) · value; 0 for a query that sees no key.

    Products are of the inputs' type, fp32 or bf16, the softmax is fp32's.

    Args:
        query: (batch, heads, queries, size)
        key: (batch, heads, keys, size)
        value: (batch, heads, keys, value size)
        scale: a number.
        kind: ALL, CAUSAL (each query sees the keys up to its own position) or OTHER, a number.
        mask: for OTHER: what each query sees, bool, broadcast to (batch, heads, queries, keys).

    Returns:
        (batch, heads, queries, value size), and what the gradient needs: (batch, heads, queries,
        keys) the softmax, or (batch, heads, queries, 1) the logarithms of its denominators.
    """
    factor, shown = float(scale), _Shown(int(kind), mask)
    if _is_fused(query, key, value):
        output, denominators = _flash(
            query, key, value, 0.0, shown.is_causal, attn_mask=shown.bias(query), scale=factor
        )
        return shown.without_blind(output), denominators[..., None]
    scores = torch.matmul(query, key.mT).float().mul_(factor)
    hidden = shown.hidden(query, key)
    if hidden is not None:
        scores.masked_fill_(hidden, -math.inf)
    # A causal mask shows each query something; the safe one takes two passes more.
    softmax = torch._safe_softmax if hidden is not None and not shown.is_causal else torch.softmax
    weights = softmax(scores, -1)
    return torch.matmul(weights.to(value.dtype), value), weights


def attention_gradient(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor,
    kind: torch.Tensor | int,
    output: torch.Tensor,
    kept: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`attention` with respect to query, key and value.

    Args:
        grad: of the output, of its shape.
        query, key, value, scale, kind, mask: as they were.
        output, kept: what was returned.
    """
    factor, shown = float(scale), _Shown(int(kind), mask)
    if _is_fused(query, key, value):
        gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _flash_gradient(
            shown.without_blind(grad),
            query,
            key,
            value,
            output.to(query.dtype),
            kept[..., 0],
            0.0,
            shown.is_causal,
            attn_mask=shown.bias(query),
            scale=factor,
        )
        return gradients
    value_grad = torch.matmul(kept.to(grad.dtype).mT, grad)
    weights_grad = torch.matmul(grad, value.mT).float()
    scores_grad = torch._softmax_backward_data(weights_grad, kept, -1, torch.float32)
    rounded = scores_grad.mul_(factor).to(query.dtype)
    return torch.matmul(rounded, key), torch.matmul(rounded.mT, query), value_grad


class _Shown:
    """What queries see, in the forms that the kernels want."""

    def __init__(self, kind: int, mask: torch.Tensor | None):
        self.is_causal = kind == CAUSAL
        self._mask = mask if kind == OTHER else None

    def hidden(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
        """Where a query sees no key, or None where each sees all."""
        if self.is_causal:
            return _lower(query.shape[-2], key.shape[-2]).logical_not()
        return None if self._mask is None else self._mask.logical_not()

    def bias(self, query: torch.Tensor) -> torch.Tensor | None:
        """What is added to the scores: finite, so that a query that sees nothing makes no NaN."""
        if self._mask is None:
            return None
        lowest = torch.finfo(query.dtype).min
        bias = torch.zeros(self._mask.shape, dtype=query.dtype)
        return bias.masked_fill_(self._mask.logical_not(), lowest)

    def without_blind(self, tensor: torch.Tensor) -> torch.Tensor:
        """With 0 for queries that see no key."""
        if self._mask is None:
            return tensor
        sees = self._mask.any(-1, keepdim=True)
        return tensor if bool(sees.all()) else tensor * sees


def num_kept(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """Size of the last axis of what :func:`attention` returns for the gradient."""
    return 1 if _is_fused(query, key, value) else key.shape[-2]


def _is_fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    is_long = min(query.shape[-2], key.shape[-2]) >= _MIN_FUSED_TOKENS
    return is_long and query.shape[-1] == value.shape[-1]


def _lower(num_queries: int, num_keys: int) -> torch.Tensor:
    return torch.ones(num_queries, num_keys, dtype=torch.bool).tril()


def _define(name: str, suffix: str, dtype: torch.dtype) -> None:
    """The operators of this name, which hand on this type."""

    @direct(name + suffix)
    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output, kept = attention(*inputs[:5], *map(as_mask, inputs[5:]))
        return output.to(dtype), kept

    @direct(GRADIENTS[name] + suffix)
    def run_gradient(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gradients = attention_gradient(*inputs[:8], *map(as_mask, inputs[8:]))
        return tuple(gradient.to(dtype) for gradient in gradients)


for _name in OPERATORS.values():
    _define(_name, "", torch.float32)
    _define(_name, BF16_SUFFIX, torch.bfloat16)


def as_mask(mask: torch.Tensor) -> torch.Tensor:
    """A mask from a graph, of four axes.

    ONNX Runtime hands bool over as uint8; torch's kernel wants a mask of two or four axes.
    """
    return mask.view(torch.bool).reshape(*[1] * (4 - mask.dim()), *mask.shape)

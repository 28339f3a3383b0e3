"""Attention and its gradient as one node each, which torch runs.

As nodes of ONNX Runtime's, attention is up to twenty a layer, and holds the softmax of every pair
of tokens. torch's fused kernel (FlashAttention on CPUs) holds none, and on 512 tokens takes half the
time. On short sequences it takes more than products and a softmax do, in bf16 at 128 tokens twice as
much for the gradient, so those are computed here as products and a softmax.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ort_train.ortmodule import bf16_values
from ort_train.ortmodule.aten import direct

#: What the exporter writes, by whether there is a mask.
OPERATORS = {False: "ort_train::attention", True: "ort_train::masked_attention"}
GRADIENTS = {name: f"{name}_grad" for name in OPERATORS.values()}
#: From so many tokens on, torch's fused kernel is the faster.
_MIN_FUSED_TOKENS = 256

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_gradient = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _is_fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    return (
        query.shape[-2] >= _MIN_FUSED_TOKENS
        and key.shape[-2] >= _MIN_FUSED_TOKENS
        and query.shape[-1] == value.shape[-1]
    )


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor,
    is_causal: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(query · keyᵀ · scale + mask) · value; 0 for a query that sees no key.

    Products are of the inputs' type, fp32 or bf16, the softmax is fp32's.

    Args:
        query: (batch, heads, queries, size)
        key: (batch, heads, keys, size)
        value: (batch, heads, keys, value size)
        scale: a number.
        is_causal: each query sees the keys up to its own position; then there is no mask.
        mask: bool, broadcast to (batch, heads, queries, keys): what each query sees.

    Returns:
        (batch, heads, queries, value size), and what the gradient needs: the softmax, or from
        _MIN_FUSED_TOKENS on the logarithm of its denominators (batch, heads, queries, 1).
    """
    factor, causal = float(scale), bool(is_causal)
    if _is_fused(query, key, value):
        bias = None if mask is None else _bias(mask, query.dtype)
        output, denominators = _flash(query, key, value, 0.0, causal, attn_mask=bias, scale=factor)
        return _seen(output, mask), denominators[..., None]
    scores = torch.matmul(query, key.mT).float().mul_(factor)
    visible = _causal(query, key) if causal else mask
    if visible is not None:
        scores.masked_fill_(visible.logical_not(), -math.inf)
    weights = torch._safe_softmax(scores, -1) if visible is not None else scores.softmax(-1)
    return torch.matmul(weights.to(value.dtype), value), weights


def attention_gradient(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor,
    is_causal: torch.Tensor,
    output: torch.Tensor,
    kept: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`attention` with respect to query, key and value.

    Args:
        grad: of the output.
        query: as they were, like what follows.
        key: ...
        value: ...
        scale: ...
        is_causal: ...
        output: what was returned first.
        kept: what was returned second.
        mask: as it was.
    """
    factor, causal = float(scale), bool(is_causal)
    if _is_fused(query, key, value):
        bias = None if mask is None else _bias(mask, query.dtype)
        gradients: Any = _flash_gradient(
            _seen(grad, mask).contiguous(),
            query,
            key,
            value,
            output.to(query.dtype),
            kept[..., 0],
            0.0,
            causal,
            attn_mask=bias,
            scale=factor,
        )
        return tuple(gradients)
    value_grad = torch.matmul(kept.to(grad.dtype).mT, grad)
    weights_grad = torch.matmul(grad, value.mT).float()
    scores_grad = torch._softmax_backward_data(weights_grad, kept, -1, torch.float32)
    rounded = scores_grad.mul_(factor).to(query.dtype)
    return torch.matmul(rounded, key), torch.matmul(rounded.mT, query), value_grad


def _define(name: str, suffix: str, dtype: torch.dtype) -> None:
    """The operators of this name, which hand on this type."""

    @direct(name + suffix)
    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output, kept = attention(*inputs[:5], *map(_as_bool, inputs[5:]))
        return output.to(dtype), kept

    @direct(GRADIENTS[name] + suffix)
    def run_gradient(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gradients = attention_gradient(*inputs[:8], *map(_as_bool, inputs[8:]))
        return tuple(gradient.to(dtype) for gradient in gradients)


for _name in OPERATORS.values():
    _define(_name, "", torch.float32)
    _define(_name, bf16_values.SUFFIX, torch.bfloat16)


def _as_bool(mask: torch.Tensor) -> torch.Tensor:
    """ONNX Runtime hands bool over as uint8; torch's kernel wants a mask of two or four axes."""
    return mask.view(torch.bool).reshape(*[1] * (4 - mask.dim()), *mask.shape)


def _bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores: finite, so that a query that sees nothing makes no NaN."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(
        mask.logical_not(), torch.finfo(dtype).min
    )


def _seen(tensor: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """With 0 for queries that see no key."""
    if mask is None:
        return tensor
    sees = mask.any(-1, keepdim=True)
    return tensor if bool(sees.all()) else tensor * sees


def _causal(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()

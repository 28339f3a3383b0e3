"""Scaled dot-product attention as ONNX nodes that ONNX Runtime can differentiate."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ort_train.ortmodule.export.nodes import (
    aten,
    constant,
    dtype_of,
    ints,
    is_none,
    onnx_type,
    scalar,
    sizes_of,
    typed,
    unsupported,
)
from ort_train.ortmodule.kernels import attention_kernels

_NAME = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    g: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    scale: Any = None,
    enable_gqa: Any = False,
) -> Any:
    """softmax(query · keyᵀ · scale + mask) · value, with dropout of the softmax.

    torch's own symbolic function (opset 14) drops nothing while training, knows no grouped heads,
    and takes the softmax of -inf, which makes the gradients of a row with no visible key NaN where
    torch's are 0. Source of the semantics: `torch.nn.functional.scaled_dot_product_attention`.
    """
    dtype = dtype_of(query)
    if constant(is_causal, "b", "is_causal") and not is_none(attn_mask):
        raise unsupported(_NAME, "both attn_mask and is_causal")
    if constant(enable_gqa, "b", "enable_gqa"):
        key, value = (_repeated_heads(g, tensor, query) for tensor in (key, value))
    if is_none(scale):
        scale = _default_scale(g, query, dtype)
    else:
        scale = g.op("Cast", scale, to_i=onnx_type(dtype))
    if _is_one_node(query, attn_mask, dropout_p):
        return _one_node(g, query, key, value, attn_mask, scale, is_causal)
    rank = _rank(query)
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    scores = g.op("MatMul", g.op("Mul", query, scale), g.op("Transpose", key, perm_i=swapped))
    if constant(is_causal, "b", "is_causal"):
        attn_mask = _causal_mask(g, query, key)
    has_mask = not is_none(attn_mask)
    if has_mask:
        bias, sees_nothing = _additive(g, attn_mask, dtype)
        scores = g.op("Add", scores, bias)
    weights = g.op("Softmax", scores, axis_i=-1)
    rate = constant(dropout_p, "f", "dropout_p")
    if rate > 0:
        is_training = scalar(g, True, torch.bool)
        ratio = scalar(g, rate, torch.float32)
        weights, _ = g.op("Dropout", weights, ratio, is_training, outputs=2)
    output = g.op("MatMul", weights, value)
    if has_mask:
        output = g.op("Where", sees_nothing, scalar(g, 0, dtype), output)
    return output


class _Export(NamedTuple):
    """How attention is exported.

    Attributes:
        is_one_node: torch runs it, where it can.
        is_asked_for: where it can't, that is an error.
        kinds: of the masks met so far, which layers share: by name, the value of its kind.
    """

    is_one_node: bool
    is_asked_for: bool
    kinds: dict[str, Any]


_export: contextvars.ContextVar[_Export] = contextvars.ContextVar("export")


@contextlib.contextmanager
def export_scope(library: str, is_faster: bool, is_free: bool) -> Iterator[None]:
    """Graphs that are exported within have attention by this library.

    Args:
        library: "onnxruntime", "torch" (attention_kernels.py), or "auto" for the faster one.
        is_faster: whether torch's is.
        is_free: whether "auto" may choose it.
    """
    is_asked_for = library == "torch"
    is_one_node = is_asked_for or (library == "auto" and is_faster and is_free)
    token = _export.set(_Export(is_one_node, is_asked_for, {}))
    try:
        yield
    finally:
        _export.reset(token)


def _is_one_node(query: Any, mask: Any, dropout_p: Any) -> bool:
    export = _export.get(_Export(False, False, {}))
    if not export.is_one_node:
        return False
    reasons = {
        "a type other than fp32": dtype_of(query) is not torch.float32,
        "other than four axes": _rank(query) != 4,
        "dropout": constant(dropout_p, "f", "dropout_p") > 0,
        "a mask that isn't bool": not (is_none(mask) or dtype_of(mask) is torch.bool),
    }
    reason = next((name for name, is_met in reasons.items() if is_met), None)
    if reason is not None and export.is_asked_for:
        raise unsupported(_NAME, f"{reason}, with attention='torch' (leave it at 'auto')")
    return reason is None


def _one_node(
    g: Any, query: Any, key: Any, value: Any, mask: Any, scale: Any, is_causal: Any
) -> Any:
    has_mask = not is_none(mask)
    kinds = _export.get().kinds
    if not has_mask:
        is_causal = constant(is_causal, "b", "is_causal")
        kind = scalar(
            g, attention_kernels.CAUSAL if is_causal else attention_kernels.ALL, torch.int64
        )
    elif (kind := kinds.get(mask.debugName())) is None:
        kind = aten(g, attention_kernels.KIND, mask)
        kind.setType(scalar(g, 0, torch.int64).type())
        kinds[mask.debugName()] = kind
    inputs = [query, key, value, scale, kind, *([mask] if has_mask else [])]
    output, kept = aten(g, attention_kernels.OPERATORS[has_mask], *inputs, outputs=2)
    typed(kept, query, [None] * 4)
    sizes, value_sizes = sizes_of(query), sizes_of(value)
    return typed(output, query, [*sizes[:3], value_sizes[3]] if sizes and value_sizes else None)


def _additive(g: Any, mask: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """A mask as finite terms to add, and which rows see no key: (…, queries, 1), bool."""
    lowest = scalar(g, torch.finfo(dtype).min, dtype)
    if dtype_of(mask) is torch.bool:
        is_visible = mask
        bias = g.op("Where", mask, scalar(g, 0, dtype), lowest)
    else:
        # A bias that is learned gets its gradient through Where; it has the mask's own shape.
        is_visible = g.op("GreaterOrEqual", mask, lowest)
        bias = g.op("Where", is_visible, mask, lowest)
    int32 = onnx_type(torch.int32)
    any_visible = g.op("ReduceMax", g.op("Cast", is_visible, to_i=int32), axes_i=[-1], keepdims_i=1)
    return bias, g.op("Equal", any_visible, scalar(g, 0, torch.int32))


def _causal_mask(g: Any, query: Any, key: Any) -> Any:
    """(queries, keys), bool: each query sees the keys up to its own position."""

    def length(tensor: Any) -> Any:
        return g.op("Slice", g.op("Shape", tensor), ints(g, -2), ints(g, -1))

    shape = g.op("Concat", length(query), length(key), axis_i=0)
    ones = g.op("ConstantOfShape", shape, value_t=torch.tensor([1.0]))
    return g.op("Cast", g.op("Trilu", ones, upper_i=0), to_i=onnx_type(torch.bool))


def _repeated_heads(g: Any, tensor: Any, query: Any) -> Any:
    """Keys or values (batch, heads, length, size) with each head repeated for its group."""
    if _rank(query) != 4:
        raise unsupported(_NAME, "enable_gqa and other than four axes")

    def size(of: Any, axis: int) -> Any:
        return g.op("Slice", g.op("Shape", of), ints(g, axis), ints(g, axis + 1))

    num_heads, num_key_heads = ((sizes_of(each) or [None, None])[1] for each in (query, tensor))
    if num_heads is None or num_key_heads is None:
        raise unsupported(_NAME, "enable_gqa and a number of heads that differs between batches")
    copies = g.op("Unsqueeze", tensor, ints(g, 2))
    num_copies = num_heads // num_key_heads
    if num_copies > 1:
        copies = g.op("Concat", *[copies] * num_copies, axis_i=2)
    shape = [size(tensor, 0), ints(g, num_heads), size(tensor, 2), size(tensor, 3)]
    return g.op("Reshape", copies, g.op("Concat", *shape, axis_i=0))


def _default_scale(g: Any, query: Any, dtype: torch.dtype) -> Any:
    """1 / sqrt(head size)."""
    sizes = sizes_of(query)
    if sizes and sizes[-1]:
        return scalar(g, 1 / math.sqrt(sizes[-1]), dtype)
    size = g.op("Slice", g.op("Shape", query), ints(g, -1), ints(g, 2**63 - 1))
    return g.op("Reciprocal", g.op("Sqrt", g.op("Cast", size, to_i=onnx_type(dtype))))


def _rank(tensor: Any) -> int:
    sizes = sizes_of(tensor)
    if sizes is None:
        raise unsupported(_NAME, "an input of unknown rank")
    return len(sizes)

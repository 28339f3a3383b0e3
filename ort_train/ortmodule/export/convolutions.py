"""Convolution and pooling, by torch: ONNX Runtime's gradients of them are wrong on CPUs.

Its ConvGrad returns other gradients for grouped weights, its AveragePoolGrad some of another shape,
and its MaxPoolGrad writes past its memory, which ends the process: torch_nodes.py has the poolings
that aren't here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ort_train.ortmodule.export.nodes import (
    aten,
    constant,
    ints,
    is_none,
    none,
    rank_of,
    sizes_of,
    typed,
    unsupported,
)


def _convolution(
    g: Any,
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: Any,
    output_padding: Any,
    groups: Any,
    *_flags: Any,
) -> Any:
    settings = (stride, padding, dilation, transposed, output_padding, groups)
    rank = rank_of(weight, "_convolution")
    output = aten(g, "convolution", input, weight, none(g), *settings)
    typed(output, input, [None] * rank)
    if is_none(bias):
        return output
    return g.op("Add", output, g.op("Reshape", bias, ints(g, 1, -1, *[1] * (rank - 2))))


def _convolution_mode(
    g: Any,
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
) -> Any:
    """With padding="same" or "valid"."""
    num_axes = rank_of(weight, "_convolution_mode") - 2
    sides = [0] * num_axes
    if constant(padding, "s", "padding") == "same":
        kernel = (sizes_of(weight) or [])[2:]
        if None in kernel:
            raise unsupported("_convolution_mode", "padding='same' and a kernel of unknown size")
        steps = constant(dilation, "is", "dilation")
        totals = [step * ((size or 1) - 1) for step, size in zip(steps, kernel, strict=True)]
        sides = [total // 2 for total in totals]
        odd = [total % 2 for total in totals]
        if any(odd):  # torch, too, pads the end by one more
            sizes = sizes_of(input)
            padded = g.op("Pad", input, ints(g, *[0] * (num_axes + 4), *odd))
            unknown = [None] * num_axes
            input = typed(padded, input, None if sizes is None else [*sizes[:2], *unknown])
    not_transposed = g.op("Constant", value_t=torch.tensor(False))
    output_padding = ints(g, *[0] * num_axes)
    settings = (stride, ints(g, *sides), dilation, not_transposed, output_padding, groups)
    return _convolution(g, input, weight, bias, *settings)


def _with_plane(g: Any, input: Any, pool: Callable[[Any], Any], name: str) -> Any:
    """Pooling over one axis, by torch's over two."""
    sizes, axis = sizes_of(input), 2
    if rank_of(input, name) != axis + 1:
        raise unsupported(name, "an input without an axis of the batch")
    plane = g.op("Unsqueeze", input, ints(g, axis))
    typed(plane, input, None if sizes is None else [*sizes[:-1], 1, sizes[-1]])
    output = g.op("Squeeze", pool(plane), ints(g, axis))
    return typed(output, input, None if sizes is None else [*sizes[:-1], None])


def _sides(g: Any, first: int, *settings: Any) -> list[Any]:
    """A pooling's settings for two axes, of which the first has one entry."""
    return [ints(g, first, *constant(each, "is", "a size of pooling")) for each in settings]


def _max_pool1d(
    g: Any, self: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any
) -> Any:
    kernels, strides, dilations = _sides(g, 1, kernel, _stride(stride, kernel), dilation)
    settings = (kernels, strides, *_sides(g, 0, padding), dilations, ceil_mode)

    def pool(plane: Any) -> Any:
        return aten(g, "max_pool2d_with_indices", plane, *settings, outputs=2)[0]

    return _with_plane(g, self, pool, "max_pool1d")


def _avg_pool1d(
    g: Any, self: Any, kernel: Any, stride: Any, padding: Any, ceil_mode: Any, with_padding: Any
) -> Any:
    kernels, strides = _sides(g, 1, kernel, _stride(stride, kernel))
    settings = (kernels, strides, *_sides(g, 0, padding), ceil_mode, with_padding, none(g))
    return _with_plane(g, self, lambda plane: aten(g, "avg_pool2d", plane, *settings), "avg_pool1d")


def _stride(stride: Any, kernel: Any) -> Any:
    return stride if constant(stride, "is", "stride") else kernel


#: By the name of the operator.
SYMBOLICS: dict[str, Callable[..., Any]] = {
    "_convolution": _convolution,
    "_convolution_mode": _convolution_mode,
    "max_pool1d": _max_pool1d,
    "avg_pool1d": _avg_pool1d,
}

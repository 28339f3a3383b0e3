"""Torch operators of our own, run inside ONNX Runtime's graph through the ATen executor."""

from __future__ import annotations

import torch


def _groups(offsets: torch.Tensor) -> list[tuple[int, int]]:
    """(start, end) of each group's rows, from the cumulative counts."""
    ends = offsets.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


@torch.library.custom_op("ort_train::grouped_linear", mutates_args=())
def grouped_linear(
    input: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, is_transposed: bool
) -> torch.Tensor:
    """A linear layer per group of rows.

    Args:
        input: (rows, in), sorted by group; rows after the last group give zeros.
        weight: (groups, out, in), or (groups, in, out) if `is_transposed`.
        offsets: (groups,) end of each group's rows.
        is_transposed: the layout of `weight`.

    Returns:
        (rows, out)
    """
    weight = weight if is_transposed else weight.mT
    output = input.new_zeros(input.shape[0], weight.shape[2])
    for group, (start, end) in enumerate(_groups(offsets)):
        torch.mm(input[start:end], weight[group], out=output[start:end])
    return output


@torch.library.custom_op("ort_train::grouped_linear_input_grad", mutates_args=())
def grouped_linear_input_grad(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    is_transposed: bool,
) -> torch.Tensor:
    """Gradient of :func:`grouped_linear` with respect to its input."""
    return grouped_linear(grad, weight, offsets, not is_transposed)


@torch.library.custom_op("ort_train::grouped_linear_weight_grad", mutates_args=())
def grouped_linear_weight_grad(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    is_transposed: bool,
) -> torch.Tensor:
    """Gradient of :func:`grouped_linear` with respect to its weight."""
    left, right = (input, grad) if is_transposed else (grad, input)
    result = torch.zeros_like(weight)
    for group, (start, end) in enumerate(_groups(offsets)):
        torch.mm(left[start:end].mT, right[start:end], out=result[group])
    return result


@torch.library.custom_op("ort_train::convolution_input_grad", mutates_args=())
def convolution_input_grad(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> torch.Tensor:
    """Gradient of a convolution with respect to its input."""
    settings = (stride, padding, dilation, transposed, output_padding, groups)
    return torch.ops.aten.convolution_backward(
        grad, input, weight, None, *settings, [True, False, False]
    )[0]


@torch.library.custom_op("ort_train::convolution_weight_grad", mutates_args=())
def convolution_weight_grad(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> torch.Tensor:
    """Gradient of a convolution with respect to its weight."""
    settings = (stride, padding, dilation, transposed, output_padding, groups)
    return torch.ops.aten.convolution_backward(
        grad, input, weight, None, *settings, [False, True, False]
    )[1]

"""Torch operators of our own, run inside ONNX Runtime's graph through the ATen executor."""

from __future__ import annotations

import math

import torch

from ort_train.ortmodule.kernels.direct import direct


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


@torch.library.custom_op("ort_train::split_groups", mutates_args=())
def split_groups(input: torch.Tensor, sizes: torch.Tensor, num_groups: int) -> list[torch.Tensor]:
    """Rows in groups whose sizes are known to the graph alone; ONNX's Split.

    Args:
        input: (rows, width), sorted by group.
        sizes: (groups,) how many rows each group has, int64.
        num_groups: how many there are.

    Returns:
        (sizes[i], width) for each group i.
    """
    return [part.clone() for part in input.split(sizes.tolist())]


@torch.library.custom_op("ort_train::index_sum", mutates_args=())
def index_sum(
    source: torch.Tensor, dim: int, index: torch.Tensor, like: torch.Tensor
) -> torch.Tensor:
    """Zeros with the shape of `like`, to which the slices of `source` are added at `index`.

    Its gradient with respect to `source` is `torch.index_select`.
    """
    return torch.zeros_like(like, dtype=source.dtype).index_add(dim, index, source)


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


# --- Rows: chosen tokens of a batch (rows.py)

PACK_ROWS, UNPACK_ROWS = "ort_train::pack_rows", "ort_train::unpack_rows"


@torch.library.custom_op(PACK_ROWS, mutates_args=())
def pack_rows(input: torch.Tensor, rows: torch.Tensor, grid: list[int]) -> torch.Tensor:
    """Chosen rows of a tensor; its gradient is :func:`unpack_rows`.

    All rows are copied in one piece. They can't be returned as they are: ONNX Runtime, which
    doesn't know that the two share memory, would give the input's to another tensor.

    Args:
        input: (*grid, ...).
        rows: (N,) indices into the flattened grid, ascending, each once.
        grid: [B, T] or [B·T].

    Returns:
        (1, N, ...) for a grid of two axes, (N, ...) for one.
    """
    return _packed(input, rows, grid)


def _packed(input: torch.Tensor, rows: torch.Tensor, grid: list[int]) -> torch.Tensor:
    flat = input.flatten(0, len(grid) - 1)
    if rows.numel() == flat.shape[0]:
        chosen = flat.clone()
    elif flat.dim() > 1:
        matrix = flat.flatten(1)  # of which torch.embedding takes rows on all cores
        chosen = torch.embedding(matrix, rows).view(-1, *flat.shape[1:])
    else:
        chosen = flat.index_select(0, rows)
    return chosen if len(grid) == 1 else chosen.unsqueeze(0)


@torch.library.custom_op(UNPACK_ROWS, mutates_args=())
def unpack_rows(input: torch.Tensor, rows: torch.Tensor, grid: list[int]) -> torch.Tensor:
    """Chosen rows at their places in a tensor (*grid, ...) that is zero elsewhere."""
    return _unpacked(input, rows, grid)


def _unpacked(input: torch.Tensor, rows: torch.Tensor, grid: list[int]) -> torch.Tensor:
    chosen = input.flatten(0, len(grid) - 1)
    if rows.numel() == math.prod(grid):
        return chosen.clone().view(*grid, *chosen.shape[1:])
    output = chosen.new_zeros(math.prod(grid), *chosen.shape[1:])
    return output.index_copy_(0, rows, chosen).view(*grid, *chosen.shape[1:])


# In a graph they run without torch's dispatcher, which takes twice as long as they do.
@direct(PACK_ROWS, numbers=[2])
def _run_pack_rows(input: torch.Tensor, rows: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    return _packed(input, rows, grid.tolist())


@direct(UNPACK_ROWS, numbers=[2])
def _run_unpack_rows(input: torch.Tensor, rows: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    return _unpacked(input, rows, grid.tolist())


def _shown(mask: torch.Tensor) -> torch.Tensor:
    """An attention mask's tokens that aren't padding.

    Args:
        mask: (B, T); or (B, heads, T, T) of what each token sees, where padding sees and is seen by
            no token.

    Returns:
        (B, T)
    """
    mask = mask.bool()
    return mask if mask.ndim != 4 else (mask.any(-1) | mask.any(-2)).any(1)


@torch.library.custom_op("ort_train::rows_where", mutates_args=())
def rows_where(mask: torch.Tensor) -> torch.Tensor:
    """Flat indices at which a mask is set, ascending; of the tokens that an attention mask shows.

    Never empty, as some kernels of ONNX Runtime fail on empty tensors: row 0 stands in, which a
    loss then ignores by its label.
    """
    rows = _shown(mask).flatten().nonzero().squeeze(1)
    return rows if rows.numel() else rows.new_zeros(1)


@torch.library.custom_op("ort_train::kept_rows", mutates_args=())
def kept_rows(mask: torch.Tensor, labels: torch.Tensor, with_samples: bool) -> torch.Tensor:
    """Rows of tokens that aren't padding or whose label counts, ascending.

    Args:
        mask: see `_shown`.
        labels: (L,) flat indices of the tokens whose label counts.
        with_samples: keep all of a sample that has a label on its padding.
    """
    kept = _shown(mask).clone()
    if with_samples:
        on_padding = labels[~kept.flatten()[labels]]
        kept[on_padding // kept.shape[1]] = True
    kept.view(-1)[labels] = True
    return kept.flatten().nonzero().squeeze(1)


@torch.library.custom_op("ort_train::row_positions", mutates_args=())
def row_positions(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Where each of the wanted rows stands in `rows`, both ascending."""
    return torch.searchsorted(rows, wanted).clamp_(max=rows.numel() - 1)


@torch.library.custom_op("ort_train::unsliced_rows", mutates_args=())
def unsliced_rows(rows: torch.Tensor, num_rows: int, grid: list[int], start: int) -> torch.Tensor:
    """Rows of x[:, start:...], which has `num_rows` of them, as rows of x, of grid [B, T]."""
    length = num_rows // grid[0]
    return rows // length * grid[1] + rows % length + start

"""Attention over each sample's own tokens, and its gradient, as one node each, which torch runs.

Where padding is left out (padding.py), queries, keys and values hold the kept tokens of all
samples, one sample after the other. Each sample is then computed by itself (attention_kernels.py),
without ever being padded: its cost grows with the square of its own number of tokens, and no
padding can mix into it. Samples that stand side by side, of one length and with one kind of mask,
are computed together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ort_train.ortmodule.kernels import attention_kernels as kernels
from ort_train.ortmodule.kernels.aten import BF16_SUFFIX
from ort_train.ortmodule.kernels.direct import direct

#: What padding.py writes in place of `attention_kernels.OPERATORS[True]`.
OPERATOR = "ort_train::packed_attention"
GRADIENT = f"{OPERATOR}_grad"
#: Which samples are computed together, which is found out once a step for all layers of one mask.
RUNS = "ort_train::attention_runs"


class _Run(NamedTuple):
    """Samples that are computed together.

    Attributes:
        start, end: their kept tokens, among those of the batch.
        num_samples: of one length each.
        kind: what each of them sees: `attention_kernels.ALL`, CAUSAL or OTHER (then it is one).
    """

    start: int
    end: int
    num_samples: int
    kind: int


@direct(RUNS)
def find_runs(mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The runs (R, 4), int64, each as a :class:`_Run`.

    Args:
        mask: (B, 1 or heads, 1 or T, T) what each query sees, bool.
        rows: (N,) kept tokens, as flat indices into (B, T), ascending.
    """
    mask = kernels.as_mask(mask)
    counts = (rows // mask.shape[-1]).unique_consecutive(return_counts=True)[1]
    runs: list[_Run] = []
    start = 0
    for count in counts.tolist():
        end = start + count
        kind = int(kernels.mask_kind(_sample_mask(mask, rows[start:end])))
        last = runs[-1] if runs else None
        if (
            last is not None
            and last.kind == kind != kernels.OTHER
            and last.end - last.start == last.num_samples * count
        ):
            runs[-1] = _Run(last.start, end, last.num_samples + 1, kind)
        else:
            runs.append(_Run(start, end, 1, kind))
        start = end
    return torch.tensor(runs)


def _sample_mask(mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """What the kept tokens of one sample see of each other: (1, 1 or heads, 1 or n, n)."""
    length = mask.shape[-1]
    sample = int(rows[0]) // length
    places = rows - sample * length
    shown = mask[sample : sample + 1].index_select(3, places)
    return shown if shown.shape[2] == 1 else shown.index_select(2, places)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor,
    runs: torch.Tensor,
    mask: torch.Tensor,
    rows: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`attention_kernels.attention` of each sample by itself.

    Args:
        query: (1, heads, N, size), of the kept tokens.
        key: (1, key heads, N, size); each is for heads / key heads of the queries'.
        value: (1, key heads, N, value size)
        scale: a number.
        runs: of :func:`find_runs`.
        mask, rows: what they were found of.

    Returns:
        (1, heads, N, value size), and what the gradient needs, flat.
    """
    num_heads = query.shape[1]
    output = value.new_empty(num_heads, *value.shape[2:])
    kept = []
    for run, sample_mask in _each(runs, mask, rows):
        q, k, v = (_part(tensor, run, num_heads) for tensor in (query, key, value))
        result, for_gradient = kernels.attention(q, k, v, scale, run.kind, sample_mask)
        output[:, run.start : run.end] = result.flatten(1, 2)
        kept.append(for_gradient.reshape(-1))
    return output[None], kept[0] if len(kept) == 1 else torch.cat(kept)


def attention_gradient(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor,
    runs: torch.Tensor,
    output: torch.Tensor,
    kept: torch.Tensor,
    mask: torch.Tensor,
    rows: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`attention` with respect to query, key and value.

    Args:
        grad: of the output, of its shape.
        query, key, value, scale, runs, mask, rows: as they were.
        output, kept: what was returned.
    """
    num_heads = query.shape[1]
    inputs = (query, key, value)
    gradients = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in inputs]
    start = 0
    for run, sample_mask in _each(runs, mask, rows):
        q, k, v, g, out = (_part(tensor, run, num_heads) for tensor in (*inputs, grad, output))
        shape = (*out.shape[:-1], kernels.num_kept(q, k, v))
        for_gradient = kept[start : start + shape[0] * (run.end - run.start) * shape[-1]]
        start += for_gradient.numel()
        found = kernels.attention_gradient(
            g, q, k, v, scale, run.kind, out, for_gradient.view(shape), sample_mask
        )
        for gradient, part in zip(gradients, found, strict=True):
            of_heads = part.flatten(1, 2)
            if num_heads != gradient.shape[1]:
                of_heads = of_heads.unflatten(0, (gradient.shape[1], -1)).sum(1)
            gradient[0, :, run.start : run.end] = of_heads
    query_grad, key_grad, value_grad = gradients
    return query_grad, key_grad, value_grad


def _each(
    runs: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor
) -> Iterator[tuple[_Run, torch.Tensor | None]]:
    """The runs, with a mask where it is neither of the usual ones: (heads or 1, 1, ...)."""
    mask = kernels.as_mask(mask)
    for run in map(_Run._make, runs.tolist()):
        if run.kind == kernels.OTHER:
            yield run, _sample_mask(mask, rows[run.start : run.end]).transpose(0, 1)
        else:
            yield run, None


def _part(tensor: torch.Tensor, run: _Run, num_heads: int) -> torch.Tensor:
    """Of a tensor (1, heads, N, size) the samples of a run: (heads, samples, n, size).

    In this order it is a view, which products take as it is where the run is all of the batch.
    """
    part = tensor[0, :, run.start : run.end].unflatten(1, (run.num_samples, -1))
    if num_heads == part.shape[0]:
        return part
    return part.repeat_interleave(num_heads // part.shape[0], 0)


def _define(suffix: str, dtype: torch.dtype) -> None:
    """The operators that hand on this type."""

    @direct(OPERATOR + suffix)
    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output, kept = attention(*inputs)
        return output.to(dtype), kept

    @direct(GRADIENT + suffix)
    def run_gradient(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(gradient.to(dtype) for gradient in attention_gradient(*inputs))


_define("", torch.float32)
_define(BF16_SUFFIX, torch.bfloat16)

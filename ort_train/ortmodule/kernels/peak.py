"""How fast this processor multiplies large matrices: what a graph's products are measured by."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from ort_train.ortmodule.kernels import onednn

#: Of the square matrices: 12 to 36 MiB each in fp32, so that no product fits a cache whole, and
#: getting started takes next to nothing.
_SIDES = 2048, 3072
#: How long to repeat them.
_SECONDS = 1.5
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def peak_gflops(precision: str, sides: Sequence[int] = _SIDES, seconds: float = _SECONDS) -> float:
    """The best speed of a product of square matrices, in 10^9 FLOPs per second.

    On as many threads as torch has, by torch's own choice of library (oneDNN in bf16, mostly MKL in
    fp32), and in fp32 by oneDNN as well where it can.

    Args:
        precision: of the factors and the result, "fp32" or "bf16".
        sides: of the matrices, each tried in turn.
        seconds: to go on for; every side is tried once at least.
    """
    multiply: list[Callable[..., torch.Tensor]] = [torch.mm]
    if precision == "fp32" and onednn.unavailable_reason() is None:
        multiply.append(onednn.product)
    matrices = [torch.randn(3, side, side).to(_DTYPES[precision]) for side in sides]
    best, ends = 0.0, time.perf_counter() + seconds
    while not best or time.perf_counter() < ends:
        for a, b, out in matrices:
            for function in multiply:
                started = time.perf_counter()
                function(a, b, out=out)
                taken_s = time.perf_counter() - started
                best = max(best, 2 * len(a) ** 3 / taken_s / 1e9)
    return best

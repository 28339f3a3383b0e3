"""Matrix products by oneDNN, which torch carries but leaves aside for fp32.

On CPUs with AVX-512 that aren't Intel's, torch's own choice for fp32 (MKL) and ONNX Runtime's
kernels (MLAS) reach two thirds of oneDNN's speed. torch takes oneDNN for products of fp32 matrices
where it may round their factors to bf16 (`torch.backends.mkldnn.matmul.fp32_precision`,
`use_mkldnn_matmul` in `aten/src/ATen/native/mkldnn/Matmul.cpp`). oneDNN makes use of that
permission on CPUs with AMX only. Elsewhere the product is a full fp32 one:
:func:`unavailable_reason` looks at the numbers before anything relies on it.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

#: Of a product of 512 x 512, against float64: fp32 accumulation gives 3e-7 to 5e-7, factors rounded
#: to bf16 3e-3, to tf32 4e-4.
_MAX_RELATIVE_ERROR = 3e-6


#: What stands behind `torch.backends.mkldnn.matmul.fp32_precision`, whose way through Python's
#: classes takes as long as a small product.
_precision = functools.partial(
    getattr(torch._C, "_get_fp32_precision_getter", str), "mkldnn", "matmul"
)
_set_precision = functools.partial(
    getattr(torch._C, "_set_fp32_precision_setter", str), "mkldnn", "matmul"
)


def preferred(multiply: Callable[..., torch.Tensor], *factors: Any, **options: Any) -> torch.Tensor:
    """What a function of torch returns whose products of fp32 matrices go to oneDNN, where it can
    make them, and elsewhere to what torch likes."""
    if unavailable_reason() is not None:
        return multiply(*factors, **options)
    return _forced(multiply, *factors, **options)


def _forced(multiply: Callable[..., torch.Tensor], *factors: Any, **options: Any) -> torch.Tensor:
    before = _precision()
    _set_precision("bf16")
    try:
        return multiply(*factors, **options)
    finally:
        _set_precision(before)


@functools.cache
def unavailable_reason() -> str | None:
    """Why oneDNN can't make the fp32 products of this machine, or None."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if not hasattr(torch._C, "_set_fp32_precision_setter"):
        return f"torch {torch.__version__} can't be told to take oneDNN: 2.9 or newer can"
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return f"the CPU has no AVX-512 ({torch.backends.cpu.get_cpu_capability()})"
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    error = float((_forced(torch.mm, a, b) - exact).norm() / exact.norm())
    if error > _MAX_RELATIVE_ERROR:
        return f"its fp32 products are rounded here (relative error {error:.1e})"
    return None


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """a · b + bias, fp32.

    Args:
        a: (M, K), any strides.
        b: (K, N), any strides.
        bias: (N,) or (M, N)
        out: (M, N), written to where given.

    Returns:
        (M, N)
    """
    if bias is None:
        return preferred(torch.mm, a, b, out=out)
    return preferred(torch.addmm, bias, a, b, out=out)


#: Why bf16 isn't worth asking for on a CPU that doesn't multiply in it.
NO_BF16 = "this CPU has no bf16 products in hardware (AVX-512 BF16 or AMX)"


def has_bf16() -> bool:
    """Whether this CPU multiplies in bf16 (AVX-512 BF16 or AMX)."""
    features = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in features)


def slow_bf16() -> str | None:
    """In words, what bf16 costs on a CPU that doesn't multiply in it, measured here, or None."""
    if has_bf16():
        return None
    return f"{NO_BF16}: one takes {bf16_price():.1f} times as long as in fp32"


@functools.cache
def bf16_price() -> float:
    """How many times as long as in fp32 a product of 512 x 512 takes in bf16, measured here."""
    a, b = torch.randn(2, 512, 512)
    factors = {"fp32": (a, b), "bf16": (a.bfloat16(), b.bfloat16())}
    times: dict[str, list[float]] = {name: [] for name in factors}
    for _ in range(7):  # interleaved; the first warms up
        for name, (left, right) in factors.items():
            started = time.perf_counter()
            torch.mm(left, right)
            times[name].append(time.perf_counter() - started)
    return statistics.median(times["bf16"][1:]) / statistics.median(times["fp32"][1:])

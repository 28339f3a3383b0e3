"""Where a training graph's time goes: ONNX Runtime's own profile, summed by kinds of kernels, and
how fast its matrix products are.

The time of a kernel that torch runs includes the way to Python and back. That of a product includes
its bias, and in bf16 that its result is widened to fp32, where it is handed on so
(product_kernels.py); its factors are rounded or decoded by kernels of other kinds. A product that
stays fp32 in a graph in bf16, as one of a small matrix does, counts among the others.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ort_train.forward import taken_over
from ort_train.ortmodule.kernels import product_kernels
from ort_train.ortmodule.kernels.aten import operator_name

_SUFFIX = "_kernel_time"
PRODUCTS = "matrix_products"
_OURS, _OURS_BATCHED = product_kernels.PRODUCTS, product_kernels.BATCHED_PRODUCTS
#: Kinds of kernels by what their operators are called; the first that matches.
_KINDS = {
    PRODUCTS: "|".join(
        ["(MatMul|FusedMatMul|Gemm|FusedGemm)$", *_OURS.values(), *_OURS_BATCHED.values()]
    ),
    "norms": r".*(LayerNorm|LayerNormalization|BatchNorm|layer_norm|rms_norm)",
    "loss": r".*(CrossEntropy|cross_entropy|NegativeLogLikelihood)",
    "softmax": r".*Softmax",
    "activations": r"(.*[GgRr]elu|Sigmoid|Tanh|Erf|.*Silu)",
    "embedding": r".*embedding",
    "rounding": rf"{product_kernels.ROUND}$|Cast$",
    "decoding": r"ort_train::.*(decode|4bit)",
    "copies": (
        r"(Transpose|Reshape|(Uns|S)queeze|Concat|Split|Slice|Gather|Scatter|Expand|Pad|Flatten"
        r"|Identity|Tile|Shape)"
    ),
    "elementwise": r"(Add|Sub|Mul|Div|Neg|Pow|Sqrt|Sum|Where|Exp|Log|.*Dropout)",
}
OTHER, OUTSIDE = "other_kernels", "outside_kernels"
#: Of the shares, in the order in which they are shown.
KINDS = (*_KINDS, OTHER, OUTSIDE)


def kind_of(operator: str) -> str:
    """The kind of an ONNX operator, or of one that torch runs (`aten::...`, `ort_train::...`)."""
    return next((kind for kind, pattern in _KINDS.items() if re.match(pattern, operator)), OTHER)


class Kernel(NamedTuple):
    """What one node of a graph takes in one of the profiled steps.

    Attributes:
        operator: of ONNX, or one that torch runs.
        seconds: median of the steps.
        flops: additions and multiplications of a matrix product, median of the steps; 0 of others.
    """

    operator: str
    seconds: float
    flops: float


def end(module: torch.nn.Module, num_steps: int) -> list[Kernel]:
    """The kernels of the steps that a module ran last.

    Profiling ends with it; the file stays.

    Args:
        module: wrapped with backend "ort" and OrtOptions.profile_prefix, which has run at least
            these steps, all by one graph.
        num_steps: how many steps count.
    """
    stand_in: Any = taken_over(module)
    (engine,) = stand_in.runner.ort.engines.values()
    path, graph = engine.end_profiling()
    events = json.loads(path.read_text(encoding="utf-8"))
    return _kernels(events, _torch_operators(graph), num_steps)


def shares(kernels: Iterable[Kernel], forward_backward_s: float) -> dict[str, float]:
    """What a step spends its forward and backward on.

    Args:
        forward_backward_s: of the step, in seconds.

    Returns:
        Share of the time by kind; those of kernels, and what is spent outside of any. They sum
        to 1.
    """
    found = {kind: 0.0 for kind in KINDS if kind != OUTSIDE}
    for kernel in kernels:
        found[kind_of(kernel.operator)] += kernel.seconds / forward_backward_s
    return {**found, OUTSIDE: 1 - sum(found.values())}


def products_gflops(kernels: Iterable[Kernel]) -> float | None:
    """Of all matrix products together, 10^9 FLOPs per second of their kernels; None without any."""
    products = [kernel for kernel in kernels if kind_of(kernel.operator) == PRODUCTS]
    seconds = sum(kernel.seconds for kernel in products)
    return sum(kernel.flops for kernel in products) / seconds / 1e9 if seconds else None


def product_flops(a: Sequence[int], b: Sequence[int], output: Sequence[int]) -> int:
    """Additions and multiplications of a product, 2·M·N·K for each (M, K) · (K, N), by its sizes.

    Which factors are transposed isn't asked for, as a profile doesn't say.

    Args:
        a: sizes of the left factor: (..., M, K), or (..., K, M) if it is transposed first.
        b: of the right one, likewise; leading axes are broadcast.
        output: (..., M, N). Where one of the three has less than three axes, leading axes of the
            others are part of M, N or K: rows of a matrix, or what is summed over.

    Raises:
        ValueError: where no factors of these sizes have a product of that size.
    """
    num_entries = math.prod(output)
    if min(len(a), len(b), len(output)) < 3:
        # M·K, K·N and M·N multiplied are the square of M·N·K.
        entries = math.prod(a) * math.prod(b) * num_entries
        size = math.isqrt(entries)
        if size * size == entries:
            return 2 * size
    elif not num_entries:
        return 0
    else:
        rows, columns = output[-2:]
        # FusedMatMul can have been given M or K as the first axis (its transBatchA, transBatchB).
        for axis in (-2, 0):
            inner, rest = divmod(a[axis] * a[-1], rows)
            if not rest and inner * columns == b[axis] * b[-1]:
                return 2 * num_entries * inner
    raise ValueError(f"{list(a)} · {list(b)} doesn't make {list(output)}")


def _torch_operators(graph: Any) -> dict[str, str]:
    """What torch runs, by the name of its node."""
    return {node.name: operator_name(node) for node in graph.node if node.op_type == "ATen"}


def _kernels(
    events: Iterable[Mapping[str, Any]], torch_operators: Mapping[str, str], num_steps: int
) -> list[Kernel]:
    """The kernels of one of the last steps, with medians, as a disturbance of the machine lengthens
    few of them.

    Args:
        events: of ONNX Runtime's profile, in the order of time; durations in microseconds.
    """
    runs: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith(_SUFFIX):
            continue
        name = event["name"].removesuffix(_SUFFIX)
        operator = torch_operators.get(name, event["args"]["op_name"])
        # By index, as names need not be unique.
        runs[operator, event["args"]["node_index"]].append(event)
    return [_kernel(operator, run[-num_steps:]) for (operator, _), run in runs.items()]


def _kernel(operator: str, run: Sequence[Mapping[str, Any]]) -> Kernel:
    """A node's, of its events."""
    is_product = kind_of(operator) == PRODUCTS
    flops = statistics.median(map(_flops, run)) if is_product else 0
    return Kernel(operator, statistics.median(event["dur"] for event in run) / 1e6, flops)


def _flops(event: Mapping[str, Any]) -> int:
    """Of a product's event."""
    arguments = event["args"]
    # Each is {type: sizes}; what follows the factors is a bias.
    a, b, *_ = (sizes for each in arguments["input_type_shape"] for sizes in each.values())
    (output,) = (sizes for each in arguments["output_type_shape"] for sizes in each.values())
    return product_flops(a, b, output)

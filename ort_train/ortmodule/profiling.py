"""Where a training graph's time goes: ONNX Runtime's own profile, summed by kinds of kernels."""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ort_train.forward import taken_over

_SUFFIX = "_kernel_time"
#: Kinds of kernels by what their operators are called; the first that matches.
_KINDS = {
    "matrix_products": r"(MatMul|FusedMatMul|Gemm|FusedGemm)$|ort_train::(batched_)?product_",
    "norms": r".*(LayerNorm|LayerNormalization|BatchNorm|layer_norm|rms_norm)",
    "loss": r".*(CrossEntropy|cross_entropy|NegativeLogLikelihood)",
    "softmax": r".*Softmax",
    "activations": r"(.*[GgRr]elu|Sigmoid|Tanh|Erf|.*Silu)",
    "embedding": r".*embedding",
    "rounding": r"ort_train::to_bf16$|Cast$",
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


def shares(module: torch.nn.Module, step_s: Iterable[float]) -> dict[str, float]:
    """What the steps that a module ran last spent their forward and backward on.

    Profiling ends with it; the file stays.

    Args:
        module: wrapped with backend "ort" and OrtOptions.profile_prefix, which has run at least
            these steps, all by one graph.
        step_s: each step's forward and backward, in seconds.

    Returns:
        Share of the time by kind; those of kernels, and what is spent outside of any. They sum
        to 1.
    """
    step_s = list(step_s)
    stand_in: Any = taken_over(module)
    forward = stand_in.runner._original
    (engine,) = forward.engines.values()
    path, graph = engine.end_profiling()
    events = json.loads(path.read_text(encoding="utf-8"))
    seconds = _seconds_by_kind(events, _torch_operators(graph), len(step_s))
    total = statistics.median(step_s)
    found = {kind: seconds.get(kind, 0.0) / total for kind in KINDS if kind != OUTSIDE}
    return {**found, OUTSIDE: 1 - sum(found.values())}


def _torch_operators(graph: Any) -> dict[str, str]:
    """What torch runs, by the name of its node."""
    return {
        node.name: next(a.s.decode() for a in node.attribute if a.name == "operator")
        for node in graph.node
        if node.op_type == "ATen"
    }


def _seconds_by_kind(
    events: Iterable[Mapping[str, Any]], torch_operators: Mapping[str, str], num_steps: int
) -> dict[str, float]:
    """Time of kernels in one of the last steps: each kernel's median, as a disturbance of the
    machine lengthens few of them.

    Args:
        events: of ONNX Runtime's profile, in the order of time; durations in microseconds.
    """
    runs: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith(_SUFFIX):
            continue
        name = event["name"].removesuffix(_SUFFIX)
        operator = torch_operators.get(name, event["args"]["op_name"])
        # By index, as names need not be unique.
        runs[operator, event["args"]["node_index"]].append(event["dur"] / 1e6)
    seconds: dict[str, float] = defaultdict(float)
    for (operator, _), durations in runs.items():
        seconds[kind_of(operator)] += statistics.median(durations[-num_steps:])
    return seconds

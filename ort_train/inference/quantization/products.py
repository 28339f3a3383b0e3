"""Products of activations with weights, and how far a weight is from what is stored for it."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ort_train.errors import ModelError

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

# Rows of a weight that are quantized at a time.
_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Product:
    """A product of an activation with a weight.

    Attributes:
        by_outputs: whether the weight is (outputs, inputs) rather than (inputs, outputs).
        bias: of a Gemm.
    """

    node: NodeProto
    weight: TensorProto
    by_outputs: bool
    bias: str = ""

    @property
    def num_inputs(self) -> int:
        return self.weight.dims[1 if self.by_outputs else 0]

    @property
    def num_outputs(self) -> int:
        return self.weight.dims[0 if self.by_outputs else 1]

    def chunks(self, array: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Some outputs at a time, as float32 rows (outputs, inputs)."""
        step = max(1, _CHUNK_BYTES // (4 * self.num_inputs))
        for start in range(0, self.num_outputs, step):
            part = slice(start, min(start + step, self.num_outputs))
            rows = array[part] if self.by_outputs else array[:, part].T
            yield part, np.ascontiguousarray(rows, np.float32)


def select_products(
    graph: GraphProto, exclude: Sequence[str]
) -> tuple[list[Product], list[Product]]:
    """The products of a graph, and those that are left out.

    Args:
        exclude: patterns (fnmatch) of node names.

    Raises:
        ModelError: for a pattern that fits none.
    """
    products = list(_found(graph))
    names = [product.node.name for product in products]
    for pattern in exclude:
        if not fnmatch.filter(names, pattern):
            raise ModelError(
                f"--exclude {pattern!r} fits no product: they are named like {', '.join(names[:3])}"
            )
    chosen: list[Product] = []
    left_out: list[Product] = []
    for product in products:
        is_out = any(fnmatch.fnmatchcase(product.node.name, pattern) for pattern in exclude)
        (left_out if is_out else chosen).append(product)
    return chosen, left_out


def _found(graph: GraphProto) -> Iterator[Product]:
    from onnx import TensorProto

    weights = {
        tensor.name: tensor
        for tensor in graph.initializer
        if len(tensor.dims) == 2 and tensor.data_type == TensorProto.FLOAT
    }
    # A traced graph multiplies by the transposed embedding where the output shares its weight.
    transposed = {
        node.output[0]: weights[node.input[0]]
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in weights
    }
    for node in graph.node:
        if node.op_type not in ("MatMul", "FusedMatMul", "Gemm"):
            continue
        is_transposed = node.input[1] in transposed
        weight = transposed.get(node.input[1]) if is_transposed else weights.get(node.input[1])
        if weight is None:
            continue
        settings = {a.name: a.f if a.HasField("f") else a.i for a in node.attribute}
        by_outputs = bool(settings.pop("transB", 0)) != is_transposed
        neutral = {"alpha": 1.0, "beta": 1.0}
        if any(value != neutral.get(name, 0) for name, value in settings.items()):
            continue  # scaled, or with its activation transposed
        bias = node.input[2] if len(node.input) > 2 else ""
        yield Product(node, weight, by_outputs, bias)


@dataclass(frozen=True)
class LayerReport:
    """A weight that was quantized.

    Attributes:
        name: of its node.
        shape: inputs, outputs.
        rel_error: Frobenius norm of the difference, over that of the weight.
        max_abs_error: of one number.
    """

    name: str
    shape: tuple[int, int]
    rel_error: float
    max_abs_error: float


class WeightError:
    """How far a weight is from what is stored for it, added up chunk by chunk."""

    def __init__(self) -> None:
        self._difference, self._norm, self._worst = 0.0, 0.0, 0.0

    def add(self, weight: np.ndarray, stored: np.ndarray) -> None:
        difference = stored - weight
        self._difference += float(np.square(difference, dtype=np.float64).sum())
        self._norm += float(np.square(weight, dtype=np.float64).sum())
        self._worst = max(self._worst, float(np.abs(difference).max()))

    def report(self, name: str, shape: tuple[int, int]) -> LayerReport:
        relative = (self._difference / self._norm) ** 0.5 if self._norm else 0.0
        return LayerReport(name, shape, relative, self._worst)

"""Random inputs of a graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ort_train.errors import ModelError

if TYPE_CHECKING:
    from onnx import ModelProto


def random_feeds(
    model: ModelProto,
    sizes: Mapping[str, int] | None = None,
    skip: Collection[str] = (),
    batch: int = 2,
    length: int = 8,
) -> dict[str, np.ndarray]:
    """Inputs that a transformer's graph accepts.

    Floats are normal; integers that index a table (ids, positions) are spread over its rows, others
    (masks, lengths) are 1.

    Args:
        sizes: of symbolic dimensions, by name.
        skip: inputs that aren't wanted.
        batch: size of dimensions that are named after it.
        length: of all other symbolic dimensions; those named after the past are 0.

    Returns:
        One array for each input of the graph; a scalar where it has no shape.

    Raises:
        ModelError: an input is a sequence or a map.
    """
    from onnx import helper

    rng = np.random.default_rng(0)
    initializers = {tensor.name for tensor in model.graph.initializer}
    rows = _indexed_rows(model)
    feeds: dict[str, np.ndarray] = {}
    for value in model.graph.input:
        if value.name in initializers or value.name in skip:
            continue
        if not value.type.HasField("tensor_type"):
            raise ModelError(
                f"input {value.name} is no tensor, and random inputs to compare with are tensors: "
                "make the model's inputs tensors"
            )
        tensor = value.type.tensor_type
        shape = [_size(dim, sizes or {}, batch, length) for dim in tensor.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if np.issubdtype(dtype, np.floating):
            feeds[value.name] = rng.standard_normal(shape).astype(dtype)
        elif value.name in rows:
            feeds[value.name] = rng.integers(0, rows[value.name], shape).astype(dtype)
        else:
            feeds[value.name] = np.ones(shape, dtype)
    return feeds


def symbolic_dimensions(model: ModelProto) -> set[str]:
    """Names of the inputs' dimensions that `random_feeds` takes sizes of."""
    names = {
        dim.dim_param
        for value in model.graph.input
        for dim in value.type.tensor_type.shape.dim
        if dim.dim_param
    }
    return names | {part.strip() for name in names for part in name.split("+")}


def _size(dim: Any, sizes: Mapping[str, int], batch: int, length: int) -> int:
    if dim.HasField("dim_value"):
        return dim.dim_value

    def named(name: str) -> int:
        if name in sizes:
            return sizes[name]
        if name.startswith("past"):
            return 0
        return batch if "batch" in name else length

    if dim.dim_param in sizes:
        return sizes[dim.dim_param]
    # "past_sequence_length + sequence_length" is the sum of two dimensions.
    return sum(named(part.strip()) for part in dim.dim_param.split("+"))


def _indexed_rows(model: ModelProto) -> dict[str, int]:
    """Inputs that a Gather takes rows by, with the number of rows."""
    rows: dict[str, int] = {}
    dims = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    dims |= {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    origin: dict[str, str] = {value.name: value.name for value in model.graph.input}
    for node in model.graph.node:
        if node.op_type in ("Cast", "Identity", "Unsqueeze", "Reshape") and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        if node.op_type == "Gather" and axis == 0 and node.input[1] in origin:
            table = dims.get(node.input[0])
            if table and table[0] > 0:
                name = origin[node.input[1]]
                rows[name] = min(rows.get(name, table[0]), table[0])
    return rows

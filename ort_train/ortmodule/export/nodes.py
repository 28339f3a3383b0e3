"""Building blocks of symbolic functions: constants, types and nodes of the exporter's graph.

`g` is the exporter's graph context; what is passed about are its values (`torch._C.Value`).
"""

from __future__ import annotations

from typing import Any

import torch

from ort_train.ortmodule.export.exporter import exporter_module
from ort_train.ortmodule.kernels.aten import ATEN_DOMAIN


def _helper() -> Any:
    return exporter_module("symbolic_helper")


def ints(g: Any, *values: int) -> Any:
    """A one-dimensional int64 constant."""
    return g.op("Constant", value_t=torch.tensor(values, dtype=torch.int64))


def scalar(g: Any, value: float | bool, dtype: torch.dtype) -> Any:
    """A constant with no axes."""
    return g.op("Constant", value_t=torch.tensor(value, dtype=dtype))


def aten(g: Any, operator: str, *inputs: Any, overload: str = "", outputs: int = 1) -> Any:
    """A node that torch itself runs (aten.py).

    Args:
        g: the graph context.
        operator: name in torch.ops, "aten::" may be left out.
        inputs: all arguments of the operator, in order.
        overload: its overload, "" for the default one.
        outputs: how many tensors it returns.
    """
    return g.op(
        f"{ATEN_DOMAIN}::ATen",
        *inputs,
        operator_s=operator,
        overload_name_s=overload,
        outputs=outputs,
    )


def none(g: Any) -> Any:
    """An absent optional argument of a node that torch runs."""
    value = g.op("prim::Constant")
    value.setType(torch._C.OptionalType.ofTensor())
    return value


def is_none(value: Any) -> bool:
    """Whether an optional argument is absent."""
    return bool(_helper()._is_none(value))


def constant(value: Any, kind: str, what: str) -> Any:
    """A constant argument as a Python value.

    Args:
        value: the graph's value, or a Python value already.
        kind: the exporter's letter: "i" int, "f" float, "b" bool, "t" tensor, "is" list of ints.
        what: the argument's name, for the error where it depends on the batch.
    """
    return _helper()._get_const(value, kind, what) if isinstance(value, torch._C.Value) else value


def rank_of(value: Any, operator: str) -> int:
    """The number of axes of a value, which `operator` needs."""
    sizes = sizes_of(value)
    rank = None if sizes is None else len(sizes)
    if rank is None:
        raise unsupported(operator, "an input of unknown rank")
    return rank


def sizes_of(value: Any) -> list[int | None] | None:
    """The size of each axis, None for one that differs between batches; None for unknown rank."""
    sizes = _helper()._get_tensor_sizes(value)
    return None if sizes is None else list(sizes)


def dtype_of(value: Any) -> torch.dtype:
    """The data type of a value, float32 where it is unknown."""
    types = exporter_module("_type_utils").JitScalarType
    return types.from_value(value, types.FLOAT).dtype()


def onnx_type(dtype: torch.dtype) -> int:
    """ONNX's number of a data type."""
    return int(exporter_module("_type_utils").JitScalarType.from_dtype(dtype).onnx_type())


def typed(value: Any, like: Any, sizes: list[int | None] | None) -> Any:
    """Give a value the data type of another and its sizes, where inference would not find them."""
    if sizes is not None and hasattr(like.type(), "with_sizes"):
        value.setType(like.type().with_sizes(sizes))
    return value


def expanded(g: Any, value: Any, *others: Any) -> Any:
    """A floating-point value with the shape that it and the others broadcast to.

    Constants, integers and values that are known to have that shape are left as they are.
    """
    if value.node().kind() == "onnx::Constant" or not dtype_of(value).is_floating_point:
        return value
    sizes = sizes_of(value)
    for other in others:
        is_scalar = other.node().kind() == "onnx::Constant" and sizes_of(other) == []
        if other is value or is_scalar:
            continue
        if sizes is None or None in sizes or sizes_of(other) != sizes:
            value = g.op("Expand", value, g.op("Shape", other))
    return value


def unsupported(operator: str, what: str) -> Exception:
    """The error of a symbolic function that can't export this use of its operator."""
    return RuntimeError(f"Exporting the operator 'aten::{operator}' is not supported with {what}")

"""Symbolic functions of operators that change a tensor's shape, or write and sum parts of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ort_train.ortmodule.export import torch_nodes
from ort_train.ortmodule.export.exporter import exporter_module, upstream_symbolic
from ort_train.ortmodule.export.nodes import (
    aten,
    constant,
    dtype_of,
    expanded,
    ints,
    is_none,
    onnx_type,
    rank_of,
    scalar,
    sizes_of,
    typed,
    unsupported,
)

_END = 2**63 - 1  # in Slice: to the end of the axis


def _repeat_interleave(
    g: Any, self: Any, repeats: Any, dim: Any = None, output_size: Any = None
) -> Any:
    """torch's own makes a Loop over a sequence, whose shape upstream can't infer."""
    counts = constant(repeats, "t", "repeats of repeat_interleave").reshape(-1)
    if counts.numel() != 1:
        raise unsupported("repeat_interleave", "a different number of repeats for each entry")
    count = int(counts)
    if is_none(dim):
        self, rank, axis = g.op("Reshape", self, ints(g, -1)), 1, 0
    else:
        rank = rank_of(self, "repeat_interleave")
        axis = constant(dim, "i", "dim") % rank
    copies = g.op("Unsqueeze", self, ints(g, axis + 1))
    repeated = g.op("Concat", *[copies] * count, axis_i=axis + 1) if count > 1 else copies
    output = g.op("Reshape", repeated, _shape_with(g, self, axis, rank, ints(g, -1)))
    sizes = sizes_of(self)
    if sizes is None:
        return output
    size = sizes[axis]
    size = None if size is None else size * count
    return typed(output, self, [*sizes[:axis], size, *sizes[axis + 1 :]])


def _full(g: Any, sizes: Any, value: Any, dtype: Any, *others: Any) -> Any:
    """Of integers where the value is one: torch's own makes floats of it."""
    if is_none(dtype):
        made = next(g.original_node.outputs()).type().dtype()
        kind = exporter_module("_type_utils").JitScalarType.from_dtype(made)
        dtype = scalar(g, int(kind), torch.int64)
    return exporter_module("symbolic_opset9").full(g, sizes, value, dtype, *others)


def _pad(g: Any, self: Any, pad: Any, mode: Any, value: Any = None) -> Any:
    """ONNX Runtime has a gradient of constant padding alone."""
    if constant(mode, "s", "mode") in ("reflect", "replicate"):
        return torch_nodes.symbolic(g, self, pad, mode, value)
    return exporter_module("symbolic_opset11").pad(g, self, pad, mode, value)


def _unflatten(g: Any, self: Any, dim: Any, sizes: Any, names: Any = None) -> Any:
    """torch's own makes a shape of unknown length, which upstream's inference can't follow."""
    rank = rank_of(self, "unflatten")
    axis = constant(dim, "i", "dim") % rank
    helper = exporter_module("symbolic_helper")
    if helper._is_packed_list(sizes):  # of sizes of the batch
        between = [g.op("Reshape", each, ints(g, 1)) for each in helper._unpack_list(sizes)]
    else:
        between = [ints(g, *constant(sizes, "is", "sizes"))]
    return g.op("Reshape", self, _shape_with(g, self, axis, rank, *between))


def _shape_with(g: Any, self: Any, axis: int, rank: int, *sizes: Any) -> Any:
    """The shape of a tensor with other sizes in place of one axis's."""
    shape = g.op("Shape", self)
    kept = [g.op("Slice", shape, ints(g, a), ints(g, b)) for a, b in ((0, axis), (axis + 1, rank))]
    return g.op("Concat", kept[0], *sizes, kept[1], axis_i=0)


def _split(g: Any, self: Any, lengths: Any, dim: Any, _outputs: Any = None) -> Any:
    """Of parts of one length: torch's own takes the last one for as long as the others. A graph
    serves no other size of this axis (tracing.py)."""
    sizes = next(g.original_node.inputs()).type().sizes()
    is_static = lengths.node().kind() == "onnx::Constant" and sizes_of(lengths) == []
    if not is_static or _outputs is None or sizes is None:
        return exporter_module("symbolic_opset13").split(g, self, lengths, dim, _outputs)
    axis, length = constant(dim, "i", "dim"), constant(lengths, "i", "split_size")
    parts = [len(part) for part in torch.arange(sizes[axis]).split(length)]
    return g.op("Split", self, ints(g, *parts), axis_i=axis, outputs=_outputs)


def _chunk(g: Any, self: Any, chunks: int, dim: int) -> Any:
    """Upstream's computes the sizes in the graph, so the parts keep the traced batch's shape as
    their type, and the exporter folds their sizes into constants of that batch.
    """
    if chunks == 1:
        return self
    sizes = sizes_of(self)
    if sizes is None:
        raise unsupported("chunk", "an input of unknown rank")
    before, size, after = sizes[: dim % len(sizes)], sizes[dim], sizes[dim % len(sizes) + 1 :]
    if size is None:
        parts = upstream_symbolic("prim::ConstantChunk")(g, self, chunks, dim)
        return [typed(part, self, [*before, None, *after]) for part in parts]
    lengths = [len(part) for part in torch.arange(size).chunk(chunks)]
    parts = g.op("Split", self, ints(g, *lengths), axis_i=dim, outputs=len(lengths))
    return [
        typed(part, self, [*before, length, *after])
        for part, length in zip(parts, lengths, strict=True)
    ]


def _cumsum(g: Any, self: Any, dim: Any, dtype: Any = None) -> Any:
    """torch's own passes booleans on, which ONNX can't sum."""
    if dtype_of(self).is_floating_point:
        return torch_nodes.symbolic(g, self, dim, dtype)  # CumSum has no gradient
    if not is_none(dtype):
        result_type = exporter_module("_type_utils").JitScalarType(constant(dtype, "i", "dtype"))
        self = g.op("Cast", self, to_i=result_type.onnx_type())
    else:
        self = g.op("Cast", self, to_i=onnx_type(torch.int64))
    return g.op("CumSum", self, scalar(g, constant(dim, "i", "dim"), torch.int64))


def _diff(
    g: Any, self: Any, n: Any = 1, dim: Any = -1, prepend: Any = None, append: Any = None
) -> Any:
    rank = rank_of(self, "diff")
    axis = constant(dim, "i", "dim") % rank
    parts = [part for part in (prepend, self, append) if not is_none(part)]
    values = g.op("Concat", *parts, axis_i=axis) if len(parts) > 1 else self
    is_bool = dtype_of(self) is torch.bool
    for _ in range(constant(n, "i", "n")):
        later = g.op("Slice", values, ints(g, 1), ints(g, _END), ints(g, axis))
        earlier = g.op("Slice", values, ints(g, 0), ints(g, -1), ints(g, axis))
        values = g.op("Xor" if is_bool else "Sub", later, earlier)
    return values


def _where(g: Any, condition: Any, self: Any = None, other: Any = None, _output: Any = None) -> Any:
    """ONNX Runtime's gradient of Where (`gradient_builder.cc`, GetWhereGradient) is not summed over
    broadcast axes: a learned bias under a padding mask got a gradient of the mask's shape.
    """
    if self is None:
        raise unsupported("where", "a condition only: its result's shape depends on the batch")
    if dtype_of(condition) is not torch.bool:
        condition = g.op("Cast", condition, to_i=onnx_type(torch.bool))
    chosen = [expanded(g, value, condition, self, other) for value in (self, other)]
    return g.op("Where", condition, *chosen)


def _index_add(g: Any, self: Any, dim: Any, index: Any, source: Any, alpha: Any = None) -> Any:
    """torch's own writes one of the slices that have the same index, and says so in a warning."""
    rank, source_rank = rank_of(self, "index_add"), rank_of(source, "index_add")
    if rank != source_rank:
        raise unsupported("index_add", f"{source_rank} axes added to {rank}")
    total = typed(aten(g, "ort_train::index_sum", source, dim, index, self), self, sizes_of(self))
    factor = 1 if alpha is None or is_none(alpha) else constant(alpha, "f", "alpha")
    if factor != 1:
        total = g.op("Mul", total, scalar(g, factor, dtype_of(self)))
    return g.op("Add", self, total)


def _index_put(g: Any, self: Any, indices: Any, values: Any, accumulate: Any = False) -> Any:
    """torch's own writes one of the values that have the same index, where they are to be added."""
    if not constant(accumulate, "b", "accumulate"):
        return exporter_module("symbolic_opset11").index_put(g, self, indices, values, accumulate)
    (index, *others) = exporter_module("symbolic_helper")._unpack_list(indices)
    is_rows = not others and sizes_of(index) is not None and len(sizes_of(index) or []) == 1
    if not is_rows or rank_of(values, "index_put") != rank_of(self, "index_put"):
        raise unsupported("index_put", "accumulate and other than one index of the first axis")
    return _index_add(g, self, scalar(g, 0, torch.int64), index, values)


#: By the name of the operator.
SYMBOLICS: dict[str, Callable[..., Any]] = {
    "repeat_interleave": _repeat_interleave,
    "full": _full,
    "pad": _pad,
    "unflatten": _unflatten,
    "split": _split,
    "unsafe_split": _split,
    "prim::ConstantChunk": _chunk,
    "cumsum": _cumsum,
    "diff": _diff,
    "where": _where,
    "index_add": _index_add,
    "index_put": _index_put,
    "index_put_": _index_put,
}

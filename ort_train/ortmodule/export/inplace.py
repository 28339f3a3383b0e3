"""Writes to memory that several tensors share, as the exporter understands them.

It turns a write into a new value, and follows that to where else the memory is seen only through
slices and selected entries. Through other views (`view`, `transpose`, `diagonal`) the write is lost
without a word, and so it is in views that were made before it: refused here. Assigned values that
are broadcast are expanded to the traced batch's sizes: left to the graph here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from ort_train.errors import UnsupportedModelError
from ort_train.ortmodule.export.recorder import SHAPES
from ort_train.ortmodule.patching import replaced

_SLICES = frozenset({"aten::slice", "aten::select"})
#: Views where nothing has to be moved or converted, copies elsewhere.
_COPIES_OTHERS = frozenset({"aten::contiguous", "aten::to", "aten::type_as"})


@contextlib.contextmanager
def understood() -> Iterator[None]:
    """While exporting, such writes are refused or mended."""
    remove = torch._C._jit_pass_onnx_remove_inplace_ops_for_onnx

    def checked(graph: Any, module: Any) -> None:
        _refuse_lost_writes(graph)
        _leave_broadcasts(graph)
        remove(graph, module)

    with replaced(torch._C, _jit_pass_onnx_remove_inplace_ops_for_onnx=checked):
        yield


@functools.lru_cache(maxsize=1024)
def _schema(text: str) -> tuple[bool, bool]:
    """Whether an operator writes to its first argument, and whether its result may share it."""
    if "->" not in text:
        return False, False
    schema = torch._C.parse_schema(text)
    first = schema.arguments[0].alias_info if schema.arguments else None
    if first is None:
        return False, False
    is_shared = bool(schema.returns) and schema.returns[0].alias_info is not None
    return first.is_write, is_shared and not first.is_write


class _Memory:
    """Which values of a trace share memory: a tree of views.

    Attributes:
        parents: by a view's name, what it was made of and whether only by slices.
    """

    def __init__(self) -> None:
        self.parents: dict[str, tuple[str, bool]] = {}

    def path(self, name: str) -> list[tuple[str, bool]]:
        """A value and what it was made of, up to the tensor that owns the memory; each with whether
        only slices lie between."""
        found, is_sliced = [(name, True)], True
        while (parent := self.parents.get(name)) is not None:
            name, is_slice = parent
            is_sliced = is_sliced and is_slice
            found.append((name, is_sliced))
        return found

    def lost(self, written: str) -> set[str]:
        """What else sees the memory, and not a write to this value."""
        path = dict(self.path(written))
        *_, (owner, _) = self.path(written)
        lost = {name for name, is_sliced in path.items() if not is_sliced}
        for other in self.parents:
            others = self.path(other)
            if other in path or others[-1][0] != owner:
                continue
            meeting, is_sliced = next(pair for pair in others if pair[0] in path)
            # Other slices of the same may be of other entries.
            if meeting == written or not (is_sliced and path[meeting]):
                lost.add(other)
        return lost


def _refuse_lost_writes(graph: Any) -> None:
    memory = _Memory()
    lost: dict[str, Any] = {}
    for node in [*graph.nodes(), graph.return_node()]:
        for value in node.inputs():
            writer = lost.get(value.debugName())
            if writer is not None and node.kind() not in SHAPES:
                place = writer.sourceRange().strip().partition("\n")[0]
                raise UnsupportedModelError(
                    f"{writer.kind().removeprefix('aten::')} at {place} writes to a tensor whose "
                    "memory is read later through another view, and a graph would lose that "
                    "write: write to the tensor itself or to a slice of it, read views made "
                    "after the write, or train with backend='compile' or 'eager'"
                )
        if node.kind() == "prim::ListUnpack":
            _add(memory, node, False)
            continue
        writes, shares = _schema(node.schema())
        if writes:
            written = node.inputsAt(0).debugName()
            lost.update(dict.fromkeys(memory.lost(written), node))
            result = node.outputsAt(0).debugName()
            if written in memory.parents:  # the same memory, under a new name
                memory.parents[result] = memory.parents[written]
            else:
                memory.parents[result] = (written, True)
        elif shares and _is_view(node):
            _add(memory, node, node.kind() in _SLICES)


def _add(memory: _Memory, node: Any, is_slice: bool) -> None:
    for output in node.outputs():
        memory.parents[output.debugName()] = (node.inputsAt(0).debugName(), is_slice)


def _is_view(node: Any) -> bool:
    """Whether the result of an operator that may return a view is one, in the traced batch."""
    source, result = node.inputsAt(0).type(), node.outputsAt(0).type()
    if not isinstance(result, torch._C.TensorType):
        return True  # a list of views
    known = [source.sizes(), source.strides(), result.sizes(), result.strides()]
    if None in known or source.scalarType() != result.scalarType():
        return False
    sizes, strides, new_sizes, new_strides = known
    if node.kind() in _COPIES_OTHERS:
        return sizes == new_sizes and strides == new_strides
    if node.kind() not in ("aten::reshape", "aten::flatten", "aten::reshape_as"):
        return True
    try:
        torch.empty_strided(sizes, strides, device="meta").view(new_sizes)
    except RuntimeError:
        return False
    return True


def _leave_broadcasts(graph: Any) -> None:
    """`x[:, 0] = y` traces an expansion of y to the sizes that x[:, 0] had; the copy does that."""
    for node in graph.nodes():
        if node.kind() != "aten::copy_" or node.inputsAt(1).node().kind() != "aten::expand":
            continue
        value = node.inputsAt(1).node().inputsAt(0)
        if value.node().kind() == "aten::view":
            value = value.node().inputsAt(0)
        ranks = [each.type().dim() for each in (node.inputsAt(0), value)]
        if None not in ranks and ranks[1] <= ranks[0]:
            node.replaceInput(1, value)

"""Leaving out tokens whose label is ignored; sparsity.py says what that means."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ort_train.errors import UnsupportedModelError
from ort_train.ortmodule.graph import GraphIndex, attribute
from ort_train.ortmodule.kernels.aten import operator_name
from ort_train.ortmodule.sparse.rewriting import BOOL, INT64, Rewriter, Selection, packed_name
from ort_train.ortmodule.sparse.rows import (
    ELEMENTWISE,
    PRODUCTS,
    Plan,
    Role,
    RowSpace,
    plan,
    product,
)

LOSS = "SoftmaxCrossEntropyLossInternal"
WAY_OUT = "turn the option off, or train with backend='compile' or 'eager'"


@dataclass
class Loss:
    """A cross entropy and the row-wise nodes that compute nothing but its logits.

    Attributes:
        space: of its own rows.
        plans: of the nodes by their identity, in reverse order.
        spaces: of the rows of their tensors, by name.
        cuts: those that cut positions off, for a shift, by identity.
        starts: of spaces before a cut: the space behind it, and its first position.
        selections: the rows whose label counts, in each space.
        blocked: why the first node on the way back isn't among them.
    """

    node: Any
    space: RowSpace
    plans: dict[int, tuple[Any, Plan]] = field(default_factory=dict)
    spaces: dict[str, RowSpace] = field(default_factory=dict)
    cuts: set[int] = field(default_factory=set)
    starts: dict[RowSpace, tuple[RowSpace, int]] = field(default_factory=dict)
    selections: dict[RowSpace, Selection] = field(default_factory=dict)
    blocked: str = ""

    @property
    def blocked_early(self) -> bool:
        """Whether even its own rows can't be chosen."""
        return not self.space.size


def trace_loss(node: Any, rewriter: Rewriter) -> Loss:
    """Walk back from a cross entropy as far as nodes are row-wise and serve it alone."""
    index = rewriter.index
    logits = node.input[0]
    shape, label_shape = (index.shapes.get(name, []) for name in node.input[:2])
    if len(shape) != 2 or len(label_shape) != 1:
        return Loss(node, RowSpace(None, ""), blocked=f"its logits have {len(shape)} axes, not 2")
    if attribute(node, "reduction", b"mean") == b"none":
        return Loss(node, RowSpace(None, ""), blocked="it returns a loss of each token")
    if any(name in index.outputs or name in index.reads for name in node.output[1:] if name):
        return Loss(node, RowSpace(None, ""), blocked="its log-probabilities are used, too")
    space = _space_of(logits, index)
    loss = Loss(node, space, spaces={logits: space})
    members = {id(node)}
    for each in reversed(index.graph.node):
        outputs = [name for name in each.output if name in loss.spaces]
        if not outputs:
            continue
        space = loss.spaces[outputs[0]]
        reason = _other_use(each, members, rewriter)
        entry: Plan | None = None
        if not reason:
            entry = plan(each, index, space)
            if entry is None and (cut := _cut(each, rewriter, space)) is not None:
                before, start = cut
                loss.starts[before] = (space, start)
                loss.cuts.add(id(each))
                entry = Plan(2, (Role(2), *[Role()] * (len(each.input) - 1)))
                space = before
            elif entry is None:
                reason = f"{operator_name(each)} {each.name!r} doesn't compute each row by itself"
        if reason or entry is None:
            loss.blocked = loss.blocked or reason
            continue
        members.add(id(each))
        loss.plans[id(each)] = (each, entry)
        for name, role in zip(each.input, entry.roles, strict=True):
            if role.rows and role.num_rest is None:
                loss.spaces.setdefault(name, space)
    return loss


def _space_of(logits: str, index: GraphIndex) -> RowSpace:
    """The rows of flattened logits, with the grid that they were flattened from."""
    size = product(index.shapes[logits][0])
    name = logits
    while (node := index.producers.get(name)) is not None and node.input:
        shape = index.shapes.get(node.input[0], [])
        if len(shape) > 2:
            space = RowSpace.of_grid(shape[0], shape[1])
            if space.size == size:
                return space
        if node.op_type not in ELEMENTWISE | {"Reshape", "Flatten"}:
            break
        name = node.input[0]
    return RowSpace(None, size)


def _other_use(node: Any, members: set[int], rewriter: Rewriter) -> str:
    """Why all rows of a node's outputs are needed, or ""."""
    index = rewriter.index
    for name in node.output:
        if name in index.outputs:
            return f"output {name!r} of the model needs all rows of {node.name!r}"
        for user in index.consumers(name):
            is_shape = user.op_type == "Shape" and rewriter.sizes_known(index.shapes[name])
            if id(user) not in members and not is_shape:
                return f"{operator_name(user)} {user.name!r} needs all rows of {node.name!r}"
    return ""


def _cut(node: Any, rewriter: Rewriter, space: RowSpace) -> tuple[RowSpace, int] | None:
    """For a Slice of positions: what it cuts from, and where it starts."""
    index = rewriter.index
    if node.op_type != "Slice":
        return None
    shape, out = index.shapes.get(node.input[0]), index.shapes.get(node.output[0], [])
    values = [index.constant(name) for name in (node.input[1], *node.input[3:])]
    if not shape or space.num_axes(out) != 2 or any(value is None for value in values):
        return None
    start, axes, *steps = (np.asarray(value).reshape(-1).tolist() for value in values)
    if axes != [1] or start[0] < 0 or steps not in ([], [[1]]) or shape[2:] != out[2:]:
        return None
    if not rewriter.sizes_known(shape[:2]):
        return None
    return RowSpace.of_grid(shape[0], shape[1]), int(start[0])


def select_labels(loss: Loss, rewriter: Rewriter) -> None:
    """Compute the rows whose label counts, in each space that the loss's rows pass through."""
    labels, ignored = loss.node.input[1], loss.node.input[3]
    shape = rewriter.index.shapes[labels]
    size = f"rows_of_{loss.node.output[0]}".replace("/", "_")
    cast = rewriter.add("Cast", [labels], INT64, shape, to=INT64)
    mask = rewriter.add("Not", [rewriter.add("Equal", [cast, ignored], BOOL, shape)], BOOL, shape)
    rows = rewriter.rows_where(mask, size)
    loss.selections[loss.space] = Selection(rows, size, loss.space)
    for before, (after, start) in loss.starts.items():
        assert before.grid is not None
        inputs = [
            loss.selections[after].rows,
            rewriter.sizes(labels, 0, 1),
            rewriter.full_shape(list(before.grid)),
            rewriter.constant(start, is_scalar=True),
        ]
        rows = rewriter.aten("unsliced_rows", inputs, INT64, [size])
        loss.selections[before] = Selection(rows, size, before)


def leave_out_labels(loss: Loss, rewriter: Rewriter) -> list[Any]:
    """Run a loss and what serves it alone on the rows whose label counts; returns those nodes.

    Raises:
        UnsupportedModelError: naming what stands between the loss and a matrix product.
    """
    nodes = [node for node, _ in loss.plans.values()]
    if not any(node.op_type in PRODUCTS for node in nodes):
        raise UnsupportedModelError(
            f"label_sparsity can't leave out ignored labels: {loss.blocked or 'no head is found'}; "
            f"{WAY_OUT}"
        )
    select_labels(loss, rewriter)
    packed = {name for node in nodes for name in node.output}
    for node, entry in loss.plans.values():
        after = loss.spaces[node.output[0]]
        selection = loss.selections[after]
        if id(node) in loss.cuts:
            before = next(b for b, (a, _) in loss.starts.items() if a == after)
            _drop_cut(node, rewriter, selection, loss.selections[before], packed)
        else:
            rewriter.run_on_rows(node, entry, selection, packed)
        for name in node.output:
            rewriter.free_of_shapes(name)
    logits, labels, *rest = loss.node.input
    selection = loss.selections[loss.space]
    shown = packed_name(logits, selection) if logits in packed else None
    replacement = type(loss.node)()
    replacement.CopyFrom(loss.node)
    replacement.input[:] = [
        shown or rewriter.pack(logits, Role(1), selection),
        rewriter.pack(labels, Role(1), selection),
        *rest,
    ]
    rewriter.replace(loss.node, replacement)
    return nodes


def _drop_cut(
    node: Any, rewriter: Rewriter, after: Selection, before: Selection, packed: set[str]
) -> None:
    """A Slice of positions: the rows behind it are chosen from those before it."""
    name, output = node.input[0], node.output[0]
    rows = packed_name(name, before) if name in packed else rewriter.pack(name, Role(2), before)
    elem_type, shape = rewriter.index.types[output], rewriter.index.shapes[output]
    result = packed_name(output, after)
    rewriter.add("Identity", [rows], elem_type, after.packed_shape(shape, 2), output=result)
    rewriter.replace(node)

"""Leaving out what a batch doesn't need: tokens whose label is ignored, and padding.

Both change the exported graph before its gradient is built, for every batch: which rows are left
out is computed in the graph, so one graph serves all densities. Upstream's own (`compute optimizer`
of onnxruntime-training 1.19.2) look at the first batch only, never find the loss of a transformers
model, and have no kernel for padding on the CPU.

Labels: a cross entropy ignores rows whose label is `ignore_index`. It gets the other rows alone,
and so do the nodes before it, back to where the tokens of a sequence meet (the last layer's
attention) or where another output needs all rows.

Padding: nodes that compute each token by itself (embeddings, norms, projections, MLPs) run on the
tokens that `attention_mask` shows, and on those whose label counts. Other nodes get zeros where
the padding was; they may only be attention that masks it, or the model is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ort_train.errors import UnsupportedModelError
from ort_train.ortmodule.rewriting import BOOL, INT64, Rewriter, Selection, packed_name
from ort_train.ortmodule.rows import (
    ELEMENTWISE,
    Dim,
    GraphIndex,
    Plan,
    Role,
    RowSpace,
    Shape,
    attribute,
    operator_name,
    plan,
    product,
    symbols,
)

_LOSS = "SoftmaxCrossEntropyLossInternal"
_PRODUCTS = ("MatMul", "Gemm")
_WAY_OUT = "turn the option off, or train with backend='compile' or 'eager'"


@dataclass(frozen=True)
class Savings:
    """What one token that is left out saves: its matrix products, forward and backward.

    Attributes:
        flops_per_padding: of a padding token.
        flops_per_ignored_label: of a token whose label is ignored.
    """

    flops_per_padding: int = 0
    flops_per_ignored_label: int = 0


def apply(graph: Any, labels: bool, padding: bool, trainable: frozenset[str]) -> Savings:
    """Change an exported graph, in place, with inferred shapes.

    Args:
        graph: onnx.GraphProto; its loss and its inputs keep their names.
        labels: leave out rows whose label is ignored.
        padding: leave out padding.
        trainable: names of the parameters that are trained, for the account of what is saved.

    Raises:
        UnsupportedModelError: where a part that was asked for can't be left out, with the reason.
    """
    label_flops = padding_flops = 0
    rewriter = Rewriter(graph)
    losses = [_trace_loss(node, rewriter) for node in graph.node if node.op_type == _LOSS]
    if labels:
        if not losses:
            raise UnsupportedModelError(
                "label_sparsity finds no cross entropy in the training forward: pass labels, so "
                f"that the model computes its loss, or {_WAY_OUT}"
            )
        for loss in losses:
            label_flops += _leave_out_labels(loss, rewriter, trainable)
        rewriter.finish()
        rewriter = Rewriter(graph)
    if padding:
        padding_flops = _Padding(rewriter, losses, labels).leave_out(trainable)
        rewriter.finish()
    return Savings(padding_flops, label_flops)


def _flops(nodes: Iterable[Any], index: GraphIndex, trainable: frozenset[str]) -> int:
    """Of the nodes' matrix products, for one row, forward and backward."""
    total = 0
    for node in nodes:
        shape = index.shapes.get(node.input[1], []) if node.op_type in _PRODUCTS else []
        if len(shape) == 2 and all(isinstance(size, int) for size in shape):
            is_trained = not trainable.isdisjoint(index.ancestors(node.input[1]))
            total += 2 * math.prod(map(int, shape)) * (3 if is_trained else 2)
    return total


# --- Labels


@dataclass
class _Loss:
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


def _trace_loss(node: Any, rewriter: Rewriter) -> _Loss:
    """Walk back from a cross entropy as far as nodes are row-wise and serve it alone."""
    index = rewriter.index
    logits = node.input[0]
    shape, label_shape = (index.shapes.get(name, []) for name in node.input[:2])
    if len(shape) != 2 or len(label_shape) != 1:
        return _Loss(node, RowSpace(None, ""), blocked=f"its logits have {len(shape)} axes, not 2")
    if attribute(node, "reduction", b"mean") == b"none":
        return _Loss(node, RowSpace(None, ""), blocked="it returns a loss of each token")
    if any(name in index.outputs or name in index.consumers for name in node.output[1:] if name):
        return _Loss(node, RowSpace(None, ""), blocked="its log-probabilities are used, too")
    space = _space_of(logits, index)
    loss = _Loss(node, space, spaces={logits: space})
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
        for user in index.consumers.get(name, ()):
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


def _select_labels(loss: _Loss, rewriter: Rewriter) -> None:
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


def _leave_out_labels(loss: _Loss, rewriter: Rewriter, trainable: frozenset[str]) -> int:
    """Run a loss and what serves it alone on the rows whose label counts; returns FLOPs a row."""
    nodes = [node for node, _ in loss.plans.values()]
    if not any(node.op_type in _PRODUCTS for node in nodes):
        raise UnsupportedModelError(
            f"label_sparsity can't leave out ignored labels: {loss.blocked or 'no head is found'}; "
            f"{_WAY_OUT}"
        )
    index = rewriter.index
    _select_labels(loss, rewriter)
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
            _free_of_shapes(name, rewriter)
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
    return _flops(nodes, index, trainable)


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


def _free_of_shapes(name: str, rewriter: Rewriter) -> None:
    """Give those that ask for a tensor's shape the full one, of all rows."""
    shape = rewriter.index.shapes.get(name)
    for user in rewriter.index.consumers.get(name, ()):
        if user.op_type == "Shape" and shape is not None and rewriter.sizes_known(shape):
            full = rewriter.full_shape(shape)
            start, end = attribute(user, "start", 0), attribute(user, "end", len(shape))
            bounds = [rewriter.constant(start), rewriter.constant(end)]
            known = rewriter.index.shapes.get(user.output[0], [len(shape)])
            rewriter.add("Slice", [full, *bounds], INT64, known, output=user.output[0])
            rewriter.replace(user)


# --- Padding

#: Nodes that may read tensors with zeros in place of padding, as long as every axis of tokens is
#: one of their result, too.
_POSITIONWISE = ELEMENTWISE | frozenset(
    """
    Concat Expand Gather GatherElements LayerNormalization Reshape Slice Split Squeeze Transpose
    Unsqueeze
    ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum ReduceSumSquare
    """.split()  # noqa: SIM905
)


class _Padding:
    """Runs the row-wise nodes of a model on its kept tokens: those that aren't padding, and those
    whose label counts.

    Args:
        rewriter: of the graph.
        losses: as they were traced before labels were left out.
        without_labels: whether ignored labels are left out already.
    """

    def __init__(self, rewriter: Rewriter, losses: list[_Loss], without_labels: bool):
        self._rewriter = rewriter
        self._index = rewriter.index
        self._losses = losses
        self._without_labels = without_labels
        self._space = self._find_tokens()
        self._selection = self._keep()
        self._plans: dict[int, tuple[Any, Plan]] = {}
        self._packed: set[str] = set()
        self._sees_padding = False

    def leave_out(self, trainable: frozenset[str]) -> int:
        """Change the graph; returns the FLOPs of a token.

        Raises:
            UnsupportedModelError: naming what would not be as it was.
        """
        for node in self._index.graph.node:
            entry = plan(node, self._index, self._space)
            if entry is not None and self._joins(node, entry):
                self._plans[id(node)] = (node, entry)
                self._packed.update(node.output)
        nodes = [node for node, _ in self._plans.values()]
        self._check([name for node in nodes for name in node.output if self._outside(name)])
        self._compute_kept()
        for node, entry in self._plans.values():
            self._rewriter.run_on_rows(node, entry, self._selection, self._packed)
        for name in [name for node in nodes for name in node.output]:
            for user in self._index.consumers.get(name, ()):
                if self._chooses_labels(user) and user.input[0] == name:
                    self._choose_of_kept(user)
            if self._outside(name):
                self._rewriter.unpack(name, self._selection)
            _free_of_shapes(name, self._rewriter)
        for loss in self._losses:
            if self._is_packed_loss(loss.node):
                self._run_loss_on_kept(loss.node)
        return _flops(nodes, self._index, trainable)

    def _refusal(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"padding_sparsity can't leave out this model's padding: {reason}; {_WAY_OUT}"
        )

    # --- which tokens

    def _find_tokens(self) -> RowSpace:
        index = self._index
        for node in index.graph.node:
            if operator_name(node) in ("embedding", "Gather") and len(node.input) > 1:
                shape = index.shapes.get(node.output[0], [])
                if self._source(node.input[1]) == "input_ids" and len(shape) == 3:
                    return RowSpace.of_grid(shape[0], shape[1])
        shape = index.shapes.get("inputs_embeds", [])
        if len(shape) == 3:
            return RowSpace.of_grid(shape[0], shape[1])
        raise self._refusal("it embeds no input_ids")

    def _source(self, name: str) -> str:
        """What a tensor is a view of."""
        while (node := self._index.producers.get(name)) is not None and node.op_type in (
            "Cast",
            "Identity",
            "Reshape",
        ):
            name = node.input[0]
        return name

    def _keep(self) -> Selection:
        index, rewriter = self._index, self._rewriter
        shape = index.shapes.get("attention_mask")
        if shape is None:
            raise self._refusal("it is called without attention_mask, or doesn't use it")
        if len(shape) != 2:
            raise self._refusal(f"attention_mask has {len(shape)} axes, not 2")
        for loss in self._losses:
            if not self._without_labels and not loss.blocked_early:
                _select_labels(loss, rewriter)
        return Selection("/ort_train/kept_tokens", "kept_tokens", self._space)

    def _compute_kept(self) -> None:
        """The rows to keep: what isn't padding, and what a loss counts though it is.

        Where a token's attention is masked altogether, as that of left padding, scaled dot product
        attention returns 0, but a plain softmax the mean of all values, the padding's included:
        then all of such a sample is kept.
        """
        rewriter, selection = self._rewriter, self._selection
        shape = self._index.shapes["attention_mask"]
        mask = rewriter.add("Cast", ["attention_mask"], BOOL, shape, to=BOOL)
        found = [loss.selections.get(self._space) for loss in self._losses]
        labels = [labels for labels in found if labels is not None]
        if not labels:
            rewriter.aten("rows_where", [mask], INT64, [selection.size], output=selection.rows)
            return
        rows = labels[0].rows
        if len(labels) > 1:
            names = [each.rows for each in labels]
            rows = rewriter.add("Concat", names, INT64, ["label_rows"], axis=0)
        with_samples = rewriter.constant(int(self._sees_padding), is_scalar=True)
        inputs = [mask, rows, with_samples]
        rewriter.aten("kept_rows", inputs, INT64, [selection.size], output=selection.rows)

    # --- which nodes

    def _joins(self, node: Any, entry: Plan) -> bool:
        """Whether a row-wise node is worth it: a product, a table look-up, or on the way."""
        if node.op_type in _PRODUCTS:
            return True
        if operator_name(node) in ("embedding", "Gather") and entry.roles[1].rows:
            return self._index.types[node.output[0]] != INT64
        rows = [n for n, role in zip(node.input, entry.roles, strict=True) if role.rows]
        return any(name in self._packed for name in rows)

    def _outside(self, name: str) -> bool:
        """Whether a packed tensor is read by a node that needs all rows."""
        if name in self._index.outputs:
            return True
        shape = self._index.shapes.get(name, [])
        return any(
            not (
                id(user) in self._plans
                or self._chooses_labels(user)
                or self._is_packed_loss(user)
                or (user.op_type == "Shape" and self._rewriter.sizes_known(shape))
            )
            for user in self._index.consumers.get(name, ())
        )

    def _chooses_labels(self, node: Any) -> bool:
        """Whether a node chooses tokens whose label counts, which are all kept."""
        return operator_name(node) == "ort_train::pack_rows" and any(
            selection.space == self._space and selection.rows == node.input[1]
            for loss in self._losses
            for selection in loss.selections.values()
        )

    def _choose_of_kept(self, node: Any) -> None:
        rewriter, selection = self._rewriter, self._selection
        name, rows, _ = node.input
        shape = self._index.shapes[node.output[0]]
        num_axes = self._space.num_axes(self._index.shapes[name])
        inputs = [selection.rows, rows]
        positions = rewriter.aten("row_positions", inputs, INT64, [shape[num_axes - 1]])
        grid = rewriter.add("Shape", [selection.rows], INT64, [1])
        if num_axes == 2:
            grid = rewriter.add("Concat", [rewriter.constant(1), grid], INT64, [2], axis=0)
        inputs = [packed_name(name, selection), positions, grid]
        elem_type = self._index.types[node.output[0]]
        rewriter.aten("pack_rows", inputs, elem_type, shape, output=node.output[0])
        rewriter.replace(node)

    def _is_packed_loss(self, node: Any) -> bool:
        """A loss over kept tokens alone is the same, as no other label counts."""
        return node.op_type == _LOSS and any(
            loss.node.output[0] == node.output[0]
            and not loss.blocked_early
            and loss.space == self._space
            and node.input[0] in self._packed
            for loss in self._losses
        )

    def _run_loss_on_kept(self, node: Any) -> None:
        logits, labels, *rest = node.input
        replacement = type(node)()
        replacement.CopyFrom(node)
        rows = self._rewriter.pack(labels, Role(1), self._selection)
        replacement.input[:] = [packed_name(logits, self._selection), rows, *rest]
        self._rewriter.replace(node, replacement)

    # --- whether the rest is as it was

    def _check(self, names: list[str]) -> None:
        """Follow tensors with zeros in place of padding to where tokens meet.

        Raises:
            UnsupportedModelError: naming a node at which padding would not be masked.
        """
        index = self._index
        is_masked = dict.fromkeys(names, False)  # weights that are zero for padding
        for node in index.graph.node:
            inputs = [name for name in node.input if name in is_masked]
            skipped = id(node) in self._plans or node.op_type == "Shape"
            if not inputs or skipped or self._chooses_labels(node) or self._is_packed_loss(node):
                continue
            masked = self._passes(node, inputs, is_masked)
            for name in node.output:
                if name and self._num_token_axes(name):
                    is_masked[name] = masked

    def _counts_tokens(self, size: Dim) -> bool:
        assert self._space.grid is not None
        length = self._space.grid[1]
        return size == length or (bool(symbols(length)) and symbols(length) <= symbols(size))

    def _num_token_axes(self, name: str) -> int:
        return sum(map(self._counts_tokens, self._index.shapes.get(name, ())))

    def _passes(self, node: Any, inputs: list[str], is_masked: dict[str, bool]) -> bool:
        """Whether a node's result is masked weights; raises where it mixes tokens otherwise."""
        kind = operator_name(node)
        where = f"{kind} {node.name!r}"
        if kind == "MatMul":
            left = node.input[0]
            sums_tokens = self._has_tokens(left, -1)
            if sums_tokens and not is_masked.get(left, False):
                raise self._refusal(f"{where} sums over tokens that attention_mask doesn't weigh")
            if sums_tokens and not self._is_zero_where_masked(node):
                self._sees_padding = True
            return False
        if kind == "Softmax":
            if not self._has_tokens(node.input[0], attribute(node, "axis", -1)):
                return False
            if not self._reaches_mask(node.input[0]):
                raise self._refusal(f"attention_mask isn't among what {where} is computed of")
            return True
        if node.op_type == _LOSS:
            if any(
                loss.node.output[0] == node.output[0] and self._space in loss.selections
                for loss in self._losses
            ):
                return False
            raise self._refusal(f"which tokens {where} counts isn't known")
        if kind not in _POSITIONWISE:
            raise self._refusal(f"{where} may mix tokens")
        is_weights = all(is_masked[name] for name in inputs)
        if kind in ("Mul", "Where"):
            is_weights = any(is_masked[name] for name in inputs)
        before = max(map(self._num_token_axes, inputs))
        if self._num_token_axes(node.output[0]) < before and not is_weights:
            raise self._refusal(f"{where} mixes or drops tokens")
        return is_weights

    def _is_zero_where_masked(self, product: Any) -> bool:
        """Whether attention's result is 0 for a token that sees none (attention.py)."""
        users = self._index.consumers.get(product.output[0], ())
        return all(
            user.op_type == "Where"
            and user.input[2] == product.output[0]
            and (zero := self._index.constant(user.input[1])) is not None
            and not np.any(zero)
            for user in users
        )

    def _has_tokens(self, name: str, axis: int) -> bool:
        shape: Shape = self._index.shapes.get(name, [])
        return bool(shape) and self._counts_tokens(shape[axis])

    def _reaches_mask(self, name: str) -> bool:
        """Whether scores are computed of attention_mask, and not by way of the tokens."""
        seen, stack = {name}, [name]
        while stack:
            name = stack.pop()
            if name == "attention_mask":
                return True
            node = self._index.producers.get(name)
            if node is None or node.op_type == "MatMul":
                continue
            stack += [each for each in node.input if each and each not in seen]
            seen.update(node.input)
        return False

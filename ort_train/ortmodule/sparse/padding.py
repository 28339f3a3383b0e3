"""Leaving out padding; sparsity.py says what that means."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from ort_train.errors import UnsupportedModelError
from ort_train.ortmodule.graph import Dim, Shape, attribute
from ort_train.ortmodule.kernels.aten import operator_name
from ort_train.ortmodule.kernels.attention_kernels import OPERATORS as ATTENTION
from ort_train.ortmodule.sparse.ignored_labels import LOSS, WAY_OUT, Loss, select_labels
from ort_train.ortmodule.sparse.rewriting import BOOL, INT64, Rewriter, Selection, packed_name
from ort_train.ortmodule.sparse.rows import (
    ELEMENTWISE,
    HEADS,
    PRODUCTS,
    Plan,
    Role,
    RowSpace,
    plan,
    symbols,
    unrepeated,
)

logger = logging.getLogger(__name__)

#: Nodes that may read tensors with zeros in place of padding, as long as every axis of tokens is
#: one of their result, too.
_POSITIONWISE = ELEMENTWISE | frozenset(
    """
    Concat Expand Gather GatherElements LayerNormalization Reshape Slice Split Squeeze Transpose
    Unsqueeze
    ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum ReduceSumSquare
    """.split()  # noqa: SIM905
)


def _is_attention(node: Any) -> bool:
    """Whether it is attention as one node, with a mask."""
    return operator_name(node) == ATTENTION[True]


class Padding:
    """Runs the row-wise nodes of a model on its kept tokens: those that aren't padding, and those
    whose label counts.

    Args:
        rewriter: of the graph.
        losses: as they were traced before labels were left out.
        without_labels: whether ignored labels are left out already.
    """

    def __init__(self, rewriter: Rewriter, losses: list[Loss], without_labels: bool):
        self._rewriter = rewriter
        self._index = rewriter.index
        self._losses = losses
        self._without_labels = without_labels
        self._space = self._find_tokens()
        self._selection = self._keep()
        self._plans: dict[int, tuple[Any, Plan]] = {}
        self._packed: set[str] = set()
        #: By the mask: which samples attention computes together (packed_attention.py).
        self._runs: dict[str, str] = {}
        self._sees_padding = False

    def leave_out(self) -> list[Any]:
        """Change the graph; returns the nodes that run on the kept tokens.

        Raises:
            UnsupportedModelError: naming what would not be as it was.
        """
        for node in self._index.graph.node:
            if _is_attention(node):
                entry = self._plan_attention(node)
            else:
                entry = plan(node, self._index, self._space)
            if entry is not None and self._joins(node, entry):
                self._plans[id(node)] = (node, entry)
                self._packed.update(node.output)
        if self._embeds_other_tokens():
            logger.warning(
                "padding_sparsity leaves out the encoder's padding, which attention_mask tells; "
                "the decoder's is computed: pad targets to the longest of a batch"
            )
        nodes = [node for node, _ in self._plans.values()]
        self._check([name for node in nodes for name in node.output if self._outside(name)])
        self._compute_kept()
        for node, entry in self._plans.values():
            if _is_attention(node):
                self._run_attention_on_kept(node)
            else:
                self._rewriter.run_on_rows(node, entry, self._selection, self._packed)
        for name in [name for node in nodes for name in node.output]:
            for user in self._index.consumers(name):
                if self._chooses_labels(user) and user.input[0] == name:
                    self._choose_of_kept(user)
            if self._outside(name):
                self._rewriter.unpack(name, self._selection)
            self._rewriter.free_of_shapes(name)
        for loss in self._losses:
            if self._is_packed_loss(loss.node):
                self._run_loss_on_kept(loss.node)
        return nodes

    def _refusal(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"padding_sparsity can't leave out this model's padding: {reason}; {WAY_OUT}"
        )

    # --- which tokens

    def _find_tokens(self) -> RowSpace:
        index = self._index
        has_heads = any(_is_attention(node) for node in index.graph.node)
        for node in index.graph.node:
            if operator_name(node) in ("embedding", "Gather") and len(node.input) > 1:
                shape = index.shapes.get(node.output[0], [])
                if self._source(node.input[1]) == "input_ids" and len(shape) == 3:
                    return RowSpace.of_grid(shape[0], shape[1], has_heads)
        shape = index.shapes.get("inputs_embeds", [])
        if len(shape) == 3:
            return RowSpace.of_grid(shape[0], shape[1], has_heads)
        raise self._refusal("it embeds no input_ids")

    def _embeds_other_tokens(self) -> bool:
        """Whether there is a second sequence, such as an encoder-decoder's targets."""
        index, grid = self._index, self._space.grid
        assert grid is not None
        for node in index.graph.node:
            if operator_name(node) not in ("embedding", "Gather"):
                continue
            shape = index.shapes.get(node.output[0], [])
            if len(shape) == 3 and shape[0] == grid[0] and shape[1] != grid[1]:
                return index.types[node.output[0]] != INT64
        return False

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
        if len(shape) == 4 and index.types["attention_mask"] != BOOL:
            raise self._refusal(
                "an attention_mask of 4 axes must hold booleans (packed rows do with "
                "model.attention=sdpa)"
            )
        if len(shape) not in (2, 4):
            raise self._refusal(f"attention_mask has {len(shape)} axes, not 2 or 4")
        for loss in self._losses:
            if not self._without_labels and not loss.blocked_early:
                select_labels(loss, rewriter)
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
        if node.op_type in PRODUCTS or _is_attention(node):
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
            for user in self._index.consumers(name)
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
        return node.op_type == LOSS and any(
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

    # --- attention as one node

    def _plan_attention(self, node: Any) -> Plan | None:
        """Attention among the kept tokens, of what was computed of them alone.

        Keys that aren't kept are left out, so attention_mask must be in the mask, as ever.
        """
        factors = self._factors(node)
        is_heads = all(
            self._space.num_axes(self._index.shapes.get(name)) == HEADS
            for name in (*factors, node.output[0])
        )
        if not is_heads or not self._packed.issuperset(factors):
            return None
        mask = self._index.shapes.get(node.input[5], [])
        is_whole = len(mask) == 4 and isinstance(mask[0], str) and isinstance(mask[3], str)
        if not is_whole or not self._reaches_mask(node.input[5]):
            return None
        return Plan(HEADS, (*[Role(HEADS)] * 3, *[Role()] * 3))

    def _factors(self, node: Any) -> list[str]:
        """Query, key and value, the latter two before their heads were repeated for groups."""
        query, key, value = node.input[:3]
        return [query, *(unrepeated(name, self._index, self._space) for name in (key, value))]

    def _run_attention_on_kept(self, node: Any) -> None:
        rewriter, selection, index = self._rewriter, self._selection, self._index
        *_, scale, _, mask = node.input
        factors = [packed_name(name, selection) for name in self._factors(node)]
        runs = self._runs.get(mask)
        if runs is None:
            runs = rewriter.aten(
                "attention_runs", [mask, selection.rows], INT64, ["attention_runs", 4]
            )
            self._runs[mask] = runs
        output, kept = (packed_name(name, selection) for name in node.output)
        shape = selection.packed_shape(index.shapes[node.output[0]], HEADS)
        rewriter.aten(
            "packed_attention",
            [*factors, scale, runs, mask, selection.rows],
            index.types[node.output[0]],
            shape,
            output,
            {kept: (1, ["kept_for_gradient"])},
        )
        rewriter.replace(node)

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
        if kind in ATTENTION.values():
            if not self._has_tokens(node.input[1], 2):
                return False
            if kind != ATTENTION[True] or not self._reaches_mask(node.input[5]):
                raise self._refusal(f"attention_mask isn't among what {where} is computed of")
            return False
        if kind == "Softmax":
            if not self._has_tokens(node.input[0], attribute(node, "axis", -1)):
                return False
            if not self._reaches_mask(node.input[0]):
                raise self._refusal(f"attention_mask isn't among what {where} is computed of")
            return True
        if node.op_type == LOSS:
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
        users = self._index.consumers(product.output[0])
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

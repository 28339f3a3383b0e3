"""Which nodes of an exported graph compute each token by itself, and running them on some tokens.

A row is one token. Tensors hold rows in one of three layouts: (B, T, ...), the model's own,
(B·T, ...), flattened, or, where attention takes chosen rows, too, (B, heads, T, size). A node is
row-wise where every row of its output depends on the same row of its inputs and on nothing else of
them: f(x)[rows] = f(x[rows]). Such nodes may run on chosen rows alone, held as (1, N, ...),
(N, ...) or (1, heads, N, size), so that all other operands keep their shapes.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ort_train.ortmodule.graph import Dim, GraphIndex, Shape, attribute, constant_value
from ort_train.ortmodule.kernels.aten import operator_name

_UNARY = """
Abs Cast Ceil Celu Clip Cos Dropout Elu Erf Exp Floor Gelu FastGelu QuickGelu HardSigmoid HardSwish
Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus
Softsign Sqrt Tanh ThresholdedRelu
""".split()  # noqa: SIM905
_BROADCASTING = """
Add And BitwiseAnd BitwiseOr Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul
Or PRelu Pow Sub Sum Where Xor
""".split()  # noqa: SIM905
ELEMENTWISE = frozenset([*_UNARY, *_BROADCASTING])
_SOFTMAX = frozenset({"Softmax", "LogSoftmax", "LpNormalization"})
PRODUCTS = ("MatMul", "Gemm")
_NORMALIZATION = frozenset({"LayerNormalization", "SimplifiedLayerNormalization"})


def indexed(graph: Any) -> GraphIndex:
    """An exported graph's index, with shapes that its inference doesn't find."""
    index = GraphIndex(graph)
    for node in graph.node:
        if node.op_type == "Flatten":  # shape inference names both sizes anew
            shape, axis = index.shapes.get(node.input[0]), attribute(node, "axis", 1)
            if shape is not None:
                index.shapes[node.output[0]] = [_size(shape[:axis]), _size(shape[axis:])]
        if node.op_type == "Constant":
            index.shapes[node.output[0]] = list(constant_value(node).shape)
    return index


def _size(shape: Shape) -> Dim:
    if all(isinstance(size, int) for size in shape):
        return math.prod(map(int, shape))
    return product(*shape)


@functools.cache
def product(*dims: Dim) -> str:
    """The product of sizes, which may be symbolic, such as "a", "a*b" or "a - 1", in one form."""
    import sympy

    result = sympy.Integer(1)
    for dim in dims:
        names = {name: sympy.Symbol(name) for name in symbols(dim)}
        result *= sympy.sympify(str(dim), locals=names)
    return str(sympy.expand(result))


@functools.cache
def symbols(dim: Dim) -> frozenset[str]:
    """The names in a symbolic size, those of functions (floor) aside."""
    return frozenset(re.findall(r"\b[A-Za-z_]\w*\b(?!\()", str(dim)))


#: Leading axes of (B, heads, T, size) up to the rows; those of the heads are among them.
HEADS = 3
#: Swaps (B, T, heads, size) and (B, heads, T, size).
SWAPPED = [0, 2, 1, 3]


@dataclass(frozen=True)
class RowSpace:
    """The rows of one batch: all positions of a (B, T) grid.

    Attributes:
        grid: symbolic sizes (B, T); None where only flattened tensors are known.
        size: B·T.
        has_heads: whether (B, heads, T, size) holds rows, too.
    """

    grid: tuple[Dim, Dim] | None
    size: str
    has_heads: bool = field(default=False, compare=False)

    @classmethod
    def of_grid(cls, batch: Dim, length: Dim, has_heads: bool = False) -> RowSpace:
        return cls((batch, length), product(batch, length), has_heads)

    def num_axes(self, shape: Shape | None) -> int:
        """How many leading axes of a tensor hold its rows, by its layout: 2, 1, HEADS, or 0 for
        another tensor."""
        if not shape:
            return 0
        if self.has_heads and len(shape) == 4 and (shape[0], shape[2]) == self.grid:
            are_known = isinstance(shape[1], int) and isinstance(shape[3], int)
            return HEADS if are_known and isinstance(shape[2], str) else 0
        if self.grid is not None and len(shape) > 1 and tuple(shape[:2]) == self.grid:
            return 2
        return int(isinstance(shape[0], str) and product(shape[0]) == self.size)


class Role(NamedTuple):
    """What becomes of a row-wise node's input.

    Attributes:
        rows: its leading axes that hold rows, of which the chosen ones are kept; 0: it stays.
        num_rest: axes behind the rows of an input that is broadcast to all rows before.
    """

    rows: int = 0
    num_rest: int | None = None


class Plan(NamedTuple):
    """How a row-wise node runs on chosen rows.

    Attributes:
        num_axes: of its outputs' rows.
        roles: of its inputs, in order.
        rest: of its output's shape, where the node is given a shape; among heads, the one it has.
    """

    num_axes: int
    roles: tuple[Role, ...]
    rest: list[int] | None = None


def unrepeated(name: str, index: GraphIndex, space: RowSpace) -> str:
    """(B, heads, T, size) of (B, heads · n, T, size), each head n times in a row, as transformers'
    `repeat_kv` makes it; another tensor itself."""
    found, shapes = name, [index.shapes.get(name, [])]
    for op_type in ("Reshape", "Expand", "Unsqueeze"):
        node = index.producers.get(found)
        if node is None or node.op_type != op_type:
            return name
        found = node.input[0]
        shapes.append(index.shapes.get(found, []))
    repeated, copies, inserted, single = shapes
    if space.num_axes(single) != HEADS or space.num_axes(repeated) != HEADS:
        return name
    batch, num_heads, length, size = single
    is_repeat = inserted == [batch, num_heads, 1, length, size] and len(copies) == 5
    is_repeat = is_repeat and [*copies[:2], *copies[3:]] == single
    return found if is_repeat else name


_PLAIN = Role()


def plan(node: Any, index: GraphIndex, space: RowSpace) -> Plan | None:
    """How a node would run on chosen rows, or None where it isn't row-wise."""
    shapes = [index.shapes.get(name) for name in node.input]
    used = [name for name in node.output if name and index.shapes.get(name)]
    roles: Sequence[Role | None] | None
    if not used or node.output[0] not in used:
        return None
    rows = {space.num_axes(index.shapes[name]) for name in used}
    if len(rows) != 1 or 0 in rows:
        return None
    num_axes = rows.pop()
    out = index.shapes[node.output[0]]
    kind = operator_name(node)
    if kind == "Dropout":
        roles = _first_only(shapes, space, num_axes)
    elif kind in ELEMENTWISE:
        roles = [_broadcast(shape, out, num_axes) for shape in shapes]
    elif (rule := _RULES.get(kind)) is not None:
        roles = rule(node, index, space, num_axes)
    else:
        return None
    known = [role for role in roles or () if role is not None]
    if roles is None or len(known) < len(roles) or not any(role.rows for role in known):
        return None
    rest = None
    if kind in ("Reshape", "Flatten", "Expand"):
        rest = [int(size) for size in out[num_axes:]]
    return Plan(num_axes, tuple(known), rest)


def _broadcast(shape: Shape | None, out: Shape, num_axes: int) -> Role | None:
    """The role of an operand that numpy's rules broadcast to `out`."""
    if shape is None:
        return None
    head = [1] * (len(out) - len(shape)) + list(shape[: max(0, num_axes - len(out) + len(shape))])
    head = head[:num_axes]
    per_row = [head[0], head[2]] if num_axes == HEADS else head
    if all(size == 1 for size in per_row):
        return _PLAIN
    if head == out[:num_axes]:
        return Role(rows=num_axes)
    rest = shape[num_axes - len(out) + len(shape) :]
    can_expand = all(isinstance(size, int) for size in rest)
    if num_axes > 1 and can_expand and all(a in (1, b) for a, b in zip(head, out, strict=False)):
        return Role(rows=num_axes, num_rest=len(rest))
    return None


def _first_only(shapes: list[Any], space: RowSpace, num_axes: int) -> list[Role] | None:
    if space.num_axes(shapes[0]) != num_axes:
        return None
    return [Role(rows=num_axes)] + [_PLAIN] * (len(shapes) - 1)


_Rule = Callable[[Any, GraphIndex, RowSpace, int], list[Role] | None]


def _matmul(node: Any, index: GraphIndex, space: RowSpace, num_axes: int) -> list[Role] | None:
    left, right = (index.shapes.get(name) for name in node.input)
    if not left or not right or len(right) != 2 or len(left) <= num_axes:
        return None
    return _first_only([left, right], space, num_axes)


def _gemm(node: Any, index: GraphIndex, space: RowSpace, num_axes: int) -> list[Role] | None:
    shapes = [index.shapes.get(name) for name in node.input]
    if attribute(node, "transA", 0) or num_axes != 1 or len(shapes[1] or ()) != 2:
        return None
    roles = _first_only(shapes[:2], space, num_axes)
    if roles is not None and len(shapes) > 2:
        bias = _broadcast(shapes[2], index.shapes[node.output[0]], num_axes)
        return None if bias is None else [*roles, bias]
    return roles


def _over_last_axes(
    node: Any, index: GraphIndex, space: RowSpace, num_axes: int
) -> list[Role] | None:
    """Softmax, normalization, sums: over axes behind the rows."""
    shapes = [index.shapes.get(name) for name in node.input]
    if shapes[0] is None:
        return None
    if node.op_type in _SOFTMAX or node.op_type in _NORMALIZATION:
        axes: list[int] | None = [attribute(node, "axis", -1)]
    else:
        axes = _axes(node, index)
    if not axes or any(axis % len(shapes[0]) < num_axes for axis in axes):
        return None
    return _first_only(shapes, space, num_axes)


def _axes(node: Any, index: GraphIndex, position: int = 1) -> list[int] | None:
    """Axes that an attribute or a constant input names."""
    axes = attribute(node, "axes")
    if axes is None and len(node.input) > position and node.input[position]:
        values = index.constant(node.input[position])
        axes = None if values is None else np.asarray(values).reshape(-1).tolist()
    return None if axes is None else [int(axis) for axis in axes]


def _reshape(node: Any, index: GraphIndex, space: RowSpace, num_axes: int) -> list[Role] | None:
    shape, out = index.shapes.get(node.input[0]), index.shapes[node.output[0]]
    before = space.num_axes(shape)
    if not before or shape is None:
        return None
    if HEADS in (before, num_axes):  # to the shape that it has
        return [Role(rows=HEADS), _PLAIN] if shape == out else None
    rests = shape[before:], out[num_axes:]
    if not all(isinstance(size, int) for rest in rests for size in rest):
        return None
    if math.prod(map(int, rests[0])) != math.prod(map(int, rests[1])):
        return None
    return [Role(rows=before), *[_PLAIN] * (len(node.input) - 1)]


def _expand(node: Any, index: GraphIndex, space: RowSpace, num_axes: int) -> list[Role] | None:
    shape, out = index.shapes.get(node.input[0]), index.shapes[node.output[0]]
    if space.num_axes(shape) != num_axes or len(shape or ()) != len(out) or num_axes == HEADS:
        return None
    if not all(isinstance(size, int) for size in out[num_axes:]):
        return None
    return [Role(rows=num_axes), _PLAIN]


def _transpose(node: Any, index: GraphIndex, space: RowSpace, num_axes: int) -> list[Role] | None:
    perm = attribute(node, "perm")
    before = space.num_axes(index.shapes.get(node.input[0]))
    if perm is not None and list(perm) == SWAPPED and {before, num_axes} == {2, HEADS}:
        return [Role(rows=before)]
    if perm is None or list(perm[:num_axes]) != list(range(num_axes)):
        return None
    return _first_only([index.shapes.get(node.input[0])], space, num_axes)


def _squeeze(node: Any, index: GraphIndex, space: RowSpace, num_axes: int) -> list[Role] | None:
    shape, out = index.shapes.get(node.input[0]), index.shapes[node.output[0]]
    axes = _axes(node, index)
    if shape is None or not axes:
        return None
    rank = max(len(shape), len(out))  # axes count in the longer of the two
    if any(axis % rank < num_axes for axis in axes):
        return None
    return _first_only([shape, *[None] * (len(node.input) - 1)], space, num_axes)


def _along_axis(node: Any, index: GraphIndex, space: RowSpace, num_axes: int) -> list[Role] | None:
    """Split, Concat, GatherElements: along an axis behind the rows."""
    shapes = [index.shapes.get(name) for name in node.input]
    if shapes[0] is None or attribute(node, "axis", 0) % len(shapes[0]) < num_axes:
        return None
    if node.op_type == "Split":
        return _first_only(shapes, space, num_axes)
    if any(space.num_axes(shape) != num_axes for shape in shapes):
        return None
    return [Role(rows=num_axes)] * len(shapes)


def _slice(node: Any, index: GraphIndex, space: RowSpace, num_axes: int) -> list[Role] | None:
    shapes = [index.shapes.get(name) for name in node.input]
    axes = _axes(node, index, position=3)
    if shapes[0] is None or not axes:
        return None
    if any(axis % len(shapes[0]) < num_axes for axis in axes):
        return None
    return _first_only(shapes, space, num_axes)


def _gather(node: Any, index: GraphIndex, space: RowSpace, num_axes: int) -> list[Role] | None:
    """A table's entries for each row, or entries of each row."""
    table, entries = (index.shapes.get(name) for name in node.input[:2])
    if table is None or entries is None:
        return None
    rest = [_PLAIN] * (len(node.input) - 2)
    axis = attribute(node, "axis", 0) % len(table)
    if axis == 0 and space.num_axes(entries) == num_axes and not space.num_axes(table):
        return [_PLAIN, Role(rows=num_axes), *rest]
    if axis >= num_axes == space.num_axes(table) and not space.num_axes(entries):
        return [Role(rows=num_axes), _PLAIN, *rest]
    return None


_RULES: dict[str, _Rule] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Expand": _expand,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _squeeze,
    "Split": _along_axis,
    "Concat": _along_axis,
    "GatherElements": _along_axis,
    "Slice": _slice,
    "Gather": _gather,
    "embedding": _gather,
    **dict.fromkeys(
        [
            *_SOFTMAX,
            *_NORMALIZATION,
            *(f"Reduce{name}" for name in ("Max", "Mean", "Min", "Prod", "Sum", "SumSquare")),
            *("ReduceL1", "ReduceL2", "ReduceLogSumExp"),
        ],
        _over_last_axes,
    ),
}

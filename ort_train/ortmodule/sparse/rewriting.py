"""Changing an exported graph: new nodes, and row-wise nodes that run on chosen rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ort_train.ortmodule.graph import FLOATS, Dim, Shape, attribute, inputs_of
from ort_train.ortmodule.kernels.aten import ATEN_DOMAIN
from ort_train.ortmodule.sparse.rows import HEADS, SWAPPED, Plan, Role, RowSpace, indexed

INT64, BOOL = 7, 9  # onnx.TensorProto


@dataclass(frozen=True)
class Selection:
    """Rows that a part of a graph runs on.

    Attributes:
        rows: name of the tensor (N,) of their flat indices, ascending.
        size: symbolic size N.
        space: what they are chosen from.
    """

    rows: str
    size: str
    space: RowSpace

    def packed_shape(self, shape: Shape, num_axes: int) -> Shape:
        """Of a tensor whose rows were chosen."""
        batch: Shape = [1] if num_axes > 1 else []
        return [*batch, *shape[1 : num_axes - 1], self.size, *shape[num_axes:]]


class Rewriter:
    """Collects changes of a graph, which is looked up as it was before, and makes them at last."""

    def __init__(self, graph: Any):
        self.index = indexed(graph)
        self._graph = graph
        self._added: list[Any] = []
        self._removed: set[int] = set()
        self._values: dict[str, tuple[int, Shape]] = {}
        self._made: dict[Any, str] = {}

    # --- new nodes ---

    def add(
        self,
        op_type: str,
        inputs: Iterable[str],
        elem_type: int,
        shape: Shape,
        output: str | None = None,
        domain: str = "",
        others: Mapping[str, tuple[int, Shape]] | None = None,
        **attributes: Any,
    ) -> str:
        """A node; returns its first output's name. `others` are its other outputs."""
        import onnx

        name = f"/ort_train/{op_type}_{len(self._graph.node)}_{len(self._added)}"
        output = output or f"{name}_output_0"
        node = onnx.helper.make_node(
            op_type, list(inputs), [output, *(others or ())], name=name, domain=domain, **attributes
        )
        self._added.append(node)
        self._values.update({output: (elem_type, shape), **(others or {})})
        return output

    def aten(
        self,
        operator: str,
        inputs: Iterable[str],
        elem_type: int,
        shape: Shape,
        output: str | None = None,
        others: Mapping[str, tuple[int, Shape]] | None = None,
    ) -> str:
        """A node that torch runs: one of ours."""
        attributes = {"operator": f"ort_train::{operator}", "overload_name": ""}
        return self.add("ATen", inputs, elem_type, shape, output, ATEN_DOMAIN, others, **attributes)

    def constant(self, *values: int, is_scalar: bool = False) -> str:
        """An int64 constant, of one axis or of none."""
        import onnx

        key = ("constant", values, is_scalar)
        if key not in self._made:
            array = np.array(values[0] if is_scalar else values, dtype=np.int64)
            tensor = onnx.numpy_helper.from_array(array)
            self._made[key] = self.add("Constant", [], INT64, list(array.shape), value=tensor)
        return self._made[key]

    def sizes(self, name: str, start: int, end: int) -> str:
        """Sizes of some of a tensor's axes, as a tensor."""
        key = ("sizes", name, start, end)
        if key not in self._made:
            rank = len(self.index.shapes[name])
            shape = self.add("Shape", [name], INT64, [rank])
            bounds = [self.constant(start), self.constant(end)]
            self._made[key] = self.add("Slice", [shape, *bounds], INT64, [end - start])
        return self._made[key]

    def size(self, dim: Dim) -> str | None:
        """A size as a tensor (1,), read off a graph input that has it; None where none has."""
        if isinstance(dim, int):
            return self.constant(dim)
        for value in self._graph.input:
            shape = self.index.shapes.get(value.name, [])
            if dim in shape:
                axis = shape.index(dim)
                return self.sizes(value.name, axis, axis + 1)
        return None

    def sizes_known(self, shape: Shape) -> bool:
        """Whether `full_shape` can be had."""
        return all(self.size(dim) is not None for dim in shape)

    def full_shape(self, shape: Shape, output: str | None = None) -> str:
        """A shape as a tensor, without a tensor that has it."""
        sizes: list[Any] = [self.size(dim) for dim in shape]
        return self.add("Concat", sizes, INT64, [len(shape)], output, axis=0)

    def rows_where(self, mask: str, size: str) -> str:
        """Indices of a mask's set entries, flattened."""
        return self.aten("rows_where", [mask], INT64, [size])

    # --- nodes on chosen rows ---

    def pack(self, name: str, role: Role, selection: Selection) -> str:
        """A tensor's chosen rows."""
        key = ("pack", name, selection.rows, role)
        if key not in self._made:
            self._made[key] = self._pack(name, role, selection)
        return self._made[key]

    def _pack(self, name: str, role: Role, selection: Selection) -> str:
        elem_type, shape = self.index.types[name], self.index.shapes[name]
        if role.num_rest is not None:
            assert selection.space.grid is not None
            batch, length = selection.space.grid
            num_rest = role.num_rest
            heads = [1, *shape][-num_rest - 2 : -num_rest - 1] if role.rows == HEADS else []
            shape = [batch, *heads, length, *shape[len(shape) - num_rest :]]
            name = self._known("Expand", [name, self.full_shape(shape)], elem_type, shape)
        if role.rows == HEADS:
            swapped = [shape[axis] for axis in SWAPPED]
            name = self._known("Transpose", [name], elem_type, swapped, perm=SWAPPED)
            name = self._pack(name, Role(2), selection)
            packed = selection.packed_shape(shape, HEADS)
            return self.add("Transpose", [name], elem_type, packed, perm=SWAPPED)
        packed = selection.packed_shape(shape, role.rows)
        if elem_type in FLOATS:
            inputs = [name, selection.rows, self.sizes(name, 0, role.rows)]
            return self.aten("pack_rows", inputs, elem_type, packed)
        # Nothing to differentiate here, and ONNX Runtime passes no booleans to torch.
        if role.rows == 2:
            rest = self.sizes(name, 2, len(shape)) if len(shape) > 2 else None
            flat = [self.constant(-1), *([rest] if rest else [])]
            target = self.add("Concat", flat, INT64, [len(shape) - 1], axis=0)
            name = self.add("Reshape", [name, target], elem_type, [selection.size, *shape[2:]])
        chosen = [selection.size, *shape[role.rows :]]
        rows = self.add("Gather", [name, selection.rows], elem_type, chosen, axis=0)
        if role.rows == 1:
            return rows
        return self.add("Unsqueeze", [rows, self.constant(0)], elem_type, packed)

    def _known(
        self, op_type: str, inputs: list[str], elem_type: int, shape: Shape, **attributes: Any
    ) -> str:
        """As `add`, of a tensor that is looked up."""
        name = self.add(op_type, inputs, elem_type, shape, **attributes)
        self.index.shapes[name], self.index.types[name] = shape, elem_type
        return name

    def unpack(self, name: str, selection: Selection) -> None:
        """Make the tensor `name` of its chosen rows, zero elsewhere."""
        elem_type, shape = self.index.types[name], self.index.shapes[name]
        num_axes = selection.space.num_axes(shape)
        packed = packed_name(name, selection)
        if num_axes == HEADS:
            self._unpack_heads(packed, name, selection)
            return
        if elem_type not in FLOATS:
            packed = self.add("Cast", [packed], 1, selection.packed_shape(shape, num_axes), to=1)
        grid = self._grid(selection.space, num_axes)
        inputs = [packed, selection.rows, grid]
        if elem_type not in FLOATS:
            full = self.aten("unpack_rows", inputs, 1, shape)
            self.add("Cast", [full], elem_type, shape, output=name, to=elem_type)
        elif name in self.index.outputs:  # whose type ONNX Runtime infers, and ATen has no rule
            full = self.aten("unpack_rows", inputs, elem_type, shape)
            self.add("Identity", [full], elem_type, shape, output=name)
        else:
            self.aten("unpack_rows", inputs, elem_type, shape, output=name)

    def _unpack_heads(self, packed: str, name: str, selection: Selection) -> None:
        elem_type, shape = self.index.types[name], self.index.shapes[name]
        swapped = [shape[axis] for axis in SWAPPED]
        between = f"{name}/swapped"
        self.index.types[between], self.index.shapes[between] = elem_type, swapped
        self.add(
            "Transpose",
            [packed],
            elem_type,
            selection.packed_shape(swapped, 2),
            packed_name(between, selection),
            perm=SWAPPED,
        )
        self.unpack(between, selection)
        self.add("Transpose", [between], elem_type, shape, name, perm=SWAPPED)

    def _grid(self, space: RowSpace, num_axes: int) -> str:
        assert space.grid is not None
        if num_axes == 2:
            key = ("grid", space)
            if key not in self._made:
                self._made[key] = self.full_shape(list(space.grid))
            return self._made[key]
        key = ("flat grid", space)
        if key not in self._made:
            sizes: list[Any] = [self.size(dim) for dim in space.grid]
            self._made[key] = self.add("Mul", sizes, INT64, [1])
        return self._made[key]

    def run_on_rows(
        self, node: Any, plan: Plan, selection: Selection, is_packed: Iterable[str]
    ) -> None:
        """Replace a row-wise node by one that runs on chosen rows alone.

        Args:
            is_packed: tensors of which other such nodes make the chosen rows.
        """
        inputs = []
        for name, role in zip(node.input, plan.roles, strict=True):
            if not role.rows:
                inputs.append(name)
            elif name in is_packed:
                inputs.append(packed_name(name, selection))
            else:
                inputs.append(self.pack(name, role, selection))
        replacement = type(node)()
        replacement.CopyFrom(node)
        if plan.rest is not None and plan.num_axes == HEADS:
            inputs = inputs[:1]
            replacement.op_type = "Identity"
            del replacement.attribute[:]
        elif plan.rest is not None:
            rows = 1 if node.op_type == "Expand" else -1
            target = self.constant(*[1] * (plan.num_axes - 1), rows, *plan.rest)
            inputs = [inputs[0], target]
            if node.op_type == "Flatten":
                replacement.op_type = "Reshape"
                del replacement.attribute[:]
        replacement.input[:] = inputs
        replacement.output[:] = [name and packed_name(name, selection) for name in node.output]
        for name in node.output:
            if name in self.index.shapes:
                shape = selection.packed_shape(self.index.shapes[name], plan.num_axes)
                self._values[packed_name(name, selection)] = (self.index.types[name], shape)
        self.replace(node, replacement)

    def replace(self, node: Any, *replacements: Any) -> None:
        """Put other nodes in a node's place, or none."""
        self._removed.add(id(node))
        self._added.extend(replacements)

    def free_of_shapes(self, name: str) -> None:
        """Give those that ask for a tensor's shape the full one, of all rows."""
        shape = self.index.shapes.get(name)
        for user in self.index.consumers(name):
            if user.op_type == "Shape" and shape is not None and self.sizes_known(shape):
                full = self.full_shape(shape)
                start, end = attribute(user, "start", 0), attribute(user, "end", len(shape))
                bounds = [self.constant(start), self.constant(end)]
                known = self.index.shapes.get(user.output[0], [len(shape)])
                self.add("Slice", [full, *bounds], INT64, known, output=user.output[0])
                self.replace(user)

    # --- the end ---

    def finish(self) -> None:
        """Make the collected changes."""
        import onnx

        graph = self._graph
        kept = [node for node in graph.node if id(node) not in self._removed]
        nodes = _sorted([*kept, *self._added], {value.name for value in graph.output})
        copies = []
        for node in nodes:
            copy = type(node)()
            copy.CopyFrom(node)
            copies.append(copy)
        made = {name for node in copies for name in node.output}
        values = [v for v in graph.value_info if v.name in made and v.name not in self._values]
        outputs = {value.name for value in graph.output}
        infos = [
            onnx.helper.make_tensor_value_info(name, elem_type, shape)
            for name, (elem_type, shape) in self._values.items()
            if name in made and name not in outputs
        ]
        kept_values = []
        for value in values:
            copy = type(value)()
            copy.CopyFrom(value)
            kept_values.append(copy)
        del graph.node[:]
        graph.node.extend(copies)
        del graph.value_info[:]
        graph.value_info.extend([*kept_values, *infos])


def packed_name(name: str, selection: Selection) -> str:
    """Of a tensor's chosen rows."""
    return f"{name}/{selection.size}"


def _sorted(nodes: list[Any], outputs: set[str]) -> list[Any]:
    """The nodes that the outputs need, each behind what it reads."""
    producers = {name: node for node in nodes for name in node.output if name}
    done: set[int] = set()
    result: list[Any] = []
    needed = {id(producers[name]) for name in outputs if name in producers}
    for root in nodes:
        if id(root) not in needed:
            continue
        stack = [(root, False)]
        while stack:
            node, is_ready = stack.pop()
            if id(node) in done:
                continue
            if is_ready:
                done.add(id(node))
                result.append(node)
                continue
            stack.append((node, True))
            for name in reversed([*inputs_of(node)]):
                source = producers.get(name)
                if source is not None and id(source) not in done:
                    stack.append((source, False))
    return result

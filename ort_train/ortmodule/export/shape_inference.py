"""What upstream's shape inference (`onnxruntime/tools/symbolic_shape_infer.py`) leaves out or gets
wrong, mended for one export."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ort_train.ortmodule.export import torch_nodes
from ort_train.ortmodule.kernels import attention_kernels
from ort_train.ortmodule.kernels.torch_operators import call_of
from ort_train.ortmodule.patching import replaced


@contextlib.contextmanager
def mended(inference: Any) -> Iterator[None]:
    """Shape inference of graphs as they are exported here.

    Args:
        inference: upstream's class SymbolicShapeInference.
    """
    with (
        replaced(
            inference,
            __init__=_with_shapes_of_torch(inference.__init__),
            _infer_Slice=_with_single_entries(inference._infer_Slice),
        ),
        replaced(sys.modules[inference.__module__], set=_OrderedSet),
    ):
        yield


class _Dispatcher(dict[str, Callable[[Any], None]]):
    """Upstream's functions for nodes that torch runs, and one for those of torch_nodes.py.

    Args:
        known: upstream's, by operator.
        infer: for the others.
    """

    def __init__(self, known: dict[str, Callable[[Any], None]], infer: Callable[[Any], None]):
        super().__init__(known)
        self._infer = infer

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or call_of(str(name)) is not None

    def __missing__(self, name: str) -> Callable[[Any], None]:
        return self._infer


def _with_shapes_of_torch(initialize: Callable[..., None]) -> Callable[..., None]:
    """Shape inference that knows attention as one node, and any operator that torch runs."""

    @functools.wraps(initialize)
    def initialized(inference: Any, *args: Any, **fields: Any) -> None:
        def infer(node: Any) -> None:
            query, key, value = (inference._get_shape(node, position) for position in range(3))
            if len(node.input) > 5:  # sizes that must be equal are, as where the mask is added
                mask = inference._get_shape(node, 5)
                inference._broadcast_shapes([*query[:3], key[2]], mask)
            elem_type = inference.known_vi_[node.input[0]].type.tensor_type.elem_type
            num_kept = str(inference._new_symbolic_dim_from_output(node, 1, 3))
            for name, size in zip(node.output, (value[3], num_kept), strict=True):
                info = onnx.helper.make_tensor_value_info(name, elem_type, [*query[:3], size])
                inference.known_vi_[name].CopyFrom(info)

        import onnx

        initialize(inference, *args, **fields)
        for operator in attention_kernels.OPERATORS.values():
            inference.aten_op_dispatcher_[operator] = infer
        inference.aten_op_dispatcher_ = _Dispatcher(
            inference.aten_op_dispatcher_, functools.partial(torch_nodes.infer_shapes, inference)
        )

    return initialized


def _with_single_entries(infer_slice: Callable[..., None]) -> Callable[..., None]:
    """Shape inference that knows that x[:, 1:2] and x[:, 1:4:3] have one entry.

    Upstream gives it a size of its own, Min(2, T) - 1, which it then takes for the size that it
    broadcasts to (`symbolic_shape_infer.py`, `_broadcast_shapes` with auto_merge): expansions were
    left out, and values written over others. Of x[:, :1] it knows.
    """

    @functools.wraps(infer_slice)
    def infer(inference: Any, node: Any) -> None:
        infer_slice(inference, node)
        bounds = [inference._try_get_value(node, position) for position in (1, 2, 3)]
        steps = inference._try_get_value(node, 4)
        if any(bound is None for bound in bounds):
            return
        starts, ends, axes = (_as_list(bound) for bound in bounds)
        steps = [1] * len(axes) if steps is None else _as_list(steps)
        sizes = inference.known_vi_[node.output[0]].type.tensor_type.shape.dim
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            if all(isinstance(each, int) for each in (start, end, axis, step)) and (
                start >= 0 and 0 < end - start <= step
            ):
                sizes[axis].Clear()
                sizes[axis].dim_value = 1

    return infer


class _OrderedSet(dict[Any, None]):
    """What shape inference needs of a set, iterated in order of insertion.

    Upstream walks sets of names to choose which of two equal sizes keeps its name
    (`symbolic_shape_infer.py`, `_add_suggested_merge`, `_merge_symbols` and `_infer_impl`). Python
    orders those by a seed of each process, so two runs of one model got two graphs.
    """

    def __init__(self, items: Iterable[Any] = ()):
        super().__init__(dict.fromkeys(items))

    def add(self, item: Any) -> None:
        self[item] = None

    def remove(self, item: Any) -> None:
        del self[item]

    def update(self, items: Iterable[Any]) -> None:  # type: ignore[override]
        super().update(dict.fromkeys(items))


def _as_list(value: Any) -> list[Any]:
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, list | tuple) else [value]

"""Operators that no symbolic function exports, or whose ONNX operators ONNX Runtime can't
differentiate: nodes that torch runs and differentiates (torch_operators.py)."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ort_train.ortmodule.export.exporter import symbolic_registry
from ort_train.ortmodule.export.nodes import aten, dtype_of, is_none, onnx_type, unsupported
from ort_train.ortmodule.kernels.aten import ATEN_DOMAIN, operator_name
from ort_train.ortmodule.kernels.torch_operators import Call, call_of

#: Of ONNX's operators, whose types a node can have.
_DTYPES = frozenset(
    {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool}
    | {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8}
)
#: Exported by torch or upstream, as operators that have no gradient in ONNX Runtime 1.19.2, or
#: none on CPUs, or none without keepdim.
UNDIFFERENTIABLE = (
    "acos", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "amax", "amin", "asin",
    "atan", "atan2", "celu", "cosh", "cross", "cumprod", "dot", "elu", "embedding_bag", "flip",
    "frobenius_norm", "grid_sampler", "group_norm", "hardshrink", "hardsigmoid", "hardswish",
    "index_copy", "index_fill", "instance_norm", "linalg_cross", "linalg_det", "linalg_norm",
    "linalg_vector_norm", "log_sigmoid", "logsumexp", "max_pool1d_with_indices",
    "max_pool2d_with_indices", "max_pool3d", "max_pool3d_with_indices", "mish", "mv",
    "nll_loss2d", "nll_loss_nd", "norm", "outer", "pixel_shuffle", "pixel_unshuffle", "prelu",
    "prod", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d", "scatter_reduce", "selu", "sinh", "softshrink",
    "softsign", "tan", "tensordot", "threshold", "tile", "upsample_bilinear2d",
    "upsample_linear1d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "upsample_trilinear3d",
)  # fmt: skip


def missing(opset: int) -> Iterator[str]:
    """Operators of torch that a node can run and that have no symbolic function.

    Args:
        opset: of the symbolic functions that are registered now.
    """
    registry = symbolic_registry()
    for name in _candidates():
        group = registry.get_function_group(name)
        if group is None or group.get(opset) is None:
            yield name


@functools.cache
def _candidates() -> tuple[str, ...]:
    names = {schema.name for schema in torch._C._jit_get_all_schemas()}
    return tuple(sorted(name for name in names if _is_candidate(name)))


def _is_candidate(name: str) -> bool:
    """Whether an operator makes tensors of tensors, draws no random numbers and writes nothing."""
    namespace, _, short = name.partition("::")
    packet = getattr(torch.ops.aten, short, None) if namespace == "aten" else None
    if packet is None or short.endswith("_") or "sparse" in short:
        return False
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    return not any(torch.Tag.nondeterministic_seeded in each.tags for each in overloads) and any(
        _is_function(each._schema) for each in overloads
    )


def _is_function(schema: Any) -> bool:
    returns = [value.type.kind() for value in schema.returns]
    takes_tensors = any(_kind(argument)[0] == "TensorType" for argument in schema.arguments)
    return {*returns} == {"TensorType"} and takes_tensors and not schema.is_mutable


def symbolic(g: Any, *values: Any) -> Any:
    """The symbolic function of any of them, for the exporter.

    Args:
        g: the graph context.
        values: all arguments of the operator, in order.
    """
    node = g.original_node
    short = node.kind().partition("::")[2]
    originals = list(node.inputs())
    overload = _overload(short, originals)
    parameters = list(overload._schema.arguments)
    inputs = _Inputs()
    given = list(zip(originals, values, map(_kind, parameters), strict=True))
    # ONNX Runtime takes an output of a gradient's node for that of the input at its place.
    for is_trained in (True, False):
        for original, value, (kind, _) in given:
            inputs.add(original, value, kind, is_trained)
    arguments = [inputs.argument(original, value, kind) for original, value, (kind, _) in given]
    types = [output.type() for output in node.outputs()]
    dtypes = [_result_type(kind, short) for kind in types]
    sizes = [_ones(kind, short) for kind in types]
    floats = [i for i, dtype in enumerate(dtypes) if dtype.is_floating_point]
    if len(floats) > 1:
        raise unsupported(short, f"gradients of {len(floats)} results")
    trained = list(range(inputs.num_trained))
    call = Call(
        overload.name(),
        arguments,
        inputs.numbers,
        inputs.masks,
        trained if floats else [],
        floats[0] if floats and trained else None,
        list(zip(map(onnx_type, dtypes), sizes, strict=True)),
    )
    _register_gradient(call, len(inputs.values))
    made = aten(g, call.forward_name, *inputs.values, outputs=len(types))
    for output, kind, ones in zip(made if len(types) > 1 else [made], types, sizes, strict=True):
        output.setType(kind.with_sizes(ones))
    return made


class _Inputs:
    """What of an operator's arguments a node reads, each value once, as its gradient is one.

    Attributes:
        values: of the exporter's graph.
        numbers: places of those that are numbers rather than tensors.
        masks: places of booleans.
        num_trained: how many of them, the first, have a gradient.
    """

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.numbers: list[int] = []
        self.masks: list[int] = []
        self.num_trained = 0
        self._places: dict[tuple[str, bool], int] = {}

    def add(self, original: Any, value: Any, kind: str, is_trained: bool) -> None:
        """Have the node read an argument, or those of a list, that has a gradient or has none.

        Args:
            original: as traced.
            value: as exported.
            kind: of the parameter.
        """
        for item, exported in _items(original, value):
            is_number = kind != "TensorType"
            key = exported.debugName(), is_number
            if key in self._places or _is_fixed(item, kind):
                continue
            dtype = None if is_number else _dtype(item, exported)
            if is_trained != (dtype is not None and dtype.is_floating_point):
                continue
            place = self._places[key] = len(self.values)
            self.values.append(exported)
            self.num_trained += is_trained
            if is_number:
                self.numbers.append(place)
            elif dtype is torch.bool:
                self.masks.append(place)

    def argument(self, original: Any, value: Any, kind: str) -> Any:
        """As a call has it (torch_operators.Call)."""
        if original.node().kind() == "prim::ListConstruct":
            return [self.argument(*item, kind) for item in _items(original, value)]
        if is_none(original):
            return None
        if _is_fixed(original, kind):
            known = original.toIValue()
            return known.tolist() if isinstance(known, torch.Tensor) else known
        return {"input": self._places[value.debugName(), kind != "TensorType"]}


def _dtype(original: Any, value: Any) -> torch.dtype:
    """Of a tensor; the trace knows it, unless a pass of the exporter's has made it."""
    kind = original.type()
    dtype: torch.dtype | None = kind.dtype() if kind.kind() == "TensorType" else None
    return dtype_of(value) if dtype is None else dtype


def _items(original: Any, value: Any) -> list[tuple[Any, Any]]:
    """An argument, or those of a list, as traced and as exported."""
    if original.node().kind() != "prim::ListConstruct":
        return [(original, value)]
    return list(zip(original.node().inputs(), value.node().inputs(), strict=True))


def _is_fixed(original: Any, kind: str) -> bool:
    """Whether an argument is the same for all batches, and no tensor."""
    is_constant: bool = original.node().kind() == "prim::Constant"
    return is_none(original) or (is_constant and kind != "TensorType")


def _overload(short: str, values: list[Any]) -> Any:
    """The overload that takes these values of a trace.

    What the exporter does to a graph's constants before leaves its nodes without their schemas.
    """
    packet = getattr(torch.ops.aten, short)
    overloads = [getattr(packet, name) for name in packet.overloads()]
    overloads = [
        each
        for each in overloads
        if len(each._schema.arguments) == len(values) and _is_function(each._schema)
    ]
    for takes in (_takes_constant, _takes):  # a number of the graph is a tensor to some overload
        for each in overloads:
            if all(map(takes, each._schema.arguments, values)):
                return each
    raise unsupported(short, f"{len(values)} arguments of these kinds")


def _takes_constant(parameter: Any, value: Any) -> bool:
    """Whether a parameter takes a value; a number is a constant."""
    kind, is_list = _kind(parameter)
    if is_none(value):
        return bool(parameter.type.kind() == "OptionalType")
    node = value.node()
    if node.kind() == "prim::ListConstruct":
        return is_list and all(
            (kind == "TensorType") != (item.node().kind() == "prim::Constant")
            for item in node.inputs()
        )
    if node.kind() != "prim::Constant":
        return kind == "TensorType" and not is_list
    known = value.toIValue()
    if isinstance(known, list):
        return is_list
    if isinstance(known, torch.Tensor) and known.dim() > 0:
        return kind == "TensorType"
    return kind != "TensorType" and not is_list


def _takes(parameter: Any, value: Any) -> bool:
    """Whether a parameter takes a value; a number is a constant or one of the graph."""
    if is_none(value):
        return bool(parameter.type.kind() == "OptionalType")
    return _kind(parameter)[1] == (
        value.node().kind() == "prim::ListConstruct"
        or (value.node().kind() == "prim::Constant" and isinstance(value.toIValue(), list))
    )


def _kind(argument: Any) -> tuple[str, bool]:
    """What a parameter of an operator takes, and whether a list of it."""
    kind = argument.real_type if hasattr(argument, "real_type") else argument.type
    is_list = False
    while kind.kind() in ("OptionalType", "ListType"):
        is_list = is_list or kind.kind() == "ListType"
        kind = kind.getElementType()
    return kind.kind(), is_list


def _ones(kind: Any, short: str) -> list[int | None]:
    """The sizes of 1 in a type of the traced batch, None for others, which differ between batches.

    A graph serves no other batches where they are 1 (`call.size_pattern`), and ONNX Runtime has to
    know where it broadcasts.
    """
    sizes = kind.sizes()
    if sizes is None:
        raise unsupported(short, "a result of unknown rank")
    return [1 if size == 1 else None for size in sizes]


def infer_shapes(inference: Any, node: Any) -> None:
    """Tell upstream's shape inference of the results of a node.

    Args:
        inference: onnxruntime.tools.symbolic_shape_infer.SymbolicShapeInference.
        node: onnx.NodeProto, as made here.
    """
    import onnx

    call = call_of(operator_name(node))
    assert call is not None
    for i, (name, (dtype, ones)) in enumerate(zip(node.output, call.results, strict=False)):
        found = [
            inference._new_symbolic_dim_from_output(node, i, axis) for axis in range(len(ones))
        ]
        # A number where another node's input has told its size.
        sizes = [
            one or (str(size) if str(size)[:1].isalpha() else int(size))
            for one, size in zip(ones, found, strict=True)
        ]
        info = onnx.helper.make_tensor_value_info(name, dtype, sizes)
        inference.known_vi_[name].CopyFrom(info)


def _result_type(kind: Any, short: str) -> torch.dtype:
    dtype: torch.dtype | None = kind.dtype()
    if dtype is None or dtype not in _DTYPES:
        raise unsupported(short, f"a result of type {dtype}, which ONNX Runtime has no tensors of")
    return dtype


@functools.cache
def _registered() -> set[str]:
    return set()


def _register_gradient(call: Call, num_inputs: int) -> None:
    """Tell ONNX Runtime of the node's gradient, for the life of the process."""
    name = call.forward_name
    if name in _registered():
        return
    _registered().add(name)
    package = "onnxruntime.training.ortmodule"
    registry = importlib.import_module(f"{package}._custom_gradient_registry")
    native = importlib.import_module("onnxruntime.capi._pybind_state")
    key = f"{ATEN_DOMAIN}::ATen::{name}::"
    trained = call.trained if call.output is not None else []
    if trained:
        node = (
            ("ATen", ATEN_DOMAIN),
            [f"GO({call.output})", *(f"I({i})" for i in range(num_inputs))],
            [f"GI({i})" for i in trained],
            {"operator": {"value": call.backward_name, "dtype": "string"}},
        )
        native.register_gradient_definition(key, registry._to_gradient_definition([node]))
    if stopped := {*range(num_inputs)} - {*trained}:
        native.register_custom_stop_gradient_edges(key, stopped)


SYMBOLICS: dict[str, Callable[..., Any]] = dict.fromkeys(UNDIFFERENTIABLE, symbolic)

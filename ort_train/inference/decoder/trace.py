"""Tracing a module into an ONNX graph; its weights go straight from the module to a file."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch

from ort_train.errors import UnsupportedModelError
from ort_train.inference.graph import IR_VERSION, MICROSOFT, OPSET, DataWriter

_DOMAINS = ("", "ai.onnx.ml", MICROSOFT)
# The exporter writes bfloat16 that a model asks for itself (Falcon's ALiBi) as complex128: torch's
# number of the one type is ONNX's of the other.
_NO_KERNELS = {
    onnx.TensorProto.BFLOAT16, onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128,
}  # fmt: skip
#: Names of a graph's inputs or outputs, each with its dynamic axes and their names.
Axes = Mapping[str, Mapping[int, str]]


def write_traced_graph(
    module: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    inputs: Axes,
    outputs: Axes,
    file: Path,
    data_file: Path,
    on_write: Callable[[int], Any] | None = None,
) -> None:
    """Trace a module and write its graph beside its weights.

    torch.onnx would hold the weights a second time, as protobuf's bytes: it is told to leave them
    out, as inputs of the graph, which are then made initializers one by one.

    Args:
        on_write: called with the bytes of each weight.

    Raises:
        UnsupportedModelError: naming the operators that only a training graph can have.
    """
    from ort_train.ortmodule.export import stop_gradient

    with tempfile.TemporaryDirectory(dir=file.parent) as folder, _trace_scope(module):
        traced = Path(folder) / file.name
        torch.onnx.export(
            module,
            example,
            str(traced),
            export_params=False,
            do_constant_folding=False,  # it would put folded weights in their places
            dynamo=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={name: dict(axes) for name, axes in {**inputs, **outputs}.items()},
        )
        model = onnx.load(str(traced))
    stop_gradient.replace(model.graph)  # there are no gradients here
    _check(model.graph)
    with DataWriter(data_file, on_write) as data:
        _fill(model.graph, module, set(inputs), data)
    model.ir_version = IR_VERSION
    if not any(opset.domain == MICROSOFT for opset in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))
    onnx.save_model(model, str(file))


def _check(graph: onnx.GraphProto) -> None:
    """Refuse what ONNX Runtime can't run, by name.

    Raises:
        UnsupportedModelError: see `write_traced_graph`.
    """
    if foreign := sorted({_operator(n) for n in graph.node if n.domain not in _DOMAINS}):
        raise UnsupportedModelError(
            f"ONNX Runtime has no operator for {', '.join(foreign)} outside a training graph"
        )
    types = {a.i for n in graph.node if n.op_type == "Cast" for a in n.attribute}
    if types & _NO_KERNELS:
        raise UnsupportedModelError(
            "it computes in bfloat16 or in complex numbers, which ONNX Runtime's CPU kernels don't"
        )


def _operator(node: onnx.NodeProto) -> str:
    """What a node computes; one of torch's, by torch's name."""
    from ort_train.ortmodule.kernels.aten import operator_name
    from ort_train.ortmodule.kernels.torch_operators import call_of

    name = operator_name(node)
    if (call := call_of(name)) is not None:
        return call.operator
    if name == "ort_train::grouped_linear":
        return f"{name} (the products of a mixture of experts)"
    return name


@contextlib.contextmanager
def _trace_scope(module: torch.nn.Module) -> Iterator[None]:
    """Everything that a trace needs of torch and transformers, taken back at the end."""
    from ort_train.ortmodule import upstream
    from ort_train.ortmodule.export.transformers_compat import export_scope

    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.onnx")
        stack.enter_context(torch.no_grad())
        stack.enter_context(export_scope(module))
        # An exporter that fails prints the whole trace.
        stack.enter_context(upstream.output_to_file())
        yield


def _fill(
    graph: onnx.GraphProto, module: torch.nn.Module, inputs: set[str], data: DataWriter
) -> None:
    """Make the inputs that are weights initializers."""
    tensors = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    weights = {value.name for value in graph.input} - inputs
    assert weights <= set(tensors), weights - set(tensors)
    kept = [value for value in graph.input if value.name in inputs]
    del graph.input[:]
    graph.input.extend(kept)
    _share_tied(graph, weights, tensors)
    transposed = _transposed_weights(graph, weights)
    nodes = [node for node in graph.node if node.output[0] not in transposed]
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    for name in sorted(weights & used):
        graph.initializer.append(data.tensor(name, tensors[name].detach().numpy()))
    for output, name in transposed.items():
        graph.initializer.append(data.tensor(output, tensors[name].detach().numpy().T))


def _share_tied(
    graph: onnx.GraphProto, weights: set[str], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Call a tensor that has several names by the first of them."""
    first: dict[int, str] = {}
    same = {name: first.setdefault(id(tensors[name]), name) for name in sorted(weights)}
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = same.get(name, name)


def _transposed_weights(graph: onnx.GraphProto, weights: set[str]) -> dict[str, str]:
    """The weights that the graph only transposes, by the transposed one's name.

    A Linear's are. ONNX Runtime would do it whenever it loads the graph, beside the original. One
    that is used as it is, too (a tied embedding), stays in the file once.
    """
    transposes = [
        node
        for node in graph.node
        if node.op_type == "Transpose"
        and node.input[0] in weights
        and list(node.attribute[0].ints) == [1, 0]
    ]
    outputs = {node.output[0] for node in transposes}
    plain = {n for node in graph.node if node.output[0] not in outputs for n in node.input}
    return {n.output[0]: n.input[0] for n in transposes if n.input[0] not in plain}

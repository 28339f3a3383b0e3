"""torch's TorchScript exporter: where this torch keeps it, its registry of symbolic functions, and
what it takes to have it export as ORTModule expects.

Patches of torch last only for the import of ORTModule or for one export.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.onnx.symbolic_opset9

from ort_train.errors import BackendUnavailableError
from ort_train.ortmodule.export import inplace, stop_gradient, tracing
from ort_train.ortmodule.patching import replaced

_PACKAGE = "torch.onnx._internal.torchscript_exporter"
#: Numbers in a tensor that could hold sizes.
_LARGEST_SHAPE = 64


def exporter_module(name: str) -> Any:
    """A module of the TorchScript exporter by its short name, from where this torch keeps it."""
    for package in (_PACKAGE, "torch.onnx", "torch.onnx._internal"):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(f"{package}.{name}")
    raise BackendUnavailableError(f"this torch has no TorchScript exporter: {name} is missing")


def symbolic_registry() -> Any:
    """The TorchScript exporter's registry of symbolic functions."""
    return exporter_module("registration").registry


def upstream_symbolic(name: str) -> Any:
    """ORTModule's own symbolic function of an operator."""
    package = "onnxruntime.training.ortmodule"
    registry = importlib.import_module(f"{package}._custom_op_symbolic_registry")
    return registry.CustomOpSymbolicRegistry._SYMBOLICS[name]


def symbolic_overrides() -> dict[str, dict[int, Any]]:
    """Symbolic functions that were registered in place of the exporter's own, by opset."""
    registry = symbolic_registry()
    groups = {name: registry.get_function_group(name) for name in registry.all_functions()}
    return {name: dict(group._functions._overrides) for name, group in groups.items()}


@contextlib.contextmanager
def restored_symbolics() -> Iterator[None]:
    """Take back every symbolic function that is registered meanwhile."""
    registry = symbolic_registry()
    before = symbolic_overrides()
    try:
        yield
    finally:
        for name, after in symbolic_overrides().items():
            functions = registry.get_function_group(name)._functions
            for opset in after:
                functions.remove_override(opset)
            for opset, function in before.get(name, {}).items():
                functions.override(opset, function)


@contextlib.contextmanager
def old_names() -> Iterator[None]:
    """The exporter's modules under the names that ORTModule imports them by.

    torch 2.9 moved `torch.onnx._internal.{jit_utils,registration,onnx_proto_utils}` and
    `torch.onnx.{_globals,_type_utils}` into `torch.onnx._internal.torchscript_exporter`, and left
    `_convolution` and `_convolution_mode` out of `torch.onnx.symbolic_opset9`.
    """
    with contextlib.ExitStack() as stack:
        for package, names in (
            ("torch.onnx._internal", ("jit_utils", "registration", "onnx_proto_utils")),
            ("torch.onnx", ("_globals", "_type_utils")),
        ):
            for name in names:
                alias = f"{package}.{name}"
                if alias in sys.modules or importlib.util.find_spec(alias) is not None:
                    continue
                module = importlib.import_module(f"{_PACKAGE}.{name}")
                sys.modules[alias] = module
                stack.callback(sys.modules.pop, alias, None)
                stack.enter_context(replaced(sys.modules[package], **{name: module}))
        opset9, public = exporter_module("symbolic_opset9"), torch.onnx.symbolic_opset9
        hidden = [n for n in ("_convolution", "_convolution_mode") if not hasattr(public, n)]
        stack.enter_context(replaced(public, **{n: getattr(opset9, n) for n in hidden}))
        yield


@contextlib.contextmanager
def as_default() -> Iterator[None]:
    """`torch.onnx.export` with `dynamo=False`, the default until torch 2.9.

    Upstream exports with TrainingMode.TRAINING, which calls train() on the whole module: a
    submodule that was put into eval mode would train. PRESERVE traces it as it is.
    """
    original = torch.onnx.export

    @functools.wraps(original)
    def export(*args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("dynamo", False)
        kwargs["training"] = torch.onnx.TrainingMode.PRESERVE
        with (
            tracing.values_kept_out(),
            stop_gradient.traced(),
            inplace.understood(),
            _weights_not_computed_with(),
        ):
            return original(*args, **kwargs)

    with replaced(torch.onnx, export=export):
        yield


@contextlib.contextmanager
def _weights_not_computed_with() -> Iterator[None]:
    """Keep weights from the exporter's shape inference, which would compute with them.

    It evaluates operators whose operands it knows, such as the transposition of every linear
    layer's weight, and keeps the results: at its end the process holds the model twice
    (`ComputeConstant` in torch/csrc/jit/passes/onnx/shape_type_inference.cpp; torch 2.8 to 2.14).
    A shape only ever follows from small integers; the weights' own shapes stand in the graph.
    """
    infer = torch._C._jit_pass_onnx_graph_shape_type_inference

    def infer_without(graph: Any, params: dict[str, Any], opset: int) -> None:
        small = {name: value for name, value in params.items() if _may_be_shape(value)}
        with warnings.catch_warnings():  # as of the exporter's own modules, see graph_module.py
            warnings.simplefilter("ignore")
            infer(graph, small, opset)

    with replaced(torch._C, _jit_pass_onnx_graph_shape_type_inference=infer_without):
        yield


def _may_be_shape(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or (
        not value.is_floating_point() and value.numel() <= _LARGEST_SHAPE
    )

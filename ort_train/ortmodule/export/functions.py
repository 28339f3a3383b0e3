"""torch.autograd.Function in an exported graph: run as it is (PythonOp), or refused.

Without its C++ extension ORTModule exports with `autograd_inlining`: a Function's forward is traced
operator by operator, its backward is dropped, and ONNX Runtime differentiates the traced operators
instead. Where the two differ (straight-through estimators, clipped or scaled gradients) a model
would train on other gradients and say nothing. So every Function is refused, by name, unless its
backward is known to be the derivative of its forward.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import FunctionMeta

from ort_train.errors import UnsupportedModelError
from ort_train.ortmodule import extensions

_ORTMODULE = "onnxruntime.training.ortmodule"
#: Functions whose backward is the derivative of their forward, written out to save memory or time.
#: A test compares each with autograd.
SAFE_TO_INLINE = {
    "transformers.models.bloom.modeling_bloom.GeLUFunction",
    "peft.tuners.loha.layer.HadaWeight",  # not HadaWeightCP: in peft 0.21 it takes t2 for t1
    # Recomputes, and differentiates what it recomputes.
    "torch.utils.checkpoint.CheckpointFunction",
}


def _is_safe(function: type) -> bool:
    # ORTModule's own Functions, and ours of it, carry its graph and mark its outputs.
    return (
        function.__module__.startswith(("onnxruntime.", "ort_train.ortmodule."))
        or f"{function.__module__}.{function.__qualname__}" in SAFE_TO_INLINE
    )


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """No torch.autograd.Function may be traced through by this thread meanwhile.

    Raises:
        UnsupportedModelError: naming the first one that was called, whatever became of the export.
    """
    refusal: UnsupportedModelError | None = None
    thread = threading.get_ident()

    def refusing(cls: type, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal refusal
            if _is_differentiable(args):
                name = f"{cls.__module__}.{cls.__qualname__}"
                refusal = refusal or UnsupportedModelError(
                    f"backend 'ort' would trace through the torch.autograd.Function {name} and "
                    "ignore its backward: set the option compiled_extensions=true, which runs it "
                    "as it is (builds a C++ extension, once), or train with backend='compile' or "
                    "'eager'"
                )
                raise refusal
            return forward(*args, **kwargs)

        return wrapper

    # `apply` looks up the class's `forward` to call it. `apply` itself can't be replaced: modules
    # bind it early (`ste = MySTE.apply`), and from torch 2.14 on it is all C++.
    def lookup(cls: Any, name: str) -> Any:
        value = type.__getattribute__(cls, name)
        if name == "forward" and threading.get_ident() == thread and not _is_safe(cls):
            return refusing(cls, value)
        return value

    FunctionMeta.__getattribute__ = lookup
    try:
        yield
    except Exception:
        if refusal is not None:  # the exporter wraps what is raised while it traces
            raise refusal from None
        raise
    finally:
        del FunctionMeta.__getattribute__
    if refusal is not None:
        raise refusal


def _is_differentiable(args: tuple[Any, ...]) -> bool:
    return any(
        isinstance(arg, torch.Tensor) and (arg.is_floating_point() or arg.is_complex())
        for arg in args
    )


@functools.cache
def _mend_upstream() -> None:
    exporter: Any = importlib.import_module(f"{_ORTMODULE}._custom_autograd_function_exporter")
    # Its own raises at TrainingMode.PRESERVE, which exporter.py exports with.
    exporter._get_training_mode = lambda: True

    # `mem_efficient_grad_management` pulls the weights through a Function. Its only caller passes
    # the parameters in place of their device, and a used-up iterator in place of the parameters
    # (_graph_transition_manager.py, line 682).
    retrieval: Any = importlib.import_module(f"{_ORTMODULE}._mem_efficient_grad_mgmt")
    add_retrieval = retrieval.post_processing_enable_mem_efficient_training

    def with_device(model: Any, _: Any, parameters: dict[str, torch.Tensor]) -> Any:
        device = next(iter(parameters.values())).device
        return add_retrieval(model, parameters.items(), device)

    retrieval.post_processing_enable_mem_efficient_training = with_device


@contextlib.contextmanager
def as_python_ops() -> Iterator[None]:
    """Every torch.autograd.Function becomes an operator that calls it, forward and backward.

    On for the ORTModule that is constructed and exported meanwhile, off for all others.

    Raises:
        BackendUnavailableError: where the C++ extension can't be built.
    """
    extensions.enable()
    support: Any = importlib.import_module(f"{_ORTMODULE}._custom_autograd_function")
    _mend_upstream()
    support.enable_custom_autograd_support(True)
    try:
        yield
    finally:
        support.enable_custom_autograd_support(False)

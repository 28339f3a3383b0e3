"""The one place that imports ORTModule 1.19.2, and what it takes to do so on today's torch.

Upstream's ORTModule is frozen at 1.19.2 and was written for torch 2.4. Every workaround here names
its bug and does nothing where the bug isn't. Patches of torch last only for the import of ORTModule
or for one export (:func:`export_scope`); what stays afterwards lies inside `onnxruntime` alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint

from ort_train.errors import BackendUnavailableError, UnsupportedModelError
from ort_train.ortmodule.explain import explained
from ort_train.ortmodule.export import exporter, functions, shape_inference, stop_gradient
from ort_train.ortmodule.kernels import aten, gpu_memory
from ort_train.ortmodule.options import OrtOptions
from ort_train.ortmodule.patching import replaced

#: The patches below are written against this very release and are applied to no other.
SUPPORTED_VERSION = "1.19.2"
_DISTRIBUTIONS = ("onnxruntime-training", "onnxruntime-training-cpu")
_EXTENSIONS_PACKAGE = "onnxruntime.training.ortmodule.torch_cpp_extensions"


def installed_version() -> str | None:
    """Version of the installed onnxruntime-training, or None."""
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def unavailable_reason() -> str | None:
    """Why ORTModule can't be used in this environment (one sentence with the way out), or None."""
    if sys.version_info[:2] not in ((3, 10), (3, 11)):
        return (
            f"Python {sys.version_info.major}.{sys.version_info.minor}: onnxruntime-training "
            f"{SUPPORTED_VERSION} has wheels up to Python 3.11 only; make the environment with "
            "python3.11"
        )
    version = installed_version()
    if version is None:
        return "onnxruntime-training is not installed: pip install onnxruntime-training==1.19.2"
    if version.split("+")[0] != SUPPORTED_VERSION:
        return (
            f"onnxruntime-training {version}: only {SUPPORTED_VERSION} is supported; "
            f"pip install onnxruntime-training=={SUPPORTED_VERSION}"
        )
    if importlib.util.find_spec("torch.onnx") is None:
        return "this torch has no torch.onnx"
    return None


@contextlib.contextmanager
def _untouched_torch() -> Iterator[None]:
    """Undo what importing ORTModule does to torch and DeepSpeed.

    `onnxruntime/training/ortmodule/__init__.py` replaces `torch.manual_seed`,
    `torch.cuda.manual_seed` and the checkpoint functions for the life of the process. Seeds are
    passed to ONNX Runtime step by step instead (engine.py), and recomputation is an option.
    """
    hidden = sys.modules.get("deepspeed")
    sys.modules["deepspeed"] = None  # type: ignore[assignment]  # its import alone takes seconds
    try:
        with (
            replaced(torch, manual_seed=torch.manual_seed),
            replaced(torch.cuda, manual_seed=torch.cuda.manual_seed),
            replaced(torch.utils.checkpoint, checkpoint=torch.utils.checkpoint.checkpoint),
        ):
            yield
    finally:
        del sys.modules["deepspeed"]
        if hidden is not None:
            sys.modules["deepspeed"] = hidden


@contextlib.contextmanager
def _untouched_logging() -> Iterator[None]:
    """`onnxruntime/tools/logger.py` configures the root logger, which is the application's."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level


@contextlib.contextmanager
def _without_build_tools() -> Iterator[None]:
    """ORTModule asks `torch.utils.cpp_extension` for ROCM_HOME alone
    (`_graph_execution_manager.py`), whose import brings setuptools: 4 MiB that no step needs."""
    name = "torch.utils.cpp_extension"
    if torch.version.hip is not None or name in sys.modules:
        yield
        return
    sys.modules[name] = types.SimpleNamespace(ROCM_HOME=None)  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def _provide_extensions() -> None:
    """Put stand-ins where ORTModule looks for its compiled extensions.

    The ATen executor (aten.py) and the GPU allocator (gpu_memory.py) are ours. The PythonOp helpers
    are empty until `compiled_extensions` asks for them.
    """
    interop = types.SimpleNamespace(
        clear_all_grad_fns=lambda: None,
        get_custom_function_forward_runner=lambda: 0,
        get_custom_function_backward_runner=lambda: 0,
    )
    for name, stand_in in (
        ("aten_op_executor", aten.executor),
        ("torch_gpu_allocator", gpu_memory.allocator),
        ("torch_interop_utils", interop),
    ):
        sys.modules.setdefault(f"{_EXTENSIONS_PACKAGE}.{name}", stand_in)  # type: ignore[arg-type]


def _silence_nvtx() -> None:
    """CPU builds of torch raise `NVTX functions not installed` from every nvtx call.

    ORTModule marks its steps with them (`training/utils/torch_profile_utils.py`).
    """
    if torch.version.cuda is None and torch.version.hip is None:
        profile: Any = importlib.import_module("onnxruntime.training.utils.torch_profile_utils")
        profile.torch_nvtx_range_push = lambda message: None
        profile.torch_nvtx_range_pop = lambda: None


def _surface_errors() -> None:
    """Raise the exception of an ATen callback in place of ONNX Runtime's report of its effect,
    and other reports in words that say what to do."""
    agent = importlib.import_module("onnxruntime.training.ortmodule._execution_agent")

    def surfacing(run: Callable[..., Any], pass_name: str) -> Callable[..., Any]:
        @functools.wraps(run)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            try:
                result = run(*args, **kwargs)
            except Exception as error:
                aten.raise_pending(error)
                raise explained(error, f"backend 'ort' failed in the {pass_name} pass") from error
            aten.raise_pending()
            return result

        return wrapper

    for pass_name in ("forward", "backward"):
        method = f"run_{pass_name}"
        run = getattr(agent.TrainingAgent, method)
        setattr(agent.TrainingAgent, method, surfacing(run, pass_name))


@functools.cache
def load() -> types.ModuleType:
    """Import `onnxruntime.training.ortmodule`, ready to use on this torch.

    Raises:
        BackendUnavailableError: with the reason and the way out.
    """
    reason = unavailable_reason()
    if reason is not None:
        raise BackendUnavailableError(f"backend 'ort' can't run here: {reason}")
    _provide_extensions()
    try:
        with (
            OrtOptions().environment(),
            exporter.old_names(),
            _untouched_torch(),
            _untouched_logging(),
            _without_build_tools(),
            warnings.catch_warnings(),
        ):
            # The CUDA wheel says on every CPU machine that it finds no CUDA runtime.
            warnings.filterwarnings("ignore", message=".*cudart_version")
            warnings.filterwarnings("ignore", message="DeepSpeed import error")  # it is hidden
            ortmodule: Any = importlib.import_module("onnxruntime.training.ortmodule")
            # Imported by the first export otherwise, and DeepSpeed with it.
            importlib.import_module("onnxruntime.training.utils.hooks")
    except (ImportError, OSError) as error:
        raise BackendUnavailableError(
            f"backend 'ort' can't run here: importing ORTModule failed with {error}; "
            "`ort-train doctor` looks for the cause"
        ) from error
    # Set at import where no compiled extension lies in site-packages; ours stand in for them.
    ortmodule._FALLBACK_INIT_EXCEPTION = None
    _silence_nvtx()
    _surface_errors()
    return ortmodule


@contextlib.contextmanager
def output_to_file(
    enable: bool = True, on_exit: Callable[..., Any] | None = None
) -> Iterator[None]:
    """What is printed goes to a file, which `on_exit` gets.

    Upstream's own (`_logger.py`, `_suppress_os_stream_output`) asks sys.stdout for its descriptor,
    which that of a notebook or of a test hasn't got, and swallows what was printed before.
    """
    if not enable:
        yield
        return
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        sys.stderr.flush()
        kept = []
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):  # closed, as in a daemon
                kept.append((os.dup(descriptor), descriptor))
                os.dup2(file.fileno(), descriptor)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for original, descriptor in kept:
                os.dup2(original, descriptor)
                os.close(original)
            if on_exit:
                on_exit(file)


def _gradients_of_trainable_only(
    export_model: Callable[..., Any], transform: Callable[[Any], Any]
) -> Callable[..., Any]:
    """ORTModule builds gradients of frozen parameters too (`_graph_transition_manager.py`,
    `_export_model`: every parameter is listed as requiring grad), which costs a LoRA run most of
    its backward pass."""

    @functools.wraps(export_model)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        model, schema, names, names_with_grad = export_model(*args, **kwargs)
        module = kwargs["flattened_module"]
        frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
        # It refuses a parameter that no gradient reaches.
        passed = stop_gradient.passed(model.graph)
        trained = [name for name in names_with_grad if name in passed - frozen]
        if not trained:
            transform(model)  # its own refusal says more, as that of a call without labels
            raise UnsupportedModelError(
                "nothing that it returns depends on a parameter that is trained: if that is meant, "
                "call it under torch.no_grad() or in eval mode"
            )
        return model, schema, names, trained

    return wrapper


#: What an export replaces belongs to the process, so threads export one after the other.
_exporting = threading.RLock()


@contextlib.contextmanager
def export_scope(options: OrtOptions, transform: Callable[[Any], None]) -> Iterator[None]:
    """Everything that construction and export of one ORTModule need, taken back at the end.

    A thread waits here while another one exports.

    Args:
        transform: changes the exported onnx.ModelProto, whose shapes are inferred, in place,
            before its gradient is built.
    """
    with _exporting, _patched(options, transform):
        yield


@contextlib.contextmanager
def _patched(options: OrtOptions, transform: Callable[[Any], None]) -> Iterator[None]:
    load()
    transition = importlib.import_module("onnxruntime.training.ortmodule._graph_transition_manager")
    upstream_logger = importlib.import_module("onnxruntime.training.ortmodule._logger")
    manager = transition.GraphTransitionManager
    infer_shapes = manager._infer_shapes

    def infer_and_transform(model: Any) -> Any:
        stop_gradient.hide(model.graph)
        model = infer_shapes(model)
        transform(model)
        return model

    def add_no_hook(*args: Any, **kwargs: Any) -> list[Any]:
        # Upstream's returns None instead of an empty list where it is off, as it is here, so
        # ORTMODULE_ENABLE_COMPUTE_OPTIMIZER=0 ended in a TypeError.
        return []

    with (
        options.environment(),
        exporter.old_names(),
        exporter.as_default(),
        exporter.restored_symbolics(),
        shape_inference.mended(transition.SymbolicShapeInference),
        replaced(upstream_logger, _suppress_os_stream_output=output_to_file),
        functions.as_python_ops() if options.compiled_extensions else functions.refused(),
        replaced(
            manager,
            _export_model=staticmethod(
                _gradients_of_trainable_only(manager._export_model, infer_and_transform)
            ),
            _add_check_label_sparsity_hook=staticmethod(add_no_hook),
            _infer_shapes=staticmethod(infer_and_transform),
        ),
    ):
        yield

"""Backends behind one function: a module's training forward run eagerly, compiled, or by ORT."""

from __future__ import annotations

import contextlib
import functools
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from ort_train.errors import BackendUnavailableError, ConfigError
from ort_train.forward import TrainingForward, give_back, take_over, taken_over

if TYPE_CHECKING:
    from ort_train.auto.trial import Decision
    from ort_train.ortmodule import OrtOptions
    from ort_train.ortmodule.forward import OrtForward

BackendName = Literal["eager", "compile", "ort", "auto"]
PrecisionName = Literal["fp32", "bf16", "fp16", "auto"]

_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def available(backend: str, precision: str = "fp32", device_type: str = "cpu") -> tuple[bool, str]:
    """Whether a backend can run here, and if not, why and what to do.

    Args:
        backend: "eager", "compile", "ort" or "auto".
        precision: "fp32", "bf16" or "fp16"; "auto" with backend "auto" only.
        device_type: of the module: "cpu" or "cuda".

    Returns:
        (True, "") or (False, reason).

    Raises:
        ConfigError: for names that are no backend or precision, or don't go together.
    """
    problems = []
    if backend not in get_args(BackendName):
        problems.append(f"backend {backend!r} is not one of {', '.join(get_args(BackendName))}")
    if precision not in get_args(PrecisionName):
        names = ", ".join(get_args(PrecisionName))
        problems.append(f"precision {precision!r} is not one of {names}")
    if precision == "auto" and backend != "auto":
        problems.append(
            f"precision 'auto' is chosen by backend 'auto', but backend is {backend!r}: set "
            "backend 'auto', or precision 'fp32', 'bf16' or 'fp16'"
        )
    if problems:
        raise ConfigError(problems)
    reason = None
    if backend == "compile":
        reason = _no_compiler(device_type)
    elif backend == "ort":
        reason = _no_ort(device_type)
    if reason is None and precision == "fp16" and device_type == "cpu":
        reason = "fp16 training needs a GPU: use precision fp32 or bf16 on CPU"
    return (reason is None, reason or "")


def _no_compiler(device_type: str) -> str | None:
    if device_type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "torch.compile on CUDA needs Triton: pip install triton"
        return None
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        compiler = get_cpp_compiler()
    except Exception:
        return "torch.compile on CPU needs a C++ compiler: apt-get install g++"
    if shutil.which(compiler) is None:
        return f"torch.compile on CPU needs a C++ compiler, and {compiler!r} is not on the PATH"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "torch.compile on CPU needs Python's headers: apt-get install python3-dev"
    return None


def _no_ort(device_type: str) -> str | None:
    from ort_train.ortmodule import cuda, upstream

    reason = upstream.unavailable_reason()
    if reason is None and device_type == "cuda":
        reason = cuda.unavailable_reason()
    return reason


class _EagerRunner:
    """The module's own forward, under autocast where a reduced precision is asked for."""

    def __init__(self, module: torch.nn.Module, original: Callable[..., Any], *, precision: str):
        self._device_type = _device_type(module)
        self._dtype = _AUTOCAST_DTYPES.get(precision)
        self._original = original
        #: What it runs in ONNX Runtime, if anything.
        self.ort: OrtForward | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._dtype is None:
            return self._original(*args, **kwargs)
        with torch.autocast(self._device_type, self._dtype):
            return self._original(*args, **kwargs)


class _CompileRunner:
    """The module's own forward through torch.compile."""

    def __init__(self, module: torch.nn.Module, original: Callable[..., Any], *, precision: str):
        self._eager = _EagerRunner(module, original, precision=precision)
        # Compiled as a plain function: the module's eval and generation paths stay uncompiled.
        self._compiled = torch.compile(lambda *args, **kwargs: self._eager(*args, **kwargs))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._compiled(*args, **kwargs)


def _make_ort_runner(
    module: torch.nn.Module, original: Callable[..., Any], *, precision: str, options: OrtOptions
) -> Callable[..., Any]:
    from ort_train.ortmodule.forward import OrtForward

    if _device_type(module) == "cpu":  # its graph sees to the precision
        forward = OrtForward(module, original, options, precision)
        runner = _EagerRunner(module, forward, precision="fp32")
    else:
        forward = OrtForward(module, original, options)
        runner = _EagerRunner(module, forward, precision=precision)
    runner.ort = forward
    return runner


def _make_auto_runner(
    module: torch.nn.Module, original: Callable[..., Any], **settings: Any
) -> Callable[..., Any]:
    from ort_train.auto.autoselect import AutoRunner

    return AutoRunner(module, original, **settings)


def runner_factory(
    backend: str, precision: str, options: OrtOptions, loss_only: bool = False
) -> Callable[[torch.nn.Module, Callable[..., Any]], Callable[..., Any]]:
    """What makes a backend's runner for a module and its own forward; see :func:`wrap`."""
    if backend == "eager":
        return functools.partial(_EagerRunner, precision=precision)
    if backend == "compile":
        return functools.partial(_CompileRunner, precision=precision)
    if backend == "ort":
        return functools.partial(_make_ort_runner, precision=precision, options=options)
    return functools.partial(
        _make_auto_runner, precision=precision, options=options, loss_only=loss_only
    )


def _device_type(module: torch.nn.Module) -> str:
    parameter = next(module.parameters(), None)
    return parameter.device.type if parameter is not None else "cpu"


def wrap(
    module: torch.nn.Module,
    backend: BackendName = "auto",
    precision: PrecisionName = "fp32",
    options: OrtOptions | None = None,
    *,
    loss_only: bool = False,
) -> torch.nn.Module:
    """Run a module's training steps by a backend, in place.

    Calls in training mode with gradients enabled go to the backend; eval mode, no-grad calls and
    `generate` run the module's own forward. Wrap after an adapter is added and before DDP or
    DeepSpeed. The optimizer, the loss of your own and the loop stay as they are.

    Args:
        module: any nn.Module; its outputs keep their type and fields.
        backend: "eager", "compile" (torch.compile), "ort" (ONNX Runtime), or "auto": the fastest
            on the first two batches of those that agree with eager.
        precision: "fp32", or autocast to "bf16" or "fp16" (with a GradScaler of your own). "auto",
            with backend "auto": fp32, or bf16 where the hardware has it and it is faster.
        options: how ONNX Runtime builds and runs the graph.
        loss_only: your loop reads nothing of a training call's result but its `loss`. Backend
            "auto" then leaves out padding and ignored labels where that is faster
            (OrtOptions.padding_sparsity and label_sparsity, unless you set them).

    Returns:
        The same object.

    Raises:
        ConfigError: for unknown names, or options that the device can't honour.
        BackendUnavailableError: where the backend can't run here, with the way out.
        UnsupportedModelError: where the module is wrapped already. What the backend can't take
            shows on the first training call, before any weight has changed.
    """
    from ort_train.ortmodule import OrtOptions

    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"wrap takes a torch.nn.Module, not a {type(module).__name__}")
    options = options if options is not None else OrtOptions()
    if isinstance(module, torch.nn.DataParallel):
        raise ConfigError(
            "torch.nn.DataParallel replicates the module every step: use DistributedDataParallel "
            "and wrap the module inside it"
        )
    device_type = _device_type(module)
    can_run, reason = available(backend, precision, device_type)
    if loss_only and backend != "auto":
        raise ConfigError(
            f"loss_only is read by backend 'auto' only, and backend is {backend!r}: set "
            "label_sparsity and padding_sparsity of OrtOptions in its place"
        )
    if not can_run:
        raise BackendUnavailableError(f"backend {backend!r} can't run here: {reason}")
    if backend in ("ort", "auto"):
        problems = options.device_problems(device_type)
        if problems:
            raise ConfigError(problems)
    return take_over(module, runner_factory(backend, precision, options, loss_only))


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """Undo :func:`wrap`: the module's own forward is back. Returns the same object."""
    return give_back(module)


@contextlib.contextmanager
def accumulating(module: torch.nn.Module) -> Iterator[None]:
    """The weights of a wrapped module stay as they are within: the micro-batches of one step.

    Backend "ort" in bf16 on a CPU then rounds each weight once, and not at every micro-batch
    (OrtOptions.keep_rounded_weights); to others it makes no difference. ORTTrainer does it by
    itself.

    Args:
        module: as given to :func:`wrap`.

    Raises:
        ConfigError: where the module isn't wrapped.
    """
    stand_in = taken_over(module)
    if stand_in is None:
        raise ConfigError(
            f"{type(module).__name__} isn't wrapped: accumulating takes the module that was given "
            "to ort_train.wrap, not DDP or DeepSpeed around it"
        )
    keep_trained_weights(stand_in, True)
    try:
        yield
    finally:
        keep_trained_weights(stand_in, False)


def keep_trained_weights(stand_in: TrainingForward, is_kept: bool) -> None:
    """As :func:`accumulating` from now on, or no longer."""
    forward = ort_forward(stand_in)
    if forward is not None and forward.rounded_weights is not None:
        forward.rounded_weights.keep_trained(is_kept)


def decision(module: torch.nn.Module) -> Decision | None:
    """What `backend="auto"` chose for a wrapped module and why, or None before its trial."""
    stand_in = taken_over(module)
    return decision_of(stand_in) if stand_in else None


def decision_of(stand_in: TrainingForward) -> Decision | None:
    """As :func:`decision`, of what stands in a module's `forward`."""
    return getattr(stand_in.runner, "decision", None)


def ort_forward(stand_in: TrainingForward) -> OrtForward | None:
    """What runs training calls in ONNX Runtime; None with other backends, and before backend "auto"
    has chosen."""
    return getattr(stand_in.runner, "ort", None)

"""What a built training graph depends on, as a key: equal keys have equal graphs.

Everything that an export or a build of gradients could read is part of it: the code that is traced
(described.py) and ours, versions, the values of modules' attributes and buffers, what is known of
parameters but their values, the call, torch's switches, options. What can't be told with certainty
has no key, and its graph isn't cached.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ort_train.ortmodule.cache.described import (
    Description,
    UndescribableError,
    tensor_kind,
    tensor_token,
)
from ort_train.ortmodule.cache.packages import package
from ort_train.ortmodule.call import CallSchema
from ort_train.ortmodule.export import exporter
from ort_train.ortmodule.options import OrtOptions

_PACKAGE = Path(__file__).resolve().parents[2]
_DISTRIBUTIONS = (
    "accelerate", "bitsandbytes", "numpy", "onnx", "onnxruntime-training",
    "onnxruntime-training-cpu", "peft", "protobuf", "sympy", "torch", "torchvision",
    "transformers", "triton",
)  # fmt: skip
#: Options of which no graph knows.
_OF_THE_RUN = frozenset(
    {"export_cache", "max_graphs", "num_threads", "allow_spinning", "keep_freed_memory"}
)
#: Those that leave traces outside of the graph, and why that rules a cached one out.
_SIDE_EFFECTS = {
    "compiled_extensions": "registers torch.autograd.Functions in the process that exports",
    "save_onnx": "writes the graphs of every stage",
    "profile_prefix": "writes a profile of every session",
}
_FILES = ("recompute_config", "triton_config")
#: Of a module's `__dict__`: what is described by itself or matters to no forward.
_SKIPPED = frozenset(
    """
    _parameters _buffers _modules _forward_hooks _forward_hooks_with_kwargs
    _forward_hooks_always_called _forward_pre_hooks _forward_pre_hooks_with_kwargs _backward_hooks
    _backward_pre_hooks _is_full_backward_hook _state_dict_hooks _state_dict_pre_hooks
    _load_state_dict_pre_hooks _load_state_dict_post_hooks
    """.split()  # noqa: SIM905
)
#: transformers' own, by which it collects hidden states; of the same code in every process.
_KNOWN_HOOKS = "transformers.utils.output_capturing"


def key_of(
    module: torch.nn.Module,
    forward: Callable[..., Any],
    schema: CallSchema,
    tensors: tuple[torch.Tensor, ...],
    options: OrtOptions,
    precision: str,
) -> str:
    """The key of the graph that a first call builds.

    Args:
        module: holds the parameters and buffers.
        forward: the module's own forward.
        schema: of the call.
        tensors: of the call; their sizes, but not their values, are part of the key, as a trace
            may take a branch by them.
        options: how the graph is built.
        precision: of its matrix products.

    Raises:
        UndescribableError: where something can't be told with certainty.
    """
    for name, reason in _SIDE_EFFECTS.items():
        if getattr(options, name):
            raise UndescribableError(f"option {name} {reason}")
    parts = list(module.named_modules(remove_duplicate=False))
    classes = {base for _, part in parts for base in type(part).__mro__}
    description = Description(own={package(kind.__module__) for kind in classes})
    _add_environment(description)
    description.add("options", dict(_options(options)))
    description.add("precision", precision)
    _add_call(description, schema, tensors)
    for path, part in parts:
        description.name(part, f"part {path!r}")
    for path, part in parts:
        _add_part(description, path, part, is_root=part is module)
    description.add("forward", forward)
    return description.hexdigest()[:40]


# --- Everything but the module


@functools.cache
def _source_digest() -> str:
    """Of this package's own files."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(_PACKAGE)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _versions() -> dict[str, str | None]:
    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in _DISTRIBUTIONS}


@functools.cache
def _processor() -> str:
    """Which instructions ONNX Runtime's optimizations may choose layouts for."""
    flags = ""
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {flags}"


def _switches() -> dict[str, Any]:
    """torch's process-wide settings that a trace or a graph may follow."""
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    autocast = {
        device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
    }
    return {
        "gpus": gpus,
        "autocast": autocast,
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fp32 products": torch.get_float32_matmul_precision(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
        "onednn": torch.backends.mkldnn.enabled,
        "grad": torch.is_grad_enabled(),
    }


def _add_environment(description: Description) -> None:
    _refuse_global_hooks()
    description.add("source", _source_digest())
    description.add("python", sys.version)
    description.add("torch", (str(torch.__version__), torch.version.git_version))
    description.add("versions", _versions())
    description.add("processor", _processor())
    description.add("switches", _switches())
    for name, opsets in sorted(exporter.symbolic_overrides().items()):
        if opsets:
            description.add(f"symbolic of {name}", opsets)


def _refuse_global_hooks() -> None:
    internals: Any = torch.nn.modules.module
    for name in ("_global_forward_hooks", "_global_forward_pre_hooks"):
        if getattr(internals, name):
            raise UndescribableError("torch has hooks on the forward of all modules")
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        raise UndescribableError("a mode of torch is active, such as TorchFunctionMode")


def _options(options: OrtOptions) -> Iterator[tuple[str, Any]]:
    for field in fields(options):
        if field.name in _OF_THE_RUN:
            continue
        value = getattr(options, field.name)
        if field.name in _FILES and value is not None:
            value = Path(value).read_bytes()
        yield field.name, value if not isinstance(value, os.PathLike) else os.fspath(value)


def _add_call(
    description: Description, schema: CallSchema, tensors: tuple[torch.Tensor, ...]
) -> None:
    try:
        spec = pytree.treespec_dumps(schema.spec)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise UndescribableError(f"the call's arguments can't be written down: {error}") from error
    description.add("call", (spec, schema.names, schema.constants))
    description.add("constant types", [kind.__qualname__ for kind in schema.constant_types])
    description.add("tensors", [tensor_kind(tensor) for tensor in tensors])


# --- The module


def _add_part(description: Description, path: str, part: torch.nn.Module, is_root: bool) -> None:
    description.add("part", path)
    description.add("class", type(part))
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        # The module's own run outside of what is traced.
        for hook in () if is_root else getattr(part, kind).values():
            if getattr(hook, "__module__", None) != _KNOWN_HOOKS:
                raise UndescribableError(f"{path!r} has a hook on its forward")
            description.add(kind, hook)
    for name, parameter in part._parameters.items():
        _add_parameter(description, f"{path}.{name}", parameter)
    for name, buffer in part._buffers.items():
        where = f"buffer {path}.{name}"
        value = None if buffer is None else tensor_token(buffer, where)
        description.add(where, (name in part._non_persistent_buffers_set, value))
    description.add("parts", list(part._modules.items()))
    for name, value in part.__dict__.items():
        if name in _SKIPPED or (is_root and name == "forward"):  # ours stands in for the latter
            continue
        description.add(f"{path}.{name}", value)


def _add_parameter(
    description: Description, where: str, parameter: torch.nn.Parameter | None
) -> None:
    """A parameter is an input of the graph: its values are not a part of it."""
    if parameter is None:
        description.add(where, None)
        return
    description.add(where, parameter_token(parameter, where))
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        description.add(f"{where}.quant_state", list(_quant_state(state)))
    # The same object under another name is tied.
    description.add("tied", parameter if description.knows(parameter) else None)
    description.name(parameter, f"parameter {where}")


def parameter_token(parameter: torch.nn.Parameter, where: str) -> str:
    """All of a parameter but its values.

    Raises:
        UndescribableError: for a class that may behave in its own way.
    """
    kind = type(parameter)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind is not torch.nn.Parameter and name != "bitsandbytes.nn.modules.Params4bit":
        raise UndescribableError(f"parameter {where} is a {name}")
    return f"{name} {tensor_kind(parameter)}"


def _quant_state(state: Any) -> Iterator[Any]:
    """Of bitsandbytes' QuantState, whose tensors are inputs of the graph, too."""
    for name, value in sorted(vars(state).items()):
        if isinstance(value, torch.Tensor):
            yield name, tensor_kind(value)
        elif type(value) is type(state):
            yield name, list(_quant_state(value))
        else:
            yield name, value

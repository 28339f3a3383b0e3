"""What is exported of a module, and the module kept as it is meanwhile."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ort_train.errors import UnsupportedModelError
from ort_train.ortmodule.call import CallSchema, ResultSchema, describe_result
from ort_train.ortmodule.constants.known_tensor import same_values
from ort_train.ortmodule.decisions import Decisions
from ort_train.ortmodule.export import layers_4bit, tracing

#: Before the name of a parameter or buffer in the graph: ORTModule's own wrapper, and ours
#: (`GraphModule.module`).
MODULE_PREFIX = "_original_module.module."


class GraphModule(torch.nn.Module):
    """What is exported: flat tensors in, flat tensors out, everything else constant.

    Args:
        module: holds the parameters and buffers.
        forward: the module's own forward.
        schema: the calls that it takes.
        without_logits: return all but the logits.

    Attributes:
        result_schema: of what the forward returned last; None before.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        forward: Callable[..., Any],
        schema: CallSchema,
        without_logits: bool,
    ):
        super().__init__()
        self._without_logits = without_logits
        self.module = module
        self.module_forward = forward
        self.schema = schema
        self.result_schema: ResultSchema | None = None
        #: What the traced forward decided by the sizes of its batch.
        self.decisions = Decisions()
        self.__signature__ = None
        layers_4bit.bind_scales(self, module)

    def forward(self, **tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = tuple(tensors[name] for name in self.schema.names)
        args, kwargs = self.schema.rebuild(inputs)
        if torch._C._get_tracing_state() is None:
            result = self.module_forward(*args, **kwargs)
        else:
            with tracing.decisions_recorded(inputs) as recorder:
                result = self.module_forward(*args, **kwargs)
            self.decisions = recorder.finish()
        self.result_schema, outputs = describe_result(result, self._without_logits)
        return outputs


@contextlib.contextmanager
def training_flags_kept(module: torch.nn.Module) -> Iterator[None]:
    """ORTModule calls train() on everything below it; submodules kept in eval mode stay so."""
    flags = [(m, m.training) for m in module.modules()]
    try:
        yield
    finally:
        for m, training in flags:
            m.training = training


@contextlib.contextmanager
def buffers_kept(module: torch.nn.Module) -> Iterator[None]:
    """Refuse a forward that updates its buffers, as no graph would; they are as before.

    Raises:
        UnsupportedModelError: naming the buffer.
    """
    saved = [
        (f"{prefix}.{name}".lstrip("."), owner, name, buffer, buffer.detach().clone())
        for prefix, owner in module.named_modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    changed = []
    try:
        yield
    finally:
        with torch.no_grad():
            for path, owner, name, buffer, value in saved:
                if not same_values(owner._buffers.get(name), value):
                    changed.append((path, owner))
                    owner._buffers[name] = buffer
                    buffer.copy_(value)
    if changed:
        path, owner = changed[0]
        part, _, name = path.rpartition(".")
        raise UnsupportedModelError(
            f"the forward of {type(owner).__name__} {part!r} updates its buffer {name!r} in every "
            "training call, which a graph of backend 'ort' doesn't: put that part into eval mode "
            f"(module.get_submodule({part!r}).eval(), which freezes statistics as in most "
            "fine-tuning), or train with backend='compile' or 'eager'"
        )


@contextlib.contextmanager
def without_checkpointing(module: torch.nn.Module) -> Iterator[bool]:
    """Gradient checkpointing off while tracing; yields whether it was on anywhere.

    The exporter can't trace torch's checkpoint function. ONNX Runtime recomputes by itself.
    """
    flagged = [m for m in module.modules() if getattr(m, "gradient_checkpointing", False)]
    for m in flagged:
        m.gradient_checkpointing = False
    try:
        yield bool(flagged)
    finally:
        for m in flagged:
            m.gradient_checkpointing = True


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """The TorchScript exporter and its tracer warn per operator, and of their own deprecation."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", module=r"torch\.onnx.*")
        warnings.filterwarnings("ignore", module=r"onnxruntime.*")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield

"""Taking over a module's training forward, in place.

The module stays the object it was: its class, config, state-dict keys, `generate` and
`save_pretrained` are untouched, and DDP, DeepSpeed or transformers' Trainer wrap it as they would
without us. Only its `forward` attribute is replaced by a callable that sends training calls to
ONNX Runtime and everything else (eval mode, no-grad, generation) to the module's own forward.
"""

from __future__ import annotations

import copy
import inspect
import logging
from typing import Any

import torch

from ort_train.errors import UnsupportedModelError
from ort_train.ortmodule.call import CallSchema, describe_call
from ort_train.ortmodule.engine import Engine
from ort_train.ortmodule.options import OrtOptions

logger = logging.getLogger(__name__)


class OrtForward:
    """A module's forward with training steps run by ONNX Runtime.

    Different schemas of calls (other arguments, ranks, dtypes, other parameters trained) get a
    graph each; batch and sequence lengths are dynamic and share one.

    Args:
        module: whose forward is taken over.
        options: how ONNX Runtime builds and runs the graphs.
    """

    def __init__(self, module: torch.nn.Module, options: OrtOptions):
        self.module = module
        self.options = options
        self.original = module.forward
        self.engines: dict[Any, Engine] = {}
        self._accepts_use_cache = "use_cache" in inspect.signature(self.original).parameters

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if not (module.training and torch.is_grad_enabled()) or torch.jit.is_tracing():
            return self.original(*args, **kwargs)
        _refuse_autocast()
        if self._accepts_use_cache and _asks_for_cache(module, kwargs):
            # A cache is of no use in a training step, and no graph can return one.
            kwargs["use_cache"] = False
        schema, tensors = describe_call(args, kwargs)
        parameters = list(module.parameters())
        key = (
            schema,
            tuple((p.requires_grad, p.dtype, p.shape) for p in parameters),
            tuple(m.training for m in module.modules()),
        )
        engine = self.engines.get(key)
        if engine is None:
            engine = self._new_engine(key, schema)
        try:
            return engine(tensors, tuple(map(id, parameters)))
        except BaseException:
            if engine.build_s == 0.0:
                del self.engines[key]  # a failed build is tried again, not kept half-made
            raise

    def _new_engine(self, key: Any, schema: CallSchema) -> Engine:
        if len(self.engines) >= self.options.max_graphs:
            raise UnsupportedModelError(
                f"{len(self.engines)} training graphs were built for "
                f"{type(self.module).__name__}, the limit max_graphs={self.options.max_graphs}: "
                f"{self._what_changes(schema)} from call to call; pass it as a tensor, leave it "
                "out, or raise max_graphs"
            )
        engine = Engine(self.module, self.original, schema, self.options)
        self.engines[key] = engine
        return engine

    def _what_changes(self, schema: CallSchema) -> str:
        last: CallSchema = next(reversed(self.engines))[0]
        if schema.constants != last.constants:
            changed = set(schema.constants) ^ set(last.constants)
            return f"a constant argument changes ({sorted(map(str, changed))[:4]})"
        if schema.names != last.names:
            return f"the arguments change ({sorted(set(schema.names) ^ set(last.names))})"
        return "the tensors' ranks or dtypes, or what is trained, changes"

    def __deepcopy__(self, memo: dict[int, Any]) -> OrtForward:
        return self._moved_to(copy.deepcopy(self.module, memo), memo)

    def _moved_to(self, module: torch.nn.Module, memo: dict[int, Any]) -> OrtForward:
        new = object.__new__(OrtForward)
        new.module, new.options, new.engines = module, self.options, {}
        new.original = copy.deepcopy(self.original, memo)
        new._accepts_use_cache = self._accepts_use_cache
        return new

    def __getstate__(self) -> dict[str, Any]:
        # Sessions can't be pickled; a loaded module builds its graphs again on its first step.
        return {**self.__dict__, "engines": {}}


def _asks_for_cache(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("use_cache")
    if asked is None:
        asked = getattr(getattr(module, "config", None), "use_cache", False)
    return bool(asked)


def _refuse_autocast() -> None:
    for device_type in ("cpu",):
        if torch.is_autocast_enabled(device_type):
            raise UnsupportedModelError(
                f"torch.autocast('{device_type}', {torch.get_autocast_dtype(device_type)}) is "
                "active, and ONNX Runtime's CPU kernels compute in fp32 only: train with "
                "precision='fp32', or with backend='compile' for reduced precision"
            )


def is_taken_over(module: torch.nn.Module) -> bool:
    """Whether the module's training forward is run by ONNX Runtime."""
    return isinstance(module.__dict__.get("forward"), OrtForward)


def take_over(module: torch.nn.Module, options: OrtOptions) -> torch.nn.Module:
    """Replace the module's training forward, in place; returns the module.

    Raises:
        UnsupportedModelError: where the module, or a part of it, is taken over already.
    """
    for name, part in module.named_modules():
        if is_taken_over(part):
            where = f"its submodule {name!r}" if name else "it"
            raise UnsupportedModelError(
                f"{type(module).__name__} can't be wrapped: {where} is run by ONNX Runtime "
                "already; call ort_train.unwrap first, or wrap once, outermost"
            )
    module.forward = OrtForward(module, options)
    return module


def give_back(module: torch.nn.Module) -> torch.nn.Module:
    """Undo :func:`take_over`; returns the module."""
    if is_taken_over(module):
        original = module.__dict__["forward"].original
        del module.forward
        if module.forward != original:  # it was an instance attribute before us, too
            module.forward = original
    return module

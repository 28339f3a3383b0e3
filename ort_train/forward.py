"""Taking over a module's training forward, in place.

The module stays the object it was: its class, config, state-dict keys, `generate` and
`save_pretrained` are untouched, and DDP, DeepSpeed or transformers' Trainer wrap it as they would
without us. Only its `forward` attribute is replaced, by a callable that sends training calls to a
backend's runner and everything else (eval mode, no-grad, generation) to the module's own forward.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch

from ort_train.errors import UnsupportedModelError

#: Runs training calls of a module: called as the module's own forward is.
Runner = Callable[..., Any]
#: Makes a runner of (module, its own forward). Picklable and stateless: it outlives copies.
MakeRunner = Callable[[torch.nn.Module, Callable[..., Any]], Runner]


class TrainingForward:
    """Stands in a module's `forward` attribute.

    Args:
        module: whose forward is taken over.
        make_runner: makes what training calls go to.
    """

    def __init__(self, module: torch.nn.Module, make_runner: MakeRunner):
        self.module = module
        self.original = module.forward
        self.make_runner = make_runner
        self._runner: Runner | None = None

    @property
    def runner(self) -> Runner:
        """What training calls go to; made on first use, when the module is whole."""
        if self._runner is None:
            for name, part in self.module.named_modules():
                if name and taken_over(part) is not None:
                    raise UnsupportedModelError(
                        f"submodule {name!r} is wrapped inside of {type(self.module).__name__}, "
                        "which is wrapped, too: call ort_train.unwrap on one of them"
                    )
            self._runner = self.make_runner(self.module, self.original)
        return self._runner

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        is_training_call = self.module.training and torch.is_grad_enabled()
        if is_training_call and not torch.jit.is_tracing():
            return self.runner(*args, **kwargs)
        return self.original(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainingForward:
        new = object.__new__(TrainingForward)
        memo[id(self)] = new
        new.module = copy.deepcopy(self.module, memo)
        new.original = copy.deepcopy(self.original, memo)
        new.make_runner = self.make_runner
        new._runner = None
        return new

    def __getstate__(self) -> dict[str, Any]:
        # A runner holds sessions, compiled code and references into one module's parameters:
        # copies and loaded pickles make a new one on their first training call.
        return {**self.__dict__, "_runner": None}


def taken_over(module: torch.nn.Module) -> TrainingForward | None:
    """The stand-in in a module's `forward`, or None."""
    forward = module.__dict__.get("forward")
    return forward if isinstance(forward, TrainingForward) else None


def take_over(module: torch.nn.Module, make_runner: MakeRunner) -> torch.nn.Module:
    """Replace the module's training forward, in place; returns the module.

    Raises:
        UnsupportedModelError: where the module, or a part of it, is taken over already.
    """
    for name, part in module.named_modules():
        if taken_over(part) is not None:
            where = f"its submodule {name!r}" if name else "it"
            raise UnsupportedModelError(
                f"{type(module).__name__} can't be wrapped: {where} is wrapped already; "
                "call ort_train.unwrap on it first, or wrap once, outermost"
            )
    module.forward = TrainingForward(module, make_runner)
    return module


def give_back(module: torch.nn.Module) -> torch.nn.Module:
    """Undo :func:`take_over`; returns the module. A module not taken over is left as it is."""
    stand_in = taken_over(module)
    if stand_in is not None:
        del module.forward
        if module.forward != stand_in.original:  # it was an instance attribute before us, too
            module.forward = stand_in.original
    return module

"""Training calls of a module, run by ONNX Runtime: a graph for every schema of calls."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import operator
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from ort_train.errors import UnsupportedModelError
from ort_train.ortmodule.cache.packages import package
from ort_train.ortmodule.call import (
    CallSchema,
    describe_call,
    fits_pattern,
    logits_of,
    size_pattern,
)
from ort_train.ortmodule.deferred import deferred
from ort_train.ortmodule.engine import Engine
from ort_train.ortmodule.kernels import onednn
from ort_train.ortmodule.kernels.rounded_weights import RoundedWeights
from ort_train.ortmodule.module_state import StateReader, forward_hooks
from ort_train.ortmodule.options import OrtOptions
from ort_train.ortmodule.sparse.sparsity import Savings

logger = logging.getLogger(__name__)

_version = operator.attrgetter("_version")
#: Packages whose forward hooks compute (a normalized, pruned or moved weight) and keep nothing for
#: whoever set them. Of any other, installed or not, that isn't known.
_ONLY_COMPUTE = frozenset({"accelerate", "peft", "torch", "transformers"})


class OrtForward:
    """Runs a module's training calls in ONNX Runtime.

    Different schemas of calls (other arguments, ranks, dtypes, other parameters trained) get a
    graph each; batch and sequence lengths are dynamic and share one.

    Args:
        module: holds the parameters; in training mode with gradients enabled when called.
        original: the module's own forward, which is exported.
        options: how ONNX Runtime builds and runs the graphs.
        precision: of the matrix products on a CPU, "fp32" or "bf16". Autocast must be off.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        original: Callable[..., Any],
        options: OrtOptions,
        precision: str = "fp32",
    ):
        self.module = module
        self.options = options
        self.precision = precision
        if precision == "bf16" and (price := onednn.slow_bf16()) is not None:
            warnings.warn(
                f"{price}; precision='fp32' trains faster here", UserWarning, stacklevel=2
            )
        self.original = original
        self.engines: dict[Any, Engine] = {}
        self._read_state = StateReader(module)
        #: Copies of weights that steps share; None where none are kept.
        self.rounded_weights: RoundedWeights | None = None
        if precision == "bf16" and options.keep_rounded_weights:
            self.rounded_weights = RoundedWeights()
        #: Whether the first call took its graph from the cache; None before it.
        self.graph_from_cache: bool | None = None
        self._num_stale = 0
        self._known_hooks: list[Any] = []
        #: The line that decides otherwise than in any graph, for a call that has none yet.
        self._decides_anew: str | None = None
        self._are_logits_read = False
        self._accepts_use_cache = "use_cache" in inspect.signature(self.original).parameters

    @property
    def savings(self) -> Savings:
        """What the graph that was built last leaves out of a batch."""
        return next(reversed(self.engines.values())).savings if self.engines else Savings()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return self._call(*args, **kwargs)
        with _without_autocast(self.precision):
            return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if self._accepts_use_cache and _asks_for_cache(module, kwargs):
            # A cache is of no use in a training step, and no graph can return one.
            kwargs["use_cache"] = False
        schema, tensors = describe_call(args, kwargs)
        return self._run(args, kwargs, schema, tensors)

    def _run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        schema: CallSchema,
        tensors: tuple[torch.Tensor, ...],
    ) -> Any:
        module = self.module
        state = self._read_state()
        if not state.is_trained and not any(t.requires_grad for t in tensors):
            return self.original(*args, **kwargs)  # there is nothing to train, in eager neither
        pattern = size_pattern(tensors)
        key = (schema, state.key, _gpu_autocast(), self._are_logits_read, pattern, 0)
        key = self._key_of_fitting(key, tensors)
        engine = self.engines.get(key)
        if engine is not None and engine.awaits_backward:
            del self.engines[key]
            self._num_stale += 1
            if self._num_stale >= self.options.max_graphs:
                raise UnsupportedModelError(
                    f"{type(module).__name__} recomputes dropout, whose graph has to be built anew "
                    "after every forward without a backward, and that happened "
                    f"{self._num_stale} times (limit max_graphs): run each forward's backward "
                    "before the next, set dropout to 0, or train without recomputation"
                )
            engine = None
        if engine is not None and (changed := engine.changed_constant(state.buffers)) is not None:
            del self.engines[key]
            self._num_stale += 1
            if self._num_stale >= self.options.max_graphs:
                raise UnsupportedModelError(
                    f"{changed}, which the forward of {type(module).__name__} may read, is "
                    f"constant in a graph, and changed {self._num_stale} times (limit "
                    "max_graphs): make it a buffer with persistent=True, or an argument of forward "
                    "that is a tensor"
                )
            logger.info("%s has changed: its training graph is built anew", changed)
            engine = None
        if engine is None:
            engine = self._new_engine(key, schema)
        compute_logits = self._logits_of_call(
            args, kwargs, schema, tensors, state.parameters, engine
        )
        if self.rounded_weights is not None:
            self.rounded_weights.confirm(state.parameters)
        try:
            result = engine(tensors, state, compute_logits)
        except BaseException:
            if engine.build_s == 0.0:
                del self.engines[key]  # a failed build is tried again, not kept half-made
            raise
        if self.graph_from_cache is None:
            self.graph_from_cache = engine.saved_s is not None
        return result

    def _logits_of_call(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        schema: CallSchema,
        tensors: tuple[torch.Tensor, ...],
        parameters: tuple[torch.nn.Parameter, ...],
        engine: Engine,
    ) -> Callable[[torch.dtype], Any]:
        """What makes the stand-in for the logits of a call whose graph leaves them out.

        Who reads it gets the same call's logits from a graph that has them. As who reads them once
        reads them in every step, that graph takes over.
        """
        versions = list(map(_version, parameters))

        def compute() -> torch.Tensor:
            name = type(self.module).__name__
            if engine.is_stochastic or list(map(_version, parameters)) != versions:
                why = "it has dropout" if engine.is_stochastic else "its weights have changed since"
                raise UnsupportedModelError(
                    f"the logits of this training call of {name} weren't computed "
                    f"(label_sparsity), and can't be now, as {why}: set label_sparsity=false to "
                    "have them in every call"
                )
            if not self._are_logits_read:
                logger.warning(
                    "the logits of a training call of %s are read, so label_sparsity saves "
                    "nothing from now on: don't read them, or set label_sparsity=false, which "
                    "spares a second graph",
                    name,
                )
                self._are_logits_read = True
            with torch.enable_grad(), _without_autocast(self.precision):
                return logits_of(self._run(args, kwargs, schema, tensors))

        def make(dtype: torch.dtype) -> Any:
            device = parameters[0].device if parameters else tensors[0].device
            return deferred(compute, dtype, device)

        return make

    def _key_of_fitting(self, key: Any, tensors: tuple[torch.Tensor, ...]) -> Any:
        """The key of a graph that was traced with sizes as general as this call's, and that decided
        as its sizes do, or its own."""
        self._decides_anew = None
        engine = self.engines.get(key)
        if engine is not None and engine.decided_otherwise(tensors) is None:
            return key
        *rest, _, _ = key
        for known, engine in self.engines.items():
            *known_rest, pattern, _ = known
            if known_rest == rest and fits_pattern(tensors, pattern):
                self._decides_anew = engine.decided_otherwise(tensors)
                if self._decides_anew is None:
                    return known
        *rest, number = key
        while (*rest, number) in self.engines:
            number += 1
        return (*rest, number)

    def _new_engine(self, key: Any, schema: CallSchema) -> Engine:
        _refuse_half_precision(self.module)
        _refuse_backward_hooks(self.module)
        _warn_of_forward_hooks(self.module)
        if len(self.engines) >= self.options.max_graphs:
            raise UnsupportedModelError(
                f"{len(self.engines)} training graphs were built for "
                f"{type(self.module).__name__}, the limit max_graphs={self.options.max_graphs}: "
                f"{self._what_changes(schema)}, or raise max_graphs"
            )
        if (where := self._decides_anew) is not None:
            logger.info("other sizes decide otherwise, in a graph of their own: %s", where)
        options = self.options
        if self._are_logits_read:
            options = replace(options, label_sparsity=False)
        engine = Engine(self.module, self.original, schema, options, self.precision)
        # Their ids are in the key, and must not become others'.
        self._known_hooks += [
            hook for part in self.module.modules() for hook in forward_hooks(part)
        ]
        self.engines[key] = engine
        return engine

    def _what_changes(self, schema: CallSchema) -> str:
        """From call to call, and what to do about it."""
        if self._decides_anew is not None:
            return (
                f"{self._decides_anew} makes a Python number or branch of a batch's sizes, which "
                "change from call to call; pad batches to a few lengths, write it with tensor "
                "operators"
            )
        last: CallSchema = next(reversed(self.engines))[0]
        if schema.constants != last.constants:
            changed = set(schema.constants) ^ set(last.constants)
            what = f"a constant argument changes ({sorted(map(str, changed))[:4]})"
        elif schema.names != last.names:
            what = f"the arguments change ({sorted(set(schema.names) ^ set(last.names))})"
        else:
            what = "the tensors' ranks or dtypes, or what is trained, changes"
        return f"{what} from call to call; pass it as a tensor, leave it out"


def _refuse_half_precision(module: torch.nn.Module) -> None:
    for name, parameter in module.named_parameters():
        is_half = parameter.dtype in (torch.float16, torch.bfloat16)
        if is_half and parameter.device.type == "cpu":
            raise UnsupportedModelError(
                f"parameter {name!r} of {type(module).__name__} is {parameter.dtype}, and ONNX "
                "Runtime's CPU kernels compute in fp32 only: load or convert the model to "
                "torch.float32, or train it with backend='compile' or 'eager'"
            )


def _refuse_backward_hooks(module: torch.nn.Module) -> None:
    """Forward hooks are traced with the module; a graph's backward passes no submodule."""
    for name, part in module.named_modules():
        if part is not module and (part._backward_hooks or part._backward_pre_hooks):
            raise UnsupportedModelError(
                f"submodule {name!r} of {type(module).__name__} has a backward hook, which a graph "
                "of backend 'ort' would never call: remove it, hook the module itself or its "
                "parameters (Tensor.register_hook), or train with backend='compile' or 'eager'"
            )


def _warn_of_forward_hooks(module: torch.nn.Module) -> None:
    """What a hook computes is in the graph; what it keeps or prints is the first batch's."""
    hooks = (
        (name, hook)
        for name, part in module.named_modules()
        for hook in (forward_hooks(part) if part is not module else ())
        if package(getattr(hook, "__module__", None) or type(hook).__module__) not in _ONLY_COMPUTE
    )
    for name, hook in itertools.islice(hooks, 1):
        warnings.warn(
            f"submodule {name!r} of {type(module).__name__} has a forward hook "
            f"({getattr(hook, '__qualname__', type(hook).__name__)}): backend 'ort' traces "
            "what it does to tensors, and calls it no more, so what it keeps or prints is "
            "that of the batch that a graph was built with. To read hidden values, have "
            "the module return them (output_hidden_states=True), or train with "
            "backend='compile' or 'eager'",
            UserWarning,
            stacklevel=2,
        )


def _asks_for_cache(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("use_cache")
    if asked is None:
        asked = getattr(getattr(module, "config", None), "use_cache", False)
    return bool(asked)


def _gpu_autocast() -> torch.dtype | None:
    """The type that autocast computes in on GPUs, which a trace writes into its graph, or None."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None


@contextlib.contextmanager
def _without_autocast(precision: str) -> Iterator[None]:
    """Autocast off, for a graph's types are its own.

    In the graph's precision it is accelerate's doing, which wraps every model that transformers'
    Trainer trains with `bf16=True`.

    Raises:
        UnsupportedModelError: where it is active in another precision.
    """
    if not torch.is_autocast_enabled("cpu"):
        yield
        return
    dtype = torch.get_autocast_dtype("cpu")
    if precision != "bf16" or dtype != torch.bfloat16:
        raise UnsupportedModelError(
            f"torch.autocast('cpu', {dtype}) is active, and the graph of backend 'ort' was asked "
            f"for in {precision}: leave autocast, and wrap with precision='bf16' for products in "
            "bf16"
        )
    with torch.autocast("cpu", enabled=False):
        yield

"""Memory of a training step, from a model without data: its storages are counted as it runs."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ort_train.config import RunConfig
from ort_train.errors import ModelError

#: Where the search for the largest micro batch ends.
_MANY = 2**30


@dataclass(frozen=True)
class StepPeak:
    """Bytes that a forward and backward pass needs beyond weights, by samples.

    Attributes:
        batch_sizes: that were measured, rising.
        sizes: peak bytes of each.
    """

    batch_sizes: tuple[int, ...]
    sizes: tuple[float, ...]

    def at(self, batch_size: int) -> float:
        """Between the measured ones, and beyond them: along straight lines."""
        pairs = list(zip(self.batch_sizes, self.sizes, strict=True))
        end = next((n for n in range(1, len(pairs)) if pairs[n][0] >= batch_size), len(pairs) - 1)
        (low, low_size), (high, high_size) = pairs[end - 1], pairs[end]
        return low_size + (batch_size - low) * (high_size - low_size) / (high - low)

    def largest(self, budget: float) -> int:
        """The most samples that stay within the bytes; 0: not even one."""
        if self.at(1) > budget:
            return 0
        fits, too_many = 1, 2
        while self.at(too_many) <= budget and too_many < _MANY:
            fits, too_many = too_many, 2 * too_many
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            fits, too_many = (middle, too_many) if self.at(middle) <= budget else (fits, middle)
        return fits


def make_without_data(
    config: RunConfig, architecture: str, fields: dict[str, Any], dtype: torch.dtype
) -> Any:
    """The model with its adapter, on the meta device: shapes and types, no data.

    Raises:
        ModelError: transformers can't make it.
    """
    from transformers import AutoConfig

    from ort_train.adapters import apply_adapter
    from ort_train.data.tasks import auto_class
    from ort_train.models import LOAD_ERRORS, refusal

    with _quiet():
        made = AutoConfig.for_model(architecture, **{**fields, "use_cache": False})
        with torch.device("meta"):
            try:
                model = auto_class(config.model.task).from_config(
                    made, dtype=dtype, attn_implementation=config.model.attention
                )
            except LOAD_ERRORS as error:
                raise ModelError(refusal(config.model, error)) from error
            return apply_adapter(model, config.adapter, config.model.task).train()


def step_bytes(
    config: RunConfig,
    architecture: str,
    fields: dict[str, Any],
    dtype: torch.dtype,
    batch: int,
    recompute: bool,
    keep_gradients: bool,
) -> float:
    """Peak of a forward and backward pass, beyond parameters and buffers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = make_without_data(config, architecture, fields, dtype)
    if recompute:
        with _quiet():
            model.gradient_checkpointing_enable({"use_reentrant": False})
    compute = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(config.train.precision)
    with _quiet(), FakeTensorMode():
        _materialize(model)
        if not keep_gradients:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_drop_gradient)
        ids_BT = torch.zeros(batch, config.data.block_size, dtype=torch.long)
        with _LiveBytes(model) as live:
            with torch.autocast("cpu", dtype=compute, enabled=compute is not None):
                attention_mask = torch.ones_like(ids_BT)
                loss = model(input_ids=ids_BT, attention_mask=attention_mask, labels=ids_BT)[0]
            loss.backward()
        return live.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made inside of it, and remembers their highest sum.

    torch's own torch.distributed._tools.MemTracker does the same by module, but can't take frozen
    parameters (it registers gradient hooks on all; torch 2.13).
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        for tensor in (*model.parameters(), *model.buffers()):
            self._known.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self._now -= size


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _materialize(model: torch.nn.Module) -> None:
    """Put data-less CPU tensors in the place of meta ones, which autocast doesn't know."""
    made: dict[int, torch.nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                    made[id(parameter)] = torch.nn.Parameter(empty, parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

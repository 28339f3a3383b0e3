"""`backend="auto"`: try the backends on the first real batches, keep the fastest that agrees."""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from ort_train.backends import CONCRETE_BACKENDS, available, runner_factory

if TYPE_CHECKING:
    from ort_train.ortmodule import OrtOptions

logger = logging.getLogger(__name__)

#: Batches that the trial runs over; until they are seen, training runs eagerly.
NUM_TRIAL_BATCHES = 2
#: Timed passes over the trial batches, interleaved among the backends.
NUM_ROUNDS = 3
# fp32 sums in another order differ in the last bits; a wrong graph differs by orders more.
_LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
_GRADIENT_TOLERANCE = {"fp32": 1e-3, "bf16": 1e-1, "fp16": 5e-2}
# Dropout draws other masks in every backend: allow a few times what eager differs from itself.
_NOISE_FACTOR = 5.0

_Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Decision:
    """What `auto` chose.

    Attributes:
        backend: the one that training goes on with.
        step_ms: median time of forward and backward of each backend that ran and agreed.
        rejected: why each other backend was left out.
        cost_s: what the trial took, compilation and export included.
    """

    backend: str
    step_ms: dict[str, float]
    rejected: dict[str, str]
    cost_s: float

    def __str__(self) -> str:
        times = ", ".join(f"{name} {ms:.1f} ms" for name, ms in self.step_ms.items())
        left_out = "".join(f"; {name} left out: {why}" for name, why in self.rejected.items())
        return f"backend auto: {self.backend} ({times} a step; trial {self.cost_s:.1f} s{left_out})"


@dataclass
class _Probe:
    """Loss and gradients of one backend over the trial batches."""

    losses: torch.Tensor
    gradients: list[torch.Tensor | None]


class AutoRunner:
    """Runs the first training calls eagerly, then tries the backends on them, then the fastest.

    Gradients of the trial go nowhere: `.grad`, buffers and torch's random state are as before.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        original: Callable[..., Any],
        *,
        precision: str,
        options: OrtOptions,
    ):
        self._module = module
        self._precision = precision
        self._runners: dict[str, Callable[..., Any]] = {}
        self._rejected: dict[str, str] = {}
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._device = device
        for name in CONCRETE_BACKENDS:
            can_run, reason = available(name, precision, device.type)
            if can_run and name == "ort" and (is_slow := _no_bf16(precision, device.type)):
                can_run, reason = False, is_slow
            if can_run:
                self._runners[name] = runner_factory(name, precision, options)(module, original)
            else:
                self._rejected[name] = reason
        self._chosen = self._runners["eager"]
        self._calls: list[_Call] = []
        self.decision: Decision | None = None

    @property
    def savings(self) -> Any:
        """Of the chosen backend."""
        return getattr(self._chosen, "savings", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.decision is None and self._differentiable((args, kwargs)):
            self._calls.append(_detached((args, kwargs)))
            if len(self._calls) == NUM_TRIAL_BATCHES:
                self.decision = self._try()
                self._chosen = self._runners[self.decision.backend]
                self._runners = {}
                self._calls = []
                logger.warning("%s", self.decision)
        return self._chosen(*args, **kwargs)

    def _try(self) -> Decision:
        started = time.perf_counter()
        rejected = dict(self._rejected)
        with _untouched(self._module, self._device):
            reference = self._probe("eager")
            noise_loss, noise_gradient = _distance(self._probe("eager"), reference)
            for name in [name for name in self._runners if name != "eager"]:
                try:
                    loss, gradient = _distance(self._probe(name), reference)
                except Exception as error:
                    rejected[name] = str(error).split("\n", 1)[0]
                    continue
                loss_limit = _LOSS_TOLERANCE[self._precision] + _NOISE_FACTOR * noise_loss
                limit = _GRADIENT_TOLERANCE[self._precision] + _NOISE_FACTOR * noise_gradient
                # Written so that a NaN is a disagreement.
                if not (loss <= loss_limit and gradient <= limit):
                    rejected[name] = (
                        f"disagrees with eager (loss by {loss:.1e}, gradients by {gradient:.1e})"
                    )
            names = self._agree_among_ranks(
                [name for name in self._runners if name not in rejected], rejected
            )
            samples: dict[str, list[float]] = {name: [] for name in names}
            for _ in range(NUM_ROUNDS):
                for name in names:
                    for call in self._calls:
                        samples[name].append(self._timed_ms(name, call))
        step_ms = self._mean_among_ranks(
            {name: statistics.median(times) for name, times in samples.items()}
        )
        fastest = min(step_ms, key=lambda name: step_ms[name])
        return Decision(fastest, step_ms, rejected, time.perf_counter() - started)

    def _gradients(self, name: str, call: _Call) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        args, kwargs = call
        loss = _probe_loss(self._runners[name](*args, **kwargs))
        # autograd.grad, unlike backward, leaves .grad and the hooks of DDP and DeepSpeed alone.
        return loss, list(torch.autograd.grad(loss, self._differentiable(call), allow_unused=True))

    def _differentiable(self, call: _Call) -> list[torch.Tensor]:
        """What a step gets gradients of: parameters, and inputs that ask for one."""
        inputs = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor)]
        return [t for t in (*self._module.parameters(), *inputs) if t.requires_grad]

    def _probe(self, name: str) -> _Probe:
        losses, total = [], None
        for call in self._calls:
            loss, gradients = self._gradients(name, call)
            losses.append(loss.detach().float().cpu())
            total = gradients if total is None else _added(total, gradients)
        assert total is not None
        return _Probe(torch.stack(losses), total)

    def _timed_ms(self, name: str, call: _Call) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        started = time.perf_counter()
        self._gradients(name, call)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return (time.perf_counter() - started) * 1e3

    def _agree_among_ranks(self, names: list[str], rejected: dict[str, str]) -> list[str]:
        """Only the backends that every rank can run: all ranks must choose the same."""
        if not _is_distributed():
            return names
        votes = torch.tensor([float(name in names) for name in CONCRETE_BACKENDS])
        votes = votes.to(self._device)
        torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN)
        common = [n for n, vote in zip(CONCRETE_BACKENDS, votes.tolist(), strict=True) if vote]
        for name in set(names) - set(common):
            rejected[name] = "another rank can't run it"
        return common

    def _mean_among_ranks(self, step_ms: dict[str, float]) -> dict[str, float]:
        if not _is_distributed():
            return step_ms
        times = torch.tensor(list(step_ms.values())).to(self._device)
        torch.distributed.all_reduce(times)
        times /= torch.distributed.get_world_size()
        return dict(zip(step_ms, times.tolist(), strict=True))


def _no_bf16(precision: str, device_type: str) -> str | None:
    """Why ONNX Runtime isn't tried in bf16, or None."""
    from ort_train.ortmodule import onednn

    if precision != "bf16" or device_type != "cpu" or onednn.has_bf16():
        return None
    return "this CPU has no bf16 products in hardware (AVX-512 BF16 or AMX)"


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _detached(call: _Call) -> _Call:
    """A call that outlives its step: the loop may reuse its buffers."""
    copy = pytree.tree_map(
        lambda leaf: (
            leaf.detach().clone().requires_grad_(leaf.requires_grad)
            if isinstance(leaf, torch.Tensor)
            else leaf
        ),
        call,
    )
    return copy


def _probe_loss(result: Any) -> torch.Tensor:
    """The module's own loss where it returns one, else the mean of all that is differentiable."""
    loss = result.get("loss") if isinstance(result, dict) else getattr(result, "loss", None)
    if isinstance(loss, torch.Tensor) and loss.requires_grad:
        return loss.mean()
    leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    differentiable = [leaf.float().mean() for leaf in leaves if leaf.requires_grad]
    if not differentiable:
        raise ValueError("the module's result has nothing to differentiate")
    return torch.stack(differentiable).sum()


def _added(
    left: list[torch.Tensor | None], right: list[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    return [b if a is None else a if b is None else a + b for a, b in zip(left, right, strict=True)]


def _distance(probe: _Probe, reference: _Probe) -> tuple[float, float]:
    """Largest loss difference, and the gradients' difference relative to the reference's norm."""
    loss = (probe.losses - reference.losses).abs().max().item()
    difference, norm = 0.0, 0.0
    for found, expected in zip(probe.gradients, reference.gradients, strict=True):
        zero = torch.zeros(())
        f = zero if found is None else found.detach().float()
        e = zero if expected is None else expected.detach().float()
        difference += (f - e).square().sum().item()
        norm += e.square().sum().item()
    return loss, (difference / norm) ** 0.5 if norm else difference**0.5


@contextlib.contextmanager
def _untouched(module: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Random state and buffers as they were, so that the trial leaves no trace in training."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        yield
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)

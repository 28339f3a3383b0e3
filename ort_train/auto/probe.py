"""Loss and gradients of a training call, computed without a trace in training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Probe:
    """Loss and gradients of one runner.

    Attributes:
        losses: (calls,)
        gradients: summed over the calls, of what :func:`differentiable` lists.
    """

    losses: torch.Tensor
    gradients: list[torch.Tensor | None]


def probe(module: torch.nn.Module, run: Callable[..., Any], calls: Sequence[Call]) -> Probe:
    """Run all calls, forward and backward."""
    losses, total = [], None
    for call in calls:
        loss, gradients = step(module, run, call)
        losses.append(loss.detach().float().cpu())
        total = gradients if total is None else _added(total, gradients)
    assert total is not None
    return Probe(torch.stack(losses), total)


def step(
    module: torch.nn.Module, run: Callable[..., Any], call: Call
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Loss and gradients of one call."""
    args, kwargs = call
    loss = _loss_of(run(*args, **kwargs))
    # autograd.grad, unlike backward, leaves .grad and the hooks of DDP and DeepSpeed alone.
    return loss, list(torch.autograd.grad(loss, differentiable(module, call), allow_unused=True))


def differentiable(module: torch.nn.Module, call: Call) -> list[torch.Tensor]:
    """What a step gets gradients of: parameters, and inputs that ask for one."""
    inputs = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor)]
    return [t for t in (*module.parameters(), *inputs) if t.requires_grad]


def distance(found: Probe, reference: Probe) -> tuple[float, float]:
    """Largest loss difference, and the gradients' difference relative to the reference's norm."""
    loss = (found.losses - reference.losses).abs().max().item()
    difference, norm = 0.0, 0.0
    for ours, theirs in zip(found.gradients, reference.gradients, strict=True):
        zero = torch.zeros(())
        f = zero if ours is None else ours.detach().float()
        e = zero if theirs is None else theirs.detach().float()
        difference += (f - e).square().sum().item()
        norm += e.square().sum().item()
    return loss, (difference / norm) ** 0.5 if norm else difference**0.5


def detached(call: Call) -> Call:
    """A call that outlives its step: the loop may reuse its buffers."""
    copy: Call = pytree.tree_map(
        lambda leaf: (
            leaf.detach().clone().requires_grad_(leaf.requires_grad)
            if isinstance(leaf, torch.Tensor)
            else leaf
        ),
        call,
    )
    return copy


@contextlib.contextmanager
def untouched(module: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Random state and buffers as they were, so that what runs within leaves no trace."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        yield
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)


def _loss_of(result: Any) -> torch.Tensor:
    """The module's own loss where it returns one, else the mean of all that is differentiable."""
    loss = result.get("loss") if isinstance(result, dict) else getattr(result, "loss", None)
    if isinstance(loss, torch.Tensor) and loss.requires_grad:
        return loss.mean()
    leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    found = [leaf.float().mean() for leaf in leaves if leaf.requires_grad]
    if not found:
        raise ValueError("the module's result has nothing to differentiate")
    return torch.stack(found).sum()


def _added(
    left: list[torch.Tensor | None], right: list[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    return [b if a is None else a if b is None else a + b for a, b in zip(left, right, strict=True)]

"""What `backend="auto"` may choose: a backend, in a precision, leaving out what a batch spares."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ort_train.data.batches import IGNORED_LABEL
from ort_train.ortmodule.options import SPARSITY

if TYPE_CHECKING:
    from ort_train.ortmodule import OrtOptions

#: The first is the reference that the others must agree with.
CONCRETE_BACKENDS = ("eager", "compile", "ort")
#: What precision "auto" stands for; fp16 isn't among them, as it needs a gradient scaler.
AUTO_PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Candidate:
    """One way to run training steps.

    Args:
        backend: eager, compile or ort.
        precision: fp32, bf16 or fp16.
        sparsity: the options of `SPARSITY` that `auto` turns on, beside those of the user.
    """

    backend: str
    precision: str
    sparsity: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " + ".join((f"{self.backend} {self.precision}", *self.sparsity))

    def options(self, options: OrtOptions) -> OrtOptions:
        """The user's options with this candidate's own."""
        return replace(
            options,
            label_sparsity="label_sparsity" in self.sparsity or options.label_sparsity,
            padding_sparsity="padding_sparsity" in self.sparsity or options.padding_sparsity,
        )


def precisions(precision: str) -> tuple[str, ...]:
    """The precisions that are tried; the first is the reference's."""
    return AUTO_PRECISIONS if precision == "auto" else (precision,)


def no_bf16(device_type: str) -> str | None:
    """Why bf16 isn't worth a trial on a device, or None."""
    from ort_train.ortmodule.kernels import onednn

    if device_type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return None
        return "this GPU has no bf16 products in hardware (compute capability 8.0)"
    return None if onednn.has_bf16() else onednn.NO_BF16


def densities(
    forward: Callable[..., Any], calls: Iterable[tuple[tuple[Any, ...], Mapping[str, Any]]]
) -> dict[str, float]:
    """How much of the calls' tokens each option of `SPARSITY` would leave in.

    Args:
        forward: whose calls these are, which names positional arguments.

    Returns:
        From 0 to 1 by the option's name; 1 where there is nothing to leave out, or no such input.
    """
    names = list(inspect.signature(forward).parameters)
    kept, total = dict.fromkeys(SPARSITY, 0), dict.fromkeys(SPARSITY, 0)
    for args, kwargs in calls:
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        for option, name in SPARSITY.items():
            values = inputs.get(name)
            # Labels of whole samples and masks of more axes say nothing of single tokens.
            if not isinstance(values, torch.Tensor) or values.dim() != 2:
                continue
            absent = IGNORED_LABEL if name == "labels" else 0
            kept[option] += int((values != absent).sum())
            total[option] += values.numel()
    return {name: kept[name] / total[name] if total[name] else 1.0 for name in SPARSITY}


def sparser(
    candidate: Candidate, options: OrtOptions, density: Mapping[str, float]
) -> list[Candidate]:
    """A candidate of backend ort with what it may leave out, the most first.

    Options that the user has set, to true or to false, stay as they are.

    Args:
        density: as :func:`densities` says.
    """
    free = [name for name in SPARSITY if getattr(options, name) is None and density[name] < 1]
    return [
        replace(candidate, sparsity=names)
        for count in range(len(free), 0, -1)
        for names in itertools.combinations(free, count)
    ]

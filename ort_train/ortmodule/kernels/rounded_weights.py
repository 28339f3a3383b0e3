"""Copies in bf16 of weights that stay as they are from step to step.

A product in bf16 (products.py) takes a weight rounded, and rounding all of them takes 6% of a LoRA
step of a Llama of hidden size 1024. Frozen weights are rounded once instead, and trained ones once
for the micro-batches of an accumulation. The copies last from forward to backward in any case, so
those of frozen weights add little to a step's peak.

A weight may still be written to. Before each forward its address and its version, which torch
counts up with every change in place, are compared. What is written through `.data` isn't counted,
so an entry of each row is compared, too: a merged adapter or an optimizer changes all of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch

from ort_train.ortmodule.kernels import memory


class _Copy:
    """A weight's copy in bf16, made when it is first asked for."""

    def __init__(self, weight: torch.nn.Parameter):
        self._weight = weakref.ref(weight)
        self._version = weight._version
        self.address = weight.data_ptr()
        self.shape = weight.shape
        self._entries: torch.Tensor | None = None
        self._expected: torch.Tensor | None = None
        self.rounded: torch.Tensor | None = None

    def make(self, weight: torch.Tensor) -> torch.Tensor:
        # As integers, for NaN isn't equal to itself. The step meets every row, and changes columns.
        self._entries = weight.view(torch.int32).view(-1)[:: weight.shape[1] - 1]
        self._expected = self._entries.clone()
        self.rounded = rounded(weight, memory.lasting)
        return self.rounded

    def is_of(self, weight: torch.nn.Parameter) -> bool:
        """Whether the weight is the one that was copied, and as it was."""
        is_same = self._weight() is weight
        if not is_same or (weight.data_ptr(), weight._version) != (self.address, self._version):
            return False
        # `.data` may have been given a transposed view of itself, which isn't counted either.
        if not weight.is_contiguous():
            return False
        if self._entries is None or self._expected is None:
            return True
        return torch.equal(self._entries, self._expected)

    def is_of_trained(self) -> bool:
        """Whether the weight is still there, and gets gradients."""
        weight = self._weight()
        return weight is not None and weight.requires_grad


#: The copies by their weights' addresses, which is all that a kernel knows of a weight.
_by_address: dict[int, weakref.ref[_Copy]] = {}


def _enter(copy: _Copy) -> None:
    address = copy.address

    def gone(reference: weakref.ref[_Copy]) -> None:
        if _by_address.get(address) is reference:
            del _by_address[address]

    _by_address[address] = weakref.ref(copy, gone)


def rounded(
    tensor: torch.Tensor, empty: Callable[..., torch.Tensor] = memory.empty
) -> torch.Tensor:
    """A tensor in bf16, and where it is large, in memory that `empty` gives."""
    if not memory.is_large(tensor.shape, torch.bfloat16):
        return tensor.bfloat16()
    return empty(*tensor.shape, dtype=torch.bfloat16).copy_(tensor)


def of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in bf16: of a weight the copy, if one is kept, and else rounded anew."""
    reference = _by_address.get(tensor.data_ptr())
    copy = None if reference is None else reference()
    if copy is None or copy.shape != tensor.shape:
        return rounded(tensor)
    return copy.make(tensor) if copy.rounded is None else copy.rounded


class RoundedWeights:
    """Which copies a module's forwards may use."""

    def __init__(self) -> None:
        self._copies: dict[int, _Copy] = {}
        self._are_trained_kept = False

    def keep_trained(self, is_kept: bool) -> None:
        """Keep copies of trained weights as well, or no longer."""
        if not is_kept:
            self._copies = {key: c for key, c in self._copies.items() if not c.is_of_trained()}
        self._are_trained_kept = is_kept

    def confirm(self, weights: Iterable[torch.nn.Parameter]) -> None:
        """To be called before every forward: copies of what has changed are dropped.

        Args:
            weights: the module's parameters now.
        """
        copies: dict[int, _Copy] = {}
        for weight in weights:
            if weight.requires_grad and not self._are_trained_kept:
                continue
            copy = self._copies.get(id(weight))
            if copy is None or not copy.is_of(weight):
                if not _can_be_kept(weight):
                    continue
                copy = _Copy(weight)
            entered = _by_address.get(copy.address)
            if entered is None or entered() is not copy:  # or another module's that shares it
                _enter(copy)
            copies[id(weight)] = copy
        self._copies = copies


def _can_be_kept(weight: torch.nn.Parameter) -> bool:
    if weight.dim() != 2 or weight.shape[1] < 2 or not weight.is_contiguous():
        return False
    is_fp32 = weight.dtype == torch.float32 and weight.device.type == "cpu"
    return is_fp32 and not weight.is_inference()  # which have no version

"""A tensor as it was when it was last looked at."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ort_train.ortmodule.cache.described import digest

#: Of larger ones a digest is kept, not a copy.
_MAX_COPIED_BYTES = 2**22


class KnownTensor(NamedTuple):
    """What a tensor was.

    Attributes:
        tensor: itself, so that no other can take its address.
        address: of its values.
        version: torch's count of writes; -1 where it keeps none, in inference mode.
        value: a copy, or of a large tensor its digest.
    """

    tensor: torch.Tensor
    address: int
    version: int
    value: torch.Tensor | str

    @classmethod
    def of(cls, tensor: torch.Tensor) -> KnownTensor:
        """As it is now."""
        is_small = tensor.nbytes <= _MAX_COPIED_BYTES
        value = tensor.detach().clone() if is_small else _digest_and_kind(tensor)
        return cls(tensor, tensor.data_ptr(), _version(tensor), value)

    def is_untouched(self, tensor: torch.Tensor) -> bool:
        """Quick, and false for some that are unchanged."""
        return (
            tensor is self.tensor
            and tensor.data_ptr() == self.address
            and _version(tensor) == self.version != -1
        )

    def is_same(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor has these values."""
        if self.is_untouched(tensor):
            return True
        if isinstance(self.value, str):
            return _digest_and_kind(tensor) == self.value
        return same_values(tensor, self.value)


def same_values(found: torch.Tensor | None, expected: torch.Tensor) -> bool:
    """Whether a tensor is as expected, to the bit; NaN is NaN."""
    if found is None or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    equal = (found == expected) | ((found != found) & (expected != expected))
    return bool(equal.all())


def _digest_and_kind(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} {digest(tensor)}"


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version

"""What a graph holds as constants, and whether the module still says the same.

Parameters and persistent buffers are inputs of a graph. Everything else that a forward reads is
constant in it: non-persistent buffers, and the values of read_values.py. A graph whose constants
have changed is built anew.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ort_train.ortmodule.constants.known_tensor import KnownTensor
from ort_train.ortmodule.constants.read_values import ReadValues


class Constants:
    """What a module's graph holds as constants.

    Args:
        values: that its forward may read, as they were before it was traced.
        buffers: by name, those that the exporter made constants of: non-persistent ones.
    """

    def __init__(self, values: ReadValues, buffers: Mapping[str, torch.Tensor]) -> None:
        values.forget_changed()
        self._values = values
        self._buffers = {name: KnownTensor.of(buffer) for name, buffer in buffers.items()}

    def changed(self, buffers: Mapping[str, torch.Tensor]) -> str | None:
        """What isn't what it was, in words, or None.

        Args:
            buffers: all of the module's now, by name.
        """
        if (name := self._changed_buffer(buffers)) is not None:
            return f"non-persistent buffer {name!r}"
        return self._values.changed()

    def _changed_buffer(self, buffers: Mapping[str, torch.Tensor]) -> str | None:
        for name, known in self._buffers.items():
            buffer = buffers.get(name)
            if buffer is None or known.is_untouched(buffer):
                continue
            if not known.is_same(buffer):
                return name
            # Written to, with the same values (DistributedDataParallel does so every step).
            self._buffers[name] = KnownTensor.of(buffer)
        return None

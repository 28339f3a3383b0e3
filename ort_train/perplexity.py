"""Perplexity of a text, and the speed of reading it.

Shapes as suffixes: B samples, T tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: exp of more overflows.
_MAX_LOSS = 700.0


@dataclass(frozen=True)
class Reading:
    """A model's account of a text.

    Attributes:
        loss: mean cross-entropy in nats per predicted token.
        num_tokens: that were predicted.
        tokens_per_s: of the whole pass, without gradients.
    """

    loss: float
    num_tokens: int
    tokens_per_s: float

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(min(self.loss, _MAX_LOSS))


def read(model: torch.nn.Module, batches: Iterable[Mapping[str, torch.Tensor]]) -> Reading:
    """Read batches with a causal language model, eagerly, in evaluation mode.

    Args:
        model: whose mode is put back.
        batches: of `input_ids` and `labels` (B, T), where -100 isn't predicted.

    Returns:
        The mean over all predicted tokens, not over batches.
    """
    import torch

    from ort_train.data.batches import IGNORED_LABEL

    was_training = model.training
    model.eval()
    total, num_tokens, num_read, seconds = 0.0, 0, 0, 0.0
    device = next(model.parameters()).device
    try:
        for batch in batches:
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            began = time.perf_counter()
            with torch.no_grad():
                loss = model(**inputs, use_cache=False).loss.item()
            seconds += time.perf_counter() - began
            predicted = int((inputs["labels"][:, 1:] != IGNORED_LABEL).sum())
            total += loss * predicted
            num_tokens += predicted
            num_read += inputs["input_ids"].numel()
    finally:
        model.train(was_training)
    return Reading(total / max(num_tokens, 1), num_tokens, num_read / seconds)

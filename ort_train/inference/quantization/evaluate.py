"""Exported models reading the same text side by side: loss, agreement, speed.

They read as they generate: a first token, then one at a time, all rows of the batch together.

Shapes as suffixes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from ort_train.perplexity import Reading

if TYPE_CHECKING:
    from ort_train.inference.folder import ExportedModel

#: Tokens of the prompt, as many generated ones, and turns of each model, in `decoding_speed`.
_SPEED_TOKENS, _SPEED_TURNS = 16, 5


@dataclass(frozen=True)
class Comparison:
    """A model beside its reference on the same tokens.

    Attributes:
        reference: what the reference made of them; without a text, of random tokens.
        reading: what the model made of them.
        mean_kl: of KL(reference || model) in nats, over all predictions.
        agreement: share of the predictions whose likeliest token is the same.
    """

    reference: Reading
    reading: Reading
    mean_kl: float
    agreement: float

    @property
    def perplexity_increase(self) -> float:
        """Over the reference's, as a share of it."""
        return self.reading.perplexity / self.reference.perplexity - 1


def compare(
    reference: ExportedModel,
    model: ExportedModel,
    ids_BT: np.ndarray,
    num_threads: int | None = None,
) -> Comparison:
    """Let two models read the same tokens in step.

    Args:
        ids_BT: at least two tokens a row.
        num_threads: of each; None: one a core.

    Returns:
        Means over all B x (T - 1) predictions.
    """
    from ort_train.inference.generation.session import DecoderSession

    num_rows, length = ids_BT.shape
    sessions = [DecoderSession(one, num_threads) for one in (reference, model)]
    losses, seconds = np.zeros(2), np.zeros(2)
    divergence, same = 0.0, 0
    decodings = []
    for session in sessions:
        decodings.append(session.start(ids_BT[:, :1].tolist(), length))
    for position in tqdm(range(1, length), desc="Comparing", unit="token", delay=2, leave=False):
        targets_B = ids_BT[:, position]
        expected, found = (_log_softmax(decoding.logits) for decoding in decodings)
        for index, log_probabilities in enumerate((expected, found)):
            losses[index] -= log_probabilities[np.arange(num_rows), targets_B].sum()
        divergence += float((np.exp(expected) * (expected - found)).sum())
        same += int((expected.argmax(-1) == found.argmax(-1)).sum())
        if position == length - 1:
            break
        for index, decoding in enumerate(decodings):
            began = time.perf_counter()
            decoding.step(targets_B)
            seconds[index] += time.perf_counter() - began
    num_tokens = num_rows * (length - 1)
    num_timed = num_rows * (length - 2)
    readings = [
        Reading(float(loss / num_tokens), num_tokens, num_timed / max(taken, 1e-9))
        for loss, taken in zip(losses, seconds, strict=True)
    ]
    return Comparison(readings[0], readings[1], divergence / num_tokens, same / num_tokens)


def decoding_speed(
    models: Sequence[ExportedModel], num_threads: int | None = None
) -> list[list[float]]:
    """Tokens/s of generating one row, the models taking turns.

    Returns:
        For each model the speed of each of its turns; turns of one number are a pair.
    """
    from ort_train.inference.generation.session import DecoderSession

    sessions = [DecoderSession(model, num_threads) for model in models]
    speeds: list[list[float]] = [[] for _ in models]
    positions = [model.info.max_positions or 2 * _SPEED_TOKENS for model in models]
    num_tokens = min(_SPEED_TOKENS, min(positions) // 2)
    prompt = [0] * num_tokens
    for turn in range(_SPEED_TURNS + 1):
        for index, session in enumerate(sessions):
            decoding = session.start([prompt], 2 * num_tokens)
            began = time.perf_counter()
            for _ in range(num_tokens):
                decoding.step([0])
            taken = time.perf_counter() - began
            if turn:  # the first warms up
                speeds[index].append(num_tokens / taken)
    return speeds


def _log_softmax(logits_BV: np.ndarray) -> np.ndarray:
    shifted = logits_BV.astype(np.float64) - logits_BV.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

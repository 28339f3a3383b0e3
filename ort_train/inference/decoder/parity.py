"""The gate of an export: the written model's logits against PyTorch's.

PyTorch runs each row by itself, without padding or cache: one forward over prompt and
continuation gives the logits after each of its tokens. The exported model runs all rows in one
batch, the prompts first and then one token at a time. Only PyTorch's logits are kept, so that its
model can be released before the other is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ort_train.errors import ExportError
from ort_train.inference.folder import ExportedModel, Parity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DECODE_STEPS = 32
# The prompts of the batch: unequal, and one of a single token.
_PROMPT_LENGTHS = (24, 11, 1)
# A prompt of this length at most is made to reach beyond a sliding window.
_LONGEST_PROMPT = 520
_SEED = 0

# 24 bits of mantissa round to 6e-8; some hundred sums in another order move a logit near 10 by 1e-6
# to 1e-5 (measured: 1e-6 for 12 layers). A wrong term shows as 1e-2 and more. Rounding errors are
# relative: logits beyond 10 get the same share of their size.
_FP32_ABS, _FP32_REL = 1e-4, 1e-5
# 11 bits of mantissa round weights and activations to 5e-4 of their size (measured: 1e-3 of the
# largest logit for 3 layers); a wrong term moves logits by some tenths of that.
_FP16_REL = 1e-2


def tolerance(precision: str, largest: float) -> float:
    """Largest difference of a logit to PyTorch's fp32 that rounding explains.

    Args:
        precision: fp32 or fp16, of the exported graph.
        largest: PyTorch's largest absolute logit.
    """
    return max(_FP32_ABS, _FP32_REL * largest) if precision == "fp32" else _FP16_REL * largest


@dataclass(frozen=True)
class Reference:
    """What PyTorch computes.

    Attributes:
        rows: token ids of each row, prompt and continuation.
        prompt_lengths: of each row.
        logits: of each row, (decode steps + 1, V), float32: after the prompt, and after each token
            of the continuation.
    """

    rows: list[list[int]]
    prompt_lengths: list[int]
    logits: list[np.ndarray]

    @property
    def decode_steps(self) -> int:
        return len(self.logits[0]) - 1

    @property
    def largest(self) -> float:
        """The largest absolute logit."""
        return max(float(np.abs(logits).max()) for logits in self.logits)


def reference(
    model: PreTrainedModel, max_positions: int | None, windows: Sequence[int | None]
) -> Reference:
    """Logits of seeded random tokens, in the model's own precision.

    Raises:
        ExportError: PyTorch's model doesn't run.
    """
    import torch

    longest = max(_PROMPT_LENGTHS)
    crossing = [window + 8 for window in windows if window and window + 8 <= _LONGEST_PROMPT]
    longest = max([longest, *crossing])
    steps = DECODE_STEPS
    if max_positions is not None:
        steps = min(steps, max_positions // 2)
        longest = min(longest, max_positions - steps)
    lengths = [min(length, longest) for length in (longest, *_PROMPT_LENGTHS[1:])]
    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(_SEED)
    rows, logits = [], []
    for length in lengths:
        row = torch.randint(0, vocab_size, (1, length + steps), generator=generator)
        try:
            with torch.no_grad():
                output: Any = model.eval()(input_ids=row, use_cache=False)
        except Exception as error:  # a model's own
            raise ExportError(
                f"this {model.config.model_type} doesn't run in PyTorch itself: {error}"
            ) from error
        rows.append(row[0].tolist())
        logits.append(output.logits[0, length - 1 :].float().numpy().copy())
        del output
    return Reference(rows, lengths, logits)


def measure(exported: ExportedModel, expected: Reference) -> float:
    """The largest difference of the exported model's logits."""
    from ort_train.inference.generation.session import DecoderSession

    lengths = expected.prompt_lengths
    prompts = [row[:n] for row, n in zip(expected.rows, lengths, strict=True)]
    capacity = max(lengths) + expected.decode_steps
    decoding = DecoderSession(exported).start(prompts, capacity)
    worst = 0.0
    for step in range(expected.decode_steps + 1):
        if step:
            decoding.step(
                [row[n + step - 1] for row, n in zip(expected.rows, lengths, strict=True)]
            )
        for ours, theirs in zip(decoding.logits, expected.logits, strict=True):
            worst = float(np.maximum(worst, np.abs(ours - theirs[step]).max()))  # keeps a NaN
    return worst


def check(exported: ExportedModel, expected: Reference) -> Parity:
    """Measure, and refuse what rounding doesn't explain.

    Raises:
        ExportError: naming the difference and what is allowed.
    """
    allowed = tolerance(exported.info.precision, expected.largest)
    error = measure(exported, expected)
    # Written so that a NaN, which compares false with everything, is refused.
    if not error <= allowed:
        advice = ""
        if exported.info.kind == "fused":
            advice = "export it with --graph traced, and "
        elif "position_ids" not in exported.info.inputs:
            advice = "the model takes no position_ids, so that padding may move its positions; "
        raise ExportError(
            f"the exported model's logits differ from PyTorch's by {error:.2g}, and {allowed:.2g} "
            f"is allowed: no file is kept; {advice}please report the model's config"
        )
    return Parity(
        logits_max_abs=error,
        tolerance=allowed,
        prompt_lengths=expected.prompt_lengths,
        decode_steps=expected.decode_steps,
    )

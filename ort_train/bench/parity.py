"""The parity gate: does a backend compute what eager fp32 computes from the same weights?

A speed-up over numbers that differ is none, so a case that fails here gets no speed-up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Tolerance:
    """Largest differences to the reference that rounding explains.

    Args:
        loss_abs: of the first step's loss, in nats a token.
        grad_rel: of the first step's gradients, |difference| / |reference| of the worst tensor.
        drift_abs: of the loss n training steps later, times sqrt(n + 1): rounding errors of
            different steps are independent, so their sum grows like a random walk's.
    """

    loss_abs: float
    grad_rel: float
    drift_abs: float


TOLERANCES = {
    # 24 bits of mantissa round to 6e-8, and other orders of summation move a loss near 10 by some
    # 1e-6 and gradients by some 1e-6 of their norm (Llama and GPT-2 of 5M to 117M parameters:
    # 2e-6 and 2.4e-6). Hundredfold that is still far below any wrong term. The drift is wider,
    # because AdamW divides by the gradient's own size: where that is all rounding, so is the
    # direction of the update.
    "fp32": Tolerance(loss_abs=1e-4, grad_rel=1e-3, drift_abs=1e-3),
    # 8 bits of mantissa round to 4e-3. The same models under bf16 autocast are 1.5e-3 from fp32
    # in the loss and 2.3e-2 in the worst gradient, a query or key projection, where terms cancel;
    # the rest is room for deeper models. A wrong term shows as some 0.1 to 1.
    "bf16": Tolerance(loss_abs=5e-2, grad_rel=1e-1, drift_abs=5e-2),
    # 11 bits of mantissa are better, but only 5 of exponent: small gradients lose bits, and those
    # below 6e-8 of the scaled loss vanish. Held to bf16's bounds.
    "fp16": Tolerance(loss_abs=5e-2, grad_rel=1e-1, drift_abs=5e-2),
}
# A gradient this much smaller than the largest is mathematically zero (a key's bias in softmax
# attention): only rounding is left in it, and a relative error of that means nothing.
NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class Trajectory:
    """What a case computed.

    Args:
        first_loss: of the first step, from the seed's weights.
        losses: of every training step after it.
        gradients: safetensors file of the first step's gradients, float32, by parameter name.
    """

    first_loss: float
    losses: Sequence[float]
    gradients: Path


def judge(
    case: Trajectory, reference: Trajectory, tolerance: Tolerance
) -> tuple[dict[str, Any], str | None]:
    """Compare a case with the reference.

    Returns:
        The record's parity section, and what exceeds the tolerance (None: nothing does).
    """
    assert len(case.losses) == len(reference.losses), "all cases take the same steps"
    first = abs(case.first_loss - reference.first_loss)
    drifts = [
        abs(ours - theirs) for ours, theirs in zip(case.losses, reference.losses, strict=True)
    ]
    error, worst = worst_gradient(case.gradients, reference.gradients)
    problems = []
    # Written so that a NaN, which compares false with everything, is a problem.
    if not first <= tolerance.loss_abs:
        problems.append(f"first loss differs by {first:.2g} (allowed {tolerance.loss_abs:g})")
    if not error <= tolerance.grad_rel:
        problems.append(
            f"gradient of {worst} differs by {error:.2g} of its norm "
            f"(allowed {tolerance.grad_rel:g})"
        )
    for step, drift in enumerate(drifts, start=1):
        allowed = tolerance.drift_abs * math.sqrt(step + 1)
        if not drift <= allowed:
            problems.append(
                f"loss of training step {step} differs by {drift:.2g} (allowed {allowed:.2g})"
            )
            break  # later steps only follow from it
    parity = {
        "first_loss_abs": finite(first),
        "loss_max_abs": finite(float(np.max([first, *drifts]))),  # np.max keeps a NaN
        "grad_max_rel": finite(error),
        "grad_worst": worst,
    }
    return parity, "; ".join(problems) or None


def worst_gradient(case: Path, reference: Path) -> tuple[float, str | None]:
    """The largest relative error among the tensors of two gradient files.

    A tensor that one side lacks counts as zero. One whose reference is negligible is held
    against the largest gradient's norm.

    Returns:
        (error, parameter name); inf where a value isn't finite; (0, None) without any tensor.
    """
    from safetensors import safe_open

    with safe_open(case, "numpy") as ours, safe_open(reference, "numpy") as theirs:
        own, expected = set(ours.keys()), set(theirs.keys())
        norms = {name: _norm(theirs.get_tensor(name)) for name in expected}
        largest = max(norms.values(), default=0.0)

        def errors() -> Iterator[tuple[float, str]]:
            for name in sorted(own | expected):
                norm = norms.get(name, 0.0)
                if name not in own:
                    difference = norm
                elif name not in expected:
                    difference = _norm(ours.get_tensor(name))
                else:
                    difference = _norm(ours.get_tensor(name) - theirs.get_tensor(name))
                scale = norm if norm > NEGLIGIBLE * largest else largest
                error = difference / scale if scale > 0 else (0.0 if difference == 0 else math.inf)
                yield (error if math.isfinite(error) else math.inf), name

        return max(errors(), default=(0.0, None))


def finite(value: float) -> float | None:
    """The value, or None where it is NaN or infinite, which JSON can't hold."""
    return value if math.isfinite(value) else None


def _norm(tensor: np.ndarray) -> float:
    return float(np.linalg.norm(tensor))

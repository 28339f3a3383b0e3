"""The engines that a benchmark of generation compares, by name, and how exact each must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Engine:
    """One way to run a language model.

    Attributes:
        runs_in: PyTorch, ONNX Runtime or llama.cpp.
        weights: what they are stored as: a dtype, or what an export or GGUF file is made with.
        tolerance: largest rms of the differences of the logits after a prompt to eager fp32's, over
            the standard deviation of eager's.
        rounds_weights: eager fp32 runs on the same rounded weights then (`rounded.py`), and what
            rounding them changes is told apart.
        baselines: engines of the same precision that this one's speed is also held against.
    """

    runs_in: Literal["torch", "ort", "llamacpp"]
    weights: str
    tolerance: float
    rounds_weights: bool = False
    baselines: tuple[str, ...] = ()


# 24 bits of mantissa round to 6e-8; other orders of summation make that some 1e-6 of a logit.
_FP32 = 1e-4
# 8 bits of mantissa round to 4e-3, in each layer anew; some 1e-2 in all.
_BF16 = 1e-1
# 11 bits round to 5e-4. llama.cpp rounds activations to f16 where weights are, and takes
# exponentials from a table of f16.
_FP16 = 5e-2
# On the same weights, what differs are the inputs of products, which are rounded to 8 bits. Of 128
# normal numbers the largest is 2.7 deviations, a 127th of it a step, and a uniform error within it
# 0.6% rms: so far is each product off, at random. The errors of the layers are independent and add
# up in the residual stream as the square root of their number: 2% was seen for 12 layers, by ONNX
# Runtime and by llama.cpp (blocks of 32), and 2e-6 without that rounding. A layer of other weights
# is beyond; what is finer, the tests see at accuracy level 0, which leaves inputs as they are.
_8_BIT_INPUTS = 5e-2

ENGINES = {
    "eager": Engine("torch", "float32", _FP32),
    "eager-bf16": Engine("torch", "bfloat16", _BF16),
    "compile": Engine("torch", "float32", _FP32),
    "ort-fp32": Engine("ort", "fp32", _FP32, baselines=("compile", "llamacpp-f32")),
    "ort-int4": Engine("ort", "int4", _8_BIT_INPUTS, True, ("llamacpp-q4_0",)),
    "llamacpp-f32": Engine("llamacpp", "f32", _FP16),
    "llamacpp-f16": Engine("llamacpp", "f16", _FP16),
    "llamacpp-q4_0": Engine("llamacpp", "q4_0", _8_BIT_INPUTS, True),
}
#: Prompts of a round, beside the one that is generated after.
EXTRA_PROMPTS = 4
#: What every other engine's numbers are held against.
REFERENCE = "eager"
#: A short name for several.
GROUPS = {"llamacpp": ("llamacpp-f32", "llamacpp-f16", "llamacpp-q4_0")}
DEFAULT = ("ort-fp32", "ort-int4", "eager", "eager-bf16", "compile")


def expand(names: list[str]) -> list[str]:
    """The engines that names and short names stand for, each once."""
    return list(dict.fromkeys(engine for name in names for engine in GROUPS.get(name, (name,))))

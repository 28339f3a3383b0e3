"""Which base an adapter was trained beside: a sample of the base's weights, kept with the adapter.

An adapter is a difference to certain weights. Names and shapes tell architectures apart, not two
models of one architecture, and merged into another base it gives a model that nobody trained.

The sample of a tensor is the largest magnitude in some of its blocks of 64 weights. That is what
4-bit weights keep as the scale of a block, so weights, their 4-bit form and what it decodes to have
the same sample.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ort_train.errors import CheckpointError
from ort_train.files import replacing

FILE = "base_fingerprint.json"
_BLOCK = 64  # bitsandbytes' default
_NUM_SAMPLES = 8
# Half a unit in the last place of the types that weights are stored in.
_ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
#: Double quantization keeps a scale's distance to their mean in 8 bits.
_DOUBLE_QUANT = 0.02
# What peft puts into the names of a base's own weights.
_WRAPPERS = ("base_layer.", "original_module.")


def write(model: torch.nn.Module, folder: str | Path) -> None:
    """Put the fingerprint of an adapted model's base beside the adapter.

    Args:
        model: a PeftModel; of any other nothing is written.
    """
    if hasattr(model, "peft_config"):
        with replacing(Path(folder) / FILE) as file:
            file.write_text(json.dumps(take(model)), encoding="utf-8")


def take(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """The fingerprint of a model, or of an adapted one's base: what isn't trained.

    Returns:
        By the name of each tensor in the base: its number of weights, the samples, and how far
        these are off at most, relatively.
    """
    return {name: _sample(tensor) for name, tensor in _base_weights(model)}


def check(model: torch.nn.Module, folder: str | Path) -> None:
    """Compare a base with that of a saved adapter; one saved without a fingerprint passes.

    Args:
        model: the base, or an adapted model.

    Raises:
        CheckpointError: they differ, or the fingerprint can't be read.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        return
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        found = take(model)
        names = [name for name in saved if name in found]
        differing = [name for name in names if not _agree(found[name], saved[name])]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{str(file)!r} is damaged: {error}") from error
    if differing or not names:
        what = (
            f"{len(differing)} of {len(names)} tensors have other values, {differing[0]} for one"
            if names
            else "no tensor has the same name"
        )
        raise CheckpointError(
            f"the adapter in {str(folder)!r} was trained beside another base than this model "
            f"({what}): load the weights that it was trained with (model.name_or_path, "
            "model.revision; for a made model, model.config and train.seed). To use it with these "
            f"all the same, remove {file.name} there"
        )


def _base_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if not hasattr(model, "peft_config"):
        yield from model.named_parameters()
        return
    # Of the adapter's weights within the base; learned prompts stand outside of it.
    prefix = getattr(model.base_model, "prefix", None)
    for name, parameter in model.get_base_model().named_parameters():
        if parameter.requires_grad or (prefix and prefix in name):
            continue
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        yield name, parameter


@torch.no_grad()
def _sample(tensor: torch.Tensor) -> dict[str, Any]:
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        return _sample_of_scales(state)
    flat = tensor.detach().flatten()
    num_blocks = max(1, flat.numel() // _BLOCK)
    blocks = [flat[b * _BLOCK : (b + 1) * _BLOCK] for b in _positions(num_blocks)]
    largest = torch.stack([b.abs().max() if b.numel() else b.new_zeros(()) for b in blocks])
    rounding = _ROUNDING.get(tensor.dtype, 0.0)
    return {"size": tensor.numel(), "max": largest.float().tolist(), "rounding": rounding}


def _sample_of_scales(state: Any) -> dict[str, Any]:
    """Of a weight that bitsandbytes has packed: its scales, where their blocks are of 64."""
    scales, rounding = state.absmax, _ROUNDING.get(state.dtype, 0.0)
    if state.nested:
        import bitsandbytes

        decoded = bitsandbytes.functional.dequantize_blockwise(scales, state.state2)
        scales, rounding = decoded + state.offset, _DOUBLE_QUANT
    size = state.shape.numel()
    if state.blocksize != _BLOCK:
        return {"size": size, "max": [], "rounding": rounding}
    positions = _positions(max(1, size // _BLOCK))
    return {"size": size, "max": scales.flatten()[positions].float().tolist(), "rounding": rounding}


def _positions(num_blocks: int) -> list[int]:
    """Evenly spread over the tensor, its first and its last block among them."""
    count = min(_NUM_SAMPLES, num_blocks)
    return [(num_blocks - 1) * n // max(count - 1, 1) for n in range(count)]


def _agree(found: dict[str, Any], saved: dict[str, Any]) -> bool:
    if found["size"] != saved["size"]:
        return False
    if not (found["max"] and saved["max"]):  # blocks of another size: nothing to compare
        return True
    # fp32 holds what it was given: only another type's rounding, and printing, may differ.
    tolerance = found["rounding"] + saved["rounding"] + 1e-6
    pairs = zip(found["max"], saved["max"], strict=True)
    return all(abs(a - b) <= tolerance * max(abs(a), abs(b)) for a, b in pairs)

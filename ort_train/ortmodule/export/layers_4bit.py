"""A module's 4-bit linear layers, bitsandbytes' `Linear4bit`, and in what state they can be trained
through."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

from ort_train.errors import UnsupportedModelError


def layers(module: torch.nn.Module) -> list[Any]:
    """The module's 4-bit linear layers, in order."""
    if "bitsandbytes" not in sys.modules:  # then it has none
        return []
    kind = sys.modules["bitsandbytes"].nn.Linear4bit
    return [part for part in module.modules() if isinstance(part, kind)]


def bind_scales(holder: torch.nn.Module, module: torch.nn.Module) -> None:
    """Make the scales of the module's packed weights buffers of `holder`, which is exported.

    They belong to no module, so the exporter would write them into the graph as constants.

    Raises:
        UnsupportedModelError: where a weight isn't in a state to be trained through.
    """
    for index, layer in enumerate(layers(module)):
        _check(layer)
        keep_format(layer)
        state = layer.weight.quant_state
        tensors = {"absmax": state.absmax}
        if state.nested:
            double = {"scale": state.state2.absmax, "code": state.state2.code}
            tensors |= {**double, "offset": state.offset}
        for name, tensor in tensors.items():
            holder.register_buffer(f"layer_{index}_{name}", tensor)


def keep_format(layer: Any) -> None:
    """Keep a Linear4bit's packed weight as it is when the layer is called in eval mode.

    On CPUs with AVX-512 BF16 such a call repacks it for inference, in place and with loss, and
    training goes on without its gradients (bitsandbytes 0.49 to 0.50, `Linear4bit.forward`).
    """
    layer.support_avx512bf16_for_cpu = False


def is_misread(layer: Any) -> bool:
    """Whether bitsandbytes decodes a Linear4bit's weight wrongly, in eager training, too.

    Its CPU kernel for AVX-512 (`cdequantize_blockwise_cpu_*` of 0.50.2) takes each row to begin a
    block of scales, which doesn't hold where the block size doesn't divide the number of columns.
    """
    state = layer.weight.quant_state
    if layer.weight.device.type != "cpu" or layer.in_features % state.blocksize == 0:
        return False
    functional = importlib.import_module("bitsandbytes.functional")
    weight = functional.dequantize_4bit(layer.weight.data, state).flatten()
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    num_whole = weight.numel() // state.blocksize
    blocks = torch.ops.bitsandbytes.dequantize_4bit(
        layer.weight.data.flatten()[: num_whole * state.blocksize // 2].reshape(-1, 1),
        absmax[:num_whole],
        state.blocksize,
        state.quant_type,
        [num_whole, state.blocksize],
        state.dtype,
    )
    return not torch.equal(weight[: blocks.numel()], blocks.flatten())


def _check(layer: Any) -> None:
    weight = layer.weight
    problem = None
    if getattr(weight, "quant_state", None) is None:
        problem = "is not quantized yet: move the model to its device first"
    elif getattr(weight.quant_state, "packing_format_for_cpu", False):
        problem = (
            "was repacked for inference by a call in eval mode, which can't be undone without "
            "loss: load the model anew, and set support_avx512bf16_for_cpu=False on its Linear4bit "
            "layers before the first such call"
        )
    elif weight.dtype != torch.uint8:
        problem = f"is stored as {weight.dtype}: quantize with bnb_4bit_quant_storage=torch.uint8"
    elif is_misread(layer):
        problem = (
            f"has {layer.in_features} columns, no multiple of the block size "
            f"{weight.quant_state.blocksize}: bitsandbytes decodes it wrongly on this CPU; leave "
            "the layer unquantized, or train on a GPU"
        )
    if problem:
        raise UnsupportedModelError(
            f"backend 'ort' can't train through a Linear4bit whose weight {problem}"
        )

"""A model whose weights are those that a quantized engine multiplies by, in fp32.

What a quantized engine computes is held against PyTorch on the same rounded weights. Held against
the original ones, an error of the engine would be lost in what rounding itself changes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ort_train.inference.folder import staged
from ort_train.inference.quantization.blockwise import dequantize_int4, quantize_int4
from ort_train.inference.quantization.quantize import Scheme

_GGUF_BLOCK_SIZE = 32


def round_weight(weight_NK: np.ndarray, weights: str, scheme: Scheme | None = None) -> np.ndarray:
    """The matrix that a product with the quantized one multiplies by.

    Args:
        weight_NK: outputs by inputs.
        weights: "int4", as `quantize_folder` stores them, or "q4_0", as llama.cpp does: symmetric
            blocks of 32 with scales in half precision.
        scheme: of int4; None: the default one.

    Returns:
        float32, of the same shape.
    """
    if weights == "q4_0":
        quantized = quantize_int4(weight_NK, _GGUF_BLOCK_SIZE, symmetric=True)
        half = quantized.scales_NG.astype(np.float16)
        quantized = replace(quantized, scales_NG=half.astype(np.float32))
    else:
        scheme = scheme or Scheme("int4")
        quantized = quantize_int4(weight_NK, scheme.block_size, scheme.symmetric)
    return dequantize_int4(quantized, weight_NK.shape[1])


def write_rounded(model_dir: Path, out: Path, weights: str, scheme: Scheme | None = None) -> None:
    """Write a transformers model with the weights of its linear layers rounded.

    A fused graph scales the queries' weights before they are quantized; blocks lie along the
    inputs, so that a factor of an output changes a block's scale and none of its numbers.

    Args:
        model_dir: a transformers folder.
        out: a new folder; it is whole or not there.
        weights: "int4" or "q4_0", see `round_weight`.
        scheme: of int4; None: the default one.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    layers = [one for one in model.modules() if isinstance(one, torch.nn.Linear | Conv1D)]
    for layer in tqdm(layers, desc="Rounding", delay=1, leave=False):
        is_transposed = isinstance(layer, Conv1D)  # inputs by outputs
        weight = layer.weight.detach()
        rounded = round_weight((weight.T if is_transposed else weight).numpy(), weights, scheme)
        made = torch.from_numpy(rounded.T.copy() if is_transposed else rounded)
        layer.weight = torch.nn.Parameter(made, requires_grad=False)
    if is_tied and weights == "q4_0":
        embedding.weight = head.weight  # a GGUF file holds them once
    elif is_tied:
        model.config.tie_word_embeddings = False  # the quantized head is a copy of its own
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    with staged(out, size) as folder:
        model.save_pretrained(folder)

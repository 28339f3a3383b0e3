"""Tiny random decoders for the tests of export and generation.

Norms and biases get random values: as they are made (ones and zeros), a graph that forgets them
would compute the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 300
MAX_POSITIONS = 128
WINDOW = 12  # shorter than the longest prompt
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 32}

#: What gets a fused graph: name -> (model_type, fields of its config).
FUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "codellama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3.1": (
        "llama",
        {
            "rope_parameters": {
                **_ROPE,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
        },
    ),
    "llama linear": ("llama", {"rope_parameters": {**_ROPE, "rope_type": "linear", "factor": 4.0}}),
    "llama yarn": ("llama", {"rope_parameters": {**_ROPE, "rope_type": "yarn", "factor": 4.0}}),
    "llama eps": ("llama", {"rms_norm_eps": 0.1}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "phi": ("phi", {"hidden_size": 128, "num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    "gemma": ("gemma", {"head_dim": 32, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {}),
    "qwen2 windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}

#: What is exported through torch.onnx: name -> (model_type, fields of its config).
TRACED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "num_key_value_heads": None}),
    "bloom": ("bloom", {"num_key_value_heads": None}),
    "gemma2": (
        "gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW},
    ),
    "llama heads of 24": ("llama", {"head_dim": 24}),
}


def make_decoder(model_type: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A seeded model in eval mode; fields are of its config."""
    torch.manual_seed(seed)
    fields = {**_SIZES, **fields}
    fields = {name: value for name, value in fields.items() if value is not None}
    config = AutoConfig.for_model(model_type, **fields)
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "embed" in name or "lm_head" in name:
                parameter.mul_(10)  # logits that differ by more than rounding
    return model.eval()


def save_decoder(folder: Path, model_type: str, **fields: Any) -> PreTrainedModel:
    """Save one with a tokenizer; returns the model."""
    from ort_train.data.tokenizer import make_tokenizer

    model = make_decoder(model_type, **fields)
    model.save_pretrained(folder)
    make_tokenizer("to be or not to be, that is the question", VOCAB_SIZE).save_pretrained(folder)
    return model

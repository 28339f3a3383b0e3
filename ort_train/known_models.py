"""Sizes of published models, for planning where neither the hub nor a cache can be asked.

Each is what the model's own config.json on the Hugging Face hub says, as far as it differs from the
defaults of its architecture in transformers; vocabulary and hidden size stand there in any case.
"""

from __future__ import annotations

from typing import Any

_LLAMA_7B = {"hidden_size": 4096, "vocab_size": 32000}
_LLAMA_13B = {
    "vocab_size": 32000,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}

#: Hub id -> (architecture, fields of its config).
KNOWN_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "meta-llama/Llama-2-7b-hf": ("llama", _LLAMA_7B),
    "meta-llama/Llama-2-13b-hf": ("llama", _LLAMA_13B),
    "microsoft/Orca-2-7b": ("llama", {**_LLAMA_7B, "vocab_size": 32003}),
    "codellama/CodeLlama-7b-hf": ("llama", {**_LLAMA_7B, "vocab_size": 32016}),
    "codellama/CodeLlama-70b-hf": (
        "llama",
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 32016,
        },
    ),
    "meta-llama/Meta-Llama-3-8B": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
    "mistralai/Mistral-7B-v0.1": (
        "mistral",
        {
            "hidden_size": 4096,
            "vocab_size": 32000,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
    ),
    "microsoft/phi-2": (
        "phi",
        {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "vocab_size": 51200,
        },
    ),
    "google/gemma-2b": (
        "gemma",
        {
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 256000,
        },
    ),
    "Qwen/Qwen3-4B": (
        "qwen3",
        {
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
    ),
}

"""Write the model of the inference benchmarks: a Llama of 125M random parameters.

python benchmarks/llama_125m.py llama_125m
"""

from __future__ import annotations

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32000,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=4,
    max_position_embeddings=4096,
)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])

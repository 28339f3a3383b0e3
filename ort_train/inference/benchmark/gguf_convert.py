"""A transformers folder as a GGUF file, llama.cpp's format, with the same weights.

Runs in llama.cpp's environment, which has numpy and `gguf` and none of this package's libraries:

    python -m ort_train.inference.benchmark.gguf_convert MODEL_DIR OUT.gguf f32|f16|q4_0

The file holds no tokenizer: it is meant for token ids.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("f32", "f16", "q4_0")
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
#: transformers' names of a Llama's tensors, and GGUF's.
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def obstacle(config: dict[str, Any]) -> str | None:
    """Why a model can't be converted here; None if it can.

    Args:
        config: `config.json`.
    """
    if config.get("model_type") not in ("llama", "mistral"):
        return f"it is a {config.get('model_type')}, and llama and mistral are converted here"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        return f"its rotary embedding is scaled ({rope})"
    if config.get("attention_bias") or config.get("mlp_bias"):
        return "its linear layers have biases"
    if config.get("sliding_window"):
        return f"it has a sliding window of {config['sliding_window']} tokens"
    return None


def convert(model: Path, out: Path, kind: str) -> None:
    """Write a GGUF file.

    Args:
        model: a transformers folder with safetensors.
        kind: of the matrices; vectors stay in f32, and beside q4_0 untied embeddings in f16.

    Raises:
        ValueError: the model is of another architecture, or lacks a tensor.
    """
    import gguf

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if problem := obstacle(config):
        raise ValueError(problem)
    num_heads = config["num_attention_heads"]
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    rope = config.get("rope_parameters") or {}
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("no_vocab")
    types = {
        "f32": gguf.GGMLQuantizationType.F32,
        "f16": gguf.GGMLQuantizationType.F16,
        "q4_0": gguf.GGMLQuantizationType.Q4_0,
    }
    is_tied = config.get("tie_word_embeddings", False)
    missing = set(_names(config))
    for name, tensor in _tensors(model):
        if name not in missing:
            continue  # a tied head, rotary frequencies of old files
        missing.remove(name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = num_heads if "q_proj" in name else num_kv_heads
            tensor = _interleave(tensor, heads)
        stored = types[kind] if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        if name == "model.embed_tokens.weight" and kind == "q4_0" and not is_tied:
            # Rows are looked up, not multiplied: 4 bits would gain no speed and lose exactness.
            stored = types["f16"]
        data = gguf.quants.quantize(np.ascontiguousarray(tensor, np.float32), stored)
        writer.add_tensor(_names(config)[name], data, raw_dtype=stored)
    if missing:
        raise ValueError(f"its safetensors lack {', '.join(sorted(missing)[:3])}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _names(config: dict[str, Any]) -> dict[str, str]:
    """transformers' name of each tensor, and GGUF's."""
    names = dict(_OUTER)
    if config.get("tie_word_embeddings"):
        del names["lm_head.weight"]  # llama.cpp takes the embeddings then
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in _LAYER.items():
            names[f"model.layers.{layer}.{theirs}.weight"] = f"blk.{layer}.{ours}.weight"
    return names


def _interleave(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head in the order of llama.cpp's rotary embedding.

    transformers turns dimension i with i + half, llama.cpp's Llama 2i with 2i + 1.
    """
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def _tensors(model: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of safetensors files: eight bytes of length, JSON, data.

    https://github.com/huggingface/safetensors#format
    """
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        data = np.memmap(file, np.uint8, "r", offset=8 + length)
        for name, entry in header.items():
            if name == "__metadata__" or entry["dtype"] not in _DTYPES:
                continue
            start, end = entry["data_offsets"]
            tensor = data[start:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
            if entry["dtype"] == "BF16":  # the upper half of a float32
                tensor = (tensor.astype(np.uint32) << 16).view(np.float32)
            yield name, tensor


if __name__ == "__main__":
    _, _model, _out, _kind = sys.argv
    try:
        convert(Path(_model), Path(_out), _kind)
    except (ValueError, OSError) as error:
        sys.exit(str(error))

"""`genai_config.json`: what onnxruntime-genai needs to run an exported folder.

onnxruntime-genai brings an ONNX Runtime of its own, so it belongs into another environment than
this package. Source of the fields: its `src/python/py/models/builder.py` and `src/config.h`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ort_train.inference.folder import MODEL_FILE, ExportInfo

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig

FILE = "genai_config.json"
_DEFAULT_CONTEXT = 2048  # of a model without a limit: genai wants one
# What both libraries call by the same name; genai takes numbers where transformers takes None.
_SEARCH = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}


def genai_obstacle(info: ExportInfo) -> str | None:
    """Why onnxruntime-genai would compute something else; None: it wouldn't."""
    if info.kind == "fused" and any(info.sliding_windows):
        # GroupQueryAttention's local_window_size of 1.19.2 counts the keys before a query's own,
        # that of 1.31 its own, too: there the same graph sees one key less.
        return (
            "its sliding window is one token shorter under later versions of ONNX Runtime, such as "
            "onnxruntime-genai brings"
        )
    return None


def write_genai_config(
    folder: Path, info: ExportInfo, config: PretrainedConfig, generation: GenerationConfig
) -> None:
    """Write the file into a folder that is being staged."""
    text = config.get_text_config()
    tokens = {
        name: value
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if (value := _token(name, text, generation)) is not None
    }
    context = info.max_positions or _DEFAULT_CONTEXT
    inputs = {name: name for name in info.inputs if not name.startswith("past_key_values")}
    do_sample = bool(generation.do_sample)
    content = {
        "model": {
            **tokens,
            "type": info.architecture if info.kind == "fused" else "decoder",
            "context_length": context,
            "vocab_size": info.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": MODEL_FILE,
                "head_size": info.head_dim,
                "hidden_size": text.hidden_size,
                "num_attention_heads": text.num_attention_heads,
                "num_hidden_layers": info.num_layers,
                "num_key_value_heads": info.num_kv_heads,
                "inputs": {
                    **inputs,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": do_sample,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": info.shares_buffer,
            **{name: _number(getattr(generation, name, None), default)
               for name, default in _SEARCH.items()},
        },
    }  # fmt: skip
    (folder / FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _token(name: str, config: PretrainedConfig, generation: GenerationConfig) -> Any:
    """A special token's id or ids; padding falls back to the end of text, as genai asks for one."""
    value = getattr(generation, name, None)
    value = getattr(config, name, None) if value is None else value
    if value is None and name == "pad_token_id":
        end = _token("eos_token_id", config, generation)
        return end[0] if isinstance(end, list) else end
    return value


def _number(value: float | None, default: float) -> float:
    return default if value is None else value

"""How decoders differ: one row an architecture, and the plan of one model's fused graph.

An architecture that isn't here, or a config that its row doesn't describe, gets no fused graph. The
numbers (eps, head size, windows, scales) always come from the model's config, and biases are there
or not by the model's own parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What GroupQueryAttention's kernel asks for (group_query_attention_helper.h of ONNX Runtime 1.19).
_HEAD_DIM_MULTIPLE = 16
_ROTARY_DIM_MULTIPLE = 16

#: transformers' names of activations -> how the graph computes them.
ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu_tanh", "relu"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
#: Kinds of rotary embedding whose angles depend on the position alone. "dynamic" ones change only
#: beyond max_position_embeddings, where a graph's table ends.
_STATIC_ROPE = ("default", "linear", "llama3", "yarn", "dynamic")
#: Kinds whose code asks a batch for its length, which a trace can't keep.
_ROPE_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class Architecture:
    """What is particular to an architecture; names are of parameters below a layer.

    Attributes:
        norm: "rms", or "layer" with a bias.
        norm_offset: added to the norm's stored weight.
        is_parallel: attention and MLP read the same norm and are added to the residual together.
        has_qk_norms: a norm of each query and key head before the rotary embedding.
        has_windows: attention heeds the config's sliding_window; others ignore such a key.
        scales_embeddings: by the square root of the hidden size.
        eps: the config's name of the norms' epsilon.
        gate, up, down: the MLP's products; no gate where it is None.
        post_norm: before the MLP; None where attention's norm serves both.
        final_norm: below the model.
    """

    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    is_parallel: bool = False
    has_qk_norms: bool = False
    has_windows: bool = False
    scales_embeddings: bool = False
    eps: str = "rms_norm_eps"
    attention_out: str = "self_attn.o_proj"
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    post_norm: str | None = "post_attention_layernorm"
    final_norm: str = "norm"


#: By transformers' model_type. Code Llama and Orca-2 are Llamas.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(),
    "mistral": Architecture(has_windows=True),
    "qwen2": Architecture(has_windows=True),
    "qwen3": Architecture(has_qk_norms=True, has_windows=True),
    "gemma": Architecture(norm_offset=1.0, scales_embeddings=True),
    "phi": Architecture(
        norm="layer",
        eps="layer_norm_eps",
        is_parallel=True,
        attention_out="self_attn.dense",
        gate=None,
        up="mlp.fc1",
        down="mlp.fc2",
        post_norm=None,
        final_norm="final_layernorm",
    ),
}


@dataclass(frozen=True)
class DecoderPlan:
    """Sizes and numbers of one model's fused graph.

    Attributes:
        windows: of each layer, the keys that a query sees, itself included; None: all before it.
        embedding_scale: 1 where there is none.
    """

    architecture: Architecture
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    eps: float
    activation: str
    embedding_scale: float
    windows: list[int | None]


def fused_obstacle(config: PretrainedConfig) -> str | None:
    """Why a model gets no fused graph; None: it does."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        return f"{kind} is none of the architectures with one ({', '.join(ARCHITECTURES)})"
    head_dim, rotary_dim = _head_dim(config), _rotary_dim(config)
    if head_dim % _HEAD_DIM_MULTIPLE:
        return (
            f"its head_dim {head_dim} is no multiple of {_HEAD_DIM_MULTIPLE}, which "
            "GroupQueryAttention needs"
        )
    if rotary_dim % _ROTARY_DIM_MULTIPLE:
        return (
            f"{rotary_dim} of each head's {head_dim} dimensions are rotated, which is no multiple "
            f"of {_ROTARY_DIM_MULTIPLE}, as GroupQueryAttention needs"
        )
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type not in _STATIC_ROPE:
        return f"its rotary embedding {rope_type!r} changes with the length of the sequence"
    if 1 in windows(config):
        return "its window is a single key, which GroupQueryAttention doesn't know"
    if config.hidden_act not in ACTIVATIONS:
        return f"its activation {config.hidden_act!r} is none of {', '.join(ACTIVATIONS)}"
    if getattr(config, "qk_layernorm", False):
        return "it has norms of queries and keys (qk_layernorm)"
    if getattr(config, "use_bidirectional_attention", None):
        return "its attention sees later tokens (use_bidirectional_attention)"
    return None


def traced_obstacle(config: PretrainedConfig) -> str | None:
    """Why a model's own forward can't be traced, as far as its config tells; None: it can."""
    rope: Any = getattr(config.get_text_config(), "rope_parameters", None) or {}
    # Of all layers, or of each kind of layer.
    for one in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if (kind := one.get("rope_type")) in _ROPE_BY_LENGTH:
            return f"its rotary embedding {kind!r} changes with the length of the sequence"
    return None


def plan(config: PretrainedConfig) -> DecoderPlan:
    """The fused graph of a model in which `fused_obstacle` found none."""
    architecture = ARCHITECTURES[config.model_type]
    num_heads = config.num_attention_heads
    return DecoderPlan(
        architecture=architecture,
        num_layers=config.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=_head_dim(config),
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        eps=float(getattr(config, architecture.eps)),
        activation=ACTIVATIONS[config.hidden_act],
        embedding_scale=config.hidden_size**0.5 if architecture.scales_embeddings else 1.0,
        windows=windows(config),
    )


def max_positions(config: PretrainedConfig) -> int | None:
    """Tokens that a model has positions for; None: no limit but memory."""
    names = ("max_position_embeddings", "max_seq_len")
    return next((n for name in names if (n := getattr(config, name, None)) is not None), None)


def windows(config: PretrainedConfig) -> list[int | None]:
    """Of each layer, the keys that a query sees, itself included; None: all before it."""
    own = ARCHITECTURES.get(config.model_type)
    if own is not None and not own.has_windows:
        return [None] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None)
    types: Any = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if types is not None:
        return [window if kind in ("sliding_attention", "local") else None for kind in types]
    return [window] * config.num_hidden_layers


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rotary_dim(config: PretrainedConfig) -> int:
    rope = getattr(config, "rope_parameters", None) or {}
    return int(_head_dim(config) * rope.get("partial_rotary_factor", 1.0))

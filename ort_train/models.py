"""Models: loaded, or made at any size from a seed."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ort_train.config import ModelConfig
from ort_train.data import tasks
from ort_train.data.corpora import hub_problem
from ort_train.errors import ModelError
from ort_train.near import near_matches
from ort_train.quantization import (
    Quantization,
    loading_options,
    prepare,
    quantize,
    refuse_full_fine_tune,
)

_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# What reading weights raises: the latter three where a file isn't what its name says.
LOAD_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, ImportError)
LOAD_ERRORS += (SafetensorError, UnpicklingError, EOFError)

# Sizes of a tiny model, by the names that architectures give them; only those that a config has
# are set. The number of key-value heads keeps to one of: all, half, or one.
_TINY_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "intermediate_size": 128,
    "num_decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "d_ff": 128,
    "ffn_dim": 128,
    "ffn_hidden_size": 128,
    "n_inner": 128,
    "word_embed_proj_dim": 64,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "query_pre_attn_scalar": 16,
    "rotary_dim": 16,
    "sliding_window": 32,
    "max_window_layers": 2,
}
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
# Lists with one entry per layer, which the config makes anew for the layers there are.
_PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")

# transformers 5 folds these into rope_parameters and still takes them.
_ROPE_FIELDS = ("rope_theta", "rope_scaling", "partial_rotary_factor")


def load_model(
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    block_size: int,
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """Loads the model's weights, or makes them from the seed.

    What doesn't fit is found from the config, before any weight is read.

    Args:
        model: with `name_or_path` the weights are loaded, else those of `architecture` are made.
        tokenizer: a made model takes at least its size as vocabulary; its special tokens go into
            the model's config where that has none of its own.
        seed: of torch's random generator, which is left where making the model brings it.
        block_size: tokens per sample, which the model must have positions for.
        quantization: of the linear layers' weights, which only an adapter can then train.

    Returns:
        A language model of the task in training mode, on the CPU, or where it was quantized.

    Raises:
        ModelError: unknown architecture or config fields, a config that the architecture refuses,
            an architecture that transformers doesn't have for the task, too few positions or
            vocabulary entries, weights that can't be loaded or quantized, or quantized ones where
            none were asked for.
    """
    config = _loaded_config(model) if model.name_or_path else _made_config(model, tokenizer)
    tasks.check_architecture(model.task, config)
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    positions = positions if isinstance(positions, int) and positions > 0 else None
    _check_positions(positions, model.task, block_size)
    if len(tokenizer) > text_config.vocab_size:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's vocabulary only "
            f"{text_config.vocab_size}: set model.tokenizer=null to take the model's own, or "
            "model.tokenizer to one that fits"
        )
    for field in _SPECIAL_IDS:
        if getattr(text_config, field, None) is None:
            setattr(text_config, field, getattr(tokenizer, field))
    options = {"dtype": getattr(torch, model.dtype), "attn_implementation": model.attention}
    if quantization is None:
        refuse_full_fine_tune(config)
    elif model.name_or_path:
        options |= loading_options(quantization, config)
    auto_class = tasks.auto_class(model.task)
    torch.manual_seed(seed)
    try:
        if model.name_or_path:
            made = auto_class.from_pretrained(
                model.name_or_path,
                config=config,
                **options,
                **load_arguments(model, model.name_or_path, model.revision),
            )
        else:
            made = auto_class.from_config(config, **options)
    except LOAD_ERRORS as error:
        raise ModelError(refusal(model, error)) from error
    if positions is not None and (unused := _unused_positions(made)):
        _check_positions(positions - unused, model.task, block_size)
    generation = getattr(made, "generation_config", None)  # of models that generate
    for field in _SPECIAL_IDS:
        if generation is not None and getattr(generation, field) is None:
            setattr(generation, field, getattr(text_config, field))
    if quantization is not None:
        if not model.name_or_path:
            quantize(made, quantization)
        prepare(made, quantization)
    return made.train()


def _check_positions(positions: int | None, task: tasks.Task, block_size: int) -> None:
    if positions is None or tasks.max_length(task, block_size) <= positions:
        return
    half = "half of " if task == "seq2seq" else ""
    raise ModelError(
        f"{half}data.block_size {block_size} exceeds the {positions} positions of the model "
        f"(max_position_embeddings): set data.block_size={2 * positions if half else positions} "
        "or less"
    )


def _unused_positions(module: PreTrainedModel) -> int:
    """How many of its positions a model gives to no token.

    RoBERTa and its kin count from the one after the padding token's id
    (`create_position_ids_from_input_ids` of `modeling_roberta.py`).
    """
    for name, part in module.named_modules():
        padding = getattr(part, "padding_idx", None)
        if name.endswith(".position_embeddings") and padding is not None:
            return int(padding) + 1
    return 0


def tiny_config(architecture: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Shrinks an architecture to about 64 hidden units in 2 layers.

    Args:
        architecture: transformers model_type.
        fields: config fields that are given besides; what isn't a size is kept.

    Returns:
        The fields of the tiny config, without `vocab_size`, which the tokenizer decides.

    Raises:
        ModelError: unknown architecture or fields.
    """
    full = made_config(architecture, fields)
    aliases = full.attribute_map
    accepted = _accepted_fields(type(full))
    given = {aliases.get(name, name): name for name in fields}
    sizes = {name: size for name, size in full.to_dict().items() if isinstance(size, int)}
    result = {
        name: value for name, value in fields.items() if name not in (*_PER_LAYER, "vocab_size")
    }

    def shrink(name: str, size: int) -> None:
        name = aliases.get(name, name)
        if name in accepted and sizes.get(name, 0) > size:
            result[given.get(name, name)] = size

    for name, size in _TINY_SIZES.items():
        shrink(name, size)
    heads = getattr(full, "num_attention_heads", None)
    for name in _KV_HEADS:
        kv_heads = sizes.get(name)
        shrink(name, _TINY_SIZES["num_attention_heads"] if kv_heads == heads else 2)
    return result


def _made_config(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    assert model.architecture is not None  # config.parse sees to it
    vocab_size = max(model.config.get("vocab_size", 0), len(tokenizer))
    special = {name: getattr(tokenizer, name) for name in _SPECIAL_IDS}
    if model.task == "seq2seq":  # with which T5's decoder begins, too
        start = model.config.get("decoder_start_token_id", tokenizer.pad_token_id)
        special["decoder_start_token_id"] = start
    return made_config(model.architecture, model.config, special | {"vocab_size": vocab_size})


def made_config(
    architecture: str, fields: Mapping[str, Any], from_tokenizer: Mapping[str, Any] | None = None
) -> PretrainedConfig:
    """The config of a model that is made.

    Raises:
        ModelError: unknown architecture or fields, or values that it refuses.
    """
    if architecture not in CONFIG_MAPPING:
        hint = near_matches(architecture, CONFIG_MAPPING)
        raise ModelError(
            f"model.architecture {architecture} is unknown to this transformers: "
            + (hint if hint.startswith("did") else "it should be a model_type such as llama")
        )
    _check_fields(CONFIG_MAPPING[architecture], fields)
    try:
        return AutoConfig.for_model(architecture, **{**fields, **(from_tokenizer or {})})
    except Exception as error:  # configs raise types of their own
        raise ModelError(f"model.config doesn't make a {architecture}: {error}") from error


def _loaded_config(model: ModelConfig) -> PretrainedConfig:
    name = model.name_or_path
    assert name is not None
    origin = load_arguments(model, name, model.revision)
    try:
        config = AutoConfig.from_pretrained(name, **origin)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"can't load model {name}: {error}") from error
    _check_fields(type(config), model.config, config.to_dict())
    try:
        return AutoConfig.from_pretrained(name, **origin, **model.config)
    except Exception as error:  # configs raise types of their own
        raise ModelError(f"model.config doesn't fit {name}: {error}") from error


def refusal(model: ModelConfig, error: Exception) -> str:
    """Why transformers made no model, in words, with the way out where there is one."""
    verb = f"load {model.name_or_path}" if model.name_or_path else f"make a {model.architecture}"
    message = f"can't {verb} as a {tasks.noun(model.task)}: {error}"
    if "attention implementation" in str(error):
        message += "; set model.attention=eager"
    elif model.name_or_path and model.config:
        message += "; set model.config={} to leave the loaded config as it is"
    return message


def _check_fields(
    kind: type[PretrainedConfig], fields: Mapping[str, Any], loaded: Iterable[str] = ()
) -> None:
    """Refuses fields that the config would store and never read."""
    known = _accepted_fields(kind).union(loaded)
    if unknown := [field for field in fields if field not in known]:
        hints = [f"{field} ({near_matches(field, known)})" for field in unknown]
        raise ModelError(f"model.config fields unknown to {kind.model_type}: {'; '.join(hints)}")


def _accepted_fields(kind: type[PretrainedConfig]) -> set[str]:
    own = inspect.signature(kind.__init__).parameters.keys() - {"self", "kwargs"}
    shared = (name for name in PretrainedConfig().to_dict() if not name.startswith("_"))
    return own.union(shared, kind.attribute_map, kind.attribute_map.values(), _ROPE_FIELDS)


def load_arguments(model: ModelConfig, name: str, revision: str | None) -> dict[str, Any]:
    """Arguments of from_pretrained; an unreachable hub isn't asked again and again."""
    absent = not os.path.isdir(name) and hub_problem(f"models/{name}") is not None
    return {
        "revision": revision or "main",
        "trust_remote_code": model.trust_remote_code,
        "local_files_only": absent,
    }

"""Tiny text-to-image pipelines with random weights, made with diffusers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def save_pipeline(folder: Path, xl: bool = False, **unet_fields: Any) -> Path:
    """Save a pipeline of SD-Turbo's kind, or of SDXL-Turbo's, of some 100k parameters.

    Args:
        unet_fields: of the UNet's config.
    """
    import torch
    from diffusers import (
        AutoencoderKL,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder.parent / f"{folder.name}-vocabulary")
    text = text_config(len(tokenizer), "gelu" if not xl else "quick_gelu")
    text_width, projected = text.hidden_size, 24
    size_fields = {}
    if xl:
        size_fields = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": projected + 6 * 8,
            "transformer_layers_per_block": (1, 2),
        }
    unet = UNet2DConditionModel(
        **{
            "sample_size": 16,
            "block_out_channels": (32, 64),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": (2, 4),
            "cross_attention_dim": text_width * (1 + xl),
            "use_linear_projection": True,
            **size_fields,
            **unet_fields,
        }
    )
    # As many levels as the real ones have: 8 pixels a latent.
    vae = AutoencoderKL(
        block_out_channels=(16,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        sample_size=128,
    )
    # SD-Turbo's and SDXL-Turbo's schedulers, with their steps from the end of the schedule.
    scheduler_class = EulerAncestralDiscreteScheduler if xl else EulerDiscreteScheduler
    scheduler = scheduler_class(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
    )
    parts: dict[str, Any] = {
        "vae": vae,
        "unet": unet,
        "text_encoder": CLIPTextModel(text),
        "tokenizer": tokenizer,
        "scheduler": scheduler,
    }
    if xl:
        parts["tokenizer_2"] = tokenizer
        second = text_config(len(tokenizer), "gelu", projection_dim=projected)
        parts["text_encoder_2"] = CLIPTextModelWithProjection(second)
        pipeline = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.save_pretrained(folder)
    return folder


def text_config(vocab_size: int, activation: str, **fields: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act=activation,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
        **fields,
    )


def make_tokenizer(folder: Path) -> Any:
    """CLIP's kind, that knows letters alone."""
    from transformers import CLIPTokenizer

    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    vocabulary = {word: index for index, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=77)

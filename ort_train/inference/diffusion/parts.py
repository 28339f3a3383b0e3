"""The models of a text-to-image pipeline: how each is traced, what its graph takes and gives.

Names of inputs and outputs are those that Optimum gave such graphs.

Shapes as suffixes: B rows of the batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ort_train.errors import ExportError

#: Pipelines by the models that each runs. SD-Turbo is the first, SDXL-Turbo the second.
PIPELINES = {
    "StableDiffusionPipeline": ("text_encoder", "unet", "vae"),
    "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2", "unet", "vae"),
}
#: Where a graph lies, if not under its model's name: of the VAE, only the decoder is exported.
FOLDERS = {"vae": "vae_decoder"}
CLASSES = {
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
}
# Inputs that a UNet takes for other tasks; text-to-image has none of them.
_UNET_MUST_BE_NONE = (
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
)


@dataclass(frozen=True)
class Shape:
    """Of a batch: rows, tokens of the text, latent height and width."""

    batch: int
    tokens: int
    height: int
    width: int


#: What a trace sees. No two numbers are equal and none is 1, so that no dimension is taken for
#: another or for a constant; and no UNet can halve odd sizes evenly: with sizes that it can,
#: diffusers leaves the upsampling factor 2 in the graph, which then is wrong for all others
#: (`UNet2DConditionModel.forward`, `forward_upsample_size`).
TRACED = Shape(batch=2, tokens=7, height=19, width=23)
#: What the written graph is compared at.
COMPARED = (Shape(1, 16, 16, 16), Shape(3, 9, 13, 24))


@dataclass(frozen=True)
class Part:
    """A model of a pipeline, ready to be traced.

    Attributes:
        module: takes the inputs by position, returns a tuple of the outputs.
        inputs: names of the graph's inputs and of their dynamic dimensions.
        outputs: likewise.
        example: makes inputs of a shape, random but for the same seed the same.
    """

    name: str
    module: torch.nn.Module
    inputs: dict[str, dict[int, str]]
    outputs: dict[str, dict[int, str]]
    example: Callable[[Shape], tuple[torch.Tensor, ...]]


def make_part(name: str, model: Any) -> Part:
    """The part for a loaded model, whose class and config have been checked."""
    make = {"unet": _unet, "vae": _vae_decoder}.get(name, _text_encoder)
    return make(name, model)


def check_class(name: str, class_name: str) -> None:
    """Refuse a model of another class than the pipeline's own.

    Raises:
        ExportError: naming the class that can be exported.
    """
    if class_name != CLASSES[name]:
        raise ExportError(
            f"{name} is a {class_name}, and only a {CLASSES[name]} can be exported: use diffusers' "
            "own pipeline for this model"
        )


def check_config(name: str, config: Any) -> None:
    """Refuse a model whose graph would not be the one that the pipeline calls.

    Args:
        config: diffusers' (a mapping) or transformers'.

    Raises:
        ExportError: naming the inputs that a graph of this kind hasn't.
    """
    problems = []
    if name == "unet":
        problems = [
            f"{field} {config[field]!r}"
            for field in _UNET_MUST_BE_NONE
            if config.get(field) is not None
        ]
        if config.get("addition_embed_type") not in (None, "text_time"):
            problems.append(f"addition_embed_type {config['addition_embed_type']!r}")
    elif getattr(config, "use_attention_mask", None):
        problems = ["use_attention_mask true"]
    if problems:
        raise ExportError(
            f"{name} has {' and '.join(problems)}, which asks for inputs that an exported graph "
            "hasn't: use diffusers' own pipeline for this model"
        )


def _generator(shape: Shape) -> torch.Generator:
    return torch.Generator().manual_seed(shape.batch)


class _UNet(torch.nn.Module):
    def __init__(self, unet: torch.nn.Module):
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.unet(
            sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False
        )


def _unet(name: str, unet: Any) -> Part:
    config = unet.config
    with_size = config.addition_embed_type == "text_time"
    inputs = {
        "sample": {0: "batch", 2: "height", 3: "width"},
        "timestep": {},
        "encoder_hidden_states": {0: "batch", 1: "tokens"},
    }
    if with_size:
        inputs |= {"text_embeds": {0: "batch"}, "time_ids": {0: "batch"}}

    def example(shape: Shape) -> tuple[torch.Tensor, ...]:
        generator = _generator(shape)

        def random(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, generator=generator)

        made = (
            random(shape.batch, config.in_channels, shape.height, shape.width),
            torch.tensor(999.0),
            random(shape.batch, shape.tokens, _width(config.cross_attention_dim)),
        )
        if not with_size:
            return made
        # Original size, crop and target size: six numbers, each embedded by itself.
        num_sizes = 6
        pooled = config.projection_class_embeddings_input_dim
        pooled -= num_sizes * config.addition_time_embed_dim
        sizes = torch.full((shape.batch, num_sizes), 512.0)
        return (*made, random(shape.batch, pooled), sizes)

    outputs = {"out_sample": {0: "batch", 2: "height", 3: "width"}}
    return Part(name, _UNet(unet), inputs, outputs, example)


def _width(dimensions: int | Sequence[int]) -> int:
    """UNets may be configured with one width for each block; text-to-image has one text."""
    return dimensions if isinstance(dimensions, int) else dimensions[0]


class _VaeDecoder(torch.nn.Module):
    def __init__(self, vae: Any):
        super().__init__()
        # Not the whole VAE: its encoder's weights would be written too.
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder

    def forward(self, latent_sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.post_quant_conv is not None:
            latent_sample = self.post_quant_conv(latent_sample)
        return (self.decoder(latent_sample),)


def _vae_decoder(name: str, vae: Any) -> Part:
    def example(shape: Shape) -> tuple[torch.Tensor, ...]:
        channels = vae.config.latent_channels
        sizes = (shape.batch, channels, shape.height, shape.width)
        return (torch.randn(*sizes, generator=_generator(shape)),)

    return Part(
        name,
        _VaeDecoder(vae),
        {"latent_sample": {0: "batch", 2: "latent_height", 3: "latent_width"}},
        {"sample": {0: "batch", 2: "height", 3: "width"}},
        example,
    )


def text_outputs(class_name: str, num_layers: int) -> list[str]:
    """Names of a text encoder's outputs, in the order of the model's own."""
    projects = class_name == "CLIPTextModelWithProjection"
    first = (
        ["text_embeds", "last_hidden_state"] if projects else ["last_hidden_state", "pooler_output"]
    )
    return [*first, *(f"hidden_states.{i}" for i in range(num_layers + 1))]


class _TextEncoder(torch.nn.Module):
    def __init__(self, encoder: torch.nn.Module, names: Sequence[str]):
        super().__init__()
        self.encoder = encoder
        self.names = names

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.encoder(input_ids=input_ids, output_hidden_states=True)
        found = {f"hidden_states.{i}": state for i, state in enumerate(output.hidden_states)}
        return tuple({**output, **found}[name] for name in self.names)


def _text_encoder(name: str, encoder: Any) -> Part:
    config = encoder.config
    names = text_outputs(type(encoder).__name__, config.num_hidden_layers)

    def example(shape: Shape) -> tuple[torch.Tensor, ...]:
        sizes = (shape.batch, shape.tokens)
        ids_BT = torch.randint(0, config.vocab_size, sizes, generator=_generator(shape))
        ids_BT[:, -2] = config.vocab_size - 1  # the end of a text, where its summary is read
        if config.eos_token_id is not None:
            ids_BT[:, -2] = min(config.eos_token_id, config.vocab_size - 1)
        return (ids_BT,)

    pooled = ("text_embeds", "pooler_output")
    outputs = {n: {0: "batch"} if n in pooled else {0: "batch", 1: "tokens"} for n in names}
    return Part(
        name,
        _TextEncoder(encoder, names),
        {"input_ids": {0: "batch", 1: "tokens"}},
        outputs,
        example,
    )

"""diffusers' pipelines around models that are ONNX graphs.

The pipeline, its loop, scheduler, tokenizers and image processor are diffusers' own. Each model is
replaced by a module with the model's config that hands its inputs to ONNX Runtime.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from ort_train.errors import ExportError, GenerationError
from ort_train.inference.diffusion.folder import (
    component_class,
    first_line,
    load_config,
    part_folder,
    read_exported,
)
from ort_train.inference.folder import MODEL_FILE

if TYPE_CHECKING:
    import onnxruntime
    from diffusers import DiffusionPipeline


def load_pipeline(folder: str | Path, num_threads: int | None = None) -> DiffusionPipeline:
    """The pipeline of an exported folder, to be called as diffusers' own.

    Args:
        folder: written by `export_pipeline`.
        num_threads: of ONNX Runtime; None: one a core.

    Raises:
        ExportError: naming the file that is missing or damaged.
    """
    import diffusers

    index, _ = read_exported(folder)

    components: dict[str, Any] = dict.fromkeys(index.absent)
    for name in index.companions:
        components[name] = component_class(index, name).from_pretrained(index.path / name)
    for name in index.parts:
        part = index.path / part_folder(name)
        session = make_session(part / MODEL_FILE, num_threads)
        components[name] = _COUNTERPARTS[name](session, load_config(index, name, part))
    return getattr(diffusers, index.pipeline)(**components, **index.flags)


def make_session(file: Path, num_threads: int | None = None) -> onnxruntime.InferenceSession:
    """A graph of the folder, loaded.

    Raises:
        ExportError: ONNX Runtime can't load it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    # Idle threads that spin would keep torch's from the cores, which run the scheduler.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own types share no public base
        raise ExportError(
            f"ONNX Runtime can't load {str(file)!r} ({first_line(error)}): export the "
            "pipeline again"
        ) from error


class _Counterpart(torch.nn.Module):
    """A module without weights, in the place of a model of a pipeline.

    Args:
        session: of the model's graph.
        config: the model's.
    """

    def __init__(self, session: onnxruntime.InferenceSession, config: Any):
        super().__init__()
        self.session = session
        self.config = config
        self.output_names = [output.name for output in session.get_outputs()]
        self.dtype = torch.float32
        self.device = torch.device("cpu")

    def run(self, **inputs: torch.Tensor) -> list[torch.Tensor]:
        """All outputs, in the graph's order."""
        feeds = {name: tensor.numpy(force=True) for name, tensor in inputs.items()}
        return [torch.from_numpy(output) for output in self.session.run(None, feeds)]

    def to(self, *args: Any, **kwargs: Any) -> _Counterpart:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if (device is not None and device.type != "cpu") or dtype not in (None, torch.float32):
            raise GenerationError(
                f"an exported pipeline runs on the CPU in float32, and can't be moved to "
                f"{dtype if device is None else device}: use diffusers' own pipeline there"
            )
        return self


def _refuse(model: str, options: dict[str, Any]) -> None:
    """No option that the graph can't follow is ignored."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise GenerationError(
            f"{', '.join(given)} can't be passed to an exported {model}, whose graph doesn't have "
            "it: use diffusers' own pipeline"
        )


class _UNet(_Counterpart):
    @property
    def add_embedding(self) -> Any:
        """StableDiffusionXLPipeline asks its first layer how many numbers it takes."""
        width = self.config.projection_class_embeddings_input_dim
        return SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        _refuse("UNet", options)
        (output,) = self.run(
            sample=sample,
            timestep=torch.as_tensor(timestep, dtype=torch.float32),
            encoder_hidden_states=encoder_hidden_states,
            **{name: tensor.float() for name, tensor in (added_cond_kwargs or {}).items()},
        )
        if not return_dict:
            return (output,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=output)


class _Vae(_Counterpart):
    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> Any:
        # A decoder draws nothing: diffusers' own takes a generator for other autoencoders' sake.
        (output,) = self.run(latent_sample=z)
        if not return_dict:
            return (output,)
        from diffusers.models.autoencoders.vae import DecoderOutput

        return DecoderOutput(sample=output)


class _TextEncoder(_Counterpart):
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **options: Any,
    ) -> Any:
        _refuse("text encoder", {"attention_mask": attention_mask, **options})
        outputs = dict(zip(self.output_names, self.run(input_ids=input_ids), strict=True))
        from transformers.modeling_outputs import BaseModelOutputWithPooling
        from transformers.models.clip.modeling_clip import CLIPTextModelOutput

        states = tuple(outputs.pop(name) for name in self.output_names if "." in name)
        kind = CLIPTextModelOutput if "text_embeds" in outputs else BaseModelOutputWithPooling
        return kind(**outputs, hidden_states=states if output_hidden_states else None)

    @property
    def text_model(self) -> Any:
        """StableDiffusionPipeline's `clip_skip` asks for a layer of it."""
        _refuse("text encoder", {"clip_skip": True})


_COUNTERPARTS: dict[str, type[_Counterpart]] = {
    "text_encoder": _TextEncoder,
    "text_encoder_2": _TextEncoder,
    "unet": _UNet,
    "vae": _Vae,
}

"""Exporting a text-to-image pipeline of diffusers, model by model, each compared with PyTorch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ort_train.errors import ExportError
from ort_train.files import expanded
from ort_train.inference import folder as folders
from ort_train.inference.diffusion import parts
from ort_train.inference.diffusion.folder import (
    INDEX_FILE,
    PartInfo,
    PipelineFolder,
    PipelineInfo,
    component_class,
    first_line,
    load_config,
    part_folder,
    read_index,
)
from ort_train.reports import provenance

#: Largest difference to PyTorch, as a share of the output's largest value. 24 bits of mantissa
#: round to 6e-8; other orders of summation through some hundred layers make that 1e-6 (SD-Turbo's
#: UNet with random weights: 1e-6). A wrong term shows as 1e-2 and more.
TOLERANCE = 1e-4


def export_pipeline(
    source: str | Path,
    out: str | Path,
    *,
    progress: bool = True,
    on_event: Callable[[str], None] | None = None,
) -> PipelineInfo:
    """Export the models of a pipeline; the rest of it is copied.

    One model at a time is in memory, PyTorch's or ONNX Runtime's.

    Args:
        source: a folder that diffusers' `save_pretrained` wrote, of a pipeline in
            `parts.PIPELINES`; or a name on the hub.
        out: a new or empty folder; it is whole or not there.
        progress: show a progress bar on stderr, where that is a terminal.
        on_event: called with a line of text for each model.

    Raises:
        ExportError: the folder is damaged or of another pipeline, before work starts; a model can't
            be traced, or its graph computes other numbers.
        CheckpointError: the disk has too little room.
    """
    folders.check_out(out)
    index = read_index(_locate(source))
    for name in index.parts:
        class_name = index.components[name][1]
        parts.check_class(name, class_name)
        parts.check_config(name, load_config(index, name, index.path / name))
    missing = [name for name in index.companions if not (index.path / name).is_dir()]
    if missing:
        raise ExportError(
            f"{str(index.path)!r} lacks {', '.join(missing)}: save the pipeline again"
        )
    num_bytes = sum(_weight_bytes(index.path / name) for name in index.parts)
    tell = on_event or (lambda line: None)
    with (
        folders.staged(out, num_bytes) as staged,
        tqdm(total=num_bytes, unit="B", unit_scale=True, disable=None if progress else True) as bar,
    ):
        shutil.copy2(index.path / INDEX_FILE, staged / INDEX_FILE)
        for name in index.companions:
            shutil.copytree(index.path / name, staged / name)
        exported = {}
        for name in index.parts:
            bar.set_description(name)
            exported[name] = _export_part(index, name, staged / part_folder(name), bar)
            tell(
                f"{name}: {exported[name].num_parameters:,} parameters, differs from PyTorch by "
                f"{exported[name].max_rel:.1e} of its largest value ({TOLERANCE:g} is allowed)"
            )
        info = PipelineInfo(
            pipeline=index.pipeline,
            parts=exported,
            source=provenance.scrub(str(source)),
            versions=provenance.versions(),
        )
        content = info.model_dump(mode="json", by_alias=True)
        (staged / folders.INFO_FILE).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return info


def _export_part(index: PipelineFolder, name: str, folder: Path, bar: tqdm) -> PartInfo:
    import torch

    from ort_train.inference.diffusion.pipeline import make_session
    from ort_train.inference.diffusion.trace import write_graph

    folder.mkdir()
    model = _load(index, name)
    part = parts.make_part(name, model)
    batches = [part.example(shape) for shape in parts.COMPARED]
    with torch.no_grad():
        expected = [[output.numpy() for output in part.module(*batch)] for batch in batches]
    try:
        write_graph(
            part, folder / folders.MODEL_FILE, folder / folders.DATA_FILE, on_write=bar.update
        )
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
        raise ExportError(
            f"{name} can't be traced ({first_line(error)}): use diffusers' own pipeline"
        ) from error
    if index.components[name][0] == "diffusers":
        model.save_config(folder)
    else:
        model.config.save_pretrained(folder)
    num_parameters = sum(parameter.numel() for parameter in part.module.parameters())
    inputs = list(part.inputs)
    del part, model  # before the graph's weights are loaded
    session = make_session(folder / folders.MODEL_FILE)
    worst = 0.0
    for batch, outputs in zip(batches, expected, strict=True):
        feeds = {key: tensor.numpy() for key, tensor in zip(inputs, batch, strict=True)}
        for ours, theirs in zip(session.run(None, feeds), outputs, strict=True):
            worst = float(np.maximum(worst, _relative(ours, theirs)))  # keeps a NaN
    # Written so that a NaN, which compares false with everything, is refused.
    if not worst <= TOLERANCE:
        raise ExportError(
            f"the graph of {name} differs from PyTorch by {worst:.2g} of its largest value, and "
            f"{TOLERANCE:g} is allowed: no file is kept. Please report the model"
        )
    return PartInfo(num_parameters=num_parameters, max_rel=worst, tolerance=TOLERANCE)


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    return float(np.abs(ours - theirs).max() / max(float(np.abs(theirs).max()), 1e-6))


def _locate(source: str | Path) -> Path:
    """The pipeline's folder; one on the hub is downloaded into its cache."""
    folder = expanded(source)
    if folder.exists() or str(source).count("/") != 1:
        return folder
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(str(source)))
    except Exception as error:  # of any of the libraries between here and the hub
        raise ExportError(
            f"{str(source)!r} is neither a folder nor a pipeline that the hub lets download "
            f"({first_line(error)})"
        ) from error


def _load(index: PipelineFolder, name: str) -> Any:
    """A model in float32, in eval mode."""
    import torch

    library, _ = index.components[name]
    dtype = {"torch_dtype" if library == "diffusers" else "dtype": torch.float32}
    folder = index.path / name
    try:
        return component_class(index, name).from_pretrained(folder, **dtype).eval()
    except Exception as error:  # each library has its own for files cut off
        raise ExportError(
            f"the weights in {str(folder)!r} can't be loaded ({first_line(error)}): save the "
            "pipeline again"
        ) from error


def _weight_bytes(folder: Path) -> int:
    """Of a model's weights in float32."""
    from safetensors import SafetensorError, safe_open

    num_bytes = 0
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                    num_bytes += 4 * int(np.prod(tensors.get_slice(name).get_shape()))
        except (SafetensorError, OSError) as error:
            raise ExportError(
                f"{str(file)!r} is damaged ({error}): save the pipeline again"
            ) from None
    return num_bytes

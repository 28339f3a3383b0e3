"""Folders of text-to-image pipelines: diffusers' own, and exported ones.

An exported folder is a diffusers folder whose models are ONNX graphs:

    model_index.json        diffusers' own, unchanged
    scheduler/, tokenizer/, ...     copied
    unet/, text_encoder/, text_encoder_2/, vae_decoder/     config.json, model.onnx, model.onnx.data
    ort_train_export.json   what was exported, and how far it is from PyTorch
"""

from __future__ import annotations

import contextlib
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ort_train.errors import ExportError
from ort_train.files import expanded
from ort_train.inference.diffusion.parts import FOLDERS, PIPELINES
from ort_train.inference.folder import INFO_FILE, MODEL_FILE

INDEX_FILE = "model_index.json"


class PartInfo(BaseModel):
    """What was measured of one model's graph."""

    model_config = ConfigDict(extra="forbid")

    num_parameters: int
    max_rel: float  # largest difference to PyTorch, over the largest value of that output
    tolerance: float


class PipelineInfo(BaseModel):
    """`ort_train_export.json` of a pipeline."""

    model_config = ConfigDict(extra="forbid")

    schema_: Literal[1] = Field(alias="schema", default=1)
    kind: Literal["diffusion"] = "diffusion"
    pipeline: str
    precision: Literal["fp32"] = "fp32"
    parts: dict[str, PartInfo]
    source: str
    versions: dict[str, str | None]


@dataclass(frozen=True)
class PipelineFolder:
    """A folder of diffusers' that names a pipeline which can be exported.

    Attributes:
        components: by name, the library and class of each.
        absent: components that the pipeline does without.
        flags: the pipeline's other arguments.
    """

    path: Path
    pipeline: str
    components: dict[str, tuple[str, str]]
    absent: list[str]
    flags: dict[str, Any]

    @property
    def parts(self) -> tuple[str, ...]:
        """The models that run in ONNX Runtime."""
        return PIPELINES[self.pipeline]

    @property
    def companions(self) -> list[str]:
        """The components that are copied as they are."""
        return [name for name in self.components if name not in self.parts]


def read_index(folder: Path) -> PipelineFolder:
    """Read `model_index.json`.

    Raises:
        ExportError: it is missing or damaged, or names a pipeline that isn't run here, or lacks one
            of its models.
    """
    file = folder / INDEX_FILE
    if not file.is_file():
        raise ExportError(
            f"{str(folder)!r} has no {INDEX_FILE}, so it is no pipeline of diffusers: name the "
            "folder that its save_pretrained wrote"
        )
    try:
        index: Any = json.loads(file.read_text(encoding="utf-8"))
        pipeline = index["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"{str(file)!r} is damaged ({error!r}): save the pipeline again"
        ) from None
    if pipeline not in PIPELINES:
        raise ExportError(
            f"{str(folder)!r} is a {pipeline}, and {' or '.join(PIPELINES)} can be run by ONNX "
            "Runtime: use diffusers' own pipeline for this one"
        )
    named = {name: value for name, value in index.items() if isinstance(value, list)}
    components = {name: (value[0], value[1]) for name, value in named.items() if all(value)}
    absent = [name for name in named if name not in components]
    flags = {
        name: value
        for name, value in index.items()
        if name not in named and not name.startswith("_")
    }
    missing = [name for name in PIPELINES[pipeline] if name not in components]
    if missing:
        raise ExportError(
            f"{str(folder)!r} has no {' and no '.join(missing)}, which a {pipeline} needs"
        )
    return PipelineFolder(folder, pipeline, components, absent, flags)


def read_exported(folder: str | Path) -> tuple[PipelineFolder, PipelineInfo]:
    """Read an exported pipeline's description, and see that no file is missing.

    Raises:
        ExportError: naming what is missing or damaged.
    """
    folder = expanded(folder)
    file = folder / INFO_FILE
    if not file.is_file():
        raise ExportError(
            f"{str(folder)!r} has no {INFO_FILE}, so it is no exported pipeline: write one with "
            "`ort-train export-diffusion DIR --out OUT`"
        )
    try:
        info = PipelineInfo.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ExportError(
            f"{str(file)!r} describes no exported pipeline ({'; '.join(lines[:3])}): export it "
            "again"
        ) from None
    index = read_index(folder)
    files = [f"{part_folder(name)}/{MODEL_FILE}" for name in index.parts]
    missing = [name for name in [*files, *index.companions] if not (folder / name).exists()]
    if missing:
        raise ExportError(f"{str(folder)!r} lacks {', '.join(missing)}: export the pipeline again")
    return index, info


def component_class(index: PipelineFolder, name: str) -> Any:
    """The class of a component.

    Raises:
        ExportError: the installed libraries don't have it.
    """
    library, class_name = index.components[name]
    # diffusers names a module of its own pipelines without the way to it.
    for module_name in (library, f"diffusers.pipelines.{library}"):
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(module_name), class_name)
    raise ExportError(
        f"{name} of {str(index.path)!r} is a {class_name} of {library}, which isn't installed, or "
        "is of another version: install the one that saved the pipeline"
    )


def load_config(index: PipelineFolder, name: str, folder: Path) -> Any:
    """A model's config, diffusers' or transformers', without its weights.

    Raises:
        ExportError: it can't be read.
    """
    model_class = component_class(index, name)
    try:
        if index.components[name][0] == "diffusers":
            from diffusers.configuration_utils import FrozenDict

            return FrozenDict(model_class.load_config(folder))
        return model_class.config_class.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ExportError(
            f"the config in {str(folder)!r} can't be read ({first_line(error)}): save the pipeline "
            "again"
        ) from None


def first_line(error: BaseException) -> str:
    """Of an error's message: those of the libraries below go on for paragraphs."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def part_folder(name: str) -> str:
    """Where a part lies in an exported folder."""
    return FOLDERS.get(name, name)

"""A run's folder: what lies in it, and whether a run may begin or go on there."""

from __future__ import annotations

import shutil
from pathlib import Path

from ort_train import checkpoints, distributed
from ort_train.config import RunConfig, to_yaml
from ort_train.errors import CheckpointError
from ort_train.files import replacing

CONFIG_FILE = "config.yaml"
RECORD_FILE = "record.json"
CHART_FILE = "speed.png"
CURVE_FILE = "training.png"
PAGE_FILE = "report.html"
MODEL_FOLDER = "model"


def prepare(config: RunConfig) -> str | None:
    """Make or check the run's folder, and write the config into it.

    Returns:
        The checkpoint to resume from, or None.

    Raises:
        CheckpointError: where it holds another run and neither overwriting nor resuming is asked
            for, can't be written to, or can't be resumed as this config.
    """
    out, output = config.output_dir, config.output
    resume_from = None
    if output.resume not in ("none", "auto"):
        resume_from = output.resume
        if not Path(resume_from).is_dir():
            raise CheckpointError(
                f"output.resume {resume_from!r} is not a folder: name a checkpoint-N folder, or "
                "auto for the newest one"
            )
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"output.dir {str(out)!r} is a file: name a folder")
    if distributed.is_main_process():
        # A run that failed before it made anything has left its config alone.
        occupied = out.is_dir() and any(path.name != CONFIG_FILE for path in out.iterdir())
        if occupied and output.resume == "auto":
            _check_same_run(config, out)
            found = checkpoints.list_checkpoints(out)
            resume_from = str(found[-1]) if found else None
            distributed.say(
                f"resuming from {resume_from}" if found else "no checkpoint yet: starting anew"
            )
        elif occupied and resume_from is None:
            if not output.overwrite:
                raise CheckpointError(
                    f"output.dir {str(out)!r} holds another run: continue it with "
                    "output.resume=auto, replace it with output.overwrite=true, or name another "
                    "folder with output.dir=..."
                )
            _remove_run(out)
        try:
            out.mkdir(parents=True, exist_ok=True)
            with replacing(out / CONFIG_FILE) as file:
                file.write_text(to_yaml(config), encoding="utf-8")
        except OSError as error:
            raise CheckpointError(
                f"output.dir {str(out)!r} can't be written to ({error.strerror}): name another "
                "folder with output.dir=..."
            ) from error
    elif output.resume == "auto":
        found = checkpoints.list_checkpoints(out)
        resume_from = str(found[-1]) if found else None
    return resume_from


def _check_same_run(config: RunConfig, out: Path) -> None:
    """A resumed run must train the same thing: model, data, adapter."""
    from ort_train.recipes import load_recipe

    file = out / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(
            f"output.dir {str(out)!r} has no {CONFIG_FILE}, so it is no run of ort_train: name "
            "another folder with output.dir=..."
        )
    before = load_recipe(file)
    changed = [
        f"{section}.{key} was {old!r}, is {getattr(getattr(config, section), key)!r}"
        for section in ("model", "data", "adapter", "distill")
        for key, old in getattr(before, section)
        if old != getattr(getattr(config, section), key)
    ]
    if changed:
        raise CheckpointError(
            f"output.dir {str(out)!r} holds a run of something else ({'; '.join(changed)}): "
            "resume with the same settings, or name another folder with output.dir=..."
        )


def _remove_run(out: Path) -> None:
    """Remove what a run wrote, and nothing that somebody else put there."""
    ours = [CONFIG_FILE, RECORD_FILE, CHART_FILE, CURVE_FILE, PAGE_FILE]
    if not (out / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"output.dir {str(out)!r} has no {CONFIG_FILE}, so it is no run of ort_train and "
            "isn't overwritten: name another folder with output.dir=..."
        )
    for name in ours:
        (out / name).unlink(missing_ok=True)
    folders = [MODEL_FOLDER, "last_finite_weights", checkpoints.STAGING_FOLDER]
    for folder in [*(out / name for name in folders), *out.glob("checkpoint-*")]:
        shutil.rmtree(folder, ignore_errors=True)

"""A run's folder: what lies in it, and whether a run may begin or go on there."""

from __future__ import annotations

import shutil
from pathlib import Path

from ort_train import checkpoints, distributed
from ort_train.config import RunConfig, to_yaml
from ort_train.errors import CheckpointError
from ort_train.files import expanded, replacing

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
        resume_from = str(expanded(output.resume))
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
        is_own = resume_from is not None and Path(resume_from).resolve().parent == out.resolve()
        if occupied and output.resume == "auto":
            _check_same_run(config, out)
            found = checkpoints.list_checkpoints(out)
            resume_from = str(found[-1]) if found else None
            distributed.say(
                f"resuming from {resume_from}" if found else "no checkpoint yet: starting anew"
            )
        elif occupied and not is_own:
            if not output.overwrite:
                raise CheckpointError(
                    f"output.dir {str(out)!r} holds another run: continue it with "
                    "output.resume=auto, replace it with output.overwrite=true, or name another "
                    "folder with output.dir=..."
                )
            _remove_run(out)
        if resume_from is not None:
            _check_training(config, Path(resume_from).parent)
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
    if not (out / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"output.dir {str(out)!r} has no {CONFIG_FILE}, so it is no run of ort_train: name "
            "another folder with output.dir=..."
        )
    before = _load(out)
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


def _check_training(config: RunConfig, run: Path) -> None:
    """What a checkpoint brings along must be what is asked for; other samples are told of."""
    if not (run / CONFIG_FILE).is_file():  # of a script's trainer
        return
    before, now = _load(run).train, config.train
    kept = [
        f"train.{key} was {old!r}, is {new!r}"
        for key in ("optimizer", "learning_rate", "weight_decay")
        if (old := getattr(before, key)) != (new := getattr(now, key))
    ]
    if kept:
        raise CheckpointError(
            f"a checkpoint of {str(run)!r} brings along what these settings say, and they would be "
            f"ignored ({'; '.join(kept)}): resume with the same, or start a new run from its "
            "weights (model.name_or_path)"
        )
    batches = [
        f"train.{key} was {old}, is {new}"
        for key in ("micro_batch_size", "gradient_accumulation_steps", "global_batch_size", "seed")
        if (old := getattr(before, key)) != (new := getattr(now, key))
    ]
    if batches:
        distributed.say(
            f"{'; '.join(batches)}: the samples of the coming steps aren't those that the "
            "interrupted run would have seen"
        )


def _load(run: Path) -> RunConfig:
    from ort_train.recipes import load_recipe

    return load_recipe(run / CONFIG_FILE)


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

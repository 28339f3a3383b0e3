"""Checkpoints that are whole or not there: room checked first, staged, renamed, verified."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ort_train import fingerprint
from ort_train.errors import CheckpointError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"^checkpoint-(\d+)$")
_STATE_FILE = "trainer_state.json"
#: Where a checkpoint is written before it gets its name.
STAGING_FOLDER = ".incomplete"
_ADAPTER_FILE = "adapter_model.safetensors"
#: Weights whose tensors aren't looked at: torch's own files, shards of FSDP and DeepSpeed, and
#: adapters by name.
_OTHER_WEIGHTS = ("pytorch_model*", "global_step*", f"*/{_ADAPTER_FILE}")
# Weights, and AdamW's two moments of what is trained; a little for config and random state.
_NUM_OPTIMIZER_COPIES = 2
_SMALL_FILES_BYTES = 16 * 2**20


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The whole checkpoints of a run, oldest step first."""
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        match = _NAME.match(path.name)
        if match and (path / _STATE_FILE).is_file():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def required_bytes(model: torch.nn.Module, with_optimizer: bool = True) -> int:
    """Upper estimate of a checkpoint's size in bytes."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    copies = _NUM_OPTIMIZER_COPIES if with_optimizer else 0
    return weights + copies * trained + _SMALL_FILES_BYTES


def check_room(folder: str | Path, num_bytes: int, what: str = "a checkpoint") -> None:
    """Refuse to start writing what doesn't fit.

    Args:
        what: is to be written, for the message.

    Raises:
        CheckpointError: naming the need and what is free.
    """
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        less = ", or save less (save_only_model, save_total_limit)" if "checkpoint" in what else ""
        raise CheckpointError(
            f"{what} needs {num_bytes / 2**30:.2f} GiB and {existing.name or '/'!r} has "
            f"{free / 2**30:.2f} GiB free: free some room, or choose another output folder{less}. "
            "Nothing was written"
        )


def publish(staged: Path, final: Path) -> None:
    """Give a completely written folder its name; one of that name before is replaced."""
    previous = final.with_name(f".{final.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if final.exists():
        os.replace(final, previous)
    os.replace(staged, final)
    shutil.rmtree(previous, ignore_errors=True)


def saved_step(checkpoint: str | Path) -> int:
    """Optimizer steps that a verified checkpoint has behind it."""
    return int(json.loads((Path(checkpoint) / _STATE_FILE).read_text()).get("global_step", 0))


def saved_world_size(checkpoint: Path) -> int | None:
    """Ranks that wrote a checkpoint, by their random states; None where there are none."""
    ranks = len(list(checkpoint.glob("rng_state_*.pth")))
    return ranks or (1 if (checkpoint / "rng_state.pth").is_file() else None)


def _check_ranks(checkpoint: Path, world_size: int, with_deepspeed: bool) -> None:
    """ZeRO's optimizer states are cut to the number of ranks, and only ZeRO can read them."""
    is_zero = (checkpoint / "latest").is_file()
    has_optimizer = is_zero or (checkpoint / "optimizer.pt").is_file()
    if has_optimizer and is_zero != with_deepspeed:
        saved, now = ("with", "without") if is_zero else ("without", "with")
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r} was saved {saved} DeepSpeed and can't be resumed "
            f"{now} it, as its optimizer states would be lost: resume as it was saved, or start a "
            "new run from its weights (model.name_or_path)"
        )
    if not is_zero:
        return
    saved_ranks = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))
    if saved_ranks != world_size:
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r} holds the optimizer states of {saved_ranks} ranks, "
            f"and this launch has {world_size}: ZeRO's states don't change hands, so resume with "
            f"{saved_ranks} ranks, or start a new run from its weights (model.name_or_path)"
        )


def verify(
    checkpoint: str | Path,
    model: torch.nn.Module,
    world_size: int = 1,
    with_deepspeed: bool = False,
) -> None:
    """Check that a checkpoint is whole, of this model and launch, before anything is loaded.

    Args:
        world_size: ranks that are to resume. Under DistributedDataParallel it may have changed.
        with_deepspeed: whether DeepSpeed is to resume it.

    Raises:
        CheckpointError: naming the file or the first differing tensors.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        near = [path.name for path in list_checkpoints(checkpoint.parent)]
        hint = f"; there are {', '.join(near)}" if near else ""
        raise CheckpointError(f"checkpoint {str(checkpoint)!r} is not a folder{hint}")
    if STAGING_FOLDER in checkpoint.absolute().parts:
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r} was not finished: resume from a named one"
        )
    state_file = checkpoint / _STATE_FILE
    try:
        json.loads(state_file.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{str(checkpoint)!r} has no {_STATE_FILE}: it is a saved model, not a checkpoint; "
            "start from it with model.name_or_path instead of resuming"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{str(state_file)!r} is damaged ({error}): resume from another checkpoint"
        ) from None
    _check_ranks(checkpoint, world_size, with_deepspeed)
    _check_training_state(checkpoint, with_deepspeed)
    shapes = dict(_tensor_shapes(checkpoint))
    if shapes:
        _compare(checkpoint, shapes, model)
        fingerprint.check(model, checkpoint)
    elif not any(any(checkpoint.glob(pattern)) for pattern in _OTHER_WEIGHTS):
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r} has no weights: resume from another checkpoint"
        )


def to_resume(
    asked: Any,
    output_dir: str,
    model: torch.nn.Module | None,
    world_size: int,
    with_deepspeed: bool,
) -> Any:
    """The checkpoint that a training resumes from, verified; what is false for none.

    Args:
        asked: its path, True for the newest whole one of `output_dir`, or what is false.
        model: None where it is made later: then the checkpoint isn't verified.
        world_size: ranks that are to resume, all of which call this.
        with_deepspeed: whether DeepSpeed is to resume it.

    Raises:
        CheckpointError: where there is none, where ranks found different ones, and as
            :func:`verify`.
    """
    wanted = asked is True
    if wanted:
        found = list_checkpoints(output_dir)
        asked = str(found[-1]) if found else None
    if world_size > 1:
        _check_agreement(asked, world_size)
    if wanted and not asked:
        raise CheckpointError(
            f"there is no whole checkpoint in {output_dir!r} to resume from: "
            "train without resume_from_checkpoint, or name another output_dir"
        )
    if asked and model is not None:
        verify(asked, model, world_size, with_deepspeed)
        saved = saved_world_size(Path(asked))
        if saved not in (None, world_size):
            logger.warning(
                "checkpoint %s was saved by %s ranks and is resumed by %s: the samples of the "
                "coming steps and their dropout differ from those of the run that saved it",
                *(asked, saved, world_size),
            )
    return asked


def _check_agreement(checkpoint: str | None, world_size: int) -> None:
    """All ranks must have found the same, or they would wait for one another forever."""
    if not torch.distributed.is_initialized():
        return
    names: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(names, str(checkpoint or "none"))
    if len(set(names)) > 1:
        found = "; ".join(f"rank {number}: {name}" for number, name in enumerate(names))
        raise CheckpointError(
            f"the ranks would resume from different checkpoints ({found}): the output folder "
            "has to be on a disk that all hosts share"
        )


def _check_training_state(checkpoint: Path, with_deepspeed: bool) -> None:
    """Optimizer, schedule and random state: present, and readable as far as their directory."""
    # DeepSpeed has files of its own, and names them in `latest`.
    for pattern in ("latest",) if with_deepspeed else ("optimizer*", "scheduler.pt"):
        if not any(checkpoint.glob(pattern)):
            raise CheckpointError(
                f"checkpoint {str(checkpoint)!r} has no {pattern.replace('*', '.pt')} (saved with "
                "save_only_model?): the optimizer would start anew. Resume from another "
                "checkpoint, or start from its weights as a model instead of resuming"
            )
    for pattern in ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth"):
        for file in checkpoint.glob(pattern):
            if not zipfile.is_zipfile(file):  # torch.save writes one; its directory is at the end
                raise CheckpointError(f"{str(file)!r} is damaged: resume from another checkpoint")


def _tensor_shapes(checkpoint: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    from safetensors import SafetensorError, safe_open

    files = sorted(checkpoint.glob("model*.safetensors")) or sorted(checkpoint.glob(_ADAPTER_FILE))
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                    yield name, tuple(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{str(file)!r} is damaged ({error}): resume from another checkpoint"
            ) from None


def _compare(checkpoint: Path, shapes: dict[str, tuple[int, ...]], model: torch.nn.Module) -> None:
    own = _saved_tensors(model) if (checkpoint / _ADAPTER_FILE).is_file() else model.state_dict()
    foreign = [name for name in shapes if name not in own]
    other_shape = [n for n in shapes if n in own and shapes[n] != tuple(own[n].shape)]
    # Tied weights are saved under one of their names.
    saved = {own[name].data_ptr() for name in shapes if name in own}
    lacking = [name for name, tensor in own.items() if tensor.data_ptr() not in saved]
    lacking = [name for name in lacking if name not in shapes]
    if foreign or other_shape or lacking:
        examples = ", ".join(
            [f"{name} is unknown to the model" for name in foreign[:2]]
            + [f"{n} is {shapes[n]}, the model's is {tuple(own[n].shape)}" for n in other_shape[:2]]
            + [f"it lacks {name}" for name in lacking[:2]]
        )
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r} is of another model: {len(foreign)} foreign tensors, "
            f"{len(other_shape)} of another shape, {len(lacking)} missing ({examples}). Resume "
            "with the config that the checkpoint was trained with"
        )


def _saved_tensors(model: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    """What an adapter's checkpoint holds, by the names in it."""
    if not hasattr(model, "peft_config"):
        return model.state_dict()
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)

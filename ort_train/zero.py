"""DeepSpeed configs: shipped ones by name, the user's own, and what in them a run contradicts.

The shipped configs (`configs/*.json`) have no optimizer section: DeepSpeed shards the optimizer
that transformers' Trainer makes, so a recipe's optimizer, and its exemption of biases and norms
from weight decay, are the same with and without ZeRO. (From an optimizer section DeepSpeed would
make its own, over one group of all parameters.)
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import socket
import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ort_train import distributed
from ort_train.config import TrainConfig
from ort_train.errors import ConfigError
from ort_train.files import expanded
from ort_train.near import did_you_mean, near_matches

AUTO = "auto"
#: Filled in where a user's config leaves them out: DeepSpeed's own defaults would set aside what
#: the recipe says (no clipping, for one).
_FOLLOW_THE_RUN = {
    "train_micro_batch_size_per_gpu": AUTO,
    "gradient_accumulation_steps": AUTO,
    "train_batch_size": AUTO,
    "gradient_clipping": AUTO,
}
# DeepSpeed ignores top-level keys that it doesn't know, so a misspelt one has no effect at all.
# Source: https://www.deepspeed.ai/docs/config-json/
_TOP_LEVEL_KEYS = """
train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer scheduler
communication_data_type prescale_gradients gradient_predivide_factor sparse_gradients fp16 bf16 amp
gradient_clipping zero_optimization zero_force_ds_cpu_optimizer zero_allow_untested_optimizer
steps_per_print wall_clock_breakdown dump_state memory_breakdown checkpoint data_types
activation_checkpointing comms_logger flops_profiler autotuning elasticity aio tensorboard wandb
csv_monitor comet sparse_attention data_efficiency curriculum_learning compression_training
seq_parallel_communication_data_type tensor_parallel compile torch_autocast
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class RunSettings:
    """What a run says about the values that a DeepSpeed config can hold, too.

    Attributes:
        names: how the user spells each of the other attributes.
        micro_batch_size: samples per rank per forward.
        gradient_accumulation_steps: micro batches per optimizer step.
        world_size: ranks.
        max_grad_norm: 0 for no clipping.
    """

    names: Mapping[str, str]
    micro_batch_size: int
    gradient_accumulation_steps: int
    world_size: int
    precision: str
    max_grad_norm: float
    optimizer: str
    learning_rate: float
    weight_decay: float

    def name(self, attribute: str) -> str:
        return self.names.get(attribute, attribute)


def shipped() -> dict[str, Path]:
    """The configs that come with the package, in a wheel or in a checkout."""
    package = Path(__file__).parent
    folder = package / "shipped_configs"
    if not folder.is_dir() and (package.parent / "pyproject.toml").is_file():
        folder = package.parent / "configs"
    return {path.stem: path for path in folder.glob("*.json")}


def chosen(deepspeed: str | Mapping[str, Any] | None) -> str | Mapping[str, Any] | None:
    """A recipe's `train.deepspeed` under this launch: ZeRO-2 where DeepSpeed's launcher started it
    and nothing is said, nothing for "none".
    """
    by_launcher = "CROSS_SIZE" in os.environ and "LOCAL_SIZE" in os.environ  # deepspeed's own names
    if deepspeed is None and by_launcher:
        return "zero2"
    return None if deepspeed == "none" else deepspeed


def resolve(deepspeed: str | Mapping[str, Any]) -> dict[str, Any]:
    """A DeepSpeed config as a mapping, with the values that follow the run set to "auto".

    Args:
        deepspeed: a shipped config's name, a JSON file's path, JSON text, or a mapping.

    Raises:
        ConfigError: for an unknown name, an unreadable file, or what isn't JSON.
    """
    values = _read(deepspeed) if isinstance(deepspeed, str) else deepcopy(dict(deepspeed))
    return {**_FOLLOW_THE_RUN, **values}


def _read(text_or_path: str) -> dict[str, Any]:
    origin = f"deepspeed {text_or_path!r}"
    if text_or_path.lstrip().startswith("{"):
        text, origin = text_or_path, "deepspeed"
    else:
        known = shipped()
        path = known.get(text_or_path) or expanded(text_or_path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            hint = near_matches(text_or_path, known)
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"{origin} is neither a shipped config ({hint}) nor a readable JSON file ({reason})"
            ) from None
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{origin} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{origin} should be a mapping of DeepSpeed's settings")
    return values


def check(values: Mapping[str, Any], run: RunSettings | None = None) -> list[str]:
    """Everything that is wrong with a resolved DeepSpeed config, or that the run contradicts.

    Args:
        values: of :func:`resolve`.
        run: None: only what is wrong by itself.
    """
    problems = [*_own_problems(values)]
    if importlib.util.find_spec("deepspeed") is None:
        problems.append(
            "deepspeed is not installed: DS_BUILD_OPS=0 pip install 'ort_train[deepspeed]' "
            "(on a machine without CUDA also set DS_SKIP_CUDA_CHECK=1)"
        )
    if run is not None:
        problems += _contradictions(values, run)
    return problems


def problems_of_recipe(train: TrainConfig, num_ranks: int) -> list[str]:
    """What is wrong with a recipe's batch sizes and DeepSpeed config for this many ranks."""
    problems = []
    accumulation = train.gradient_accumulation_steps
    try:
        accumulation = distributed.accumulation_steps(
            train.global_batch_size, train.micro_batch_size, accumulation, num_ranks
        )
    except ConfigError as error:
        problems += error.problems
    deepspeed = chosen(train.deepspeed)
    if deepspeed is None:
        return problems
    try:
        values = resolve(deepspeed)
    except ConfigError as error:
        return [*problems, *(f"train.{problem}" for problem in error.problems)]
    run = RunSettings(
        names={name: f"train.{name}" for name in type(train).model_fields},
        micro_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        world_size=num_ranks,
        precision=train.precision,
        max_grad_norm=train.max_grad_norm,
        optimizer=train.optimizer,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
    )
    return [*problems, *(f"train.{problem}" for problem in check(values, run))]


def _own_problems(values: Mapping[str, Any]) -> Iterator[str]:
    for key in values:
        hint = did_you_mean(str(key), _TOP_LEVEL_KEYS, cutoff=0.8)
        if key not in _TOP_LEVEL_KEYS and hint:
            yield f"deepspeed has an unknown key {key}: {hint}"
    zero = values.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        yield f"deepspeed.zero_optimization {zero!r} should be a mapping"
        return
    stage = zero.get("stage", 0)
    if stage == 3:
        yield (
            "deepspeed.zero_optimization.stage 3 splits the parameters themselves, and an exported "
            "training graph needs them whole (ORTModule fails on the first step: 'Parameter' "
            "object has no attribute 'ds_status'): set stage 2, which splits gradients and "
            "optimizer states, with adapters or offload_optimizer for the memory"
        )
    elif stage not in (0, 1, 2):
        yield f"deepspeed.zero_optimization.stage {stage!r} is unknown: set 1 or 2"
    if zero.get("offload_param") and stage != 3:
        yield "deepspeed.zero_optimization.offload_param needs ZeRO-3, which isn't taken: remove it"
    offload = _get(zero, "offload_optimizer.device") not in (None, "none")
    section = values.get("optimizer")
    # Only Adam has a compiled version that DeepSpeed would put in the optimizer's place.
    takes_compiled = section is None or (
        "adam" in str(_get(values, "optimizer.type")).lower()
        and not _get(values, "optimizer.params.torch_adam")
    )
    forced = values.get("zero_force_ds_cpu_optimizer", True)
    if takes_compiled and (offload and forced) and not _can_compile():
        yield (
            "deepspeed.zero_optimization.offload_optimizer runs DeepSpeed's own CPU Adam, which a "
            "C++ compiler and ninja have to build: install them, or set "
            "zero_force_ds_cpu_optimizer false to run the recipe's optimizer on the CPU"
        )
    elif section is not None and takes_compiled and not offload and not _has_gpu():
        yield (
            f"deepspeed.optimizer.type {_get(values, 'optimizer.type')} is a CUDA kernel without "
            "params.torch_adam: set that to true, or remove the optimizer section to run the "
            "recipe's own"
        )


def _contradictions(values: Mapping[str, Any], run: RunSettings) -> Iterator[str]:
    batch_size = run.micro_batch_size * run.gradient_accumulation_steps * run.world_size
    expected: list[tuple[str, str, Any]] = [
        ("train_micro_batch_size_per_gpu", run.name("micro_batch_size"), run.micro_batch_size),
        (
            "gradient_accumulation_steps",
            run.name("gradient_accumulation_steps"),
            run.gradient_accumulation_steps,
        ),
        (
            "train_batch_size",
            f"{run.name('micro_batch_size')} x {run.name('gradient_accumulation_steps')} x "
            f"{run.world_size} rank{'s' if run.world_size > 1 else ''} =",
            batch_size,
        ),
        ("gradient_clipping", run.name("max_grad_norm"), run.max_grad_norm),
        ("optimizer.params.lr", run.name("learning_rate"), run.learning_rate),
        ("optimizer.params.weight_decay", run.name("weight_decay"), run.weight_decay),
    ]
    for key, name, value in expected:
        found = _get(values, key)
        if found is not None and found != AUTO and found != value:
            yield (
                f'deepspeed.{key} {found!r} contradicts {name} {value!r}: set the former to "auto"'
            )
    for precision in ("fp16", "bf16"):
        found = _get(values, f"{precision}.enabled")
        if found not in (None, AUTO) and found != (run.precision == precision):
            yield (
                f"deepspeed.{precision}.enabled {found!r} contradicts {run.name('precision')} "
                f'{run.precision}: set the former to "auto"'
            )
    kind = _get(values, "optimizer.type")
    # Compared by family, since both sides have several builds of the same algorithm.
    if kind is not None and str(kind).lower().split("_")[0] != run.optimizer.split("_")[0]:
        yield (
            f"deepspeed.optimizer.type {kind} contradicts {run.name('optimizer')} {run.optimizer}: "
            "remove the optimizer section"
        )
    if "scheduler" in values:
        yield (
            "deepspeed.scheduler would take the place of the recipe's "
            f"{run.name('lr_scheduler')} and warm-up: remove the scheduler section"
        )


def prepare() -> None:
    """Set DeepSpeed up for this machine, also in a process that no launcher started."""
    # deepspeed 0.19 still calls it by the older name.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if not _has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # An operator for ranks of one CPU machine, which all of them would wait for while it is
        # compiled, for minutes; gloo does its work (deepspeed/comm/torch.py, build_shm_op; 0.19).
        operators = importlib.import_module("deepspeed.ops")
        getattr(operators, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(alone)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(port))


def _get(values: Mapping[str, Any], key: str) -> Any:
    node: Any = values
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _can_compile() -> bool:
    return bool(shutil.which("ninja") and (shutil.which("c++") or shutil.which("g++")))

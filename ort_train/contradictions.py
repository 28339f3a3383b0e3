"""What contradicts what in a recipe, beyond the types and ranges of its single values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ort_train.data.tasks import max_length

if TYPE_CHECKING:
    from ort_train.config import RunConfig

# How architectures spell the number of positions they can address.
POSITION_FIELDS = ("max_position_embeddings", "n_positions")


def contradictions(config: RunConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields (keys that the rule reads, problem) for values that don't go together."""
    model, data, train = config.model, config.data, config.train
    if not model.name_or_path and not model.architecture:
        yield (
            ("model.name_or_path", "model.architecture"),
            "no model: set model.name_or_path to load one, or model.architecture to make one",
        )
    if model.vocab_size and (model.tokenizer or model.name_or_path):
        owner = "tokenizer" if model.tokenizer else "name_or_path"
        yield (
            ("model.vocab_size", "model.tokenizer", "model.name_or_path"),
            f"model.vocab_size {model.vocab_size} sizes a tokenizer that is trained, but "
            f"model.{owner} brings its own: set one of them to null",
        )
    if model.revision and not model.name_or_path:
        yield (
            ("model.revision", "model.name_or_path"),
            f"model.revision {model.revision} needs model.name_or_path: set that, or remove it",
        )
    teacher = config.distill.teacher
    if teacher and not teacher.name_or_path and not teacher.architecture:
        yield (
            ("distill.teacher.name_or_path", "distill.teacher.architecture"),
            "no teacher: set distill.teacher.name_or_path to load one, "
            "distill.teacher.architecture to make one, or distill.teacher=null",
        )
    vocab_size = model.config.get("vocab_size")
    if model.vocab_size and isinstance(vocab_size, int) and vocab_size < model.vocab_size:
        yield (
            ("model.vocab_size", "model.config"),
            f"model.config.vocab_size {vocab_size} is below the tokenizer's model.vocab_size "
            f"{model.vocab_size}: raise the former or lower the latter",
        )
    for field in POSITION_FIELDS:
        positions = model.config.get(field)
        if isinstance(positions, int) and positions < max_length(model.task, data.block_size):
            half = "half of " if model.task == "seq2seq" else ""
            fitting = 2 * positions if half else positions
            yield (
                ("data.block_size", "model.config", "model.task"),
                f"{half}data.block_size {data.block_size} exceeds model.config.{field} "
                f"{positions}: set data.block_size={fitting} or raise the latter",
            )
    if data.folder and data.source in ("hub", "offline"):
        yield (
            ("data.folder", "data.source"),
            f"data.folder {data.folder} isn't read with data.source {data.source}: "
            "set data.source=folder, or data.folder=null",
        )
    yield from _task(config)
    yield from _packing(config)
    if (train.max_steps is None) == (train.epochs is None):
        yield (
            ("train.max_steps", "train.epochs"),
            "no length of training: set train.max_steps or train.epochs"
            if train.max_steps is None
            else f"train.max_steps {train.max_steps} and train.epochs {train.epochs} both set the "
            "length of training: set one of them to null",
        )
    if train.precision == "fp16" and model.dtype == "float16" and config.adapter.method == "none":
        yield (
            ("train.precision", "model.dtype", "adapter.method"),
            "train.precision fp16 scales the loss, which needs float32 weights, but model.dtype is "
            "float16: set model.dtype=float32",
        )
    if train.precision == "auto" and train.backend != "auto":
        yield (
            ("train.precision", "train.backend"),
            f"train.precision auto is chosen by train.backend auto, but that is {train.backend}: "
            "set train.backend=auto, or train.precision=fp32, bf16 or fp16",
        )
    yield from _ignored(config)


def _task(config: RunConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    task, data, teacher = config.model.task, config.data, config.distill.teacher
    if task != "causal-lm" and data.format != "blocks":
        yield (
            ("model.task", "data.format"),
            f"data.format {data.format} is for model.task causal-lm, but that is {task}: set "
            "data.format=blocks, or model.task=causal-lm",
        )
    if task == "seq2seq" and data.block_size < 2:
        yield (
            ("model.task", "data.block_size"),
            f"data.block_size {data.block_size} can't be halved for model.task seq2seq: set it to "
            "2 or more",
        )
    if teacher is not None and (task != "causal-lm" or teacher.task != "causal-lm"):
        yield (
            ("distill.teacher", "model.task"),
            f"distillation is of model.task causal-lm, but the model's is {task} and the teacher's "
            f"{teacher.task}: set both to causal-lm, or distill.teacher=null",
        )


def _packing(config: RunConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    data, teacher = config.data, config.distill.teacher
    if not data.packing:
        return
    if data.format != "instructions":
        yield (
            ("data.packing", "data.format"),
            "data.packing is for samples of different lengths, and text blocks have no padding: "
            "set data.format=instructions, or data.packing=false",
        )
    if data.padding == "longest":
        yield (
            ("data.packing", "data.padding"),
            "data.padding longest isn't read with data.packing, whose rows have data.block_size "
            "tokens: set data.padding=null, or data.packing=false",
        )
    if teacher is not None and teacher.attention != config.model.attention:
        yield (
            ("data.packing", "distill.teacher.attention", "model.attention"),
            "with data.packing both models get one mask, which sdpa and eager attention take in "
            f"different forms: set distill.teacher.attention={config.model.attention}",
        )


def _ignored(config: RunConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """Settings that nothing would read."""
    adapter, data, distill = config.adapter, config.data, config.distill
    if distill.teacher is None:
        for key in ("temperature", "alpha"):
            if (value := getattr(distill, key)) is not None:
                yield (
                    (f"distill.{key}", "distill.teacher"),
                    f"distill.{key} {value} is read with a distill.teacher only: name one, or set "
                    f"distill.{key}=null",
                )
    else:
        for key in ("tokenizer", "vocab_size"):
            if (value := getattr(distill.teacher, key)) is not None:
                yield (
                    (f"distill.teacher.{key}",),
                    f"distill.teacher.{key} {value} isn't read, as both models have one tokenizer: "
                    f"set model.{key} in place of it",
                )
    if config.train.keep_zeros and adapter.method != "none":
        yield (
            ("train.keep_zeros", "adapter.method"),
            f"train.keep_zeros is for trained weights, and adapter.method {adapter.method} leaves "
            "them as they are: set train.keep_zeros=false",
        )
    if adapter.method != "qlora":
        for key in ("quant_type", "double_quant", "compute_dtype"):
            if (value := getattr(adapter, key)) is not None:
                yield (
                    (f"adapter.{key}", "adapter.method"),
                    f"adapter.{key} {value} is for 4-bit weights, which only adapters beside them "
                    f"can train, but adapter.method is {adapter.method}: set adapter.method=qlora, "
                    f"or adapter.{key}=null",
                )
    if data.format != "instructions":
        for key in ("prompt_column", "response_column", "padding"):
            if (value := getattr(data, key)) is not None:
                yield (
                    (f"data.{key}", "data.format"),
                    f"data.{key} {value} is read with data.format instructions only: set that, or "
                    f"data.{key}=null",
                )

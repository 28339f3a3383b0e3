"""The benchmark record: its schema and its file.

What it says of machine and versions is found by `provenance.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ort_train.errors import OrtTrainError
from ort_train.files import replacing
from ort_train.reports.provenance import envelope

SCHEMA = 1


class RecordError(OrtTrainError, ValueError):
    """A file that is no benchmark record of this schema."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Spread(_Section):
    """Median with the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float


class Parity(_Section):
    """Distance to eager fp32 of the same shape; null where a value was not finite."""

    first_loss_abs: float | None  # the first step, from identical weights
    loss_max_abs: float | None  # the first step and every training step after it
    grad_max_rel: float | None  # worst tensor of the first step: |difference| / |reference|
    grad_worst: str | None  # that tensor's parameter name


class Profile(_Section):
    """Where steps of backend ort spend their forward and backward, after the timed rounds."""

    steps: int
    forward_backward_ms: float  # median, slower by the profiling
    # By kind of kernel (ortmodule/profiling.py), and outside of any; they sum to 1.
    shares: dict[str, float]
    # 10^9 FLOPs per second: of all kernels of matrix products together, and of large square ones in
    # the same precision, by the fastest library, right before and after those steps. Null on a GPU,
    # and in records before they were measured.
    products_gflops: float | None = None
    peak_gflops: float | None = None
    products_share_of_peak: float | None = None


class Result(_Section):
    """One case: a backend in a precision at a shape."""

    backend: str
    precision: str
    micro_batch_size: int  # samples per forward
    block_size: int  # tokens per sample
    status: Literal["ok", "mismatch", "unavailable", "failed"]
    reason: str | None = None  # why the status isn't ok
    reference_only: bool = False  # run as the parity reference, not asked for
    it_per_s: Spread | None = None  # training iterations: zero_grad, forward, backward, optimizer
    step_ms: Spread | None = None
    forward_backward_ms: float | None = None  # median
    optimizer_ms: float | None = None  # median
    tokens_per_s: float | None = None  # median iterations/s x samples x tokens
    first_step_s: float | None = None  # first forward and backward, compilation included
    peak_gib: float | None = None  # of the process (CPU) or of the device's allocator (CUDA)
    loss: list[float | None] = []  # of every training step in order, warm-up included
    parity: Parity | None = None
    profile: Profile | None = None  # with --profile
    speedup_vs_eager: float | None = None  # median of the ratios of paired rounds
    speedup_vs_eager_range: tuple[float, float] | None = None  # p20, p80
    speedup_vs_compile: float | None = None
    speedup_vs_compile_range: tuple[float, float] | None = None
    speedup_vs_ort_dense: float | None = None  # ort without label_sparsity and padding_sparsity
    speedup_vs_ort_dense_range: tuple[float, float] | None = None


class Machine(_Section):
    cpu: str
    cores: int  # that this process may use
    threads: int | None  # of torch, in every worker
    memory_gib: float
    gpu: str | None
    instruction_sets: list[str]
    os: str
    load_average: float | None  # over the minute before the start


class Protocol(_Section):
    """How the steps were measured."""

    steps: int  # measured steps per round
    rounds: int
    warmup_steps: int
    dropout: Literal["off"]  # draws differ between backends, so no parity could be judged
    optimizer: str
    # What a first step begins with, of kernels and graphs; null in records before it was said.
    caches: Literal["empty"] | None = None


class ModelInfo(_Section):
    architecture: str
    name: str | None
    num_parameters: int
    num_trainable: int
    adapter: str


class Envelope(BaseModel):
    """What the record of every kind of benchmark holds; a job may add sections of its own."""

    model_config = ConfigDict(extra="allow")

    schema_: Literal[1] = Field(alias="schema")  # plain `schema` is a method of pydantic's
    command: str
    started_at: str  # UTC, ISO 8601
    machine: Machine
    versions: dict[str, str | None]
    git_sha: str | None
    git_dirty: bool | None
    environment: dict[str, str] = {}  # variables about threads
    interrupted: bool = False  # the cases that were left have failed


class Record(Envelope):
    """A benchmark of training steps."""

    kind: Literal["training"] = "training"
    recipe: str
    model: ModelInfo | None  # null where no case came as far as a model
    data: str | None  # which corpus, in words
    protocol: Protocol
    results: list[Result]


class EngineResult(_Section):
    """One case: an engine at a shape."""

    engine: str
    batch_size: int
    status: Literal["ok", "mismatch", "unavailable", "failed"]
    reason: str | None = None  # why the status isn't ok
    reference_only: bool = False  # run as the parity reference, not asked for
    load_s: float | None = None  # until the first round could begin: loading, compiling, warm-up
    peak_gib: float | None = None  # of the process
    # Baseline engine -> what was sped up -> ratios of paired rounds.
    speedups: dict[str, dict[str, Spread]] = {}


class LogitParity(_Section):
    """Distance to eager fp32 at the same prompts.

    Of an engine with weights in four bits: to eager fp32 on the same weights.
    """

    # After the prompt: rms of the differences, over the standard deviation of eager's logits; null
    # where one wasn't finite.
    logits_rel: float | None
    tolerance: float
    equal_tokens: list[int]  # of each row: generated tokens before the first that is another
    # What rounding the weights changes: logits_rel of eager on them to eager on the original ones.
    # Depends on the model and holds for no other; null where no weight is rounded.
    rounding_rel: float | None = None


class GenerationResult(EngineResult):
    """Prompts of one length, and the tokens generated after them."""

    prompt_len: int  # tokens of each row
    prompt_tokens_per_s: Spread | None = None  # all rows together
    generate_tokens_per_s: Spread | None = None  # all rows; the mean over the generated tokens
    prompt_ms: Spread | None = None
    token_ms: Spread | None = None  # a step that generates one token for each row
    parity: LogitParity | None = None


class GenerationProtocol(_Section):
    new_tokens: int  # generated after each prompt, greedily
    rounds: int
    warmup: str


class DecoderInfo(_Section):
    architecture: str
    name: str | None
    num_parameters: int


class GenerationRecord(Envelope):
    """A benchmark of prompts and generation."""

    kind: Literal["generation"]
    model: DecoderInfo | None
    protocol: GenerationProtocol
    results: list[GenerationResult]


class ImageParity(_Section):
    """Distance to eager's images from the same noise, of pixels from 0 to 1."""

    image_max_abs: float | None
    tolerance: float


class ImageResult(EngineResult):
    """A batch of images drawn in some steps."""

    steps: int
    images_per_s: Spread | None = None
    batch_s: Spread | None = None  # prompt to pixels, of the whole batch
    parity: ImageParity | None = None


class ImageProtocol(_Section):
    rounds: int
    height: int
    width: int
    guidance_scale: float


class PipelineInfo(_Section):
    pipeline: str
    name: str | None
    num_parameters: int  # of the models that draw: text encoders, UNet, decoder


class ImageRecord(Envelope):
    """A benchmark of drawing images."""

    kind: Literal["images"]
    model: PipelineInfo | None
    protocol: ImageProtocol
    results: list[ImageResult]


KINDS: dict[str, type[Envelope]] = {
    "training": Record,
    "generation": GenerationRecord,
    "images": ImageRecord,
}


def validate(record: Mapping[str, Any]) -> dict[str, Any]:
    """Check a record against the schema.

    Returns:
        The record as plain data with every optional field present.

    Raises:
        RecordError: with every problem found.
    """
    if not isinstance(record, Mapping):
        raise RecordError(f"a benchmark record is a JSON object, not {type(record).__name__}")
    if record.get("schema") != SCHEMA:
        raise RecordError(
            f"record has schema {record.get('schema')!r}, this version reads {SCHEMA}: "
            "run the benchmark again with `ort-train bench`"
        )
    kind = record.get("kind", "training")  # the first records had no other
    if kind not in KINDS:
        raise RecordError(f"record is of kind {kind!r}, known are {', '.join(KINDS)}")
    try:
        return KINDS[kind].model_validate(record).model_dump(mode="json", by_alias=True)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()
        ]
        raise RecordError("not a benchmark record:\n  - " + "\n  - ".join(lines)) from None


def assemble(
    started_at: str, machine: Mapping[str, Any], sections: Mapping[str, Any]
) -> dict[str, Any]:
    """A record of this process's command, on these versions.

    Args:
        started_at: `provenance.now()`, when the benchmark began.
        machine: `provenance.machine()`, asked before the load that it brought.
        sections: what the kind of benchmark adds.

    Raises:
        RecordError: the sections are not those of a record.
    """
    return validate({"schema": SCHEMA, **envelope(started_at, machine), **sections})


def write(record: Mapping[str, Any], path: str | Path) -> None:
    """Validate a record and write it as JSON, whole or not at all."""
    # NaN is no JSON: a value that isn't finite must have become null before.
    text = json.dumps(validate(record), indent=2, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def load(path: str | Path) -> dict[str, Any]:
    """Read and validate a record.

    Raises:
        RecordError: the file can't be read, isn't JSON, or isn't a record of this schema.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"can't read {path}: {error.strerror}") from None
    except ValueError as error:
        raise RecordError(f"{path} is not JSON ({error}): is it cut off?") from None
    try:
        return validate(record)
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from None

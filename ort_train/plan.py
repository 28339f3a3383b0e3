"""Whether a recipe fits: memory per rank, from sizes alone, before anything is loaded.

What a training step needs is not guessed from a formula: it runs on tensors without data, whose
storages are counted. Weights, gradients and optimizer states are counted as DeepSpeed 0.19 and
DistributedDataParallel hold them. DeepSpeed's own estimator for ZeRO-2 knows neither adapters, nor
4-bit weights, fp32 or activations, and accelerate's only whole models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from ort_train import quantization
from ort_train.config import RunConfig
from ort_train.errors import ConfigError, ModelError
from ort_train.known_models import KNOWN_MODELS
from ort_train.models import made_config
from ort_train.step_memory import StepPeak, make_without_data, step_bytes

GIB = 2**30
STRATEGIES = ("ddp", "zero1", "zero2", "zero2_offload")
#: Elements of DeepSpeed's reduction buffer in the shipped configs, of which overlap_comm has two.
_REDUCE_BUCKET = 50_000_000
#: What a GPU process holds besides: CUDA's context, the math libraries' workspaces, NCCL's buffers.
_PROCESS_BYTES = GIB
# Measured on the CPU, see benchmarks/plan_check.json: ONNX Runtime's step takes 1.26 to 1.45 times
# eager's memory, and its layerwise recompute keeps half of what torch's checkpoints give up.
_ORT_STEP = 1.37
_ORT_STILL_KEPT = 0.5
#: Samples at which activations outweigh gradients, which don't grow with them.
_LARGE_BATCH = 64


@dataclass(frozen=True)
class ModelSizes:
    """Counts of a model, and the memory of its training step beyond its states.

    Attributes:
        num_frozen: parameters that aren't trained and aren't quantized.
        num_quantized: parameters that are stored in 4 bits.
        weight_bytes: of each that isn't quantized.
        step: peak of activations, temporaries and gradients.
        sharded_step: the same where each gradient is given away as soon as it is there.
        decoded_layer_bytes: of the largest quantized layer while it is multiplied.
    """

    num_trained: int
    num_frozen: int
    num_quantized: int
    bits_per_quantized: float
    weight_bytes: int
    step: StepPeak
    sharded_step: StepPeak
    decoded_layer_bytes: int

    @property
    def stored_bytes(self) -> float:
        """Of the weights of all kinds."""
        plain = (self.num_trained + self.num_frozen) * self.weight_bytes
        return plain + self.num_quantized * self.bits_per_quantized / 8


@dataclass(frozen=True)
class Estimate:
    """Memory of one rank, in bytes, under one strategy.

    Attributes:
        states_bytes: weights, optimizer states, ZeRO's fp32 copies, communication buffers.
        step_bytes: activations, temporaries and gradients at their joint peak.
        host_bytes: what offloading puts into the memory of each node.
        max_micro_batch: samples per rank that fit; 0: not even one.
    """

    strategy: str
    recompute: bool
    states_bytes: float
    step_bytes: float
    host_bytes: float
    max_micro_batch: int

    @property
    def total_bytes(self) -> float:
        return self.states_bytes + self.step_bytes


def estimate(config: RunConfig, gpus: int, nodes: int, gpu_mem_gib: float | None) -> list[Estimate]:
    """All strategies, with and without recomputed activations.

    Args:
        gpus: per node.
        gpu_mem_gib: None: nothing is limited, and nothing but the step itself is counted (a CPU).

    Raises:
        ModelError: sizes that can't be known here, or a model that can't be made.
    """
    found = []
    budget = None if gpu_mem_gib is None else gpu_mem_gib * GIB - _PROCESS_BYTES
    half = config.train.precision in ("bf16", "fp16")  # auto may be fp32, which takes more
    by_kind = {
        for_deepspeed: {r: measure_sizes(config, r, for_deepspeed) for r in (False, True)}
        for for_deepspeed in ((False, True) if half else (False,))
    }
    for recompute in (False, True):
        for strategy in STRATEGIES:
            by_recompute = by_kind[half and strategy != "ddp"]
            sizes = by_recompute[recompute]
            if config.train.backend in ("ort", "auto"):
                sizes = _under_ort(sizes, by_recompute[False])
            found.append(_estimate(sizes, strategy, recompute, config, gpus, nodes, budget))
    return found


def _under_ort(sizes: ModelSizes, kept: ModelSizes) -> ModelSizes:
    """The same in ONNX Runtime's arena; `kept` is without recomputing."""

    def step(ours: StepPeak, theirs: StepPeak) -> StepPeak:
        pairs = zip(ours.sizes, theirs.sizes, strict=True)
        sizes = (
            _ORT_STEP * size + _ORT_STILL_KEPT * max(whole - size, 0.0) for size, whole in pairs
        )
        return StepPeak(ours.batch_sizes, tuple(sizes))

    return replace(
        sizes,
        step=step(sizes.step, kept.step),
        sharded_step=step(sizes.sharded_step, kept.sharded_step),
    )


def _estimate(
    sizes: ModelSizes,
    strategy: str,
    recompute: bool,
    config: RunConfig,
    gpus: int,
    nodes: int,
    budget: float | None,
) -> Estimate:
    ranks = gpus * nodes
    trained = sizes.num_trained
    states = sizes.stored_bytes + sizes.decoded_layer_bytes
    host = 0.0
    if strategy == "ddp":
        states += 2 * trained * sizes.weight_bytes
        if ranks > 1:  # buckets that hold all gradients once more
            states += trained * sizes.weight_bytes
    else:
        partition = trained / ranks
        # The fp32 master copy, the two moments, and the gradient in fp32 for the step.
        optimizer = (4 + 8 + 4) * partition
        if strategy == "zero2_offload":
            host = optimizer * gpus
        else:
            states += optimizer
        if strategy != "zero1":
            states += partition * sizes.weight_bytes
            states += 2 * min(_REDUCE_BUCKET, trained) * sizes.weight_bytes
    peak = sizes.sharded_step if strategy.startswith("zero2") else sizes.step
    step = peak.at(config.train.micro_batch_size)
    fits = peak.largest(budget - states) if budget is not None else 0
    return Estimate(strategy, recompute, states, step, host, fits)


def measure_sizes(config: RunConfig, recompute: bool, for_deepspeed: bool) -> ModelSizes:
    """Counts the model, and runs its training step on tensors without data.

    Args:
        for_deepspeed: which holds the weights in the precision that is trained in.
    """
    quantized = quantization.of_run(config)
    architecture, fields = model_fields(config)
    dtype = getattr(torch, config.model.dtype)
    if for_deepspeed and config.train.precision in ("bf16", "fp16"):
        dtype = torch.float16 if config.train.precision == "fp16" else torch.bfloat16
    made = make_without_data(config, architecture, fields, dtype)
    layers = made.config.get_text_config().num_hidden_layers
    trained = {n: p.numel() for n, p in made.named_parameters() if p.requires_grad}
    total = sum(p.numel() for p in made.parameters())
    num_quantized, decoded = 0, 0
    if quantized is not None:
        weights = [part.weight.numel() for _, part in quantization.quantizable(made)]
        num_quantized = sum(weights)
        decoded = max(weights) * getattr(torch, quantized.compute_dtype).itemsize
    micro = config.train.micro_batch_size
    batch_sizes = tuple(sorted({1, micro, max(_LARGE_BATCH, 2 * micro)}))
    few, some = min(layers, 2), min(layers, 4)
    peaks = []
    for keep_gradients in (True, False):
        sizes = []
        for batch in batch_sizes:
            at = {
                n: step_bytes(
                    config, architecture, {**fields, "num_hidden_layers": n}, dtype,
                    batch, recompute, keep_gradients,
                )
                for n in {few, some}
            }  # fmt: skip
            per_layer = (at[some] - at[few]) / max(some - few, 1)
            sizes.append(at[some] + (layers - some) * per_layer)
        peaks.append(StepPeak(batch_sizes, tuple(sizes)))
    num_trained = sum(trained.values())
    return ModelSizes(
        num_trained=num_trained,
        num_frozen=total - num_trained - num_quantized,
        num_quantized=num_quantized,
        bits_per_quantized=quantized.bits_per_weight if quantized else 0.0,
        weight_bytes=dtype.itemsize,
        step=peaks[0],
        sharded_step=peaks[1],
        decoded_layer_bytes=decoded,
    )


def model_fields(config: RunConfig) -> tuple[str, dict[str, Any]]:
    """Architecture and config fields of a recipe's model, without a download where known.

    Raises:
        ModelError: for a hub model that is neither known, cached nor reachable, and for an
            architecture or fields that can't be.
    """
    model = config.model
    if model.name_or_path is None:
        assert model.architecture is not None  # config.parse sees to it
        fields = dict(model.config)
        if model.vocab_size:
            fields["vocab_size"] = max(model.vocab_size, fields.get("vocab_size", 0))
        made_config(model.architecture, model.config, fields)  # refuses what would be ignored
        return model.architecture, fields
    if model.name_or_path in KNOWN_MODELS:
        architecture, known = KNOWN_MODELS[model.name_or_path]
        return architecture, {**known, **model.config}
    from transformers import AutoConfig

    try:
        loaded = AutoConfig.from_pretrained(model.name_or_path, revision=model.revision)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the sizes of {model.name_or_path} aren't known here and its config can't be loaded "
            f"({str(error).splitlines()[0]}): plan on a machine that reaches the hub, or set "
            "model.name_or_path=null with model.architecture and the sizes in model.config"
        ) from error
    fields = {name: value for name, value in loaded.to_diff_dict().items() if name != "model_type"}
    return loaded.model_type, {**fields, **model.config}


def show(config: RunConfig, gpus: int, nodes: int, gpu_mem_gib: float) -> bool:
    """Print a recipe's plan as a table; returns whether the recipe fits in any way.

    Raises:
        ConfigError: for counts or sizes that aren't positive, and models that it can't count.
    """
    from rich.console import Console
    from rich.table import Table

    given = {"--gpus": gpus, "--nodes": nodes, "--gpu-mem-gib": gpu_mem_gib}
    if problems := [
        f"{name} {value} should be above 0 and finite"
        for name, value in given.items()
        if not 0 < value < math.inf
    ]:
        raise ConfigError(problems)
    if config.model.task == "seq2seq":
        raise ConfigError(
            "the plan doesn't count the two halves of model.task seq2seq: plan for causal-lm or "
            "masked-lm"
        )
    if config.distill.teacher is not None:
        raise ConfigError(
            "the plan doesn't count a teacher's memory: plan with distill.teacher=null, and leave "
            "room for its weights and one forward"
        )
    estimates = estimate(config, gpus, nodes, gpu_mem_gib)
    batch = config.train.micro_batch_size
    ranks = gpus * nodes
    table = Table(
        title=f"{config.name}: {ranks} GPU{'s' if ranks > 1 else ''} of {gpu_mem_gib:g} GiB, "
        f"{config.data.block_size} tokens a sample, {config.train.precision}"
    )
    table.add_column("strategy")
    table.add_column("recompute")
    for head in ("states\nGiB", f"step, {batch} samples\nGiB", "a rank\nGiB", "host, a node\nGiB"):
        table.add_column(head, justify="right")
    table.add_column("fits")
    table.add_column("largest\nmicro batch", justify="right")
    for row in estimates:
        sizes = (row.states_bytes, row.step_bytes, row.total_bytes, row.host_bytes)
        table.add_row(
            row.strategy,
            "yes" if row.recompute else "no",
            *(f"{size / GIB:.2f}" if size else "" for size in sizes),
            "yes" if row.max_micro_batch >= batch else "no",
            str(row.max_micro_batch),
        )
    console = Console()
    console.print(table)
    console.print(
        f"A rank has {gpu_mem_gib:g} GiB, less {_PROCESS_BYTES / GIB:g} for CUDA and NCCL."
    )
    best = next((row for row in estimates if row.max_micro_batch >= batch), None)
    if best is None:
        console.print(
            "It doesn't fit: use a smaller data.block_size or train.micro_batch_size, "
            "adapter.method=lora or qlora, or more GPUs."
        )
        return False
    strategy = "torchrun" if best.strategy == "ddp" else f"train.deepspeed={best.strategy}"
    extra = " train.ort.recompute=layerwise" if best.recompute else ""
    console.print(
        f"It fits with {strategy}{extra}; up to train.micro_batch_size={best.max_micro_batch}."
    )
    return True

"""The main job: corpus, model, adapter, baselines, training, evaluation, saving, report."""

from __future__ import annotations

import functools
import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ort_train import checkpoints, distributed, quantization, run_folder
from ort_train.config import RunConfig
from ort_train.errors import ConfigError, NonFiniteLossError
from ort_train.files import replacing

if TYPE_CHECKING:
    from ort_train.data.samples import Samples
    from ort_train.distillation import Distiller
    from ort_train.trainer import ORTTrainer


@dataclass(frozen=True)
class JobResult:
    """What a job leaves behind.

    Attributes:
        output_dir: holds the files named by the constants of run_folder.py.
        perplexity: of the evaluation text's predicted tokens, exp of their mean loss.
        record: the benchmark record of the baselines, with a section `training`.
    """

    output_dir: Path
    perplexity: float
    record: dict[str, Any] | None


def run(config: RunConfig) -> JobResult:
    """Run a recipe from its corpus to its report.

    Args:
        config: the whole recipe; it is written beside the results.

    Raises:
        ConfigError: for settings that contradict one another or this machine, before work starts.
        CheckpointError: where the output folder holds another run, or can't be resumed from.
        NonFiniteLossError: naming what was saved.
        RankError: where the ranks can't meet, or one of them has died.
        StoppedBySignal: on all ranks, after the checkpoint that a signal asked for.
    """
    distributed.check_launch()
    distributed.share_cores()
    distributed.take_device()
    check(config)
    distributed.check_port()
    resume_from = run_folder.prepare(config)
    is_main = distributed.is_main_process()
    out = config.output_dir

    import torch
    from transformers.utils import logging as transformers_logging

    from ort_train import zero
    from ort_train.adapters import apply_adapter, trainable_summary
    from ort_train.data.packing import check_models
    from ort_train.data.samples import make_samples
    from ort_train.distillation import load_distiller
    from ort_train.models import load_model
    from ort_train.roster import Roster
    from ort_train.signals import StopOnSignal, ending_at_once

    transformers_logging.set_verbosity_error()  # its hints are about code, not about this run
    transformers_logging.disable_progress_bar()  # the job has a bar of its own
    samples = make_samples(config.data, config.model, seed=config.train.seed)
    distributed.say(f"data: {samples.source}")
    model = load_model(
        config.model,
        samples.tokenizer,
        config.train.seed,
        config.data.block_size,
        quantization.of_run_here(config),
    )
    torch.manual_seed(config.train.seed)  # for the adapter's first weights, as in the benchmark
    model = apply_adapter(model, config.adapter, config.model.task)
    distiller = None
    if config.distill.teacher is not None:
        distiller = load_distiller(config, samples.tokenizer, model)
    check_models(config.data, samples.collate, model, distiller and distiller.teacher)
    trainable, total = trainable_summary(model)
    distributed.say(
        f"model: {type(model).__name__}, {total:,} parameters, {trainable:,} trained; "
        f"{len(samples.train):,} training and {len(samples.evaluation or ()):,} evaluation samples "
        f"of {config.data.block_size} tokens"
    )
    if distiller is not None:
        num_parameters = sum(p.numel() for p in distiller.teacher.parameters())
        distributed.say(
            f"teacher: {type(distiller.teacher).__name__}, {num_parameters:,} parameters, frozen; "
            f"temperature {distiller.temperature:g}, alpha {distiller.alpha:g}"
        )
    if config.train.save_steps:
        checkpoints.check_room(out, checkpoints.required_bytes(model))

    if resume_from is not None:  # what is wrong with it is said before minutes of measuring
        with_deepspeed = zero.chosen(config.train.deepspeed) is not None
        checkpoints.verify(resume_from, model, distributed.world_size(), with_deepspeed)

    record = None
    if is_main and config.measure.baselines:
        with ending_at_once():
            record = _measure(config)
    trainer = _make_trainer(config, model, samples, record, distiller)
    way_out = f"Continue from the last checkpoint in {str(out)!r} with output.resume=auto"
    roster = Roster()
    # The signal's note outside: a launcher ends the survivors, who have a name to say first.
    with StopOnSignal() as stop, roster.watched(way_out):
        trainer.add_callback(stop)
        _train(trainer, resume_from, out)
        if stop.stopped:
            distributed.leave()
            raise stop.error(trainer.state)
        eval_loss = trainer.evaluate()["eval_loss"]
        perplexity = math.exp(min(eval_loss, 700.0))  # beyond, exp overflows
        _save_model(trainer, samples.tokenizer, out)
    with roster.watched(way_out):
        if is_main:
            _report(config, trainer, record, eval_loss, perplexity)
        distributed.leave()
    return JobResult(out, perplexity, record)


def check(config: RunConfig) -> None:
    """Everything about the config that can be wrong on this machine, at once.

    Raises:
        ConfigError: with all of it.
    """
    from ort_train import distillation, extras, zero
    from ort_train.backends import available
    from ort_train.ortmodule.options import parse_options

    problems = []
    try:
        parse_options(config.train.ort)
    except ConfigError as error:
        problems += [f"train.ort: {problem}" for problem in error.problems]
    import torch

    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    can_run, reason = available(config.train.backend, config.train.precision, device_type)
    if not can_run:
        problems.append(f"train.backend {config.train.backend}: {reason}")
    if config.train.ort and config.train.backend not in ("ort", "auto"):
        problems.append(
            f"train.ort is given but train.backend is {config.train.backend}: it would be "
            "ignored; remove it or set train.backend=ort"
        )
    if quantization.of_run(config) and (missing := quantization.unavailable_reason()):
        problems.append(f"adapter.method qlora: {missing}")
    problems += zero.problems_of_recipe(config.train, distributed.world_size())
    problems += distillation.problems(config)
    problems += extras.problems(config.train)
    if config.train.keep_zeros and zero.chosen(config.train.deepspeed):
        problems.append(
            "train.keep_zeros works on the weights, which DeepSpeed keeps copies of: set "
            "train.deepspeed=none, or train.keep_zeros=false"
        )
    if problems:
        raise ConfigError(problems)


def _measure(config: RunConfig) -> dict[str, Any]:
    """The run's backend and the baselines on this run's model and first batches."""
    from ort_train.bench.benchmark import BACKENDS, precisions_here, run_benchmark
    from ort_train.bench.run import Case

    backend, train = config.train.backend, config.train
    own = list(BACKENDS) if backend == "auto" else [backend]
    names = list(dict.fromkeys([*config.measure.baselines, *own]))
    distributed.say(
        f"measuring {', '.join(names)} on the first batches, in turns, each in its own process"
    )
    measure = config.measure
    return run_benchmark(
        config,
        [Case(name, each) for each in precisions_here(train.precision) for name in names],
        steps=measure.steps,
        rounds=measure.rounds,
        warmup_steps=measure.warmup_steps,
    )


def _make_trainer(
    config: RunConfig, model: Any, samples: Samples, record: Any, distiller: Distiller | None
) -> ORTTrainer:
    from transformers import PrinterCallback, ProgressCallback

    from ort_train import zero
    from ort_train.auto.candidates import precisions
    from ort_train.console import ConsoleCallback
    from ort_train.distillation import DistillationTrainer
    from ort_train.pruning import KeepZeros
    from ort_train.trainer import ORTTrainer, ORTTrainingArguments

    train = config.train
    args = ORTTrainingArguments(
        output_dir=str(config.output_dir),
        backend=train.backend,
        ort_options=dict(train.ort),
        precision=train.precision,
        optim=train.optimizer,
        per_device_train_batch_size=train.micro_batch_size,
        per_device_eval_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=distributed.accumulation_steps(
            train.global_batch_size,
            train.micro_batch_size,
            train.gradient_accumulation_steps,
            distributed.world_size(),
        ),
        deepspeed=zero.chosen(train.deepspeed),
        ddp_timeout=train.ddp_timeout_s,
        max_steps=train.max_steps or -1,
        num_train_epochs=train.epochs or 1.0,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        warmup_steps=train.warmup_steps,
        lr_scheduler_type=train.lr_scheduler,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        logging_steps=train.logging_steps,
        logging_first_step=True,
        eval_strategy="steps" if train.eval_steps else "no",
        eval_steps=train.eval_steps,
        save_strategy="steps" if train.save_steps else "no",
        save_steps=train.save_steps or 500,
        save_total_limit=train.save_total_limit,
        report_to=list(train.report_to),
        dataloader_pin_memory=_has_gpu(),
        prediction_loss_only=True,  # perplexity needs no logits kept
        ddp_find_unused_parameters=False,
    )
    make: Any = ORTTrainer
    if distiller is not None:
        make = functools.partial(
            DistillationTrainer,
            teacher=distiller.teacher,
            temperature=distiller.temperature,
            alpha=distiller.alpha,
        )
    trainer = make(
        model=model,
        args=args,
        train_dataset=samples.train,
        eval_dataset=samples.evaluation,
        processing_class=samples.tokenizer,
        data_collator=samples.collate,
    )
    if config.model.task != "causal-lm":
        # Their losses are each batch's mean, but as their forwards take **kwargs, Trainer believes
        # that they divide by num_items_in_batch, and doesn't divide by the accumulation steps
        # (transformers 4.57 to 5.23, Trainer.__init__).
        trainer.model_accepts_loss_kwargs = False
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ConsoleCallback())
    if train.keep_zeros:
        trainer.add_callback(KeepZeros(model))
    # Ratios compare like with like: one process against one process.
    if record is not None and args.world_size == 1:
        trainer.speed.baselines = {
            result["backend"]: result["it_per_s"]["median"]
            for result in record["results"]
            if result["status"] == "ok"
            and result["backend"] != train.backend
            and result["precision"] == precisions(train.precision)[0]
        }
    return trainer


def _train(trainer: ORTTrainer, resume_from: str | None, out: Path) -> None:
    import torch

    try:
        trainer.train(resume_from_checkpoint=resume_from)
    except NonFiniteLossError as error:
        weights = list(trainer.model.parameters())
        if not all(bool(torch.isfinite(p).all()) for p in weights):
            raise NonFiniteLossError(
                f"{error}. The weights themselves aren't finite any more: none were saved"
            ) from None
        trainer.save_model(str(out / "last_finite_weights"))
        raise NonFiniteLossError(
            f"{error}. Those weights are in {out / 'last_finite_weights'}"
        ) from None


def _save_model(trainer: ORTTrainer, tokenizer: Any, out: Path) -> None:
    """Model (or adapter) and tokenizer, as one folder that is whole or not there."""
    staged = out / checkpoints.STAGING_FOLDER / run_folder.MODEL_FOLDER
    checkpoints.check_room(out, checkpoints.required_bytes(trainer.model, with_optimizer=False))
    trainer.save_model(str(staged))
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        tokenizer.save_pretrained(staged)
        checkpoints.publish(staged, out / run_folder.MODEL_FOLDER)
        shutil.rmtree(staged.parent, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def _report(
    config: RunConfig,
    trainer: ORTTrainer,
    record: dict[str, Any] | None,
    eval_loss: float,
    perplexity: float,
) -> None:
    from ort_train.reports import curves, report
    from ort_train.reports.record import write

    out = config.output_dir
    training = {
        "backend": config.train.backend,
        "precision": config.train.precision,
        "decision": None if trainer.decision is None else asdict(trainer.decision),
        "world_size": trainer.args.world_size,
        "steps": trainer.state.global_step,
        "first_step_s": trainer.speed.first_step_s,
        "graph_from_cache": trainer.graph_from_cache,
        **trainer.speed.summary(),
        "eval_loss": eval_loss,
        "perplexity": perplexity,
        "log": trainer.state.log_history,
    }
    if record is not None:
        record["training"] = training
        write(record, out / run_folder.RECORD_FILE)
        report.show(record)
        report.plot(record, out / run_folder.CHART_FILE)
        report.html(record, out / run_folder.PAGE_FILE)
    else:
        with replacing(out / run_folder.RECORD_FILE) as file:
            file.write_text(json.dumps({"training": training}, indent=1), encoding="utf-8")
    curves.plot(trainer.state.log_history, out / run_folder.CURVE_FILE, title=config.name)
    if trainer.speed.first_step_s is not None:
        cached = "; its graph is from the cache" if trainer.graph_from_cache else ""
        distributed.say(f"first step: {trainer.speed.first_step_s:.2f} s{cached}")
    speed = trainer.speed.summary()
    if speed:
        tokens = f", {speed['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in speed else ""
        distributed.say(f"training: {speed['it_per_s']:.2f} it/s{tokens} over the whole run")
    distributed.say(f"evaluation: loss {eval_loss:.4f}, perplexity {perplexity:.1f}")
    pictures = (run_folder.CHART_FILE, run_folder.CURVE_FILE, run_folder.PAGE_FILE)
    files = [run_folder.RECORD_FILE, *(name for name in pictures if (out / name).is_file())]
    distributed.say(f"saved in {out}: {run_folder.MODEL_FOLDER}/, {', '.join(files)}")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()

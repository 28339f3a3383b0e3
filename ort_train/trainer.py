"""ORTTrainer: transformers' Trainer whose training steps a backend of ours runs.

Every hook here is one of Trainer's own; the loop, evaluation, checkpoints' content and logging stay
transformers'. Optimum's ORTTrainer copied that loop and ended with it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree
from transformers import Seq2SeqTrainer, Trainer
from transformers.modeling_outputs import ModelOutput

from ort_train import checkpoints, distributed, fingerprint
from ort_train.backends import (
    decision_of,
    keep_trained_weights,
    ort_forward,
    runner_factory,
)
from ort_train.data import batches
from ort_train.errors import ConfigError, NonFiniteLossError
from ort_train.forward import TrainingForward, give_back, take_over
from ort_train.metrics import SparsityMeter, SpeedCallback
from ort_train.optimum_order import without_optimums_order
from ort_train.training_args import (
    ORTOptimizerNames,
    ORTSeq2SeqTrainingArguments,
    ORTTrainingArguments,
)

if TYPE_CHECKING:
    from ort_train.auto.trial import Decision
    from ort_train.ortmodule.forward import OrtForward

__all__ = [
    "ORTOptimizerNames",
    "ORTSeq2SeqTrainer",
    "ORTSeq2SeqTrainingArguments",
    "ORTTrainer",
    "ORTTrainingArguments",
]

logger = logging.getLogger(__name__)


class ORTTrainer(Trainer):
    """transformers' Trainer with the training steps run by `args.backend`.

    Used exactly as Trainer: evaluation, prediction, saving and generation run the model itself,
    which stays the object that was passed. Logs carry `it_per_s` and `tokens_per_s` beside the
    loss.

    Args:
        model: a transformers model, a peft model, or any module that returns its loss.
        args: :class:`ORTTrainingArguments`.
        tokenizer: older name of `processing_class`.
        **kwargs: every other argument of Trainer.

    Raises:
        ConfigError: for settings that exclude one another.
        UnsupportedModelError: on the first step, where the backend can't take the model.
        NonFiniteLossError: when the loss becomes NaN or infinite; weights and optimizer are those
            of the step before.
        CheckpointError: for a checkpoint that doesn't fit on the disk, or can't be resumed from.
    """

    def __init__(
        self,
        model: Any = None,
        args: ORTTrainingArguments | None = None,
        *positional: Any,
        tokenizer: Any = None,
        **kwargs: Any,
    ):
        if args is None:
            args = ORTTrainingArguments(output_dir="tmp_trainer")
        if not hasattr(args, "make_ort_options"):
            raise ConfigError(
                f"args is a {type(args).__name__}: ORTTrainer takes ORTTrainingArguments "
                "(ORTSeq2SeqTrainer: ORTSeq2SeqTrainingArguments), which accept all of its fields"
            )
        if tokenizer is not None:
            if kwargs.get("processing_class") is not None:
                raise ConfigError("tokenizer is the older name of processing_class: give only one")
            kwargs["processing_class"] = tokenizer
        positional, kwargs = without_optimums_order(positional, kwargs)
        super().__init__(model, args, *positional, **kwargs)
        if args.use_module_with_loss and type(self).compute_loss is not ORTTrainer.compute_loss:
            raise ConfigError(
                "use_module_with_loss computes the loss inside the graph, where an overridden "
                "compute_loss isn't run: pass compute_loss_func instead, or turn it off"
            )
        self.speed = SpeedCallback()
        self.add_callback(self.speed)
        self.sparsity = SparsityMeter()
        self._stand_in: TrainingForward | None = None
        self._leaves_out = False
        self._num_micro_batches = 0
        self._micro_batch_of_step, self._step_seen = 0, -1

    @property
    def tokenizer(self) -> Any:
        """Older name of `processing_class`."""
        return self.processing_class

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self.processing_class = tokenizer

    # --- the backend ---

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        """Hand the training forward to the backend, innermost, before DDP or DeepSpeed."""
        if training:
            self._install_backend(self.accelerator.unwrap_model(model))
        return super()._wrap_model(model, training=training, dataloader=dataloader)

    def _install_backend(self, model: torch.nn.Module) -> None:
        if self._stand_in is not None and self._stand_in.module is model:
            if not _is_installed(self._stand_in, model):
                model.forward = self._stand_in
            return
        args = self.args
        options = args.make_ort_options()
        self._leaves_out = bool(options.label_sparsity or options.padding_sparsity)
        make_runner = runner_factory(
            args.backend, args.train_precision, options, self._reads_only_loss()
        )
        if args.use_module_with_loss:
            make_runner = functools.partial(_loss_runner, make_runner, self._graph_loss)
        take_over(model, make_runner)
        self._stand_in = model.forward
        logger.info("training steps of %s run by backend %s", type(model).__name__, args.backend)

    def _reads_only_loss(self) -> bool:
        """Whether training looks at nothing but the loss of what the model returns."""
        ours, own = ORTTrainer, type(self)
        return self.args.use_module_with_loss or (
            own.compute_loss is ours.compute_loss
            and own.training_step is ours.training_step
            and self.compute_loss_func is None
            and self.label_smoother is None
        )

    @property
    def decision(self) -> Decision | None:
        """What `backend="auto"` chose and why, or None before its trial."""
        if self._stand_in is None or self.args.backend != "auto":
            return None
        return decision_of(self._stand_in)

    @property
    def graph_from_cache(self) -> bool | None:
        """Whether the first step, or the trial of `backend="auto"`, took its graph from the cache;
        None for a backend without, and before it."""
        forward = self._ort_forward
        return None if forward is None else forward.graph_from_cache

    @property
    def _ort_forward(self) -> OrtForward | None:
        return None if self._stand_in is None else ort_forward(self._stand_in)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer.train; `resume_from_checkpoint=True` takes the newest whole checkpoint."""
        resume_from_checkpoint = checkpoints.to_resume(
            resume_from_checkpoint,
            self.args.output_dir,
            self.model,
            self.args.world_size,
            self.is_deepspeed_enabled,
        )
        self._num_micro_batches, self._step_seen = 0, -1
        resumes = resume_from_checkpoint and self.model is not None
        self._num_steps_before = checkpoints.saved_step(resume_from_checkpoint) if resumes else 0
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            # Outside of training the model is what it was: it can be pickled, copied, compiled.
            if self._stand_in is not None:
                give_back(self._stand_in.module)

    _num_steps_before = 0

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; a checkpoint that has all the steps is trained no further.

        Trainer looks at `max_steps` after a step only, and takes one more (4.57 to 5.23).
        """
        num_epochs, epoch_steps, *rest = super().set_initial_training_values(*args, **kwargs)
        if (before := self._num_steps_before) >= rest[-1] > 0:
            logger.warning("the checkpoint has all of %s steps: nothing is trained", rest[-1])
            num_epochs = min(num_epochs, before // epoch_steps)
        return (num_epochs, epoch_steps, *rest)

    # --- loss ---

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """As Trainer.compute_loss; with `use_module_with_loss` the graph returns the loss alone."""
        in_graph = self.args.use_module_with_loss and model.training and torch.is_grad_enabled()
        if not in_graph:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _graph_loss(
        self, module: torch.nn.Module, original: Callable[..., Any], **inputs: Any
    ) -> ModelOutput:
        """Trainer's own loss (smoothing, compute_loss_func), traced with the model."""
        num_items_in_batch = inputs.pop("num_items_in_batch", None)
        with _plain_forward(module, original):
            loss = Trainer.compute_loss(self, module, inputs, num_items_in_batch=num_items_in_batch)
        return ModelOutput(loss=loss)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As Trainer.training_step; stops on a loss that isn't finite, before it does harm."""
        self.speed.add_tokens(self._num_tokens(inputs))
        self._num_micro_batches += 1
        if self._num_micro_batches == 1:  # DeepSpeed has made its process groups by now
            distributed.limit_waits(self.args.ddp_timeout)
        if self.state.global_step != self._step_seen:
            self._micro_batch_of_step, self._step_seen = 0, self.state.global_step
        self._micro_batch_of_step += 1
        stand_in = self._stand_in if self.args.gradient_accumulation_steps > 1 else None
        if stand_in is not None:
            keep_trained_weights(stand_in, True)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if stand_in is not None and self.accelerator.sync_gradients:
            keep_trained_weights(stand_in, False)
        self._count_savings(inputs)
        # fp16 overflows now and then, and its gradient scaler skips such steps.
        if self.args.train_precision != "fp16" and not torch.isfinite(loss).all():
            raise NonFiniteLossError(self._non_finite_report(loss))
        return loss

    def _count_savings(self, inputs: dict[str, Any]) -> None:
        chosen, forward = self.decision, self._ort_forward
        if forward is not None and (self._leaves_out or (chosen and chosen.sparsity)):
            saved = forward.savings
            self.sparsity.add(inputs, saved.flops_per_padding, saved.flops_per_ignored_label)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """As Trainer's; ids that the model has no row for are named before a graph reads them."""
        prepared = super()._prepare_inputs(inputs)
        if self.model is not None and isinstance(prepared, Mapping):
            batches.check_ids(self.model, prepared)
        return prepared

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, in the precision that `auto` trains in."""
        chosen = self.decision
        is_ours = self.args.train_precision == "auto" and chosen and chosen.precision == "bf16"
        if not is_ours:
            return super().prediction_step(*args, **kwargs)
        with torch.autocast(self.args.device.type, torch.bfloat16):
            predicted = super().prediction_step(*args, **kwargs)
        return pytree.tree_map(_widened, predicted)

    def _num_tokens(self, inputs: dict[str, Any]) -> int:
        name = getattr(self.model, "main_input_name", "input_ids")
        values = inputs.get(name)
        if not isinstance(values, torch.Tensor) or values.is_floating_point():
            return 0
        return values.numel() * self.args.world_size

    def _non_finite_report(self, loss: torch.Tensor) -> str:
        saved = checkpoints.list_checkpoints(self.args.output_dir)
        last = f"the last checkpoint is {saved[-1].name}" if saved else "no checkpoint was saved"
        accumulation = self.args.gradient_accumulation_steps
        return (
            f"loss is {loss.item()} at step {self.state.global_step + 1} (micro-batch "
            f"{self._micro_batch_of_step} of {accumulation}, number {self._num_micro_batches} of "
            "this training): the step was not applied, the weights are those after step "
            f"{self.state.global_step}, and {last}. "
            "Lower learning_rate, raise warmup_steps, set max_grad_norm, or look at that batch"
        )

    # --- speed ---

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer.log; training logs carry `it_per_s`, `tokens_per_s` and `x_<baseline>`,
        and with label_sparsity or padding_sparsity the batches' densities and `tflops_avoided`."""
        if "loss" in logs:
            logs.update(self.speed.take_window())
            logs.update(self.sparsity.take_window())
        super().log(logs, *args, **kwargs)

    # --- optimizer ---

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """As Trainer's, with "adamw_ort_fused"."""
        if args.optim != ORTOptimizerNames.ADAMW_ORT_FUSED:
            return Trainer.get_optimizer_cls_and_kwargs(args, model)
        torch_args = copy.copy(args)
        torch_args.optim = "adamw_torch_fused"
        torch_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(torch_args, model)
        if args.device.type != "cuda":
            logger.warning("optim adamw_ort_fused: on CPU this is torch's fused AdamW")
            return torch_class, kwargs
        from onnxruntime.training.optim import FusedAdam
        from onnxruntime.training.optim.fused_adam import AdamWMode

        kwargs.pop("fused", None)
        # Its own default is transformers' old AdamW, whose weight decay differs.
        return FusedAdam, {**kwargs, "adam_w_mode": AdamWMode.ADAMW_TORCH}

    # --- checkpoints ---

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / checkpoints.STAGING_FOLDER) if self._staging else folder

    _staging = False

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As Trainer's, into a folder that gets its name when all of it is written."""
        run_dir = Path(self._get_output_dir(trial))
        with_optimizer = not self.args.save_only_model
        checkpoints.check_room(run_dir, checkpoints.required_bytes(self.model, with_optimizer))
        name = f"checkpoint-{self.state.global_step}"
        staging = run_dir / checkpoints.STAGING_FOLDER
        if self.args.should_save:  # what a killed run left
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()  # the files of all ranks are there
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            if best and Path(best).parent == staging:
                self.state.best_model_checkpoint = str(run_dir / Path(best).name)
                self.state.save_to_json(str(staging / name / "trainer_state.json"))
            checkpoints.publish(staging / name, run_dir / name)
            shutil.rmtree(staging, ignore_errors=True)
            self._rotate(run_dir)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As Trainer's; beside an adapter stands which base it was trained with."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            fingerprint.write(self.model, output_dir or self.args.output_dir)

    def _rotate(self, run_dir: Path) -> None:
        try:
            from transformers.trainer_utils import rotate_checkpoints
        except ImportError:  # transformers 4: a method
            self._rotate_checkpoints(use_mtime=True, output_dir=str(run_dir))
            return
        rotate_checkpoints(
            output_dir=str(run_dir),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )


class ORTSeq2SeqTrainer(ORTTrainer, Seq2SeqTrainer):
    """transformers' Seq2SeqTrainer (generation in evaluation) with the backend of ORTTrainer."""


def _widened(leaf: Any) -> Any:
    """As accelerate hands on what autocast computes: metrics are of fp32."""
    is_bf16 = isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bfloat16
    return leaf.float() if is_bf16 else leaf


def _is_installed(stand_in: TrainingForward, model: torch.nn.Module) -> bool:
    """accelerate's mixed precision puts its own wrapper around forward, and keeps ours in
    `_original_forward`."""
    attributes = model.__dict__
    return stand_in in (attributes.get("forward"), attributes.get("_original_forward"))


@contextlib.contextmanager
def _plain_forward(module: torch.nn.Module, original: Callable[..., Any]) -> Iterator[None]:
    stand_in = module.__dict__.get("forward")
    module.forward = original
    try:
        yield
    finally:
        module.forward = stand_in


def _loss_runner(
    make_runner: Callable[..., Any],
    graph_loss: Callable[..., Any],
    module: torch.nn.Module,
    original: Callable[..., Any],
) -> Callable[..., Any]:
    return make_runner(module, functools.partial(graph_loss, module, original))

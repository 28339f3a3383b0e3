"""Arguments of ORTTrainer: transformers' own, Optimum's late ORTTrainer's, and the backend's."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.utils.generic import ExplicitEnum

from ort_train import distributed, zero
from ort_train.backends import available
from ort_train.errors import ConfigError

if TYPE_CHECKING:
    from ort_train.ortmodule import OrtOptions


class ORTOptimizerNames(ExplicitEnum):
    """Optimizers of onnxruntime, by the name that Optimum gave them."""

    ADAMW_ORT_FUSED = "adamw_ort_fused"


#: What transformers 5 calls arguments that scripts for Optimum's ORTTrainer still pass.
_RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}
#: Arguments that transformers 5 dropped because what they asked for is now always so.
_DROPPED = {
    "save_safetensors": True,
    "include_tokens_per_second": None,
    "overwrite_output_dir": None,
    "half_precision_backend": "auto",
}


@dataclass
class _BackendArguments:
    """The fields that ORTTrainingArguments adds; mixed into both argument classes."""

    backend: str = field(
        default="ort",
        metadata={"help": "What runs the training steps: ort, compile, eager or auto."},
    )
    ort_options: dict | str | None = field(
        default=None,
        metadata={"help": "Fields of ort_train.OrtOptions, as a dict or a JSON string."},
    )
    use_module_with_loss: bool = field(
        default=False,
        metadata={
            "help": "Compute the loss (label smoothing and compute_loss_func included) inside the "
            "graph, which then returns the loss alone: less memory, no logits in training."
        },
    )
    save_onnx: bool = field(
        default=False, metadata={"help": "Save the graphs of each stage as ONNX files."}
    )
    onnx_prefix: str | None = field(
        default=None, metadata={"help": "Name of the saved graphs; needed with save_onnx."}
    )
    onnx_log_level: str = field(
        default="ERROR",
        metadata={"help": "ORTModule's log level: VERBOSE, INFO, WARNING, ERROR or FATAL."},
    )
    evaluation_strategy: str | None = field(
        default=None, metadata={"help": "Older name of eval_strategy."}
    )
    no_cuda: bool | None = field(default=None, metadata={"help": "Older name of use_cpu."})
    push_to_hub_token: str | None = field(
        default=None, metadata={"help": "Older name of hub_token."}
    )
    push_to_hub_model_id: str | None = field(
        default=None, metadata={"help": "Older name of hub_model_id."}
    )
    per_gpu_train_batch_size: int | None = field(
        default=None, metadata={"help": "Older name of per_device_train_batch_size."}
    )
    per_gpu_eval_batch_size: int | None = field(
        default=None, metadata={"help": "Older name of per_device_eval_batch_size."}
    )
    save_safetensors: bool = field(
        default=True, metadata={"help": "Accepted for older scripts; always true."}
    )
    include_tokens_per_second: bool | None = field(
        default=None, metadata={"help": "Accepted for older scripts; tokens/s are always logged."}
    )
    overwrite_output_dir: bool | None = field(
        default=None, metadata={"help": "Accepted for older scripts; transformers 5 has no check."}
    )
    half_precision_backend: str = field(
        default="auto", metadata={"help": "Accepted for older scripts; always torch's autocast."}
    )

    def _translate_older_names(self) -> None:
        for old, new in _RENAMED.items():
            value = getattr(self, old)
            if value is not None:
                warnings.warn(f"{old} is now called {new}", FutureWarning, stacklevel=4)
                setattr(self, new, value)
                setattr(self, old, None)
        problems = [
            f"{name}={getattr(self, name)!r} isn't supported any more; leave it out"
            for name, only in _DROPPED.items()
            if only is not None and getattr(self, name) != only
        ]
        if problems:
            raise ConfigError(problems)

    @property
    def precision(self) -> str:
        """ "fp32", "bf16" or "fp16", as transformers' own flags say."""
        arguments: Any = self
        return "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32"

    def make_ort_options(self) -> OrtOptions:
        """The graph options that these arguments ask for.

        Raises:
            ConfigError: for unknown fields or values, all at once.
        """
        from ort_train.ortmodule.options import parse_options

        values = self.ort_options
        if isinstance(values, str):
            try:
                values = json.loads(values)
            except json.JSONDecodeError as error:
                raise ConfigError(
                    f"ort_options={self.ort_options!r} is not JSON: {error}"
                ) from None
        values = dict(values or {})
        if self.save_onnx:
            if not self.onnx_prefix:
                raise ConfigError("save_onnx=True needs a name for its files: give onnx_prefix")
            arguments: Any = self
            values.setdefault("save_onnx", True)
            values.setdefault("onnx_prefix", self.onnx_prefix)
            values.setdefault("save_onnx_path", arguments.output_dir)
        values.setdefault("log_level", self.onnx_log_level.lower())
        return parse_options(values)

    def _check_backend(self) -> None:
        arguments: Any = self
        device_type = arguments.device.type
        can_run, reason = available(self.backend, self.precision, device_type)
        if not can_run:
            raise ConfigError(f"backend={self.backend!r}: {reason}")
        if arguments.torch_compile:
            raise ConfigError(
                "torch_compile=True compiles whatever the backend is: set backend='compile' instead"
            )
        self.make_ort_options() if not self.save_onnx else None


def _check_deepspeed(arguments: Any) -> None:
    """Before transformers reads it: the rest of the program changes with ZeRO-3."""
    values = zero.resolve(arguments.deepspeed)
    names = {
        "micro_batch_size": "per_device_train_batch_size",
        "precision": "bf16 and fp16: precision",
        "optimizer": "optim",
        "lr_scheduler": "lr_scheduler_type",
    }
    run = zero.RunSettings(
        names=names,
        micro_batch_size=arguments.per_device_train_batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        world_size=distributed.world_size(),
        precision=arguments.precision,
        max_grad_norm=arguments.max_grad_norm,
        optimizer=str(getattr(arguments.optim, "value", arguments.optim)),
        learning_rate=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
    )
    if problems := zero.check(values, run):
        raise ConfigError(problems)
    zero.prepare()
    arguments.deepspeed = values


def _post_init(arguments: Any, parent: type) -> None:
    arguments._translate_older_names()
    if arguments.deepspeed:
        _check_deepspeed(arguments)
    if not torch.cuda.is_available():
        # Without use_cpu, accelerate would let the ranks of a CPU machine train side by side.
        arguments.use_cpu = True
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and arguments.ddp_backend is None:
            arguments.ddp_backend = "gloo"
    fused = arguments.optim == ORTOptimizerNames.ADAMW_ORT_FUSED
    if fused:  # not a name that transformers knows
        arguments.optim = "adamw_torch_fused"
    parent.__post_init__(arguments)  # type: ignore[attr-defined]
    if fused:
        arguments.optim = ORTOptimizerNames.ADAMW_ORT_FUSED
    arguments._check_backend()


@dataclass
class ORTTrainingArguments(_BackendArguments, TrainingArguments):
    """transformers' TrainingArguments with the backend's fields.

    Args:
        backend: "ort", "compile", "eager" or "auto"; see :func:`ort_train.wrap`.
        ort_options: fields of :class:`ort_train.OrtOptions`.
        optim: transformers' names and "adamw_ort_fused": ORT's FusedAdam on CUDA (with AdamW's
            semantics), torch's fused AdamW on CPU.
        use_module_with_loss: compute the loss inside the graph.

    Raises:
        ConfigError: where backend, precision, device and options don't fit one another.
    """

    def __post_init__(self) -> None:
        _post_init(self, TrainingArguments)


@dataclass
class ORTSeq2SeqTrainingArguments(_BackendArguments, Seq2SeqTrainingArguments):
    """transformers' Seq2SeqTrainingArguments with the backend's fields."""

    def __post_init__(self) -> None:
        _post_init(self, Seq2SeqTrainingArguments)

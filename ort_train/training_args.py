"""Arguments of ORTTrainer: transformers' own, Optimum's late ORTTrainer's, and the backend's."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.training_args import OptimizerNames
from transformers.utils.generic import ExplicitEnum

from ort_train import distributed, zero
from ort_train.backends import PrecisionName, available
from ort_train.errors import ConfigError

if TYPE_CHECKING:
    from ort_train.ortmodule import OrtOptions


class ORTOptimizerNames(ExplicitEnum):
    """Optimizers of onnxruntime, by the name that Optimum gave them."""

    ADAMW_ORT_FUSED = "adamw_ort_fused"


#: What transformers 4.57 or 5 calls arguments that scripts for Optimum's ORTTrainer still pass.
_RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "warmup_ratio": "warmup_steps",  # which takes a share of the steps, too, from 5 on
}
#: Optimizers that transformers dropped, and what it took in their place.
_RENAMED_OPTIMIZERS = {"adamw_hf": "adamw_torch", "adamw_apex_fused": "adamw_torch_fused"}
#: Arguments that transformers 5 dropped because what they asked for is now always so.
_DROPPED = {
    "save_safetensors": True,
    "include_tokens_per_second": None,
    "overwrite_output_dir": None,
    "half_precision_backend": "auto",
    "use_legacy_prediction_loop": False,
    "past_index": -1,
    "fp16_opt_level": None,  # apex, which was never used without half_precision_backend
    "tpu_num_cores": None,
    "mp_parameters": None,
    "ray_scope": None,
}


_DEFAULT_OPTIMIZER = next(
    str(getattr(each.default, "value", each.default))
    for each in fields(TrainingArguments)
    if each.name == "optim"
)


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
    precision: str | None = field(
        default=None,
        metadata={
            "help": "fp32, bf16, fp16, or auto (with backend auto: fp32 or bf16, the faster). "
            "None: as bf16 and fp16 say."
        },
    )
    label_sparsity: bool | None = field(
        default=None,
        metadata={
            "help": "Tokens whose label is ignored (-100) cost nothing in head and loss: "
            "OrtOptions.label_sparsity. None: off, or as backend auto finds."
        },
    )
    padding_sparsity: bool | None = field(
        default=None,
        metadata={
            "help": "Padding costs nothing, in most attention either: "
            "OrtOptions.padding_sparsity. None: "
            "off, or as backend auto finds."
        },
    )
    optim: str = field(  # not transformers' enumeration: a command line takes only its members
        default=_DEFAULT_OPTIMIZER,
        metadata={"help": "Any optimizer of transformers, or adamw_ort_fused."},
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
    no_cuda: bool = field(default=False, metadata={"help": "Older name of use_cpu."})
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
    include_tokens_per_second: bool = field(
        default=False, metadata={"help": "Accepted for older scripts; tokens/s are always logged."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Accepted for older scripts; transformers 5 has no check."}
    )
    half_precision_backend: str = field(
        default="auto", metadata={"help": "Accepted for older scripts; always torch's autocast."}
    )

    warmup_ratio: float | None = field(
        default=None, metadata={"help": "Older name of warmup_steps below 1."}
    )
    logging_dir: str | None = field(
        default=None, metadata={"help": "Older way to set TENSORBOARD_LOGGING_DIR."}
    )
    group_by_length: bool = field(
        default=False, metadata={"help": "Older way to set train_sampling_strategy."}
    )
    adafactor: bool = field(default=False, metadata={"help": "Older way to set optim."})
    include_inputs_for_metrics: bool = field(
        default=False, metadata={"help": "Older way to set include_for_metrics."}
    )
    use_legacy_prediction_loop: bool = field(
        default=False, metadata={"help": "Accepted for older scripts; always false."}
    )
    past_index: int = field(default=-1, metadata={"help": "Accepted for older scripts; always -1."})
    fp16_opt_level: str | None = field(
        default=None, metadata={"help": "Accepted for older scripts; apex isn't used."}
    )
    tpu_num_cores: int | None = field(
        default=None, metadata={"help": "Accepted for older scripts; no TPU is used."}
    )
    mp_parameters: str | None = field(
        default=None, metadata={"help": "Accepted for older scripts; SageMaker's."}
    )
    ray_scope: str | None = field(
        default=None, metadata={"help": "Accepted for older scripts; pass scope to Ray itself."}
    )

    def _translate_older_names(self, parent: type) -> None:
        native = {each.name: each.default for each in fields(parent)}
        for old, new in _RENAMED.items():
            value = getattr(self, old) or None
            is_native = old in native  # of transformers before 5, which deprecates most of them
            if value is not None and not (is_native and old == "warmup_ratio"):
                _say_renamed(old, new)
                setattr(self, new, value)
                value = None
            if value is None:
                setattr(self, old, native.get(old))
        arguments: Any = self
        if self.group_by_length and "group_by_length" not in native:
            _say_renamed("group_by_length", "train_sampling_strategy")
            arguments.train_sampling_strategy = "group_by_length"
        if self.include_inputs_for_metrics and "include_inputs_for_metrics" not in native:
            _say_renamed("include_inputs_for_metrics", "include_for_metrics")
            arguments.include_for_metrics = [*arguments.include_for_metrics, "inputs"]
        if self.adafactor and "adafactor" not in native:
            _say_renamed("adafactor", "optim")
            arguments.optim = "adafactor"
        if self.logging_dir is not None and "logging_dir" not in native:
            _say_renamed("logging_dir", "the variable TENSORBOARD_LOGGING_DIR")
            os.environ["TENSORBOARD_LOGGING_DIR"] = str(self.logging_dir)  # as transformers 5 reads
        optimizer = str(getattr(arguments.optim, "value", arguments.optim))
        if optimizer in _RENAMED_OPTIMIZERS and optimizer not in set(OptimizerNames):
            _say_renamed(f"optim={optimizer}", f"optim={_RENAMED_OPTIMIZERS[optimizer]}")
            arguments.optim = _RENAMED_OPTIMIZERS[optimizer]
        problems = [
            f"{name}={getattr(self, name)!r} isn't supported any more; leave it out"
            for name, only in _DROPPED.items()
            if only is not None and name not in native and getattr(self, name) != only
        ]
        if problems:
            raise ConfigError(problems)

    @property
    def train_precision(self) -> str:
        """ "auto", or "fp32", "bf16" or "fp16" as transformers' own flags say."""
        arguments: Any = self
        if self.precision == "auto":
            return "auto"
        return "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32"

    def _set_precision_flags(self) -> None:
        """`precision` as transformers' own flags.

        Raises:
            ConfigError: for an unknown one, or where the flags say another.
        """
        arguments: Any = self
        if self.precision is None:
            return
        if self.precision not in get_args(PrecisionName):
            names = ", ".join(get_args(PrecisionName))
            raise ConfigError(f"precision={self.precision!r} is not one of {names}")
        for flag in ("bf16", "fp16"):
            if getattr(arguments, flag) and self.precision != flag:
                raise ConfigError(
                    f"precision={self.precision!r} contradicts {flag}=True: give one of them"
                )
        if self.precision in ("bf16", "fp16"):
            setattr(arguments, self.precision, True)

    def make_ort_options(self) -> OrtOptions:
        """The graph options that these arguments ask for.

        Raises:
            ConfigError: for unknown fields or values, all at once.
        """
        from ort_train.ortmodule.options import SPARSITY, parse_options

        values = self.ort_options
        if isinstance(values, str):
            try:
                values = json.loads(values)
            except json.JSONDecodeError as error:
                raise ConfigError(
                    f"ort_options={self.ort_options!r} is not JSON: {error}"
                ) from None
        if not isinstance(values, dict | None):
            raise ConfigError(
                f"ort_options={self.ort_options!r} must be a dict of OrtOptions' fields, or JSON "
                "of one"
            )
        values = dict(values or {})
        if self.save_onnx:
            if not self.onnx_prefix:
                raise ConfigError("save_onnx=True needs a name for its files: give onnx_prefix")
            arguments: Any = self
            values.setdefault("save_onnx", True)
            values.setdefault("onnx_prefix", self.onnx_prefix)
            values.setdefault("save_onnx_path", arguments.output_dir)
        for name in SPARSITY:
            if (value := getattr(self, name)) is not None:
                values.setdefault(name, value)
        values.setdefault("log_level", self.onnx_log_level.lower())
        return parse_options(values)

    def _check_backend(self) -> None:
        arguments: Any = self
        device_type = arguments.device.type
        can_run, reason = available(self.backend, self.train_precision, device_type)
        if not can_run:
            raise ConfigError(f"backend={self.backend!r}: {reason}")
        if arguments.torch_compile:
            raise ConfigError(
                "torch_compile=True compiles whatever the backend is: set backend='compile' instead"
            )
        if self.ort_options and self.backend not in ("ort", "auto"):
            raise ConfigError(
                f"ort_options are given but backend is {self.backend!r}: they would be ignored; "
                "leave them out or set backend='ort'"
            )
        sparsity = self.label_sparsity or self.padding_sparsity
        if sparsity and self.backend not in ("ort", "auto"):
            raise ConfigError(
                f"label_sparsity and padding_sparsity are backend ort's, but backend is "
                f"{self.backend!r}: leave them out or set backend='ort'"
            )
        if self.save_onnx:
            Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
        if self.make_ort_options().label_sparsity and arguments.label_smoothing_factor:
            raise ConfigError(
                f"label_smoothing_factor={arguments.label_smoothing_factor} takes all logits, "
                "which label_sparsity leaves out: turn one of them off"
            )


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
        precision=arguments.train_precision,
        max_grad_norm=arguments.max_grad_norm,
        optimizer=str(getattr(arguments.optim, "value", arguments.optim)),
        learning_rate=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
    )
    if problems := zero.check(values, run):
        raise ConfigError(problems)
    zero.prepare()
    arguments.deepspeed = values


def _say_renamed(old: str, new: str) -> None:
    warnings.warn(f"{old} is now called {new}", FutureWarning, stacklevel=5)


def _post_init(arguments: Any, parent: type) -> None:
    arguments._translate_older_names(parent)
    arguments._set_precision_flags()
    if arguments.deepspeed:
        _check_deepspeed(arguments)
    if not torch.cuda.is_available():
        # Without use_cpu, accelerate would let the ranks of a CPU machine train side by side.
        arguments.use_cpu = True
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and arguments.ddp_backend is None:
            arguments.ddp_backend = "gloo"
        if arguments.ddp_backend == "gloo":
            distributed.join("gloo", arguments.ddp_timeout)
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
        precision: "fp32", "bf16", "fp16" or "auto"; None: as `bf16` and `fp16` say.
        ort_options: fields of :class:`ort_train.OrtOptions`.
        label_sparsity: as in OrtOptions; None: off, or as backend "auto" finds.
        padding_sparsity: likewise.
        optim: transformers' names and "adamw_ort_fused": ORT's FusedAdam on CUDA (with AdamW's
            semantics), torch's fused AdamW on CPU.
        use_module_with_loss: compute the loss inside the graph, which then returns no logits.
        save_onnx: write the graphs of each stage into `output_dir`, named by `onnx_prefix`.
        onnx_prefix: needed with `save_onnx`.
        onnx_log_level: "VERBOSE", "INFO", "WARNING", "ERROR" or "FATAL".

    Further fields are older names of transformers' own, for scripts that give them.

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

"""Knowledge distillation: a student learns a frozen teacher's predictions beside the text's tokens.

Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015.

Shapes as suffixes: B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ort_train.config import RunConfig
from ort_train.data.batches import IGNORED_LABEL
from ort_train.errors import ConfigError, ModelError
from ort_train.files import expanded
from ort_train.trainer import ORTTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: A made teacher is not the student itself, which the run's own seed makes.
_SEED_OFFSET = 1


def distillation_loss(
    student_logits_BTV: torch.Tensor,
    teacher_logits_BTV: torch.Tensor,
    labels_BT: torch.Tensor,
    temperature: float,
    alpha: float,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """alpha x cross-entropy + (1 - alpha) x temperature² x KL(teacher || student).

    Both are means over the predicted tokens. The KL is that of the predictions at the temperature,
    whose gradients the square brings to the size of the cross-entropy's.

    Args:
        labels_BT: the samples' own tokens, which position t - 1 predicts; -100 isn't learnt.
        temperature: logits are divided by it; above 1, unlikely tokens count for more.
        alpha: 1: the text alone; 0: the teacher alone.
        num_items: what the sums are divided by; None: predicted tokens of this batch. With gradient
            accumulation it is their number in all of its batches.

    Returns:
        A scalar in float32.
    """
    targets_N = labels_BT[:, 1:].reshape(-1)
    learnt_N = targets_N != IGNORED_LABEL
    vocabulary = student_logits_BTV.shape[-1]
    student_NV = student_logits_BTV[:, :-1].float().reshape(-1, vocabulary)
    teacher_NV = teacher_logits_BTV[:, :-1].float().reshape(-1, vocabulary)
    cross_entropy = F.cross_entropy(
        student_NV, targets_N, ignore_index=IGNORED_LABEL, reduction="sum"
    )
    divergence_N = F.kl_div(
        F.log_softmax(student_NV / temperature, -1),
        F.log_softmax(teacher_NV / temperature, -1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    divergence = (divergence_N * learnt_N).sum()
    total = alpha * cross_entropy + (1 - alpha) * temperature**2 * divergence
    return total / (learnt_N.sum().clamp(min=1) if num_items is None else num_items)


class Distiller:
    """A frozen teacher, and the loss that a student has by it.

    Args:
        teacher: put into evaluation mode and frozen; it runs eagerly, without gradients.
        temperature: see `distillation_loss`.
        alpha: likewise.

    Raises:
        ConfigError: a temperature that isn't positive, or an alpha outside 0 to 1.
    """

    def __init__(self, teacher: torch.nn.Module, temperature: float = 2.0, alpha: float = 0.5):
        problems = []
        if not temperature > 0:
            problems.append(f"temperature {temperature} must be above 0")
        if not 0 <= alpha <= 1:
            problems.append(f"alpha {alpha}, the text's share of the loss, must be within 0 and 1")
        if problems:
            raise ConfigError(problems)
        self.teacher = teacher.eval().requires_grad_(False)
        self.temperature = temperature
        self.alpha = alpha

    def teach(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The teacher's logits (B, T, V) of a batch."""
        with torch.no_grad():
            return self.teacher(**_without_labels(inputs), use_cache=False).logits

    def loss(
        self,
        student_logits_BTV: torch.Tensor,
        teacher_logits_BTV: torch.Tensor,
        labels_BT: torch.Tensor,
        num_items: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """See `distillation_loss`."""
        return distillation_loss(
            student_logits_BTV,
            teacher_logits_BTV,
            labels_BT,
            self.temperature,
            self.alpha,
            num_items,
        )

    def step_loss(self, student: torch.nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The loss of one training call of the student, for loops without a trainer."""
        logits = student(**_without_labels(inputs)).logits
        return self.loss(logits, self.teach(inputs), inputs["labels"])


class DistillationTrainer(ORTTrainer):
    """ORTTrainer that trains a student by a teacher; evaluation is by the text alone.

    The student's forward and backward are run by `args.backend`, the teacher eagerly.

    Args:
        teacher: of the student's vocabulary; it is frozen, and moved to the training device.
        temperature: see `distillation_loss`.
        alpha: likewise.
        **kwargs: every argument of ORTTrainer but compute_loss_func.

    Raises:
        ConfigError: `compute_loss_func` or `use_module_with_loss` is given.
        ModelError: the two vocabularies differ.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        teacher: torch.nn.Module,
        temperature: float = 2.0,
        alpha: float = 0.5,
        **kwargs: Any,
    ):
        if kwargs.get("compute_loss_func") is not None:
            raise ConfigError("compute_loss_func is the teacher's here: use ORTTrainer with it")
        check_vocabularies(model, teacher)
        self.distiller = Distiller(teacher, temperature, alpha)
        self._teacher_logits: torch.Tensor | None = None
        super().__init__(model, args, compute_loss_func=self._loss, **kwargs)
        self.distiller.teacher.to(self.args.device)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """As ORTTrainer's; in training the teacher is asked first."""
        self._teacher_logits = self.distiller.teach(inputs) if model.training else None
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self._teacher_logits = None

    def _loss(
        self, outputs: Any, labels_BT: torch.Tensor, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        logits_BTV = outputs["logits"]
        if self._teacher_logits is None:
            return F.cross_entropy(
                logits_BTV[:, :-1].float().flatten(0, 1),
                labels_BT[:, 1:].flatten(),
                ignore_index=IGNORED_LABEL,
            )
        return self.distiller.loss(logits_BTV, self._teacher_logits, labels_BT, num_items_in_batch)


def load_distiller(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, student: torch.nn.Module
) -> Distiller:
    """The teacher of a run, loaded or made.

    Raises:
        ModelError: it can't be loaded, or its vocabulary isn't the student's.
    """
    from ort_train.models import load_model

    distill = config.distill
    assert distill.teacher is not None
    teacher: PreTrainedModel = load_model(
        distill.teacher, tokenizer, config.train.seed + _SEED_OFFSET, config.data.block_size
    )
    check_vocabularies(student, teacher)
    return Distiller(
        teacher, distill.temperature or 2.0, 0.5 if distill.alpha is None else distill.alpha
    )


def problems(config: RunConfig) -> list[str]:
    """What stands against a run's distillation on this machine."""
    teacher = config.distill.teacher
    if teacher is None:
        return []
    found = []
    for key, name in (
        ("distill.teacher.name_or_path", teacher.name_or_path),
        ("model.tokenizer", config.model.tokenizer),
    ):
        # A hub id has one slash at most.
        if name and len(Path(name).parts) > 2 and not expanded(name).is_dir():
            found.append(
                f"{key} {name!r} doesn't exist: train the teacher first (the quickstart's is "
                "trained with `ort-train train --recipe quickstart`), or name another folder"
            )
    return found


def check_vocabularies(student: Any, teacher: Any) -> None:
    """Predictions can be compared token by token only over one vocabulary.

    Raises:
        ModelError: their sizes differ.
    """
    sizes = [
        model.get_output_embeddings().weight.shape[0]
        for model in (student, teacher)
        if getattr(model, "get_output_embeddings", None) and model.get_output_embeddings()
    ]
    if len(set(sizes)) > 1:
        raise ModelError(
            f"the student predicts {sizes[0]} tokens and the teacher {sizes[1]}: both must have "
            "one tokenizer, set model.tokenizer to the teacher's"
        )


def _without_labels(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != "labels"}

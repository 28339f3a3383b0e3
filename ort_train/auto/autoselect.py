"""`backend="auto"`: the first real batches decide what runs the others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ort_train.auto.candidates import precisions
from ort_train.auto.probe import Call, detached, differentiable
from ort_train.auto.trial import Decision, Trial
from ort_train.backends import runner_factory

if TYPE_CHECKING:
    from ort_train.ortmodule import OrtOptions
    from ort_train.ortmodule.forward import OrtForward

logger = logging.getLogger(__name__)

#: Batches that the trial runs over; until they are seen, training runs eagerly.
NUM_TRIAL_BATCHES = 2


class AutoRunner:
    """Runs the first training calls eagerly, tries the candidates on them, keeps the fastest.

    Gradients of the trial go nowhere: `.grad`, buffers and torch's random state are as before.
    The arguments are :class:`ort_train.auto.trial.Trial`'s.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        original: Callable[..., Any],
        *,
        precision: str,
        options: OrtOptions,
        loss_only: bool = False,
    ):
        self._module = module
        self._original = original
        self._settings: dict[str, Any] = {
            "precision": precision,
            "options": options,
            "loss_only": loss_only,
        }
        eager = runner_factory("eager", precisions(precision)[0], options)
        self._chosen = eager(module, original)
        self._calls: list[Call] = []
        self.decision: Decision | None = None

    @property
    def ort(self) -> OrtForward | None:
        """What the chosen backend runs in ONNX Runtime, if anything."""
        return getattr(self._chosen, "ort", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.decision is None and differentiable(self._module, (args, kwargs)):
            self._calls.append(detached((args, kwargs)))
            if len(self._calls) == NUM_TRIAL_BATCHES:
                trial = Trial(self._module, self._original, self._calls, **self._settings)
                self.decision, self._chosen = trial.run()
                self._calls = []
                logger.warning("%s", self.decision)
        return self._chosen(*args, **kwargs)

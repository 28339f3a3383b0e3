"""`backend="auto"`: the first real batches decide what runs the others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ort_train.backends import runner_factory
from ort_train.candidates import precisions
from ort_train.probe import Call, detached, differentiable
from ort_train.trial import Decision, Trial

if TYPE_CHECKING:
    from ort_train.ortmodule import OrtOptions

logger = logging.getLogger(__name__)

#: Batches that the trial runs over; until they are seen, training runs eagerly.
NUM_TRIAL_BATCHES = 2


class AutoRunner:
    """Runs the first training calls eagerly, tries the candidates on them, keeps the fastest.

    Gradients of the trial go nowhere: `.grad`, buffers and torch's random state are as before.
    The arguments are :class:`ort_train.trial.Trial`'s.
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
    def savings(self) -> Any:
        """Of the chosen backend."""
        return getattr(self._chosen, "savings", None)

    @property
    def rounded_weights(self) -> Any:
        """Of backend ort in bf16, if that is what was chosen."""
        return getattr(self._chosen, "rounded_weights", None)

    @property
    def graph_from_cache(self) -> bool | None:
        """Of the chosen backend, in the trial."""
        return getattr(self._chosen, "graph_from_cache", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.decision is None and differentiable(self._module, (args, kwargs)):
            self._calls.append(detached((args, kwargs)))
            if len(self._calls) == NUM_TRIAL_BATCHES:
                trial = Trial(self._module, self._original, self._calls, **self._settings)
                self.decision, self._chosen = trial.run()
                self._calls = []
                logger.warning("%s", self.decision)
        return self._chosen(*args, **kwargs)

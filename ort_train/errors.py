"""Every error a user can meet: the message names the value, the rule and the way out."""

from __future__ import annotations

from collections.abc import Sequence


class OrtTrainError(Exception):
    """Base of all errors raised by this package."""


class ConfigError(OrtTrainError, ValueError):
    """A configuration that can't be run; carries every problem found, not just the first.

    Args:
        problems: one line each, in the order they were found.
    """

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        if len(self.problems) == 1:
            message = self.problems[0]
        else:
            lines = "\n".join(f"  - {problem}" for problem in self.problems)
            message = f"{len(self.problems)} problems:\n{lines}"
        super().__init__(message)

    def __reduce__(self):
        return (type(self), (self.problems,))


class DataError(OrtTrainError, ValueError):
    """A corpus or batch that can't be trained on."""


class ModelError(OrtTrainError, ValueError):
    """A model, tokenizer or adapter that doesn't fit the rest of the run."""


class CheckpointError(OrtTrainError, ValueError):
    """An output directory or checkpoint that can't be used as asked."""


class ExportError(OrtTrainError, ValueError):
    """A model that can't be exported, or a folder that is no whole exported model."""


class GenerationError(OrtTrainError, ValueError):
    """Prompts or options that can't be generated from."""


class UnsupportedModelError(OrtTrainError, RuntimeError):
    """ORTModule can't take the module; names the operator and the way out."""


class BackwardError(OrtTrainError, RuntimeError):
    """A backward that would not give the gradients of its forward."""


class BackendUnavailableError(OrtTrainError, RuntimeError):
    """A backend or precision that this machine or installation can't run."""


class NonFiniteLossError(OrtTrainError, ArithmeticError):
    """The training loss became NaN or infinite."""


class RankError(OrtTrainError, RuntimeError):
    """Ranks of a launch that can't meet, or lost one of their number."""


class StoppedBySignal(OrtTrainError):
    """The run was told to end early, and what it had done is saved, to continue from."""

    #: Of the process; not a code of the shell's, Python's or Slurm's. Job files requeue on it.
    EXIT_CODE = 85

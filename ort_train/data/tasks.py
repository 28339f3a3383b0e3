"""What a language model learns from blocks of text: which models can, and the blocks' batches.

Shapes as suffixes: B samples of a batch, T tokens of a sample.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ort_train.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Task = Literal["causal-lm", "masked-lm", "seq2seq"]
#: Of the tokens, those that a masked language model predicts (BERT, https://arxiv.org/abs/1810.04805).
MASKED_SHARE = 0.15
# A batch of few tokens may get no mask at first; that none of so many draws masks one means that
# none can be masked.
_MAX_DRAWS = 100

Rows = Sequence[Mapping[str, Any]]
Collate = Callable[[Any], dict[str, Any]]


@dataclass(frozen=True)
class _Kind:
    """How transformers and peft call a task's models."""

    noun: str
    auto_class: str
    mapping: str
    peft_type: str | None  # peft has none for masked language models, and none fits


_KINDS: dict[str, _Kind] = {
    "causal-lm": _Kind(
        "causal language model",
        "AutoModelForCausalLM",
        "MODEL_FOR_CAUSAL_LM_MAPPING",
        "CAUSAL_LM",
    ),
    "masked-lm": _Kind(
        "masked language model", "AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING", None
    ),
    "seq2seq": _Kind(
        "sequence-to-sequence model",
        "AutoModelForSeq2SeqLM",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
        "SEQ_2_SEQ_LM",
    ),
}


def noun(task: Task) -> str:
    """What a model of the task is called."""
    return _KINDS[task].noun


def auto_class(task: Task) -> Any:
    """transformers' class that loads and makes the task's models."""
    import transformers

    return getattr(transformers, _KINDS[task].auto_class)


def peft_type(task: Task) -> str | None:
    """peft's name of the task."""
    return _KINDS[task].peft_type


def check_architecture(task: Task, config: PretrainedConfig) -> None:
    """Refuses a model that transformers doesn't have for the task.

    Raises:
        ModelError: naming the tasks that it has it for.
    """
    import transformers

    if getattr(config, "auto_map", None):
        return  # the code that comes with it says what it can
    fitting = [
        name for name, kind in _KINDS.items() if type(config) in getattr(transformers, kind.mapping)
    ]
    if task in fitting:
        return
    others = " or ".join(f"model.task={name}" for name in fitting)
    raise ModelError(
        f"can't make a {config.model_type} as a {noun(task)} (model.task {task}): "
        + (f"transformers has it for {others}" if others else "transformers has no such model")
    )


def max_length(task: Task, block_size: int) -> int:
    """Positions that a model must have for blocks of so many tokens."""
    return block_size - block_size // 2 if task == "seq2seq" else block_size


def make_collate(task: Task, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Collate, str]:
    """What makes a batch of rows of `data.make_blocks`.

    Args:
        seed: of the masks of a masked language model.

    Returns:
        The function, and what it does in words, empty for a causal model.
    """
    if task == "masked-lm":
        collate: Collate = functools.partial(masked_batch, tokenizer=tokenizer, seed=seed)
        return collate, f"{MASKED_SHARE:.0%} of the tokens are masked and predicted"
    if task == "seq2seq":
        return halved_batch, "each block's second half is predicted from its first"
    from transformers import default_data_collator

    return default_data_collator, ""


def masked_batch(rows: Rows, tokenizer: PreTrainedTokenizerBase, seed: int) -> dict[str, Any]:
    """Masks tokens as BERT does; only they have labels.

    The masks follow from the seed and the batch's tokens, and from nothing before: all backends,
    all evaluations and a resumed run see the same, and a sample has others whenever shuffling puts
    it beside other samples. (transformers' collator by itself goes on from batch to batch.)

    Returns:
        `input_ids`, `attention_mask` (ones) and `labels`, (B, T) int64 each.

    Raises:
        DataError: no token can be masked.
    """
    import torch
    from transformers import DataCollatorForLanguageModeling

    from ort_train.data.batches import IGNORED_LABEL

    ids_BT = torch.tensor([row["input_ids"] for row in rows])
    content = hashlib.sha256(f"{seed} ".encode() + ids_BT.numpy().tobytes()).digest()
    first = int.from_bytes(content[:4], "little")
    for draw in range(_MAX_DRAWS):
        collate = DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=MASKED_SHARE, seed=first + draw
        )
        batch = dict(collate([{"input_ids": ids_T} for ids_T in ids_BT]))
        if bool((batch["labels"] != IGNORED_LABEL).any()):
            return {**batch, "attention_mask": torch.ones_like(ids_BT)}
    raise DataError(
        f"a batch of {ids_BT.numel()} tokens has none that can be masked: all are special tokens "
        f"of the tokenizer, or too few; raise data.block_size {ids_BT.shape[1]}, or give other text"
    )


def halved_batch(rows: Rows) -> dict[str, Any]:
    """The encoder reads a block's first half, the decoder learns its second (prefix LM as in T5's
    paper, https://arxiv.org/abs/1910.10683, section 3.2.3, always cut in the middle).

    Returns:
        `input_ids` and `attention_mask` (ones), (B, T // 2); `labels`, (B, T - T // 2); int64.
    """
    import torch

    ids_BT = torch.tensor([row["input_ids"] for row in rows])
    middle = ids_BT.shape[1] // 2
    read = ids_BT[:, :middle].contiguous()
    return {
        "input_ids": read,
        "attention_mask": torch.ones_like(read),
        "labels": ids_BT[:, middle:].contiguous(),
    }

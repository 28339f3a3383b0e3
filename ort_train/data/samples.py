"""A recipe's samples: its data, in its model's tokens, and how they become batches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ort_train.config import DataConfig, ModelConfig

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Samples:
    """What is trained and evaluated on.

    Attributes:
        evaluation: None where it wasn't asked for.
        collate: makes a batch of rows.
        source: where the data come from, one line.
    """

    tokenizer: PreTrainedTokenizerBase
    train: datasets.Dataset
    evaluation: datasets.Dataset | None
    collate: Callable[[Any], dict[str, Any]]
    source: str


def make_samples(
    data: DataConfig,
    model: ModelConfig,
    max_train: int | None = None,
    with_evaluation: bool = True,
    seed: int = 0,
) -> Samples:
    """Loads the data and the tokenizer, and cuts one by the other.

    Args:
        max_train: rows of `train` at most.
        with_evaluation: whether to read what is evaluated on, too.
        seed: of which samples share a row, with `data.packing`, and of masks.

    Raises:
        DataError: see `corpora.load_corpus` and `instructions.load_records`.
        ModelError: see `tokenizer.load_tokenizer`.
    """
    if data.format == "instructions":
        return _instructions(data, model, max_train, with_evaluation, seed)
    num_train = _least(max_train, data.max_train_blocks)
    return _blocks(data, model, num_train, with_evaluation, seed)


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _blocks(
    data: DataConfig, model: ModelConfig, num_train: int | None, with_evaluation: bool, seed: int
) -> Samples:
    from ort_train.data.corpora import load_corpus, make_blocks
    from ort_train.data.tasks import make_collate
    from ort_train.data.tokenizer import load_tokenizer

    corpus = load_corpus(
        data.source, data.dataset, data.subset, data.text_column, data.folder, data.hub_timeout_s
    )
    tokenizer = load_tokenizer(model, corpus.train_text)
    train = make_blocks(corpus.train_text, tokenizer, data.block_size, num_train)
    evaluation = None
    if with_evaluation:
        evaluation = make_blocks(corpus.eval_text, tokenizer, data.block_size, data.max_eval_blocks)
    collate, note = make_collate(model.task, tokenizer, seed)
    source = f"{corpus.source}; {note}" if note else corpus.source
    return Samples(tokenizer, train, evaluation, collate, source)


def _instructions(
    data: DataConfig,
    model: ModelConfig,
    max_train: int | None,
    with_evaluation: bool,
    seed: int,
) -> Samples:
    from ort_train.data.instructions import load_records, pad_batch, tokenize
    from ort_train.data.packing import pack, packed_batch
    from ort_train.data.tokenizer import load_tokenizer

    columns = (data.prompt_column or "prompt", data.response_column or "response")
    records = load_records(
        data.source, data.dataset, data.subset, columns, data.folder, data.hub_timeout_s
    )
    tokenizer = load_tokenizer(model, records.text)
    num_train = data.max_train_blocks if data.packing else _least(max_train, data.max_train_blocks)
    train = tokenize(records.train, tokenizer, data.block_size, num_train)
    evaluation = None
    if with_evaluation:
        evaluation = tokenize(records.evaluation, tokenizer, data.block_size, data.max_eval_blocks)
    if not data.packing:
        length = None if data.padding == "longest" else data.block_size
        collate = functools.partial(pad_batch, pad_id=tokenizer.pad_token_id, length=length)
        mean_length = sum(map(len, train["input_ids"])) / len(train)
        source = f"{records.source}; samples of {mean_length:.0f} tokens on average"
        return Samples(tokenizer, train, evaluation, collate, source)
    packed_rows = functools.partial(
        pack, block_size=data.block_size, pad_id=tokenizer.pad_token_id, seed=seed
    )
    rows = packed_rows(train)
    note = (
        f"{len(train):,} samples packed into {len(rows):,} rows of {data.block_size} tokens, "
        f"{sum(map(sum, rows['attention_mask'])) / (len(rows) * data.block_size):.1%} of them not "
        "padding"
    )
    rows = rows.select(range(_least(max_train, len(rows)) or 0))
    evaluation = evaluation and packed_rows(evaluation)
    collate = functools.partial(packed_batch, attention=model.attention, dtype=model.dtype)
    return Samples(tokenizer, rows, evaluation, collate, f"{records.source}; {note}")

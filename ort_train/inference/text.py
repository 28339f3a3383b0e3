"""Tokens that exported models are compared on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ort_train.errors import ExportError
from ort_train.recipes import make_config

if TYPE_CHECKING:
    from ort_train.inference.folder import ExportedModel


@dataclass(frozen=True)
class Rows:
    """Tokens to read.

    Attributes:
        ids_BT: rows of one length.
        source: of the text; None for random tokens, which have no perplexity worth telling.
    """

    ids_BT: np.ndarray
    source: str | None


def make_rows(
    model: ExportedModel,
    overrides: Sequence[str] = (),
    num_rows: int = 16,
    length: int = 128,
) -> Rows:
    """Rows of the evaluation text in the model's tokens, or of random ones without a tokenizer.

    Args:
        overrides: `data.key=value`, as in a recipe.
        num_rows: at most; a short text has fewer.
        length: of each, at most as many as the model has positions.

    Raises:
        ConfigError: overrides of anything but data, or wrong ones.
        DataError: there is no such text.
    """
    from ort_train.data.corpora import load_corpus, make_blocks

    if model.info.max_positions is not None:
        length = min(length, model.info.max_positions)
    values = {
        "model": {"architecture": model.info.architecture},
        "train": {"max_steps": 1},
        "data": {"block_size": length},
    }
    data = make_config(values, overrides).data
    try:
        tokenizer = model.load_tokenizer()
    except ExportError:
        rng = np.random.default_rng(0)
        return Rows(rng.integers(0, model.info.vocab_size, (num_rows, length)), None)
    corpus = load_corpus(
        data.source, data.dataset, data.subset, data.text_column, data.folder, data.hub_timeout_s
    )
    blocks = make_blocks(corpus.eval_text, tokenizer, data.block_size, num_rows)
    return Rows(np.array(blocks["input_ids"], dtype=np.int64), corpus.source)

"""Instructions: records of a prompt and its response, padded into batches.

Shape suffixes: B samples of a batch, T tokens.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ort_train.data.batches import IGNORED_LABEL
from ort_train.data.corpora import UnavailableError, load_splits
from ort_train.errors import DataError
from ort_train.files import expanded

if TYPE_CHECKING:
    import datasets
    import torch
    from transformers import PreTrainedTokenizerBase

_TRAIN_SHARE = 0.9
_SEPARATOR = "\n"
# Of a response that is made of documentation: long enough to differ, short enough to be many.
_MAX_PARAGRAPHS = 2

Record = tuple[str, str]  # prompt, response


@dataclass(frozen=True)
class Records:
    """Prompts and responses to train and to evaluate on.

    Attributes:
        source: one line: which records these are, and why the sources before were not taken.
    """

    train: list[Record]
    evaluation: list[Record]
    source: str

    @property
    def text(self) -> str:
        """All of the training records, for a tokenizer to be trained on."""
        return "\n".join(part for record in self.train for part in record)


def load_records(
    source: str,
    dataset: str,
    subset: str | None,
    columns: tuple[str, str],
    folder: str | Path | None = None,
    hub_timeout_s: float = 3.0,
) -> Records:
    """Reads the first source there is of: the hub, a folder of JSONL files, the documentation.

    Args:
        source: ``auto``, or the one to take: ``hub``, ``folder`` or ``offline``.
        dataset: hub id.
        subset: the dataset's configuration; None where it has one only.
        columns: of prompt and response, in the dataset or the JSON objects.
        folder: holds *.jsonl files; a named one comes before the hub.
        hub_timeout_s: seconds to wait for the hub's first answer.

    Raises:
        DataError: the source asked for isn't there, can't be read, or holds no records.
    """
    order = [source] if source != "auto" else (["folder"] if folder else ["hub", "offline"])
    skipped = []
    for name in order:
        try:
            if name == "hub":
                splits, origin = load_splits(dataset, subset, columns, hub_timeout_s)
                rows = splits["train"]
                records = list(zip(*(rows[column] for column in columns), strict=True))
            elif name == "folder":
                records, origin = _from_folder(folder, columns)
            else:
                records, origin = _from_python_docs()
        except UnavailableError as reason:
            skipped.append(f"{name}: {reason}")
            continue
        records = [(prompt, response) for prompt, response in records if prompt and response]
        if len(records) < 2:
            raise DataError(
                f"{origin} holds {len(records)} records with a prompt and a response, and at least "
                "one is needed to train and one to evaluate"
            )
        near = min(max(1, int(len(records) * _TRAIN_SHARE)), len(records) - 1)
        why = f" (not taken: {'; '.join(skipped)})" if skipped else ""
        return Records(records[:near], records[near:], f"{len(records):,} records of {origin}{why}")
    raise DataError(
        f"no instructions: {'; '.join(skipped)}; set data.folder to a folder of *.jsonl files, or "
        "data.source=offline"
    )


def tokenize(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    max_samples: int | None = None,
) -> datasets.Dataset:
    """One sample per record, of its own length; a prompt that fills the sample is left out.

    Args:
        block_size: tokens kept of prompt and response.
        max_samples: tokenize no further than this many; None: all records.

    Returns:
        Rows of `input_ids`, `attention_mask` (ones) and `labels`, which are ignored on the prompt.

    Raises:
        DataError: no prompt is shorter than `block_size`.
    """
    from datasets import Dataset, Features, List, Value

    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    options = {"add_special_tokens": False, "verbose": False}
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for prompt, response in records:
        if max_samples is not None and len(rows["labels"]) == max_samples:
            break
        prompt_ids = tokenizer(prompt + _SEPARATOR, **options)["input_ids"]
        ids = (prompt_ids + tokenizer(response, **options)["input_ids"] + end)[:block_size]
        if len(prompt_ids) >= len(ids):
            continue
        rows["input_ids"].append(ids)
        rows["attention_mask"].append([1] * len(ids))
        rows["labels"].append([IGNORED_LABEL] * len(prompt_ids) + ids[len(prompt_ids) :])
    if not rows["labels"]:
        raise DataError(
            f"no prompt is shorter than data.block_size {block_size} tokens: raise it, or give "
            "shorter prompts"
        )
    features = Features(dict.fromkeys(rows, List(Value("int64"))))
    return Dataset.from_dict(rows, features=features)


def pad_batch(
    rows: Sequence[Mapping[str, Any]], pad_id: int, length: int | None = None
) -> dict[str, torch.Tensor]:
    """Stacks samples, padded on the right.

    Args:
        rows: `input_ids`, `attention_mask` and `labels` of each sample, of equal length.
        pad_id: token that pads; its labels are ignored, and attention doesn't see it.
        length: T; None: of the longest sample.

    Returns:
        The three, (B, T) int64 each.
    """
    import torch

    length = length or max(len(row["input_ids"]) for row in rows)
    fillers = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORED_LABEL}
    return {
        name: torch.tensor([[*row[name], *[filler] * (length - len(row[name]))] for row in rows])
        for name, filler in fillers.items()
    }


def _from_folder(folder: str | Path | None, columns: tuple[str, str]) -> tuple[list[Record], str]:
    if folder is None:
        raise DataError("data.source folder needs data.folder: name a folder of *.jsonl files")
    files = sorted(expanded(folder).glob("*.jsonl"))
    if not files:
        raise DataError(f"data.folder {folder} holds no *.jsonl files")
    records = []
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"can't read {file}: {error}") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                records.append((str(row[columns[0]]), str(row[columns[1]])))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{file}, line {number}, is no JSON object with {columns[0]!r} and "
                    f"{columns[1]!r} ({error}): set data.prompt_column and data.response_column"
                ) from error
    return records, f"folder {folder}"


def _from_python_docs() -> tuple[list[Record], str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UnavailableError("this Python comes without pydoc_data") from error
    records = []
    for topic, text in sorted(topics.items()):
        paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
        for start in range(len(paragraphs)):
            count = 1 + start % _MAX_PARAGRAPHS
            prompt = f"Python on {topic}, from part {start + 1}?"
            records.append((prompt, "\n\n".join(paragraphs[start : start + count])))
    # So that training and evaluation see all topics.
    random.Random(0).shuffle(records)
    return records, "instructions made of the Python documentation"

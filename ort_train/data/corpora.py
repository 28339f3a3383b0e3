"""Corpora, and the token blocks (N, T) that are cut from them."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from ort_train.distributed import is_main_process
from ort_train.errors import DataError
from ort_train.files import expanded

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

_TRAIN_SHARE = 0.9  # of a text that comes in one piece
_CHUNK_CHARS = 1 << 15  # tokenized at a time: long, as some tokenizers add a space to each
_CHUNKS_PER_BATCH = 16
_EVAL_SPLITS = ("validation", "valid", "val", "dev", "test")


@dataclass(frozen=True)
class Corpus:
    """Text to train and to evaluate on.

    Attributes:
        source: one line: which text this is, and why the sources before it were not taken.
    """

    train_text: str
    eval_text: str
    source: str


class UnavailableError(Exception):
    """A source that isn't there, as opposed to one that is broken."""


def load_corpus(
    source: str = "auto",
    dataset: str = "Salesforce/wikitext",
    subset: str | None = "wikitext-2-raw-v1",
    text_column: str = "text",
    folder: str | Path | None = None,
    hub_timeout_s: float = 3.0,
) -> Corpus:
    """Reads the first source there is of: the hub, a folder of text files, offline text.

    Args:
        source: ``auto``, or the one to take: ``hub``, ``folder`` or ``offline``.
        dataset: hub id; a copy in the cache is taken where the hub can't be reached.
        subset: the dataset's configuration; None where it has one only.
        text_column: of the dataset.
        folder: holds *.tokens or *.txt files, whose names may tell their split (train, valid,
            test). A named folder comes before the hub. None: $ORT_TRAIN_DATA, ./data/wikitext-2 or
            ../shared/data/wikitext-2, whichever there is.
        hub_timeout_s: seconds to wait for the hub's first answer.

    Raises:
        DataError: the source asked for isn't there, can't be read, or holds no text.
    """
    if source == "auto":
        order = ["folder"] if folder else ["hub", "folder", "offline"]
    else:
        order = [source]
    skipped: list[str] = []
    for name in order:
        try:
            if name == "hub":
                corpus = _from_hub(dataset, subset, text_column, hub_timeout_s)
            elif name == "folder":
                corpus = _from_folder(expanded(folder) if folder else _usual_folder())
            else:
                corpus = _from_python_docs()
        except UnavailableError as reason:
            skipped.append(f"{name}: {reason}")
            continue
        for split, text in (("training", corpus.train_text), ("evaluation", corpus.eval_text)):
            if not text.strip():
                raise DataError(
                    f"the {split} text of {corpus.source} is empty: give data.folder a folder of "
                    "*.tokens or *.txt files, or set data.source=offline"
                )
        why = f" (not taken: {'; '.join(skipped)})" if skipped else ""
        return Corpus(corpus.train_text, corpus.eval_text, corpus.source + why)
    raise DataError(
        f"no corpus: {'; '.join(skipped)}; set data.folder to a folder of *.tokens or *.txt files, "
        "or data.source=offline"
    )


def make_blocks(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    max_blocks: int | None = None,
) -> datasets.Dataset:
    """Tokenizes the text and cuts it into samples, back to back; what remains is dropped.

    Args:
        block_size: T, tokens per sample.
        max_blocks: tokenize no further than this many samples; None: the whole text.

    Returns:
        N rows of `input_ids`, `attention_mask` (ones) and `labels` (the ids: models shift them
        themselves), each T int64.

    Raises:
        DataError: the text has fewer tokens than one sample.
    """
    from datasets import Dataset, Features, List, Value

    wanted = None if max_blocks is None else max_blocks * block_size
    pieces: list[np.ndarray] = []
    num_tokens = 0
    chunks = list(_chunks(text))
    with tqdm(
        total=len(text),
        desc="Tokenizing",
        unit="char",
        unit_scale=True,
        delay=1,
        disable=not is_main_process(),
    ) as bar:
        for start in range(0, len(chunks), _CHUNKS_PER_BATCH):
            if wanted is not None and num_tokens >= wanted:
                break
            batch = chunks[start : start + _CHUNKS_PER_BATCH]
            encoded = tokenizer(
                batch, add_special_tokens=False, return_attention_mask=False, verbose=False
            )
            pieces += [np.asarray(ids, dtype=np.int64) for ids in encoded["input_ids"]]
            num_tokens += sum(len(ids) for ids in encoded["input_ids"])
            bar.update(sum(map(len, batch)))
    num_blocks = num_tokens // block_size
    if num_blocks == 0:
        raise DataError(
            f"a text of {num_tokens} tokens is shorter than one sample of data.block_size "
            f"{block_size}: give more text, or set data.block_size to {max(num_tokens, 1)} or less"
        )
    if max_blocks is not None:
        num_blocks = min(num_blocks, max_blocks)
    ids_NT = np.concatenate(pieces)[: num_blocks * block_size].reshape(num_blocks, block_size)
    columns = {"input_ids": ids_NT, "attention_mask": np.ones_like(ids_NT), "labels": ids_NT}
    # Else some columns get smaller integers for their names, which torch's embedding refuses.
    features = Features(dict.fromkeys(columns, List(Value("int64"))))
    return Dataset.from_dict(columns, features=features)


def hub_problem(repository: str, timeout_s: float = 3.0) -> str | None:
    """Asks the hub about a repository, once, to spare the hub's clients their retries.

    Args:
        repository: ``datasets/ID`` or ``models/ID``.

    Returns:
        None where it answers, if only that it has no such repository; else the reason.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            url = f"{constants.ENDPOINT}/api/{repository}"
            urllib.request.urlopen(url, timeout=timeout_s).close()
            answers.put(None)
        except urllib.error.HTTPError as error:
            # The hub explains its refusals in this header; a proxy in between doesn't.
            from_hub = "X-Error-Code" in error.headers
            answers.put(None if from_hub else f"answers with status {error.code}")
        except Exception as error:
            answers.put(f"can't be reached ({getattr(error, 'reason', None) or error})")

    # In a thread: looking up the host's name heeds no timeout.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=timeout_s)
    except queue.Empty:
        return f"gives no answer within {timeout_s:g} s"


def load_splits(
    dataset: str, subset: str | None, columns: Sequence[str], timeout_s: float
) -> tuple[datasets.DatasetDict, str]:
    """Reads a dataset from the hub, or from the cache where the hub can't be reached.

    Args:
        columns: that all of its splits must have.

    Returns:
        Its splits, `train` among them, and their origin in words.

    Raises:
        UnavailableError: no hub and nothing cached.
        DataError: no such dataset, subset, split or column.
    """
    import datasets

    label = f"{dataset} {subset}" if subset else dataset
    problem = hub_problem(f"datasets/{dataset}", timeout_s)
    with _offline() if problem else contextlib.nullcontext():
        try:
            splits = datasets.load_dataset(dataset, subset)
        except datasets.exceptions.DatasetNotFoundError as error:
            raise DataError(f"data.dataset {dataset}: {error}") from error
        except (OSError, datasets.exceptions.DatasetsError) as error:
            # Nothing in the cache, or the connection broke.
            raise UnavailableError(
                f"{problem}, and {label} isn't cached" if problem else str(error)
            ) from error
        except ValueError as error:
            if problem:
                raise UnavailableError(f"{problem}, and {label} isn't cached") from error
            raise DataError(f"data.dataset {dataset}, data.subset {subset}: {error}") from error
    if "train" not in splits:
        raise DataError(f"data.dataset {label} has no train split, only {', '.join(splits)}")
    keys = ("text_column",) if len(columns) == 1 else ("prompt_column", "response_column")
    for name, split in splits.items():
        for key, column in zip(keys, columns, strict=True):
            if column not in split.column_names:
                raise DataError(
                    f"data.{key} {column} isn't in split {name} of {label}: set it to one "
                    f"of {', '.join(split.column_names)}"
                )
    return (
        splits,
        f"{label} from the cache (hub: {problem})" if problem else f"{label} from the hub",
    )


def _from_hub(dataset: str, subset: str | None, text_column: str, timeout_s: float) -> Corpus:
    splits, origin = load_splits(dataset, subset, [text_column], timeout_s)
    train_text = _join_rows(splits["train"][text_column])
    for name in _EVAL_SPLITS:
        if name in splits:
            return Corpus(train_text, _join_rows(splits[name][text_column]), origin)
    return _split(train_text, origin)


def _join_rows(rows: list[str | None]) -> str:
    """One text in which every row ends its line."""
    return "".join(row if row.endswith("\n") else f"{row}\n" for row in (r or "" for r in rows))


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keeps `datasets` to its cache; it has no argument for that, and else retries for minutes."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _text_files(folder: Path) -> list[Path]:
    """The folder's *.tokens files, or else its *.txt files (which may be notes on the former)."""
    return sorted(folder.glob("*.tokens")) or sorted(folder.glob("*.txt"))


def _usual_folder() -> Path:
    if named := os.environ.get("ORT_TRAIN_DATA"):
        return expanded(named)
    places = [
        root / place
        for root in (Path.cwd(), Path(__file__).resolve().parents[2])
        for place in ("data/wikitext-2", "../shared/data/wikitext-2")
    ]
    for place in places:
        if _text_files(place):
            return Path(os.path.normpath(place))
    raise UnavailableError("data.folder and ORT_TRAIN_DATA unset, no ./data/wikitext-2")


def _from_folder(folder: Path) -> Corpus:
    if not folder.is_dir():
        raise DataError(f"folder {folder} doesn't exist: set data.folder to a folder of text files")
    files = _text_files(folder)
    if not files:
        raise DataError(f"folder {folder} holds no *.tokens and no *.txt files")
    by_split: dict[str, list[Path]] = {"train": [], "valid": [], "test": []}
    for path in files:
        words = re.split(r"[^a-z]+", path.name.lower())
        if "test" in words:
            by_split["test"].append(path)
        elif any(word in _EVAL_SPLITS for word in words):
            by_split["valid"].append(path)
        else:
            by_split["train"].append(path)
    present = [split for split in by_split if by_split[split]]
    train, *others = present
    train_text = "".join(_read_text(path) for path in by_split[train])
    names = ", ".join(path.name for path in by_split[train])
    origin = f"folder {folder}: training on {names}"
    if not others:
        return _split(train_text, origin)
    eval_text = "".join(_read_text(path) for path in by_split[others[0]])
    names = ", ".join(path.name for path in by_split[others[0]])
    note = "" if train == "train" else ", as there is no train split"
    return Corpus(train_text, eval_text, f"{origin}, evaluating on {names}{note}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} isn't UTF-8 text (byte {error.start}: {error.reason}): convert it, for "
            "example with iconv -t utf-8"
        ) from error
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror or error}") from error


def _from_python_docs() -> Corpus:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UnavailableError("this Python comes without pydoc_data") from error
    return _split("\n".join(topics.values()), "the Python documentation that every CPython carries")


def _split(text: str, origin: str) -> Corpus:
    """Trains on the first part of a text and evaluates on the rest, cut at the end of a line."""
    near = int(len(text) * _TRAIN_SHARE)
    cut = text.rfind("\n", 0, near) + 1 or near
    share = round(_TRAIN_SHARE * 100)
    return Corpus(
        text[:cut], text[cut:], f"{origin}, split {share}/{100 - share} for training and evaluation"
    )


def _chunks(text: str) -> Iterator[str]:
    """Pieces of at most `_CHUNK_CHARS`, cut at the end of a line or else of a word."""
    start = 0
    while start < len(text):
        end = start + _CHUNK_CHARS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or text.rfind(" ", start + 1, end)
            if end <= start:
                end = start + _CHUNK_CHARS
        yield text[start:end]
        start = end

"""ort_train.data.instructions: prompts and responses, and their padded batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ort_train import job
from ort_train.config import DataConfig, ModelConfig, parse
from ort_train.data.instructions import load_records, pad_batch, tokenize
from ort_train.data.samples import make_samples
from ort_train.data.tokenizer import make_tokenizer
from ort_train.errors import ConfigError, DataError
from ort_train.recipes import load_recipe

COLUMNS = ("prompt", "response")
RECORDS = [("What is this?", "A test."), ("And that?", "A much longer answer to what that is.")]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer("What is this? A test.", 300)


def write(folder: Path, rows: list[Any]) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder


def test_labels_are_on_the_response_only(tokenizer):
    rows = tokenize(RECORDS, tokenizer, 512)
    for row, (prompt, response) in zip(rows, RECORDS, strict=True):
        labelled = [
            i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label >= 0
        ]
        assert tokenizer.decode(row["input_ids"]) == f"{prompt}\n{response}{tokenizer.eos_token}"
        assert tokenizer.decode(labelled) == response + tokenizer.eos_token
        assert row["labels"][-len(labelled) :] == labelled
        assert row["attention_mask"] == [1] * len(row["input_ids"])


@pytest.mark.parametrize("length", [None, 80])
def test_batches_are_padded_on_the_right(tokenizer, length):
    rows = [dict(row) for row in tokenize(RECORDS, tokenizer, 512)]
    batch = pad_batch(rows, tokenizer.pad_token_id, length)
    num_tokens = [len(row["input_ids"]) for row in rows]
    assert batch["input_ids"].shape == (2, length or max(num_tokens))
    for index, count in enumerate(num_tokens):
        assert batch["input_ids"][index, :count].tolist() == rows[index]["input_ids"]
        assert (batch["input_ids"][index, count:] == tokenizer.pad_token_id).all()
        assert batch["attention_mask"][index].sum() == count
        assert (batch["labels"][index, count:] == -100).all()
    assert all(column.dtype == torch.int64 for column in batch.values())


def test_long_samples_are_cut_and_long_prompts_left_out(tokenizer):
    rows = tokenize([("x" * 100, "y"), ("x", "y" * 100)], tokenizer, 32)
    assert len(rows) == 1
    assert len(rows[0]["input_ids"]) == 32
    assert len(tokenize(RECORDS * 5, tokenizer, 512, max_samples=3)) == 3
    with pytest.raises(DataError, match=r"no prompt is shorter than data.block_size 4"):
        tokenize(RECORDS, tokenizer, 4)


def test_records_of_a_folder(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(20)]
    folder = write(tmp_path / "texts", [*rows, "", {"question": "unanswered", "answer": ""}])
    records = load_records("auto", "none/such", None, ("question", "answer"), folder)
    assert records.train == [(f"q{i}", f"a{i}") for i in range(18)]
    assert records.evaluation == [("q18", "a18"), ("q19", "a19")]
    assert records.source.startswith("20 records of folder")


@pytest.mark.parametrize(
    ("rows", "rule"),
    [
        ([{"prompt": "p"}], "line 1, is no JSON object with 'prompt' and 'response'"),
        (["{"], "set data.prompt_column and data.response_column"),
        ([{"prompt": "p", "response": "r"}], "holds 1 records"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path, rows, rule):
    with pytest.raises(DataError, match=rule):
        load_records("folder", "", None, COLUMNS, write(tmp_path / "texts", rows))


def test_folders_without_records_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no \*.jsonl files"):
        load_records("folder", "", None, COLUMNS, tmp_path)
    with pytest.raises(DataError, match=r"needs data.folder"):
        load_records("folder", "", None, COLUMNS)


def test_offline_records_are_made_of_the_documentation():
    records = load_records("auto", "no/such", None, COLUMNS)
    assert "Python documentation (not taken: hub: HF_HUB_OFFLINE is set" in records.source
    assert len(records.train) > 9 * len(records.evaluation) - 10
    assert records.train == load_records("offline", "", None, COLUMNS).train


def test_samples_collate_as_the_recipe_says(tmp_path):
    rows = [{"prompt": p, "response": r} for p, r in RECORDS * 5]
    folder = str(write(tmp_path / "texts", rows))
    model = ModelConfig(architecture="llama", vocab_size=300)
    widths = {}
    for padding in ("block", "longest"):
        data = DataConfig(format="instructions", folder=folder, padding=padding, block_size=96)
        samples = make_samples(data, model)
        batch = samples.collate([samples.train[0], samples.train[1]])
        widths[padding] = batch["input_ids"].shape[1]
    assert widths["block"] == 96
    assert widths["longest"] == max(len(row["input_ids"]) for row in samples.train)


@pytest.mark.parametrize("setting", [{"padding": "longest"}, {"prompt_column": "question"}])
def test_settings_that_would_be_ignored_are_refused(setting):
    with pytest.raises(ConfigError, match=r"read with data.format instructions only"):
        parse({"model": {"architecture": "llama"}, "train": {"max_steps": 1}, "data": setting})


def test_longest_padding_trains_through_one_graph(tmp_path):
    settings = [
        "measure.baselines=[]",
        "data.source=offline",
        "data.padding=longest",
        "train.max_steps=3",
        "train.ort={num_threads: 1}",
        f"output.dir={tmp_path}",
    ]
    # Three steps leave a guess among 512 tokens; one that sees its labels is far below.
    assert 256 < job.run(load_recipe("orca2_7b_lora", settings, tiny=True)).perplexity < 1024

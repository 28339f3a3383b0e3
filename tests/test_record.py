"""The record: schema, files, and nothing private in it."""

from __future__ import annotations

import copy
import json
import os

import pytest
from example_records import example

from ort_train.errors import OrtTrainError
from ort_train.reports import record as records
from ort_train.reports.record import RecordError


def test_round_trip(tmp_path):
    record = example()
    path = tmp_path / "new" / "record.json"
    records.write(record, path)
    assert records.load(path) == record
    assert json.loads(path.read_text())["schema"] == 1
    assert os.listdir(path.parent) == ["record.json"]


def test_a_job_may_add_sections(tmp_path):
    record = {**example(), "training": {"perplexity": 12.5}}
    records.write(record, tmp_path / "record.json")
    assert records.load(tmp_path / "record.json")["training"] == {"perplexity": 12.5}


def test_an_invalid_record_leaves_the_old_file(tmp_path):
    path = tmp_path / "record.json"
    records.write(example(), path)
    before = path.read_bytes()
    wrong = copy.deepcopy(example())
    wrong["results"][0]["status"] = "fast"
    del wrong["machine"]
    with pytest.raises(RecordError, match=r"(?s)machine.*results.0.status"):
        records.write(wrong, path)
    not_json = copy.deepcopy(example())
    not_json["results"][0]["tokens_per_s"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.write(not_json, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["record.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 1, "comm', "is not JSON .* cut off"),
        ("[1, 2]", "a JSON object, not list"),
        ('{"schema": 7}', "schema 7, this version reads 1: run"),
        ("{}", "schema None"),
        ('{"schema": 1}', "not a benchmark record"),
    ],
)
def test_load_refuses_what_is_no_record(tmp_path, text, message):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=message) as caught:
        records.load(path)
    assert "record.json" in str(caught.value)
    assert isinstance(caught.value, OrtTrainError)


def test_load_of_a_missing_file(tmp_path):
    with pytest.raises(RecordError, match=r"can't read .*missing.json: No such file"):
        records.load(tmp_path / "missing.json")

"""The record: schema, files, and nothing private in it."""

from __future__ import annotations

import copy
import json
import os
import socket
import sys
import tempfile
from pathlib import Path

import pytest
from example_records import example

from ort_train import record as records
from ort_train.errors import OrtTrainError
from ort_train.record import RecordError


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


def test_machine_and_versions_of_this_machine():
    machine = records.machine(threads=3)
    assert machine["cpu"]
    assert machine["cores"] >= 1
    assert machine["threads"] == 3
    assert machine["memory_gib"] > 0
    assert set(machine["instruction_sets"]) <= set(records.INSTRUCTION_SETS)
    assert socket.gethostname() not in json.dumps({k: v for k, v in machine.items() if k != "cpu"})
    versions = records.versions()
    assert versions["torch"]
    assert versions["onnxruntime"], "the training wheel's own distribution name must be known"


def test_git_state_needs_a_tracked_file(monkeypatch):
    sha, dirty = records.git_state()
    assert sha is None or (len(sha) == 40 and isinstance(dirty, bool))
    monkeypatch.setattr(records, "PACKAGE_ROOT", Path(tempfile.gettempdir()))
    assert records.git_state() == (None, None)


def test_the_command_names_no_directory_of_this_machine(monkeypatch):
    arguments = [f"{sys.prefix}/bin/ort-train", "bench", f"{Path.cwd()}/recipes/a.yaml", "--tiny"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert records.command() == "ort-train bench ./recipes/a.yaml --tiny"


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        (f"{Path.home()}/models/x", "~/models/x"),
        (f'File "{sys.prefix}/lib/torch/x.py", line 3', 'File "<env>/lib/torch/x.py", line 3'),
        ("--json=/data/somebody/out.json /mnt/x/y", "--json=out.json y"),
        (
            "2.5 it/s of https://huggingface.co/a/b, ./c/d",
            "2.5 it/s of https://huggingface.co/a/b, ./c/d",
        ),
    ],
)
def test_scrub_shortens_only_directories(text, scrubbed):
    assert records.scrub(text) == scrubbed

"""ort_train.reports.provenance: true of this machine, and fit to be published."""

from __future__ import annotations

import json
import socket
import sys
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from ort_train.reports import provenance


def test_machine_and_versions_of_this_machine():
    machine = provenance.machine(threads=3)
    assert machine["cpu"]
    assert machine["cores"] >= 1
    assert machine["threads"] == 3
    assert machine["memory_gib"] > 0
    assert set(machine["instruction_sets"]) <= set(provenance.INSTRUCTION_SETS)
    assert socket.gethostname() not in json.dumps({k: v for k, v in machine.items() if k != "cpu"})
    versions = provenance.versions()
    assert versions["torch"]
    assert versions["onnxruntime"], "the training wheel's own distribution name must be known"


def test_git_state_needs_a_tracked_file(monkeypatch):
    sha, dirty = provenance.git_state()
    assert sha is None or (len(sha) == 40 and isinstance(dirty, bool))
    monkeypatch.setattr(provenance, "PACKAGE_ROOT", Path(tempfile.gettempdir()))
    assert provenance.git_state() == (None, None)


def test_the_command_names_no_directory_of_this_machine(monkeypatch):
    arguments = [f"{sys.prefix}/bin/ort-train", "bench", f"{Path.cwd()}/recipes/a.yaml", "--tiny"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert provenance.command() == "ort-train bench ./recipes/a.yaml --tiny"


@pytest.mark.parametrize("name", ["package", "package.__main__"])
def test_the_command_of_a_module_can_be_typed(monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["/somewhere/package/__main__.py", "--tiny"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec(name, None))
    assert provenance.command() == "python -m package --tiny"


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
    assert provenance.scrub(text) == scrubbed

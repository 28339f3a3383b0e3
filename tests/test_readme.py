"""What the README claims, held against what is tested."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from architectures import ARCHITECTURES, KNOWN_UNSUPPORTED

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _section(title: str) -> str:
    return README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_names_exactly_the_architectures_that_are_tested() -> None:
    rows = [line for line in _section("Architectures").splitlines() if line.startswith("| ")][1:]
    named = [name for row in rows for name in row.split("|")[2].strip().split(", ")]
    assert sorted(named) == sorted(a.model_type for a in ARCHITECTURES)
    assert f"{len(named)} architectures" in README


def test_names_the_architectures_that_are_refused() -> None:
    refused = _section("Architectures").split("Refused,", 1)[1]
    missing = [
        architecture.model_type
        for architecture, _ in KNOWN_UNSUPPORTED
        if not re.search(rf"\b{re.escape(architecture.model_type)}\b", refused)
    ]
    assert not missing


def test_shows_the_table_of_versions_as_it_was_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "benchmarks" / "compat_matrix.py"
    spec = importlib.util.spec_from_file_location("compat_matrix", path)
    assert spec is not None
    assert spec.loader is not None
    compat_matrix = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, compat_matrix)  # its dataclass looks there
    spec.loader.exec_module(compat_matrix)
    results = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["results"]
    assert compat_matrix.with_table(README, results) == README
    recorded = [row["name"] for row in results]
    assert recorded == [versions.name for versions in compat_matrix.SETS]

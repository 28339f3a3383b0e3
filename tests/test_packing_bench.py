"""benchmarks/packing.py, with workers that have no model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from test_benchmark import STAND_IN

from ort_train.bench import run as bench_run
from ort_train.bench import turns as bench_turns
from ort_train.bench.process import Worker
from ort_train.recipes import load_recipe

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "packing.py"


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> Any:
    class StandIn(Worker):
        def __init__(self, scratch: Path, timeout_s: float):
            super().__init__(scratch, timeout_s, STAND_IN)

    monkeypatch.setattr(bench_run, "Worker", StandIn)
    monkeypatch.setattr(bench_turns, "SETTLE_S", 0)
    spec = importlib.util.spec_from_file_location("packing_bench", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "packing_bench", module)
    spec.loader.exec_module(module)
    return module


def test_ratios_are_of_tokens_that_count(packing: Any):
    config = load_recipe("bench_llama_512_padded", ["description='{}'"], tiny=True)
    results = packing.measure(config, steps=2, rounds=2, warmup_steps=1, threads=1)
    assert {result["status"] for result in results.values()} == {"ok"}
    # The stand-in's steps take 20 ms by eager and 10 ms by ort, whatever a batch holds.
    assert results["block, ort"]["x block, eager"]["median"] == pytest.approx(2.0)
    full = {name: result["tokens_of_full_shape"] for name, result in results.items()}
    assert full["block, ort"] == full["longest, ort"] < full["packed, ort"] > 0.9
    packed, block = (results[name]["tokens_per_s"] for name in ("packed, ort", "block, ort"))
    expected = packed["median"] / block["median"]
    assert results["packed, ort"]["x block, ort"]["median"] == pytest.approx(expected, rel=0.1)
    assert results["packed, ort"]["x block, eager"]["median"] > 2.0

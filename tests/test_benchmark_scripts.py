"""What the scripts in benchmarks/ make of their measurements."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from example_records import broken, result

from ort_train import wrap
from ort_train.auto import trial

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # for its dataclasses
        spec.loader.exec_module(module)
        return module

    return load


def test_auto_is_compared_round_by_round_with_the_best_choice(script: Callable[[str], ModuleType]):
    auto_check = script("auto_check")
    times = {
        "eager fp32": [3.0, 3.0, 3.0],  # left behind
        "compile fp32": [2.0, 2.0, 4.0, 2.0],
        "ort fp32": [1.0, 1.0, 2.0, 1.0],
        "auto": [1.1, 1.1, 2.2, 1.1],
    }
    found = auto_check.compared(times)
    assert found["best"] == "ort fp32"
    assert found["slower_by"] == {"median": 0.1, "p20": 0.1, "p80": 0.1}
    assert found["vs_each"] == {"compile fp32": 0.55, "ort fp32": 1.1}
    decision = {"backend": "ort", "precision": "fp32", "sparsity": []}
    assert auto_check.with_same_choice({**found, "decision": decision})["same_choice"] == 1.1


def test_auto_is_checked_against_every_single_choice(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
):
    auto_check = script("auto_check")
    monkeypatch.setattr("ort_train.auto.candidates.CONCRETE_BACKENDS", ("eager", "ort"))
    monkeypatch.setattr("ort_train.auto.candidates.no_bf16", lambda device_type: "none here")
    model, batches = auto_check._made(
        "bert",
        {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64},
    )
    names = [str(single) for single in auto_check.singles(model, batches)]
    sparse = [f"ort fp32 + {name}" for name in ("label_sparsity", "padding_sparsity")]
    both = "ort fp32 + label_sparsity + padding_sparsity"
    assert names == ["eager fp32", "ort fp32", both, *sparse]
    monkeypatch.setattr(trial, "CONCRETE_BACKENDS", ("eager",))
    models = {"eager fp32": model, "auto": wrap(model, "auto")}
    monkeypatch.setattr(
        auto_check,
        "step_ms",
        lambda model, *rest: 1.0 if model is models["auto"] else 2.0,
    )
    models["eager fp32"] = torch.nn.Linear(1, 1)
    times = auto_check.in_turns(models, batches, 5)
    assert {name: len(each) for name, each in times.items()} == {"eager fp32": 3, "auto": 5}


@pytest.mark.parametrize(("case", "num_tensors"), [("llama_256", 39), ("lora_1024", 14 * 16)])
def test_optimizers_make_the_same_weights(
    script: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    num_tensors: int,
):
    optimizers = script("optimizers")
    small = {**optimizers.CASES[case], "hidden_size": 16, "vocab_size": 32}
    monkeypatch.setitem(optimizers.CASES, case, small)
    row = optimizers.measure(case, rounds=2, steps=2)
    assert row["num_tensors"] == num_tensors
    assert row["weights_max_abs"] <= optimizers.TOLERANCE
    assert row["step_ms"].keys() == {"single_tensor", "foreach", "fused"}
    assert row["fused_times_faster_than"]["fused"]["median"] == 1


def test_growth_is_compared_with_a_line_through_the_first_point(
    script: Callable[[str], ModuleType], tmp_path: Path
):
    growth = script("growth")

    def at(value: int, backend: str, speed: float, **changes: Any) -> dict[str, Any]:
        return {"value": value, "reason": None, **result(backend, speed, **changes)}

    points = growth.with_line(
        [
            at(1, "eager", 1.0),
            at(1, "ort", 2.0),
            at(4, "eager", 0.25),  # in proportion
            at(4, "ort", 1.0),  # half of that
            {"value": 8, **broken("eager", "failed", "out of memory")},
        ]
    )
    assert [point["vs_line"] for point in points] == [1.0, 1.0, 1.0, 0.5, None]
    growth.plot({"batch": points}, tmp_path / "one.svg")
    growth.plot({"batch": points, "layers": points}, tmp_path / "growth.svg")
    assert "samples of 128 tokens" in (tmp_path / "growth.svg").read_text()


def test_first_step_with_a_cached_graph_computes_the_same(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    graph_cache = script("graph_cache")
    monkeypatch.setenv("ORT_TRAIN_GRAPH_CACHE", str(tmp_path))
    config = {
        **next(iter(graph_cache.MODELS.values())),
        **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
    }
    cold, warm = (graph_cache.first_step(config, torch.get_num_threads()) for _ in range(2))
    assert (cold.pop("graph_from_cache"), warm.pop("graph_from_cache")) == (False, True)
    assert min(cold.pop("first_step_s"), warm.pop("first_step_s")) > 0
    assert cold == warm


@pytest.mark.parametrize("is_same", [True, False])
def test_graph_cache_takes_turns_in_fresh_folders(
    script: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_same: bool,
):
    graph_cache = script("graph_cache")
    states = []

    def process(config: dict[str, int], threads: int, cache: str) -> dict[str, Any]:
        folder = Path(cache)
        state = "off" if cache == "off" else "warm" if folder.is_dir() else "cold"
        states.append(state)
        if state == "cold":
            folder.mkdir()
            (folder / "graph.onnx").write_bytes(bytes(10))
        return {
            "first_step_s": {"off": 4.0, "cold": 5.0, "warm": 1.0}[state],
            "graph_from_cache": state == "warm",
            "loss": 1.0,
            "gradients": state if not is_same else "same",
        }

    monkeypatch.setattr(graph_cache, "in_fresh_process", process)
    found = graph_cache.measure("llama_4_layers", 3, 1, tmp_path)
    assert states == [
        "cold",  # of which the warm ones begin
        *("off", "cold", "warm"),
        *("cold", "warm", "off"),
        *("warm", "off", "cold"),
    ]
    assert found["is_same"] == is_same
    assert found["entry_bytes"] == 10
    assert found["first_step_s"]["warm"] == {"median": 1.0, "p20": 1.0, "p80": 1.0}
    assert found["vs_off"]["warm"]["median"] == 0.25
    assert found["vs_off"]["cold"]["median"] == 1.25

"""`ort-train passes-bench`: what it times is what it says, and what it says of it is right."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxoptimizer", reason="needs the extra inference")

from ort_train.cli import main
from ort_train.errors import ConfigError
from ort_train.inference.optimization import bench as passes_bench
from ort_train.inference.optimization import models as passes_models
from ort_train.inference.optimization import passes
from ort_train.inference.optimization import report as passes_report
from ort_train.inference.optimization import run as passes_run
from ort_train.inference.optimization.worker import Session

ROOT = Path(__file__).resolve().parents[1]
GEMM_PASSES = ["fuse_transpose_into_gemm", "fuse_matmul_add_bias_into_gemm"]


@pytest.mark.parametrize("name", passes_models.MODELS)
def test_the_exported_graphs_compute_what_the_models_do(name: str, tmp_path: Path) -> None:
    values = passes_models.make_input(name, 32, 1, 8)
    np.save(tmp_path / "input.npy", values)
    passes_models.export(name, 32, 2, values, tmp_path / "model.onnx")
    sizes = {"name": name, "hidden": 32, "heads": 2}
    eager = Session("eager", str(tmp_path / "input.npy"), str(tmp_path / "a.npz"), sizes, threads=1)
    graphs = {level: (str(tmp_path / "model.onnx"), level == "on") for level in ("off", "on")}
    ort = Session(
        "ort", str(tmp_path / "input.npy"), str(tmp_path / "b.npz"), graphs=graphs, threads=1
    )
    eager.start()
    ort.start()
    (expected,) = np.load(tmp_path / "a.npz").values()
    for found in np.load(tmp_path / "b.npz").values():
        assert passes.relative_difference(found, expected) < passes_run.TOLERANCE
    times = ort.round(3)
    assert {variant: len(seconds) for variant, seconds in times.items()} == {"off": 3, "on": 3}


@pytest.mark.parametrize("name", passes_models.MODELS)
def test_which_models_the_gemm_passes_act_on(name: str, tmp_path: Path) -> None:
    values = passes_models.make_input(name, 32, 1, 8)
    passes_models.export(name, 32, 2, values, tmp_path / "model.onnx")
    optimized = passes.optimize(tmp_path / "model.onnx", GEMM_PASSES)
    # torch's exporter fuses transposes into Gemm itself: the first pass finds none anywhere.
    assert [report.changed for report in optimized.singly] == [False, name == "mlp"]
    assert (optimized.together.before["Gemm"] > 0) == (name == "gpt2")
    if name == "mlp":
        assert optimized.together.after == {"Gemm": 8, "Relu": 8}


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return passes_bench.run_benchmark(
        [passes_run.Size("mlp", 32, 1)],
        GEMM_PASSES,
        repeats=4,
        warmup=1,
        seq_len=8,
        threads=1,
        with_compile=False,
        progress=False,
    )


def test_a_record(record: dict[str, Any], tmp_path: Path) -> None:
    (result,) = record["results"]
    labels = ["original", *GEMM_PASSES, "all", "original again"]
    expected = {f"{label}, {level}" for label in labels for level in ("off", "on")}
    assert set(result["variants"]) == {"eager"} | expected
    for name, variant in result["variants"].items():
        assert variant["status"] == "ok", variant
        assert 0 < variant["ms"]["p20"] <= variant["ms"]["median"] <= variant["ms"]["p80"]
        assert variant["rel_diff"] < passes_run.TOLERANCE
        assert ("speedup_vs_original" in variant) == (name != "eager")
    assert result["variants"]["original, on"]["speedup_vs_original"]["median"] == 1
    assert result["changes"]["all"] == {"nodes": [24, 16], "changed": True}
    orders = set(result["cold"]["apparent_gain_of_pass"])
    assert orders == {"original first", f"{GEMM_PASSES[0]} first"}
    passes_bench.write(record, tmp_path / "record.json")
    assert passes_bench.load(tmp_path / "record.json") == record
    text = (tmp_path / "record.json").read_text()
    assert str(tmp_path.parent) not in text


def test_a_record_is_gone_on_with(record: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"repeats": 4, "warmup": 1, "seq_len": 8, "progress": False}
    size = [passes_run.Size("mlp", 32, 1)]
    again = passes_bench.run_benchmark(size, GEMM_PASSES, **settings, before=record)
    assert again["results"] == record["results"]  # nothing is left to measure
    with pytest.raises(ConfigError, match="differs in passes: use the same settings"):
        passes_bench.run_benchmark(size, GEMM_PASSES[:1], **settings, before=record)


def test_a_report(
    record: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    passes_report.show(record)
    shown = capsys.readouterr().out
    assert "mlp, 2 layers, hidden 32" in shown
    assert "24 -> 16 nodes" in shown
    assert "the noise: the same graph twice" in shown
    assert "without warm-up, one graph after the other" in shown
    passes_report.plot(record, tmp_path / "chart.svg")
    assert (tmp_path / "chart.svg").read_text().count("<svg") == 1


def test_a_difference_below_the_noise_is_none(record: dict[str, Any]) -> None:
    result = copy.deepcopy(record["results"][0])
    variants = result["variants"]
    noise = {"median": 1.01, "p20": 0.97, "p80": 1.04}
    variants["original again, on"]["speedup_vs_original"] = noise

    def verdict(median: float, changed: bool = True) -> str:
        ratio = {"median": median, "p20": median, "p80": median}
        variants["all, on"]["speedup_vs_original"] = ratio
        result["changes"]["all"]["changed"] = changed
        return passes_report.verdict(result, "all", "on")

    assert verdict(1.03) == "24 -> 16 nodes; within the noise of 4.0%"
    assert verdict(0.965) == "24 -> 16 nodes; within the noise of 4.0%"
    assert verdict(1.2) == "24 -> 16 nodes; 20.0% faster, noise 4.0%"
    assert verdict(0.9) == "24 -> 16 nodes; 10.0% slower, noise 4.0%"
    strayed = {"median": 1.2, "p20": 1.0, "p80": 1.4}
    variants["all, on"]["speedup_vs_original"] = strayed
    assert passes_report.verdict(result, "all", "on").endswith("within the noise of 4.0%")
    assert verdict(1.0, changed=False) == "graph identical; within the noise of 4.0%"


def test_other_numbers_are_a_mismatch(tmp_path: Path) -> None:
    runs = []
    for name, value in (("eager", 1.0), ("ort", 1.001)):
        run = passes_run.Run(name, {"runner": name})
        run.files = tmp_path / name
        run.files.mkdir()
        np.savez(run.files / "outputs.npz", out=np.full(3, value, np.float32))
        runs.append(run)
    runs[1].judge(runs[0])
    assert runs[1].status == "mismatch"
    assert "out differ from eager by 1.0e-03" in str(runs[1].reason)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--hidden", "512,1024"], "add --grid"),
        (["--hidden", "512,big"], "--hidden '512,big' must be whole numbers"),
        (["--models", "lama"], "did you mean llama"),
        (["--models", ","], "--models is empty: there are gpt2, llama"),
        (["--json", "."], "--json . is a directory"),
        (["--plot", f"{__file__}/chart.svg"], "can't be made"),
        (["--hidden", "100", "--heads", "8"], "hidden 100 isn't 8 heads of an even size"),
        (["--passes", "eliminate_idntity"], "did you mean eliminate_identity"),
        (["--repeats", "0"], "repeats 0 must be at least 1"),
        (["--resume"], "--resume needs a record to go on with"),
        (["--plot", "chart.jpeg"], "must end in .png or .svg"),
    ],
)
def test_what_is_asked_wrongly(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["passes-bench", *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_no_record(tmp_path: Path) -> None:
    from ort_train.errors import OrtTrainError

    (tmp_path / "other.json").write_text(json.dumps({"schema": 1}))
    with pytest.raises(OrtTrainError, match="no record of `ort-train passes-bench`"):
        passes_bench.load(tmp_path / "other.json")
    (tmp_path / "damaged.json").write_text('{"schema": ')
    with pytest.raises(OrtTrainError, match=r"damaged\.json is damaged .*: remove it"):
        passes_bench.load(tmp_path / "damaged.json")
    with pytest.raises(ConfigError, match="2 problems"):
        passes_bench.run_benchmark([passes_run.Size("lama", 8, 1)], ["nop"], repeats=0)

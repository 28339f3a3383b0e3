"""The benchmark: its plan, its processes, its parity gate, and one real run."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from ort_train.auto import candidates
from ort_train.bench import benchmark
from ort_train.bench import run as bench_run
from ort_train.bench import turns as bench_turns
from ort_train.bench.benchmark import Case, precisions_here, run_benchmark
from ort_train.bench.options import output_problems, show_and_save
from ort_train.bench.parity import TOLERANCES, Trajectory, judge, worst_gradient
from ort_train.bench.process import Worker, WorkerError
from ort_train.config import RunConfig, parse
from ort_train.errors import ConfigError
from ort_train.ortmodule.kernels import onednn
from ort_train.reports import record as records
from ort_train.reports import report
from ort_train.reports.report import summary_lines

STAND_IN = (sys.executable, str(Path(__file__).parent / "bench_stand_in.py"))
ALL = [Case("eager"), Case("compile"), Case("ort")]


def make_config(**behaviours: str) -> RunConfig:
    return parse(
        {
            "name": "example",
            "description": json.dumps(behaviours),
            "model": {"architecture": "llama", "config": {"max_position_embeddings": 256}},
            "data": {"block_size": 64},
            "train": {"micro_batch_size": 2, "max_steps": 1},
        }
    )


@pytest.fixture
def stand_in(monkeypatch):
    """Workers without a model."""

    class StandIn(Worker):
        def __init__(self, scratch: Path, timeout_s: float):
            super().__init__(scratch, timeout_s, STAND_IN)

    monkeypatch.setattr(bench_run, "Worker", StandIn)
    monkeypatch.setattr(bench_turns, "SETTLE_S", 0)


def measure(config: RunConfig, cases=ALL, **options) -> dict:
    settings = {"steps": 2, "rounds": 2, "warmup_steps": 1, "progress": False, "timeout_s": 20}
    return run_benchmark(config, cases, **(settings | options))


def by_backend(record: dict) -> dict[str, dict]:
    return {result["backend"]: result for result in record["results"]}


@pytest.mark.usefixtures("stand_in")
class TestRunBenchmark:
    def test_record_of_cases_that_agree(self, tmp_path):
        events: list[str] = []
        record = measure(make_config(), on_event=events.append, threads=3)
        results = by_backend(record)
        assert [result["status"] for result in record["results"]] == ["ok"] * 3
        ort = results["ort"]
        assert ort["it_per_s"] == {"median": 100.0, "p20": 100.0, "p80": 100.0}
        assert ort["step_ms"]["median"] == 10.0
        assert (ort["forward_backward_ms"], ort["optimizer_ms"]) == (7.5, 2.5)
        assert ort["tokens_per_s"] == 100 * 2 * 64
        assert ort["speedup_vs_eager"] == 2.0
        assert ort["speedup_vs_eager_range"] == [2.0, 2.0]
        assert ort["speedup_vs_compile"] == 1.6
        assert results["eager"]["speedup_vs_eager"] == 1.0
        assert ort["loss"] == [2.5, 2.0, 2.0, 2.0, 2.0]
        assert ort["parity"] == {
            "first_loss_abs": 0.0,
            "loss_max_abs": 0.0,
            "grad_max_rel": 0.0,
            "grad_worst": "weight",
        }
        assert record["machine"]["threads"] == 3
        assert record["protocol"]["caches"] == "empty"
        assert "first steps begin with empty caches, of kernels and of graphs" in summary_lines(
            record
        )
        assert any(event.startswith("ort fp32 2x64: round 2 of 2, 100 it/s") for event in events)
        records.write(record, tmp_path / "record.json")

    @pytest.mark.parametrize(
        ("behaviour", "status", "reason"),
        [
            ("unavailable", "unavailable", "no C.. compiler"),
            ("die", "failed", r"SIGKILL \(out of memory\?\)\n.*something about memory"),
            ("die in a round", "failed", "exit code 3"),
            ("wrong gradient", "mismatch", r"gradient of weight differs by 1 of its norm"),
            ("drift", "mismatch", r"loss of training step 2 differs by 1 \(allowed"),
            ("nan", "mismatch", "first loss differs by nan"),
            ("other data", "mismatch", "its data differs from that of eager fp32 2x64: made up"),
        ],
    )
    def test_one_case_gone_wrong_leaves_the_others(self, behaviour, status, reason):
        record = measure(make_config(compile=behaviour))
        results = by_backend(record)
        assert results["compile"]["status"] == status
        assert re.search(reason, results["compile"]["reason"])
        assert results["compile"]["speedup_vs_eager"] is None
        assert results["ort"]["status"] == "ok"
        assert results["ort"]["speedup_vs_eager"] == 2.0
        assert results["ort"]["speedup_vs_compile"] is None

    def test_ort_without_sparsity(self):
        config = make_config()
        ort = {"label_sparsity": True, "num_threads": 1}
        sparse = config.model_copy(update={"train": config.train.model_copy(update={"ort": ort})})
        record = measure(sparse, [Case("eager"), Case("ort"), Case("ort-dense")])
        results = by_backend(record)
        assert results["ort"]["speedup_vs_ort_dense"] == 1.5
        assert results["ort"]["speedup_vs_eager"] == 2.0
        assert results["ort-dense"]["step_ms"]["median"] == 15.0
        assert report.summary_lines(record)[0].endswith("2.00 x eager, 1.50 x ort-dense")
        with pytest.raises(ConfigError, match="turns on neither: leave ort-dense out"):
            measure(config, [Case("ort-dense")])

    def test_a_hanging_case_is_stopped(self):
        began = time.monotonic()
        record = measure(make_config(ort="hang"), [Case("ort")], timeout_s=2)
        assert time.monotonic() - began < 20
        ort = by_backend(record)["ort"]
        assert ort["status"] == "failed"
        assert "no answer to `prepare` within 2 s" in ort["reason"]
        assert "still compiling" in ort["reason"]

    def test_without_a_reference_nothing_has_a_speedup(self):
        record = measure(make_config(eager="die"))
        results = by_backend(record)
        assert results["ort"]["status"] == "mismatch"
        assert "nothing to compare with: eager fp32 2x64 is failed" in results["ort"]["reason"]
        assert results["ort"]["it_per_s"]["median"] == 100.0
        assert results["ort"]["speedup_vs_compile"] is None

    def test_the_reference_is_run_even_if_nobody_asked(self):
        record = measure(make_config(), [Case("ort"), Case("eager", "bf16")])
        results = {(r["backend"], r["precision"]): r for r in record["results"]}
        assert results["eager", "fp32"]["reference_only"]
        assert results["ort", "fp32"]["speedup_vs_eager"] == 2.0
        # A baseline has the case's own precision.
        assert results["eager", "bf16"]["speedup_vs_eager"] == 1.0
        assert len(report.results(record)) == 2

    def test_every_shape_has_its_reference(self):
        cases = [Case("ort", "fp32", size, block) for size in (1, 2) for block in (32, 64)]
        record = measure(make_config(), cases)
        references = [result for result in record["results"] if result["reference_only"]]
        assert len(references) == 4
        assert all(result["speedup_vs_eager"] == 2.0 for result in report.results(record))
        assert [result["tokens_per_s"] for result in report.results(record)] == [
            3200.0,
            6400.0,
            6400.0,
            12800.0,
        ]

    def test_all_problems_are_told_before_anything_runs(self, monkeypatch):
        monkeypatch.setattr(bench_run, "Worker", None)
        cases = [Case("onnx"), Case("auto"), Case("ort", "fp8"), Case("ort", "fp32", 0, 512)]
        with pytest.raises(ConfigError) as caught:
            measure(make_config(), cases, steps=0, rounds=0, threads=0)
        text = str(caught.value)
        for part in ("steps 0", "rounds 0", "threads 0", "'onnx'", "'auto'", "fp8", "512"):
            assert part in text
        assert "train.micro_batch_size" in text
        assert len(caught.value.problems) == 8
        with pytest.raises(ConfigError, match="no cases"):
            measure(make_config(), [])

    def test_an_interrupt_leaves_no_process_and_no_file(self, monkeypatch, tmp_path):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        workers: list[Worker] = []

        def interrupt(event: str) -> None:
            if "round 1" in event:
                raise KeyboardInterrupt

        class Watched(bench_run.Worker):  # type: ignore[name-defined]
            def __init__(self, *arguments):
                super().__init__(*arguments)
                workers.append(self)

        monkeypatch.setattr(bench_run, "Worker", Watched)
        with pytest.raises(KeyboardInterrupt):
            measure(make_config(), on_event=interrupt)
        assert len(workers) == 3
        assert all(worker._process.poll() is not None for worker in workers)
        assert os.listdir(tmp_path) == []

    def test_a_log_file_gets_no_bar(self, capsys):
        measure(make_config(), [Case("ort")], progress=True, on_event=print)
        captured = capsys.readouterr()
        assert captured.err == ""
        assert "ort fp32 2x64: round 2 of 2" in captured.out

    def test_an_interrupt_keeps_the_shapes_before_it(self, tmp_path, capsys):
        def interrupt(event: str) -> None:
            if "ort fp32 2x64: round 1" in event:
                raise KeyboardInterrupt

        cases = [Case(name, "fp32", size) for size in (1, 2, 4) for name in ("eager", "ort")]
        record = measure(make_config(), cases, on_event=interrupt)
        assert record["interrupted"]
        by_size = {(r["backend"], r["micro_batch_size"]): r for r in record["results"]}
        assert by_size["ort", 1]["speedup_vs_eager"] == 2.0
        for size in (2, 4):
            result = by_size["ort", size]
            assert (result["status"], result["speedup_vs_eager"]) == ("failed", None)
            assert result["reason"] == "interrupted before it was measured"
        args = argparse.Namespace(
            json=tmp_path / "a.json", plot=tmp_path / "a.png", html=tmp_path / "a.html"
        )
        assert show_and_save(record, args) == 130
        assert "2.00 x eager" in capsys.readouterr().out
        assert records.load(args.json) == record

    def test_sigterm_leaves_no_process_and_no_file_either(self, monkeypatch, tmp_path):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as caught:
            measure(make_config(), on_event=lambda _: os.kill(os.getpid(), signal.SIGTERM))
        assert caught.value.code == 143
        assert os.listdir(tmp_path) == []
        assert psutil.Process().children() == []
        assert signal.getsignal(signal.SIGTERM) is before


class TestWorker:
    def test_what_is_no_reply(self, tmp_path):
        worker = Worker(tmp_path, 10, [sys.executable, "-c", "input(); print('hello'); input()"])
        with pytest.raises(WorkerError, match="not a reply to `prepare`: 'hello'"):
            worker.request("prepare")
        assert worker._process.poll() is not None

    def test_one_that_cannot_start(self, tmp_path):
        worker = Worker(tmp_path, 10, [sys.executable, "-c", "import nothing_like_this"])
        with pytest.raises(WorkerError, match=r"exit code 1(?s:.)*No module named"):
            worker.request("prepare")

    def test_an_error_comes_without_directories_of_this_machine(self, tmp_path):
        reply = json.dumps({"error": "bad /home/somebody/x", "unavailable": True})
        worker = Worker(tmp_path, 10, [sys.executable, "-c", f"input(); print({reply!r})"])
        with pytest.raises(WorkerError, match=r"^bad x$") as caught:
            worker.request("prepare")
        assert caught.value.unavailable

    def test_the_real_worker_keeps_prints_out_of_its_replies(self):
        code = (
            "import os, sys, ort_train.bench.worker as w\n"
            "class Noisy:\n"
            "    def __init__(self, **_): print('python'); os.system('echo child')\n"
            "    def start(self): os.write(1, b'raw'); raise ValueError('bad /home/somebody/x')\n"
            "w.Session = Noisy\n"
            "sys.exit(w.main())"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            input='{"request": "prepare"}\n',
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stdout)["error"] == "ValueError: bad /home/somebody/x"
        for noise in ("python", "child", "raw", "Traceback"):
            assert noise in done.stderr


class TestParity:
    def judge(self, tmp_path, ours: dict, theirs: dict, /, **losses) -> tuple[dict, str | None]:
        trajectories = []
        for side, gradients in (("ours", ours), ("theirs", theirs)):
            path = tmp_path / f"{side}.safetensors"
            save_file({name: np.float32(value) for name, value in gradients.items()}, path)
            first, rest = losses.get(side, (3.0, [2.0, 1.0]))
            trajectories.append(Trajectory(first, rest, path))
        return judge(trajectories[0], trajectories[1], TOLERANCES["fp32"])

    def test_equal(self, tmp_path):
        gradients = {"a": np.ones(3), "b": np.zeros(3)}
        parity, problem = self.judge(tmp_path, gradients, gradients)
        assert problem is None
        assert parity["grad_max_rel"] == parity["loss_max_abs"] == 0.0

    def test_worst_tensor_is_named(self, tmp_path):
        theirs = {"large": np.full(4, 100.0), "small": np.full(4, 0.01)}
        ours = {"large": np.full(4, 100.01), "small": np.full(4, 0.0101)}
        parity, problem = self.judge(tmp_path, ours, theirs)
        assert parity["grad_worst"] == "small"
        assert parity["grad_max_rel"] == pytest.approx(0.01, rel=1e-3)
        assert "small differs by 0.01 of its norm (allowed 0.001)" in problem

    def test_rounding_in_a_gradient_of_zero_is_no_mismatch(self, tmp_path):
        theirs = {"weight": np.full(4, 1.0), "key.bias": np.full(4, 1e-9)}
        ours = {"weight": np.full(4, 1.0), "key.bias": np.full(4, -3e-9)}
        assert self.judge(tmp_path, ours, theirs)[1] is None
        # A real one in its place is.
        ours["key.bias"] = np.full(4, 0.1)
        assert "key.bias" in self.judge(tmp_path, ours, theirs)[1]

    def test_missing_and_surplus_gradients_count_as_zero(self, tmp_path):
        full = {"a": np.ones(3), "b": np.ones(3)}
        assert "gradient of b" in self.judge(tmp_path, {"a": np.ones(3)}, full)[1]
        assert "gradient of b" in self.judge(tmp_path, full, {"a": np.ones(3)})[1]
        zero = {"a": np.ones(3), "b": np.zeros(3)}
        assert self.judge(tmp_path, zero, {"a": np.ones(3)})[1] is None

    def test_what_is_not_finite_never_passes(self, tmp_path):
        good, bad = {"a": np.ones(3)}, {"a": np.array([1.0, math.nan, 1.0])}
        parity, problem = self.judge(tmp_path, bad, good)
        assert "gradient of a" in problem
        assert parity["grad_max_rel"] is None
        nan = (3.0, [2.0, math.nan])
        parity, problem = self.judge(tmp_path, good, good, ours=nan)
        assert "training step 2 differs by nan" in problem
        assert parity["loss_max_abs"] is None

    def test_drift_may_grow_like_a_random_walk(self, tmp_path):
        gradients = {"a": np.ones(3)}
        walk = (3.0, [2.0 + 1e-3 * math.sqrt(step) for step in range(1, 51)])
        flat = (3.0, [2.0] * 50)
        assert self.judge(tmp_path, gradients, gradients, ours=walk, theirs=flat)[1] is None
        jump = (3.0, [2.01, *[2.0] * 49])
        assert "step 1 " in self.judge(tmp_path, gradients, gradients, ours=jump, theirs=flat)[1]

    def test_no_gradients_at_all(self, tmp_path):
        save_file({}, tmp_path / "none.safetensors")
        path = tmp_path / "none.safetensors"
        assert worst_gradient(path, path) == (0.0, None)


def test_outputs_that_cannot_be_written_are_refused_first(tmp_path):
    (tmp_path / "file").touch()
    args = argparse.Namespace(
        json=tmp_path / "file" / "a.json", plot=Path("/proc/a.png"), html=tmp_path
    )
    problems = output_problems(args)
    assert len(problems) == 2 + (not os.access("/proc", os.W_OK))
    assert "file' is no folder" in problems[0]
    assert f"--html {tmp_path} is a directory" in problems[-1]
    same = tmp_path / "missing" / "page"
    assert output_problems(argparse.Namespace(json=same, plot=None, html=same)) == [
        "--json and --html name one file: give each its own"
    ]


def test_precision_auto_is_measured_in_all_that_it_may_choose(monkeypatch):
    monkeypatch.setattr(candidates, "no_bf16", lambda device_type: None)
    assert precisions_here("auto") == ("fp32", "bf16")
    monkeypatch.setattr(candidates, "no_bf16", lambda device_type: "none here")
    assert precisions_here("auto") == ("fp32",)
    assert precisions_here("bf16") == ("bf16",)  # asked for by name


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("is_in_hardware", [True, False])
def test_what_bf16_costs_without_hardware_is_said_first(monkeypatch, is_in_hardware):
    """A step takes minutes there, of every backend."""
    monkeypatch.setattr(onednn, "has_bf16", lambda: is_in_hardware)
    events: list[str] = []
    cases = [Case("eager", precision) for precision in ("fp32", "bf16")]
    measure(make_config(), cases, on_event=events.append)
    said = re.search(r"takes [0-9.]+ times as long as in fp32.*--precision fp32", events[0])
    assert bool(said) != is_in_hardware
    measure(make_config(), cases[:1], on_event=events.append)
    assert len(list(filter(re.compile("times as long").search, events))) == (not is_in_hardware)


def test_dropout_is_switched_off_everywhere():
    torch = pytest.importorskip("torch")
    from ort_train.bench.worker import disable_dropout

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention_dropout = 0.2
            self.scaling = 0.5
            self.drop = torch.nn.Dropout(0.3)

    model = torch.nn.Sequential(Attention(), torch.nn.Dropout1d(0.1))
    disable_dropout(model)
    assert model[0].attention_dropout == model[0].drop.p == model[1].p == 0.0
    assert model[0].scaling == 0.5


def test_zero_matrices_get_values_so_that_no_gradient_is_hidden():
    torch = pytest.importorskip("torch")
    from ort_train.bench.worker import fill_zero_weights

    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model[1].weight.requires_grad_(False)
    fill_zero_weights(model)
    assert model[0].weight.all()
    assert not model[0].bias.any()
    assert not model[1].weight.any()


class TestCommandLine:
    def parse(self, *words: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        benchmark.add_arguments(parser)
        return parser.parse_args(words)

    def test_all_problems_at_once(self, tmp_path):
        words = ["no_such_recipe", "--backends", "ort,egaer", "--precision", "fp8"]
        words += ["--batch-sizes", "1,x", "--seq-lens", "0", "--plot", "chart.jpg"]
        with pytest.raises(ConfigError) as caught:
            benchmark.main(self.parse(*words, "--json", str(tmp_path)))
        text = str(caught.value)
        for part in ("no_such_recipe", "did you mean eager", "fp8", "'1,x'", "'0'", "chart.jpg"):
            assert part in text
        assert "is a directory" in text

    @pytest.mark.usefixtures("stand_in")
    def test_outputs_and_exit_code(self, tmp_path, monkeypatch, capsys):
        behaviours: dict[str, str] = {"compile": "unavailable"}
        monkeypatch.setattr(
            "ort_train.recipes.load_recipe", lambda *_, **__: make_config(**behaviours)
        )
        words = ["example", "--batch-sizes", "1,2", "--steps", "1", "--rounds", "1"]
        assert benchmark.main(self.parse(*words)) == 0
        out = capsys.readouterr().out
        assert "ort fp32 2x64: 2.00 x eager" in out
        assert "compile fp32 1x64 can't run here: no C++ compiler" in out
        names = {"--json": "r.json", "--plot": "c.svg", "--html": "p.html"}
        for option, name in names.items():
            words += [option, str(tmp_path / name)]
        behaviours["ort"] = "wrong gradient"
        assert benchmark.main(self.parse(*words)) == 1
        assert sorted(os.listdir(tmp_path)) == sorted(names.values())
        assert len(records.load(tmp_path / "r.json")["results"]) == 6


@pytest.mark.slow
def test_real_backends_agree(monkeypatch):
    from ort_train.recipes import load_recipe

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    overrides = ["data.source=offline", "train.micro_batch_size=1", "data.block_size=16"]
    config = load_recipe("quickstart_lora", overrides, tiny=True)
    cases = [*ALL, Case("ort", "bf16")]
    record = run_benchmark(
        config, cases, steps=2, rounds=2, warmup_steps=1, threads=1, profile_steps=2, progress=False
    )
    results = {(r["backend"], r["precision"]): r for r in record["results"]}
    for backend in ("eager", "ort"):
        result = results[backend, "fp32"]
        assert result["status"] == "ok", result["reason"]
        assert len(result["loss"]) == 5
        assert 0 < result["peak_gib"] < 20
        assert result["speedup_vs_eager"] > 0
    assert results["eager", "fp32"]["profile"] is None
    profile = results["ort", "fp32"]["profile"]
    assert profile["shares"]["matrix_products"] > 0
    assert 0 < profile["products_gflops"] < profile["peak_gflops"]
    share = profile["products_gflops"] / profile["peak_gflops"]
    assert profile["products_share_of_peak"] == pytest.approx(share)
    # A machine without a C++ compiler is no failure.
    assert results["compile", "fp32"]["status"] in ("ok", "unavailable"), results["compile", "fp32"]
    assert results["ort", "bf16"]["status"] in ("ok", "unavailable"), results["ort", "bf16"]
    assert record["model"]["architecture"] == "llama"
    assert str(Path.home()) not in json.dumps(record)

"""The benchmark of generation: its plan, its gate, what it makes, and one real run."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from ort_train.backends import available
from ort_train.cli import main
from ort_train.errors import ConfigError, ExportError
from ort_train.inference.benchmark import exports, gguf_convert
from ort_train.inference.benchmark import run as generation_run
from ort_train.inference.benchmark.engines import ENGINES, expand
from ort_train.inference.benchmark.generation import PYTHON_VARIABLE, run_benchmark
from ort_train.inference.benchmark.run import compare
from ort_train.reports import record as records
from ort_train.reports import report


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any) -> Path:
    folder = tmp_path_factory.mktemp("generation") / "model"
    tiny_llama().save_pretrained(folder)
    return folder


def measure(model: Path, engines: list[str], **options: Any) -> dict[str, Any]:
    settings = {"new_tokens": 6, "rounds": 2, "threads": 1, "progress": False}
    return run_benchmark(model, engines, [2], [12], **{**settings, **options})


def by_engine(record: dict[str, Any]) -> dict[str, Any]:
    return {result["engine"]: result for result in record["results"]}


def test_engines_agree_and_every_report_shows_them(model, tmp_path, capsys):
    told: list[str] = []
    record = measure(model, ["ort-fp32", "ort-int4"], on_event=told.append)
    results = by_engine(record)
    for name in ("ort-fp32", "ort-int4"):
        result = results[name]
        assert result["status"] == "ok", result["reason"]
        assert result["parity"]["logits_rel"] <= ENGINES[name].tolerance
        assert result["prompt_tokens_per_s"]["median"] > 0
        assert result["speedups"]["eager"]["generation"]["median"] > 0
        assert result["peak_gib"] > 0
    assert results["ort-fp32"]["parity"]["equal_tokens"] == [6, 6]
    # Four bits do change a random model's logits: 0 would mean that it wasn't quantized.
    assert results["ort-int4"]["parity"]["rounding_rel"] > 0.01
    assert results["ort-fp32"]["parity"]["rounding_rel"] is None
    assert results["eager"]["reference_only"]
    assert results["eager"]["parity"]["logits_rel"] == 0
    assert record["machine"]["threads"] == 1
    folder = model.with_name("model-exports")
    assert sum(f"{folder / 'onnx-fp32'}" in line for line in told) >= 2  # announced, described
    records.write(record, tmp_path / "record.json")
    loaded = records.load(tmp_path / "record.json")
    assert loaded == record
    report.show(loaded)
    printed = capsys.readouterr().out
    for head in ("prompt, tokens/s", "generation, tokens/s", "x eager", "GiB"):
        assert head in printed
    assert "ort-fp32 2x12: prompt" in printed
    report.plot(loaded, tmp_path / "chart.svg")
    report.html(loaded, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("<tr>") == 3


def test_an_interrupt_keeps_the_shapes_before_it(model, tmp_path):
    def interrupt(line: str) -> None:
        if "ort-fp32 1x8: round 1" in line:
            raise KeyboardInterrupt

    record = run_benchmark(
        model, ["ort-fp32"], [1], [4, 8, 12], new_tokens=2, rounds=1, threads=1, on_event=interrupt
    )
    assert record["interrupted"]
    found = {(each["engine"], each["prompt_len"]): each for each in record["results"]}
    assert found["ort-fp32", 4]["speedups"]["eager"]["prompt"]["median"] > 0
    for length in (8, 12):
        assert found["ort-fp32", length]["status"] == "failed"
        assert found["ort-fp32", length]["reason"] == "interrupted before it was measured"
    records.write(record, tmp_path / "record.json")
    assert records.load(tmp_path / "record.json")["interrupted"]


def test_an_export_of_other_weights_has_no_speedup(model, tmp_path, tiny_llama):
    copied = Path(shutil.copytree(model, tmp_path / "model"))
    other = tmp_path / "other"
    tiny_llama(seed=1).save_pretrained(other)
    said: list[str] = []
    made = exports.make(copied, ["ort-fp32"], None, said.append)["ort-fp32"]
    wrong = exports.make(other, ["ort-fp32"], None, said.append)["ort-fp32"]
    shutil.rmtree(made)
    shutil.move(wrong, made)
    result = by_engine(measure(copied, ["ort-fp32"]))["ort-fp32"]
    assert result["status"] == "mismatch"
    assert "logits after the prompt differ by" in result["reason"]
    assert result["speedups"] == {}


def test_exports_are_kept_until_the_model_changes(model, tmp_path):
    copied = Path(shutil.copytree(model, tmp_path / "model"))
    said: list[str] = []
    first = exports.make(copied, ["ort-fp32", "eager"], None, said.append)
    assert first["eager"] == copied
    assert any("exporting" in line for line in said)
    said.clear()
    assert exports.make(copied, ["ort-fp32"], None, said.append)["ort-fp32"] == first["ort-fp32"]
    assert ["is there already" in line for line in said] == [True]
    source = copied.with_name("model-exports") / "source.json"
    source.write_text(json.dumps(json.loads(source.read_text()) | {"generation": 1}))
    said.clear()
    exports.make(copied, ["ort-fp32"], None, said.append)
    assert any("or this program has" in line for line in said)
    weights = copied / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    said.clear()
    exports.make(copied, ["ort-fp32"], None, said.append)
    assert any("has changed" in line for line in said)
    assert any("exporting" in line for line in said)


def test_a_folder_of_another_purpose_is_left_alone(model, tmp_path):
    copied = Path(shutil.copytree(model, tmp_path / "model"))
    (tmp_path / "model-exports").mkdir()
    (tmp_path / "model-exports" / "mine").write_text("mine")
    with pytest.raises(ExportError, match="something else"):
        exports.make(copied, ["ort-fp32"], None, print)
    assert (tmp_path / "model-exports" / "mine").read_text() == "mine"


def test_all_problems_are_told_before_anything_is_made(model, tmp_path, monkeypatch):
    copied = Path(shutil.copytree(model, tmp_path / "model"))
    monkeypatch.setattr(generation_run, "Worker", None)
    with pytest.raises(ConfigError) as caught:
        run_benchmark(
            copied, ["ort-fp8", "llamacpp-f32"], [0], [12, 127], new_tokens=2, rounds=0, threads=0
        )
    text = str(caught.value)
    for part in ("batch size 0", "rounds 0", "threads 0", "'ort-fp8'", "pip install"):
        assert part in text
    assert "127 tokens and 2 new ones exceed the 128 positions" in text
    assert "prompt of 12 tokens" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(ConfigError, match=r"has no llama\.cpp"):
        run_benchmark(copied, ["llamacpp-f32"], [1], [12], llamacpp_python=sys.executable)
    with pytest.raises(ConfigError, match=r"/bin/false has no llama.cpp .exit code 1"):
        run_benchmark(copied, ["llamacpp-f32"], [1], [12], llamacpp_python="/bin/false")
    with pytest.raises(ConfigError, match="can't be run"):
        run_benchmark(copied, ["llamacpp-f32"], [1], [12], llamacpp_python="no/such/python")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is damaged"),
        ("{}", "has no model_type and no vocab_size"),
        ('{"model_type": "gpt2", "vocab_size": 9, "n_positions": 16}', "exceed the 16 positions"),
    ],
)
def test_a_config_that_cannot_be(config, message, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=message):
        run_benchmark(tmp_path, ["eager"], [1], [12], new_tokens=5)


@pytest.mark.parametrize(
    ("model_type", "message"), [("t5", "no causal language model"), ("bert", "reads both ways")]
)
def test_what_generates_nothing_is_refused_before_anything_is_made(model_type, message, tmp_path):
    config = AutoConfig.for_model(model_type, vocab_size=100)
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(ExportError, match=message):
        run_benchmark(tmp_path / "model", ["eager"], [1], [12], new_tokens=5)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_compile_agrees(tiny_llama, tmp_path):
    """Twice, as rounds do: the second prompt begins with an emptied cache."""
    can_run, reason = available("compile")
    if not can_run:
        pytest.skip(reason)
    from ort_train.inference.benchmark.worker import make_session

    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    prompts = np.random.default_rng(0).integers(0, 100, (2, 5))
    np.save(tmp_path / "prompts.npy", prompts)
    outputs = {}
    for engine in ("eager", "compile"):
        file = tmp_path / f"{engine}.npz"
        session = make_session(
            engine, str(tmp_path / "model"), str(tmp_path / "prompts.npy"), 3, None, str(file)
        )
        session.start()
        outputs[engine] = dict(np.load(file))
        again = session._generate(None)
        assert np.array_equal(again[1], outputs[engine]["tokens"])
        assert min(again[2:]) > 0
    parity, problem = compare(outputs["compile"], outputs["eager"], ENGINES["compile"].tolerance)
    assert problem is None
    assert parity["equal_tokens"] == [3, 3]


def test_the_short_name_stands_for_all_of_llamacpp():
    assert expand(["eager", "llamacpp", "llamacpp-f16"]) == [
        "eager",
        "llamacpp-f32",
        "llamacpp-f16",
        "llamacpp-q4_0",
    ]


def test_command_line(model, tmp_path, capsys):
    words = ["bench-inference", str(model), "--engines", "eager,onnx", "--batch-sizes", "x"]
    assert main([*words, "--plot", "chart.jpg"]) == 2
    err = capsys.readouterr().err
    for part in ("'onnx' is unknown", "'x' must be whole numbers", "chart.jpg"):
        assert part in err
    assert main(["bench-inference", str(tmp_path)]) == 2
    assert "is no model" in capsys.readouterr().err


class TestCompare:
    """Two rows, four tokens, a vocabulary of eight."""

    def outputs(self) -> dict[str, np.ndarray]:
        logits = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
        candidates = np.tile(np.array([5, 2, 7]), (2, 4, 1))
        values = np.tile(np.array([3.0, 2.999, 1.0], np.float32), (2, 4, 1))
        tokens = np.full((2, 4), 5)
        return {"logits": logits, "tokens": tokens, "candidates": candidates, "values": values}

    def test_equal(self):
        parity, problem = compare(self.outputs(), self.outputs(), 1e-4)
        assert problem is None
        assert parity == {"logits_rel": 0.0, "tolerance": 1e-4, "equal_tokens": [4, 4]}

    def test_other_logits(self):
        ours = self.outputs()
        ours["logits"] = ours["logits"] * 1.01
        _, problem = compare(ours, self.outputs(), 1e-4)
        assert "logits after the prompt differ by 0.01" in problem

    def test_nan_never_passes(self):
        ours = self.outputs()
        ours["logits"] = ours["logits"] * np.nan
        parity, problem = compare(ours, self.outputs(), 0.7)
        assert parity["logits_rel"] is None
        assert "differ by nan" in problem

    def test_a_tie_may_fall_either_way(self):
        ours = self.outputs()
        ours["tokens"] = ours["tokens"].copy()
        ours["tokens"][1, 2:] = 2  # 0.001 below eager's choice
        parity, problem = compare(ours, self.outputs(), 1e-3)
        assert problem is None
        assert parity["equal_tokens"] == [4, 2]

    @pytest.mark.parametrize("token", [7, 0])
    def test_another_token_may_not(self, token):
        ours = self.outputs()
        ours["tokens"] = ours["tokens"].copy()
        ours["tokens"][0, 1] = token  # 2 below, or not among the highest at all
        _, problem = compare(ours, self.outputs(), 1e-3)
        assert f"token 2 generated in row 1 is {token}" in problem


class TestGguf:
    def test_tensors_are_read_as_safetensors_reads_them(self, tmp_path):
        import torch
        from safetensors.torch import save_file

        tensors = {
            "a": torch.randn(3, 4),
            "b": torch.randn(5).to(torch.bfloat16),
            "c": torch.randn(2, 2).half(),
        }
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        read = dict(gguf_convert._tensors(tmp_path))
        assert set(read) == set(tensors)
        for name, tensor in tensors.items():
            assert np.array_equal(read[name].astype(np.float32), tensor.float().numpy())

    def test_rotary_halves_become_neighbours(self):
        rows = np.arange(8)[:, None]  # two heads of four rows
        assert gguf_convert._interleave(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"model_type": "phi"}, "it is a phi"),
            ({"rope_parameters": {"rope_type": "llama3"}}, "is scaled"),
            ({"attention_bias": True}, "have biases"),
            ({"sliding_window": 8}, "sliding window of 8"),
        ],
    )
    def test_what_cannot_be_converted(self, model, changes, reason):
        config = json.loads((model / "config.json").read_text())
        assert gguf_convert.obstacle(config) is None
        assert reason in gguf_convert.obstacle({**config, **changes})


@pytest.mark.skipif(
    PYTHON_VARIABLE not in os.environ, reason=f"{PYTHON_VARIABLE} names no llama.cpp environment"
)
def test_llamacpp_agrees(model):
    engines = expand(["llamacpp"])
    record = measure(model, engines, llamacpp_python=os.environ[PYTHON_VARIABLE])
    for engine in engines:
        result = by_engine(record)[engine]
        assert result["status"] == "ok", result["reason"]
    assert record["versions"]["llama-cpp-python"]

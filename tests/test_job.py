"""The main job end to end, and what it refuses before work starts."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ort_train import job, run_folder
from ort_train.auto import trial
from ort_train.config import RunConfig
from ort_train.errors import CheckpointError, ConfigError, DataError, NonFiniteLossError
from ort_train.recipes import load_recipe

pytestmark = pytest.mark.usefixtures("shared_graphs")


def tiny(out: Path, *overrides: str, recipe: str = "quickstart") -> RunConfig:
    quick = ["data.source=offline", "measure.baselines=[]", "train.max_steps=4"]
    return load_recipe(recipe, [*quick, f"output.dir={out}", *overrides], tiny=True)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- a whole run ---


def test_run_leaves_model_config_record_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    config = tiny(out, "train.logging_steps=1")
    result = job.run(config)
    assert names(out) == {"config.yaml", "model", "record.json", "training.png"}
    assert result.output_dir == out
    # Four steps leave a guess among some 512 tokens; one that sees its labels is far below.
    assert 256 < result.perplexity < 600

    assert load_recipe(out / "config.yaml") == config
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    model = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    inputs = tokenizer("It is a test", return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits).all()

    training = json.loads((out / "record.json").read_text())["training"]
    assert training["steps"] == 4
    assert training["backend"] == "ort"
    assert training["perplexity"] == pytest.approx(result.perplexity)
    assert training["it_per_s"] > 0
    assert [log["step"] for log in training["log"] if "loss" in log] == [1, 2, 3, 4]

    printed = capsys.readouterr().out
    assert "data: the Python documentation" in printed
    assert "parameters" in printed
    assert printed.count("it/s") >= 3  # of each step but the first, and of the whole
    assert "tokens/s" in printed
    assert f"saved in {out}" in printed


def test_record_says_what_auto_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trial, "CONCRETE_BACKENDS", ("eager",))
    monkeypatch.setattr(trial, "no_bf16", lambda device_type: "no such products here")
    job.run(tiny(tmp_path / "run", "train.backend=auto", "train.precision=auto"))
    training = json.loads((tmp_path / "run" / "record.json").read_text())["training"]
    decision = training["decision"]
    assert (decision["backend"], decision["precision"], decision["sparsity"]) == (
        "eager",
        "fp32",
        [],
    )
    assert decision["step_ms"].keys() == {"eager fp32"}
    assert decision["rejected"] == {"eager bf16": "no such products here"}
    assert decision["cost_s"] > 0


def test_second_run_says_that_its_graph_is_cached_and_trains_the_same_whatever_the_logging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("ORT_TRAIN_GRAPH_CACHE", str(tmp_path / "graphs"))
    weights = []
    for name, steps, is_cached in (("a", 1, False), ("b", 4, True)):
        out = tmp_path / name
        job.run(tiny(out, f"train.logging_steps={steps}"))
        training = json.loads((out / "record.json").read_text())["training"]
        assert training["graph_from_cache"] is is_cached
        (line,) = (
            line for line in capsys.readouterr().out.splitlines() if line.startswith("first step: ")
        )
        assert line.endswith("; its graph is from the cache") == is_cached
        weights.append(AutoModelForCausalLM.from_pretrained(out / "model").state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_resume_auto_continues_to_the_same_weights(tmp_path: Path):
    fields = ("train.save_steps=2", "train.lr_scheduler=constant", "train.warmup_steps=0")
    job.run(tiny(tmp_path / "whole", *fields))
    job.run(tiny(tmp_path / "parts", *fields, "train.max_steps=2"))
    job.run(tiny(tmp_path / "parts", *fields, "output.resume=auto"))
    whole, parts = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict()
        for name in ("whole", "parts")
    )
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


@pytest.mark.slow
def test_run_with_a_baseline_shows_the_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    result = job.run(
        tiny(out, "measure.baselines=[eager]", "measure.steps=2", "measure.rounds=1",
             "measure.warmup_steps=1", "train.logging_steps=1")
    )  # fmt: skip
    assert {"speed.png", "report.html", "record.json"} <= names(out)
    assert result.record is not None
    assert {each["backend"] for each in result.record["results"]} == {"eager", "ort"}
    assert "x eager" in capsys.readouterr().out


# --- before work starts ---


def test_all_problems_of_the_machine_at_once(tmp_path: Path):
    config = tiny(
        tmp_path / "run", "train.precision=fp16", "train.ort={num_thread: 1, recompute: no}"
    )
    with pytest.raises(ConfigError) as caught:
        job.run(config)
    message = str(caught.value)
    assert "did you mean num_threads" in message
    assert "recompute=False" in message or "recompute='no'" in message
    assert "fp16 training needs a GPU" in message
    assert not (tmp_path / "run").exists()


def test_options_of_a_backend_that_is_not_used(tmp_path: Path):
    with pytest.raises(ConfigError, match="would be ignored"):
        job.run(tiny(tmp_path / "run", "train.backend=eager", "train.ort={num_threads: 1}"))


def test_optimizers_and_trackers_that_are_not_installed_are_said_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    config = tiny(tmp_path / "run", "train.optimizer=lomo", "train.report_to=[wandb, tensorbord]")
    with pytest.raises(ConfigError) as caught:
        job.run(config)
    lomo, wandb, unknown = caught.value.problems
    assert "train.optimizer lomo: You need to install `lomo_optim`" in lomo
    assert "train.report_to wandb: WandbCallback requires wandb to be installed" in wandb
    assert "train.report_to tensorbord is unknown: did you mean tensorboard" in unknown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adafactor", "sgd", "adamw_ort_fused"])
@pytest.mark.parametrize("trackers", ["[none]", "[all]", "[]"])
def test_optimizers_and_trackers_that_are_here_pass(tmp_path: Path, optimizer: str, trackers: str):
    job.check(tiny(tmp_path, f"train.optimizer={optimizer}", f"train.report_to={trackers}"))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A folder that looks like a run's, made without training."""
    out = tmp_path / "run"
    run_folder.prepare(tiny(out))
    (out / "model").mkdir()
    (out / "model" / "model.safetensors").write_bytes(b"weights of two weeks")
    return out


def test_another_run_is_not_touched(finished: Path):
    with pytest.raises(CheckpointError, match=r"output.resume=auto.*output.overwrite=true"):
        job.run(tiny(finished))
    assert (finished / "model" / "model.safetensors").read_bytes() == b"weights of two weeks"


def test_overwrite_removes_the_run_and_nothing_else(finished: Path):
    (finished / "notes.txt").write_text("mine")
    (finished / "checkpoint-5").mkdir()
    assert run_folder.prepare(tiny(finished, "output.overwrite=true")) is None
    assert names(finished) == {"config.yaml", "notes.txt"}


def test_folder_of_somebody_else_is_not_overwritten(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("mine")
    for wish in ("output.overwrite=true", "output.resume=auto"):
        with pytest.raises(CheckpointError, match="is no run of ort_train"):
            run_folder.prepare(tiny(tmp_path, wish))
    assert names(tmp_path) == {"thesis.tex"}


def test_run_that_failed_before_it_wrote_anything_is_no_run(tmp_path: Path):
    out, empty = tmp_path / "run", tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError):
        job.run(tiny(out, "data.source=folder", f"data.folder={empty}"))
    assert run_folder.prepare(tiny(out)) is None  # the same command, mended


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("model.config.hidden_size=32", "model.config was"),
        ("data.block_size=16", "data.block_size was"),
        ("adapter.method=lora", "adapter.method was 'none', is 'lora'"),
    ],
)
def test_resume_auto_of_something_else(finished: Path, change: str, match: str):
    with pytest.raises(CheckpointError, match=match):
        run_folder.prepare(tiny(finished, "output.resume=auto", change))


@pytest.fixture
def resumable(finished: Path) -> Path:
    """The same with a checkpoint."""
    (finished / "checkpoint-2").mkdir()
    (finished / "checkpoint-2" / "trainer_state.json").write_text("{}")
    return finished


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("train.optimizer=sgd", "train.optimizer was 'adamw_torch_fused', is 'sgd'"),
        ("train.learning_rate=1e-5", "train.learning_rate was 0.001, is 1e-05"),
        ("train.weight_decay=0", "train.weight_decay was 0.1, is 0"),
    ],
)
@pytest.mark.parametrize("resume", ["auto", "checkpoint-2"])
def test_settings_that_a_checkpoints_optimizer_would_not_take(
    resumable: Path, change: str, match: str, resume: str
):
    before = (resumable / "config.yaml").read_text()
    named = resume if resume == "auto" else str(resumable / resume)
    with pytest.raises(CheckpointError, match=match):
        run_folder.prepare(tiny(resumable, f"output.resume={named}", change))
    assert (resumable / "config.yaml").read_text() == before


def test_other_batches_than_the_interrupted_runs_are_told_of(
    resumable: Path, capsys: pytest.CaptureFixture[str]
):
    run_folder.prepare(tiny(resumable, "output.resume=auto", "train.micro_batch_size=1"))
    assert "train.micro_batch_size was 2, is 1: the samples of the" in capsys.readouterr().out


def test_a_checkpoint_of_another_folder_does_not_replace_the_run_here(
    resumable: Path, tmp_path: Path
):
    other = tmp_path / "other"
    run_folder.prepare(tiny(other))
    (other / "model").mkdir()
    wish = f"output.resume={resumable}/checkpoint-2"
    with pytest.raises(CheckpointError, match="holds another run"):
        run_folder.prepare(tiny(other, wish))
    assert names(other) == {"config.yaml", "model"}
    chosen = run_folder.prepare(tiny(other, wish, "output.overwrite=true"))
    assert (chosen, names(other)) == (str(resumable / "checkpoint-2"), {"config.yaml"})


def test_a_checkpoint_that_can_not_be_resumed_is_said_before_baselines_are_measured(
    resumable: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(job, "_measure", lambda config: pytest.fail("measured"))
    with pytest.raises(CheckpointError, match="has no optimizer"):
        job.run(tiny(resumable, "output.resume=auto", "measure.baselines=[eager]"))


def test_resume_auto_takes_the_newest_whole_checkpoint(finished: Path):
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-12"):
        (finished / name).mkdir()
    for name in ("checkpoint-2", "checkpoint-10"):
        (finished / name / "trainer_state.json").write_text("{}")
    chosen = run_folder.prepare(tiny(finished, "output.resume=auto", "train.max_steps=3"))
    assert chosen == str(finished / "checkpoint-10")


def test_resume_auto_without_a_run_starts_anew(tmp_path: Path):
    assert run_folder.prepare(tiny(tmp_path / "new", "output.resume=auto")) is None


def test_resume_from_no_folder(tmp_path: Path):
    with pytest.raises(CheckpointError, match="is not a folder: name a checkpoint-N"):
        job.run(tiny(tmp_path / "run", f"output.resume={tmp_path}/checkpoint-3"))


def test_output_that_is_a_file_or_below_one(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file: name a folder"):
        job.run(tiny(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="can't be written to"):
        job.run(tiny(tmp_path / "file" / "run"))


_Usage = namedtuple("_Usage", "total used free")


def test_no_room_for_checkpoints_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(10, 10, 0))
    monkeypatch.setattr(job, "_make_trainer", lambda *args: pytest.fail("training began"))
    with pytest.raises(CheckpointError, match="GiB free"):
        job.run(tiny(tmp_path / "run", "train.save_steps=2"))


# --- a loss that is no number ---


def test_exploding_run_keeps_the_last_finite_weights(tmp_path: Path):
    out = tmp_path / "run"
    with pytest.raises(NonFiniteLossError) as caught:
        job.run(
            tiny(out, "train.learning_rate=1e18", "train.warmup_steps=0",
                 "train.lr_scheduler=constant")
        )  # fmt: skip
    message = str(caught.value)
    assert "at step 2" in message  # the first one's update is of 1e18
    assert "last_finite_weights" in message
    saved: Any = AutoModelForCausalLM.from_pretrained(out / "last_finite_weights")
    assert all(torch.isfinite(p).all() for p in saved.parameters())
    assert not (out / "model").exists()

"""What ORTTrainer measures reaches the trackers that transformers' report_to names."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from ort_train import ORTTrainer, ORTTrainingArguments

MakeModel = Callable[..., Any]
#: In the logs of every window but the first, which has no step to clock.
MEASURED = {"loss", "it_per_s", "tokens_per_s", "token_density", "label_density", "tflops_avoided"}


def _train(model: Any, folder: Path, tracker: str, **settings: Any) -> list[dict[str, float]]:
    """Three steps of half padded rows; returns transformers' own log of them."""
    ids = torch.arange(8)
    mask = (ids < 4).long()
    row = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    trainer = ORTTrainer(
        model,
        ORTTrainingArguments(
            str(folder),
            max_steps=3,
            per_device_train_batch_size=2,
            logging_steps=1,
            save_strategy="no",
            report_to=[tracker],
            disable_tqdm=True,
            use_cpu=True,
            label_sparsity=True,
            **settings,
        ),
        train_dataset=[row] * 8,
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[-1].keys() >= MEASURED
    assert log[-1]["token_density"] == log[-1]["label_density"] == 0.5
    return log


def _assert_tracked(found: dict[str, list[float]], log: list[dict[str, float]], prefix: str):
    for name in MEASURED:
        expected = [entry[name] for entry in log if name in entry]
        # TensorBoard keeps fp32.
        assert found[f"{prefix}{name}"] == pytest.approx(expected, rel=1e-6), name
        assert all(map(math.isfinite, expected))


def test_tensorboard(tiny_llama: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = tmp_path / "board"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(board))
    is_argument = any(each.name == "logging_dir" for each in fields(TrainingArguments))  # before 5
    settings: dict[str, Any] = {"logging_dir": str(board)} if is_argument else {}
    log = _train(tiny_llama(), tmp_path, "tensorboard", **settings)
    (file,) = board.glob("events.*")
    events = EventAccumulator(str(file)).Reload()
    found = {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    _assert_tracked(found, log, "train/")


@pytest.mark.skipif(not find_spec("mlflow"), reason="mlflow is not installed")
def test_mlflow(tiny_llama: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import mlflow

    uri = f"file://{tmp_path / 'mlruns'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # from 3.7 on it asks for a database
    mlflow.set_tracking_uri(uri)
    log = _train(tiny_llama(), tmp_path, "mlflow")
    mlflow.flush_async_logging()
    client = mlflow.MlflowClient(uri)
    (experiment,) = client.search_experiments()
    (run,) = client.search_runs([experiment.experiment_id])
    found = {
        name: [metric.value for metric in client.get_metric_history(run.info.run_id, name)]
        for name in MEASURED
    }
    _assert_tracked(found, log, "")


@pytest.mark.skipif(not find_spec("wandb"), reason="wandb is not installed")
def test_wandb(tiny_llama: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    logged: list[dict[str, Any]] = []
    monkeypatch.setattr("wandb.sdk.wandb_run.Run._partial_history_callback", _spy(logged))
    log = _train(tiny_llama(), tmp_path, "wandb")
    wandb.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    _assert_tracked(_columns(logged), log, "train/")


def _spy(logged: list[dict[str, Any]]) -> Callable[..., None]:
    from wandb.sdk.wandb_run import Run

    original = Run._partial_history_callback

    def record(run: Any, data: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        logged.append(dict(data))
        original(run, data, *args, **kwargs)

    return record


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    names = {name for row in rows for name in row}
    return {name: [row[name] for row in rows if name in row] for name in names}

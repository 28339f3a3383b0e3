"""Finished runs of tiny models, for tests of what comes after training."""

from __future__ import annotations

from pathlib import Path

from ort_train import job
from ort_train.recipes import load_recipe


def train_adapter(folder: Path, *overrides: str) -> Path:
    """A run of LoRA, or of what the overrides say; returns its folder."""
    settings = [
        "measure.baselines=[]",
        "data.source=offline",
        "train.max_steps=3",
        "train.learning_rate=0.05",  # for an adapter that changes something
        "train.ort={num_threads: 1}",
        f"output.dir={folder}",
        *overrides,
    ]
    job.run(load_recipe("quickstart_lora", settings, tiny=True))
    return folder

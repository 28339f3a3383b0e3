"""What distillation and pruning do to perplexity: `python benchmarks/smaller_models.py`.

Run where the quickstart was trained (runs/quickstart). The recipe quickstart_distill is trained
with its teacher and without one, for equally many steps; the quickstart's model is pruned to 2 of
each 4 weights and to half of them, and trained on with the zeros kept. Writes smaller_models.json
and smaller_models.svg beside this file. Speeds aren't recorded: `ort-train bench` measures them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

RECORD = Path(__file__).resolve().with_suffix(".json")
CHART = RECORD.with_suffix(".svg")
STEPS, TUNING_STEPS = 300, 60
NO_TEACHER = ["distill.teacher=null", "distill.temperature=null", "distill.alpha=null"]


def train(folder: Path, overrides: list[str]) -> float:
    from ort_train import job
    from ort_train.recipes import load_recipe

    settings = ["measure.baselines=[]", f"train.max_steps={STEPS}", f"output.dir={folder}"]
    return job.run(load_recipe("quickstart_distill", [*settings, *overrides])).perplexity


def prune(folder: Path, **how: Any) -> list[dict[str, Any]]:
    from ort_train.prune import prune_folder

    report = prune_folder("runs/quickstart/model", folder, steps=TUNING_STEPS, **how)
    names = ("stage", "zeros", "loss", "perplexity")
    return [{name: stage[name] for name in names} for stage in report["stages"]]


def chart(record: dict[str, Any], file: Path) -> None:
    """Perplexity of each model, a bar each."""
    from matplotlib.figure import Figure

    distilled = record["distillation"]
    bars = {
        f"student, {distilled['steps']} steps {name}": perplexity
        for name, perplexity in distilled["perplexity"].items()
    }
    for pattern in ("2:4", "50%"):
        for stage in record["pruning"][pattern]:
            is_dense = stage["stage"] == "dense"
            name = "quickstart's model" if is_dense else f"pruned {pattern}, {stage['stage']}"
            bars[name] = stage["perplexity"]
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh(list(bars), list(bars.values()), color="C0")
    axes.bar_label(drawn, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.set(xlabel="perplexity of the evaluation text, lower is better")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help="of all trainings: data.folder=...")
    overrides = parser.parse_args().overrides
    from ort_train.files import replacing
    from ort_train.recipes import load_recipe
    from ort_train.reports import provenance

    teacher = load_recipe("runs/quickstart/config.yaml").train.max_steps
    record: dict[str, Any] = {**provenance.envelope(provenance.now(), provenance.machine())}
    with tempfile.TemporaryDirectory(prefix="ort_train-smaller-") as name:
        folder = Path(name)
        record["distillation"] = {
            "steps": STEPS,
            "teacher_steps": teacher,
            "perplexity": {
                "with teacher": train(folder / "taught", overrides),
                "without teacher": train(folder / "alone", [*NO_TEACHER, *overrides]),
            },
        }
        record["pruning"] = {
            "tuning_steps": TUNING_STEPS,
            "2:4": prune(folder / "p24", pattern="2:4", overrides=overrides),
            "50%": prune(folder / "p50", sparsity=0.5, overrides=overrides),
        }
    with replacing(RECORD) as file:
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    chart(record, CHART)


if __name__ == "__main__":
    main()

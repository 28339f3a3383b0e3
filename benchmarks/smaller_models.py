"""What distillation and pruning do to perplexity: `python benchmarks/smaller_models.py`.

Run where the quickstart was trained (runs/quickstart). The recipe quickstart_distill is trained
with its teacher and without one, for equally many steps; the quickstart's model is pruned to 2 of
each 4 weights and to half of them, and trained on with the zeros kept. Writes smaller_models.json
beside this file. Speeds aren't recorded: `ort-train bench` measures them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

RECORD = Path(__file__).resolve().with_suffix(".json")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help="of all trainings: data.folder=...")
    overrides = parser.parse_args().overrides
    from ort_train import record as records
    from ort_train.recipes import load_recipe

    teacher = load_recipe("runs/quickstart/config.yaml").train.max_steps
    record: dict[str, Any] = {**records.envelope(records.now(), records.machine())}
    with tempfile.TemporaryDirectory(prefix="ort_train-smaller-") as name:
        folder = Path(name)
        record["distillation"] = {
            "steps": STEPS,
            "teacher_steps": teacher,
            "perplexity": {
                "with teacher": train(folder / "taught", overrides),
                "without": train(folder / "alone", [*NO_TEACHER, *overrides]),
            },
        }
        record["pruning"] = {
            "tuning_steps": TUNING_STEPS,
            "2:4": prune(folder / "p24", pattern="2:4", overrides=overrides),
            "50%": prune(folder / "p50", sparsity=0.5, overrides=overrides),
        }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

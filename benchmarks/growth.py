"""How the time of a training step grows with batch, sequence and layers, against a straight line.

    python benchmarks/growth.py [--steps 3] [--rounds 5] [--threads 1]

A Llama of hidden size 256: `ort-train bench` of the recipe bench_llama_256 (forward, backward,
fused AdamW, each backend in a process of its own, in turns, with its parity gate) over 1 to 8
samples, 64 to 512 tokens and 1 to 8 layers, the others at 2 samples, 128 tokens and 4 layers.
Writes growth.json and growth.svg beside this file, and exits with 1 where a backend's numbers
differ from eager's.

`vs_line` is the time over that of a line through zero and the first point: above 1, steps cost more
than in proportion. A step's constant part (embedding and head for layers, Python for all) keeps it
below 1, attention's square of the tokens lifts it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ort_train.bench.benchmark import run_benchmark
from ort_train.bench.run import Case
from ort_train.files import replacing
from ort_train.recipes import load_recipe
from ort_train.reports import provenance
from ort_train.reports.views import COLORS

FILE = Path(__file__).with_suffix(".json")
RECIPE = "bench_llama_256"
BACKENDS = ("eager", "ort")
SWEEPS: dict[str, tuple[int, ...]] = {
    "batch": (1, 2, 4, 8),
    "sequence": (64, 128, 256, 512),
    "layers": (1, 2, 4, 8),
}
LABELS = {"batch": "samples of 128 tokens", "sequence": "tokens, 2 samples", "layers": "layers"}


def measure(sweep: str, values: Sequence[int], tiny: bool, **protocol: Any) -> list[dict[str, Any]]:
    """The results of `ort-train bench` for one sweep, each with its `value`."""
    found = []
    if sweep == "layers":  # another model for each
        shapes: list[tuple[list[str], dict[str, int]]] = [
            ([f"model.config.num_hidden_layers={value}"], {}) for value in values
        ]
    else:
        name = {"batch": "micro_batch_size", "sequence": "block_size"}[sweep]
        shapes = [([], {name: value}) for value in values]
    for value, (overrides, shape) in zip(values, shapes, strict=True):
        config = load_recipe(RECIPE, overrides, tiny=tiny)
        cases = [Case(backend, **shape) for backend in BACKENDS]
        results = run_benchmark(config, cases, **protocol)["results"]
        found += [{"value": value, **result} for result in results]
    return found


def with_line(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A sweep's points, each compared with the line through zero and its backend's first."""
    points = []
    first: dict[str, tuple[int, float]] = {}
    for result in results:
        backend, value = result["backend"], result["value"]
        point = {
            "backend": backend,
            "value": value,
            "status": result["status"],
            "reason": result["reason"],
            "step_ms": result["step_ms"],
            "tokens_per_s": result["tokens_per_s"],
            "vs_line": None,
        }
        if result["status"] == "ok":
            median = result["step_ms"]["median"]
            first_value, first_ms = first.setdefault(backend, (value, median))
            point["vs_line"] = round(median / first_ms * first_value / value, 3)
        points.append(point)
    return points


def plot(sweeps: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """A panel for each sweep: the measured medians with their spread, and the line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(sweeps), 3.6), layout="constrained")
    panels = figure.subplots(1, len(sweeps), squeeze=False)[0]
    for axes, (sweep, points) in zip(panels, sweeps.items(), strict=True):
        for backend in BACKENDS:
            own = [p for p in points if p["backend"] == backend and p["status"] == "ok"]
            if not own:
                continue
            x = [point["value"] for point in own]
            y = [point["step_ms"]["median"] for point in own]
            below = [p["step_ms"]["median"] - p["step_ms"]["p20"] for p in own]
            above = [p["step_ms"]["p80"] - p["step_ms"]["median"] for p in own]
            color = COLORS[backend]
            axes.errorbar(x, y, [below, above], marker="o", capsize=2.5, color=color, label=backend)
            line = [y[0] * value / x[0] for value in x]
            axes.plot(x, line, "--", linewidth=1, color=color, alpha=0.7)
        axes.plot([], [], "--", linewidth=1, color="#404040", label="in proportion to the first")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(SWEEPS[sweep], [str(value) for value in SWEEPS[sweep]])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(LABELS[sweep])
        axes.grid(alpha=0.3)
    left = figure.axes[0]
    left.set_ylabel("training step, ms")
    left.legend(frameon=False, fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."), metadata={"Date": None})


def main() -> int:
    """Measure the sweeps; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=3, help="measured steps per round")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each backend")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", action="append", choices=SWEEPS, help="run this sweep alone")
    parser.add_argument("--tiny", action="store_true", help="shrink the model, for a trial")
    parser.add_argument(
        "--out", type=Path, default=FILE, help="the record; its chart stands beside"
    )
    args = parser.parse_args()
    started_at, machine = provenance.now(), provenance.machine(args.threads)
    sweeps: dict[str, list[dict[str, Any]]] = {}
    for sweep in args.only or SWEEPS:
        results = measure(
            sweep,
            SWEEPS[sweep],
            args.tiny,
            steps=args.steps,
            rounds=args.rounds,
            warmup_steps=2,
            threads=args.threads,
        )
        sweeps[sweep] = with_line(results)
        for point in sweeps[sweep]:
            ms = point["step_ms"] and point["step_ms"]["median"]
            print(
                f"{sweep} {point['value']}: {point['backend']} {ms} ms, {point['vs_line']} x line"
            )
    content = {
        **provenance.envelope(started_at, machine),
        "recipe": RECIPE,
        "protocol": {"steps": args.steps, "rounds": args.rounds, "warmup_steps": 2},
        "sweeps": sweeps,
    }
    with replacing(args.out) as file:
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    plot(sweeps, args.out.with_suffix(".svg"))
    return int(any(point["status"] != "ok" for points in sweeps.values() for point in points))


if __name__ == "__main__":
    sys.exit(main())

"""Packing, padding_sparsity and plain padding, in tokens that count per second.

    python benchmarks/packing.py [--recipe bench_llama_512_padded] [--steps 2] [--rounds 7]

Each way trains the recipe's model on the recipe's instructions, in a process of its own; all take
turns, and a ratio is the median over paired rounds. A token counts where it isn't padding: a packed
step holds more samples than a padded one, so iterations don't compare. Each way's first gradients
and all losses are compared with eager's on its own batches; one that differs has no speed. Writes
packing.json beside this file, or what --out names.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ort_train.bench.run import Case, Run
from ort_train.bench.turns import CaseRun, spread, take_turns
from ort_train.config import RunConfig, parse
from ort_train.data.samples import make_samples
from ort_train.files import replacing
from ort_train.recipes import load_recipe
from ort_train.reports import provenance

FILE = Path(__file__).with_suffix(".json")
_LABELS = {"label_sparsity": True}
#: How batches are made -> what is set in the recipe's `data`.
BATCHES: dict[str, dict[str, Any]] = {
    "block": {"padding": "block", "packing": False},
    "longest": {"padding": "longest", "packing": False},
    "packed": {"padding": None, "packing": True},
}
#: Way -> batches, backend, train.ort. Of each kind of batches, eager stands first.
WAYS: dict[str, tuple[str, str, dict[str, bool]]] = {
    "block, eager": ("block", "eager", {}),
    "block, ort": ("block", "ort", _LABELS),
    "block, ort, padding_sparsity": ("block", "ort", {**_LABELS, "padding_sparsity": True}),
    "longest, eager": ("longest", "eager", {}),
    "longest, ort": ("longest", "ort", _LABELS),
    "packed, eager": ("packed", "eager", {}),
    "packed, ort": ("packed", "ort", _LABELS),
}
#: Ways that the others are compared with.
BASELINES = ("block, eager", "block, ort")


@dataclass(frozen=True)
class Way(Case):
    """A case that is told from others of its backend by a name."""

    name: str = ""

    def __str__(self) -> str:
        return self.name


@dataclass
class WayRun(Run):
    """Judged by eager on the same batches."""

    eager: Run | None = None

    def compare(self, reference: CaseRun) -> str | None:
        return super().compare(self.eager or self)


def make_runs(config: RunConfig) -> list[WayRun]:
    """One of each of `WAYS`."""
    runs: list[WayRun] = []
    eager: dict[str, WayRun] = {}
    for name, (batches, backend, options) in WAYS.items():
        values = config.model_dump(mode="json")
        values["data"] |= BATCHES[batches]
        values["train"] |= {"backend": backend, "ort": options}
        way = parse(values)
        case = Way(backend, way.train.precision, *_shape(way), name=name)
        run = WayRun(case, way, eager=eager.get(batches))
        eager.setdefault(batches, run)
        runs.append(run)
    return runs


def _shape(config: RunConfig) -> tuple[int, int]:
    return config.train.micro_batch_size, config.data.block_size


def tokens_of_batches(config: RunConfig, num_batches: int) -> list[int]:
    """Tokens that aren't padding in each batch that a worker makes (`bench_worker.build`)."""
    size = config.train.micro_batch_size
    samples = make_samples(config.data, config.model, num_batches * size, False, config.train.seed)
    counts = [sum(mask) for mask in samples.train["attention_mask"]]
    starts = range(0, max(len(counts) - size + 1, 1), size)
    return [sum(counts[i % len(counts)] for i in range(start, start + size)) for start in starts]


def token_rates(run: Run, counts: list[int], warmup_steps: int) -> np.ndarray:
    """Tokens that count per second, round by round."""
    step, rates = warmup_steps, []
    for times in run.rounds:
        steps = range(step, step + len(times["step_s"]))
        rates.append(sum(counts[i % len(counts)] for i in steps) / sum(times["step_s"]))
        step = steps.stop
    return np.array(rates)


def measure(
    config: RunConfig, steps: int, rounds: int, warmup_steps: int, threads: int | None
) -> dict[str, Any]:
    """All ways in turns.

    Args:
        steps: measured steps of a round.
        warmup_steps: steps before the first round.
        threads: of torch and ONNX Runtime; None: their own choice.

    Returns:
        Way -> status, tokens_per_s, token_density and its ratio to each baseline.
    """
    runs = make_runs(config)
    num_batches = warmup_steps + steps * rounds
    with tqdm(total=len(runs) * (1 + rounds), unit="turn") as bar:
        take_turns(
            runs,
            rounds,
            prepare={"num_batches": num_batches, "warmup_steps": warmup_steps, "threads": threads},
            turn={"steps": steps},
            prepared_line=lambda run: f"first step {run.prepared['first_step_s']:.2f} s",
            turn_line=lambda run: f"{1 / np.median(run.rounds[-1]['step_s']):.3g} it/s",
            timeout_s=900.0,
            bar=bar,
            tell=lambda line: tqdm.write(line, file=sys.stderr),
        )
    results: dict[str, Any] = {}
    rates: dict[str, np.ndarray] = {}
    for run in runs:
        name = str(run.case)
        results[name] = {"status": run.status, "reason": run.reason, "parity": run.parity}
        if run.status != "ok":
            continue
        counts = tokens_of_batches(run.config, num_batches)
        rates[name] = token_rates(run, counts, warmup_steps)
        samples, tokens = _shape(run.config)
        results[name] |= {
            "data": run.prepared["data"],
            "it_per_s": spread(1 / np.array(run.series("step_s"))),
            "tokens_per_s": spread(rates[name]),
            "tokens_of_full_shape": round(float(np.mean(counts)) / (samples * tokens), 4),
        }
        for baseline in BASELINES:
            if baseline in rates:
                results[name][f"x {baseline}"] = spread(rates[name] / rates[baseline])
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="bench_llama_512_padded", help="of instructions")
    parser.add_argument("--tiny", action="store_true", help="shrink the model, for a trial")
    parser.add_argument("--steps", type=int, default=2, help="measured steps of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first round")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=FILE, help="the record (default: %(default)s)")
    args = parser.parse_args()
    config = load_recipe(args.recipe, [], tiny=args.tiny)
    started_at, machine = provenance.now(), provenance.machine(args.threads)
    results = measure(config, args.steps, args.rounds, args.warmup, args.threads)
    text = {"recipe": config.name, **provenance.envelope(started_at, machine), "results": results}
    with replacing(args.out) as file:
        file.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    for name, result in results.items():
        rate = result.get("tokens_per_s", {}).get("median")
        ratios = [f"{v['median']:.2f} {k}" for k, v in result.items() if k.startswith("x ")]
        print(f"{name}: {result['status']}", rate and f"{rate:,.0f} tokens/s", *ratios, sep=", ")
    return int(any(result["status"] != "ok" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())

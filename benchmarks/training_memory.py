"""Resident memory of training on the CPU, ONNX Runtime against eager PyTorch.

    python benchmarks/training_memory.py [--steps 6] [--only lora] [--threads 1] [--repeats 5]

Each case is a recipe; each backend trains it in processes of its own, in turns, on the same
batches, with fused AdamW. How glibc's heap is broken up, and with it the peak, differs from process
to process by up to a tenth: the medians are compared, and all repeats are in the record. Writes
training_memory.json beside this file, and exits with 1 where ONNX Runtime needs more than the case
allows. A case of an earlier run stays until it is run again.

`libraries` is what is resident before there is a model; `loaded` when it stands; `peak` the highest
from then to the end of the last step, with the export of the graph, which no cache spares;
`steady_peak` that of the steps after the first; `growth` is the peak without the libraries. Freed
memory is given back to the kernel before the first step, and from then on as the allocators do.
eager's process doesn't load ONNX Runtime.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ort_train.files import replacing
from ort_train.reports import provenance

FILE = Path(__file__).with_suffix(".json")
BACKENDS = ("eager", "ort")
NUM_BATCHES = 4


@dataclass(frozen=True)
class Case:
    """What is trained, and what ONNX Runtime may need for it.

    Attributes:
        measure: "peak" of the whole process, or its "growth".
        limit: times eager's.
    """

    recipe: str
    measure: str
    limit: float
    overrides: tuple[str, ...] = ()


CASES = {
    "full": Case("bench_llama_1024", "peak", 1.1),
    "lora": Case("bench_llama_1024_lora", "peak", 1.0),
    "qlora": Case("bench_llama_1024_qlora", "growth", 1.05),
    "qlora_double_quant": Case(
        "bench_llama_1024_qlora", "growth", 1.05, ("adapter.double_quant=true",)
    ),
    "qlora_fp4": Case("bench_llama_1024_qlora", "growth", 1.05, ("adapter.quant_type=fp4",)),
    "qlora_fp4_double_quant": Case(
        "bench_llama_1024_qlora",
        "growth",
        1.05,
        ("adapter.quant_type=fp4", "adapter.double_quant=true"),
    ),
}


def status_mib(field: str) -> float:
    """A field of /proc/self/status in MiB: VmRSS, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def reset_peak() -> None:
    """VmHWM starts anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def give_back() -> None:
    """What was freed, to the kernel: glibc keeps some of it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measure(name: str, backend: str, steps: int, threads: int) -> dict[str, Any]:
    """A case's memory in MiB and its losses, in this process."""
    import torch

    from ort_train import wrap
    from ort_train.bench.worker import build
    from ort_train.ortmodule import OrtOptions, upstream
    from ort_train.quantization import hush_kernel_notice
    from ort_train.recipes import load_recipe

    hush_kernel_notice()
    torch.set_num_threads(threads)
    case = CASES[name]
    config = load_recipe(case.recipe, list(case.overrides))
    if config.adapter.method == "qlora":
        import bitsandbytes  # noqa: F401
    if config.adapter.method != "none":
        import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    if backend == "ort":
        upstream.load()
    give_back()
    libraries = status_mib("VmRSS")
    model, batches, *_ = build(config, NUM_BATCHES)
    model.train()
    give_back()
    reset_peak()
    loaded = status_mib("VmRSS")
    wrap(model, backend, options=OrtOptions(num_threads=threads))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.train.learning_rate, fused=True)
    losses, peaks = [], []
    for step in range(steps):
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        del loss
        if step == 0:
            peaks.append(status_mib("VmHWM"))
            reset_peak()
    peaks.append(status_mib("VmHWM"))
    sizes = {
        "libraries": libraries,
        "loaded": loaded,
        "peak": max(peaks),
        "steady_peak": peaks[-1],
        "growth": max(peaks) - libraries,
    }
    mib = {f"{key}_mib": round(value, 1) for key, value in sizes.items()}
    return {"backend": backend, **mib, "loss": losses}


def measure_in_processes(name: str, steps: int, threads: int, repeats: int) -> dict[str, Any]:
    """A case's entry of the record."""
    case = CASES[name]
    results: list[dict[str, Any]] = []
    for backend in BACKENDS * repeats:
        command = [sys.executable, __file__, "--measure", name, backend]
        command += ["--steps", str(steps), "--threads", str(threads)]
        with tempfile.TemporaryDirectory() as graphs:
            environment = {**os.environ, "ORT_TRAIN_GRAPH_CACHE": graphs}
            output = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=environment
            ).stdout
        results.append(json.loads(output.splitlines()[-1]))
        shown = {key: value for key, value in results[-1].items() if key != "loss"}
        print(name, shown, flush=True)

    def median_mib(backend: str, key: str) -> float:
        return statistics.median(r[f"{key}_mib"] for r in results if r["backend"] == backend)

    ratios = {
        f"{key}_vs_eager": round(median_mib("ort", key) / median_mib("eager", key), 3)
        for key in ("peak", "steady_peak", "growth")
    }
    print(name, ratios, flush=True)
    return {
        "case": name,
        "recipe": case.recipe,
        "overrides": case.overrides,
        "limit": {f"{case.measure}_vs_eager": case.limit},
        "results": results,
        **ratios,
    }


def main() -> int:
    """Measure the cases; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=6, help="training steps, at least 2")
    parser.add_argument("--only", action="append", choices=CASES, help="run this case alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each backend")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure, args.steps, args.threads)))
        return 0
    rows: dict[str, dict[str, Any]] = {}
    if FILE.is_file():
        rows = {row["case"]: row for row in json.loads(FILE.read_text())["cases"]}
    for name in args.only or CASES:
        sha, is_dirty = provenance.git_state()
        row = measure_in_processes(name, args.steps, args.threads, args.repeats)
        rows[name] = {**row, "git_sha": sha, "git_dirty": is_dirty}
        content = {
            "command": provenance.command(),
            "machine": provenance.machine(args.threads),
            "versions": provenance.versions(),
            "cases": [rows[key] for key in CASES if key in rows],
        }
        with replacing(FILE) as file:
            file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    over = [row["case"] for row in rows.values() for key, most in row["limit"].items()
            if row[key] > most]  # fmt: skip
    print(f"above their limit: {', '.join(over)}" if over else "all within their limits")
    return int(bool(over))


if __name__ == "__main__":
    sys.exit(main())

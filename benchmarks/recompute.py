"""What recomputing activations saves and costs: ONNX Runtime's levels and torch's checkpoints.

    python benchmarks/recompute.py [--steps 8] [--threads 1]

A Llama of hidden size 512 with 8 layers trains on 4 x 512 tokens, each variant in a process of its
own, which take turns by steps. Writes recompute.json beside this file, and exits with 1 where a
variant's loss or gradients differ from eager's.

`peak` is the highest resident memory of a process in steps after the first, less that of the loaded
model before the first step: activations, gradients, and the graph.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ort_train.files import replacing
from ort_train.reports import provenance

FILE = Path(__file__).with_suffix(".json")
SHAPE = (4, 512)  # samples, tokens
MODEL = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "vocab_size": 1000,
}
#: Backend, its `recompute`, and whether gradient_checkpointing_enable() is called.
VARIANTS: dict[str, tuple[str, str, bool]] = {
    "eager": ("eager", "none", False),
    "eager_checkpoints": ("eager", "none", True),
    "ort": ("ort", "none", False),
    "ort_layerwise": ("ort", "layerwise", False),
    "ort_layerwise_compromised": ("ort", "layerwise_compromised", False),
    "ort_checkpointing_enabled": ("ort", "none", True),
}
# fp32 sums in another order: a gradient's norm moves by some 1e-6 of itself; one that is wrong
# moves by 1e-2 and more.
GRADIENT_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-4


def status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def reset_peak() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def work(name: str, threads: int, gradients: str) -> None:
    """One variant: the first step, then a step for every line on stdin; a JSON line for each."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ort_train import wrap
    from ort_train.ortmodule import OrtOptions, upstream

    torch.set_num_threads(threads)
    backend, recompute, checkpoints = VARIANTS[name]
    if backend == "ort":
        upstream.load()
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **MODEL)).train()
    model.config.use_cache = False
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, MODEL["vocab_size"], SHAPE)
    reset_peak()
    loaded = status_mib("VmRSS")
    wrap(model, backend, options=OrtOptions(num_threads=threads, recompute=recompute))

    def step() -> tuple[float, float]:
        model.zero_grad()
        began = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return (time.perf_counter() - began) * 1e3, loss.item()

    first_ms, loss = step()
    torch.save({n: p.grad for n, p in model.named_parameters()}, gradients)
    reset_peak()
    print(json.dumps({"first_step_s": round(first_ms / 1e3, 2), "loss": loss}), flush=True)
    for _ in sys.stdin:
        step_ms, _ = step()
        peak = status_mib("VmHWM") - loaded
        print(json.dumps({"step_ms": step_ms, "peak_mib": round(peak, 1)}), flush=True)


def relative_distance(path: Path, reference: Path) -> float:
    """The largest of all gradients' |difference| / |reference|."""
    import torch

    ours, theirs = torch.load(path), torch.load(reference)
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in ours)


def measure(steps: int, threads: int, folder: Path) -> list[dict[str, Any]]:
    """All variants' entries of the record."""
    workers, entries, times = {}, [], {}
    try:
        for name in VARIANTS:
            command = [sys.executable, __file__, "--threads", str(threads)]
            workers[name] = subprocess.Popen(
                [*command, "--work", name, str(folder / f"{name}.pt")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            first = _reply(workers[name])
            distance = relative_distance(folder / f"{name}.pt", folder / "eager.pt")
            entries.append({"variant": name, **first, "gradient_max_relative": distance})
            times[name] = []
            print(entries[-1], flush=True)
        for _ in range(steps):
            for entry in entries:
                worker = workers[entry["variant"]]
                assert worker.stdin is not None
                worker.stdin.write("\n")
                worker.stdin.flush()
                reply = _reply(worker)
                times[entry["variant"]].append(reply["step_ms"])
                entry["peak_mib"] = reply["peak_mib"]
    finally:
        for worker in workers.values():
            worker.kill()
    for entry in entries:
        p20, median, p80 = np.percentile(times[entry["variant"]], [20, 50, 80])
        entry["step_ms"] = {
            "median": round(float(median), 1),
            "p20": round(float(p20), 1),
            "p80": round(float(p80), 1),
        }
        ratios = np.array(times[entry["variant"]]) / np.array(times["ort"])
        entry["step_vs_ort"] = round(float(np.median(ratios)), 3)
        print(entry, flush=True)
    return entries


def _reply(worker: subprocess.Popen[str]) -> dict[str, Any]:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"a variant ended with code {worker.wait()}")
    return json.loads(line)


def main() -> int:
    """Measure all variants; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each variant")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work[0], args.threads, args.work[1])
        return 0
    sha, is_dirty = provenance.git_state()
    with tempfile.TemporaryDirectory() as folder:
        entries = measure(args.steps, args.threads, Path(folder))
    content = {
        "command": provenance.command(),
        "machine": provenance.machine(args.threads),
        "versions": provenance.versions(),
        "git_sha": sha,
        "git_dirty": is_dirty,
        "model": MODEL,
        "shape": SHAPE,
        "results": entries,
    }
    with replacing(FILE) as file:
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    losses = [entry["loss"] for entry in entries]
    return int(
        max(losses) - min(losses) > LOSS_TOLERANCE
        or max(entry["gradient_max_relative"] for entry in entries) > GRADIENT_TOLERANCE
    )


if __name__ == "__main__":
    sys.exit(main())

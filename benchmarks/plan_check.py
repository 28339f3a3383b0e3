"""Checks `ort-train plan` against measured memory: `python benchmarks/plan_check.py`.

Each case trains in a process of its own on the CPU, with random tokens; what is measured is the
highest resident memory of the steps after the first, less that before the model was made. Writes
plan_check.json beside this file, and ends with 1 where an estimate is off by more than 15%.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_suffix(".json")
TOLERANCE = 0.15
RECIPES: dict[str, list[str]] = {
    "quickstart": ["train.micro_batch_size=32"],
    "bench_llama_1024": [],
    "bench_llama_1024_lora": ["train.micro_batch_size=4"],
}
NUM_STEPS = 3


def predicted_bytes(recipe: str, backend: str, recompute: bool) -> float:
    from ort_train import plan
    from ort_train.recipes import load_recipe

    config = load_recipe(recipe, [*RECIPES[recipe], f"train.backend={backend}"])
    estimates = plan.estimate(config, 1, 1, gpu_mem_gib=None)
    (found,) = (e for e in estimates if (e.strategy, e.recompute) == ("ddp", recompute))
    return found.total_bytes


def measure(recipe: str, backend: str, recompute: bool) -> float:
    """Bytes by which resident memory grows, in this process."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ort_train import wrap
    from ort_train.adapters import apply_adapter
    from ort_train.ortmodule import OrtOptions
    from ort_train.plan import model_fields
    from ort_train.recipes import load_recipe

    torch.set_num_threads(1)
    config = load_recipe(recipe, RECIPES[recipe])
    architecture, fields = model_fields(config)
    _warm_up(torch)
    before = _memory("VmRSS")
    made = AutoConfig.for_model(architecture, **{**fields, "use_cache": False})
    model = AutoModelForCausalLM.from_config(made, attn_implementation=config.model.attention)
    model = apply_adapter(model, config.adapter).train()
    options = OrtOptions()
    if recompute and backend == "ort":
        options = OrtOptions(recompute="layerwise")
    elif recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    wrap(model, backend, "fp32", options)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), fused=True)
    shape = (config.train.micro_batch_size, config.data.block_size)
    ids_BT = torch.randint(0, made.vocab_size, shape)
    for step in range(NUM_STEPS):
        model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), labels=ids_BT)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:  # what export and compilation needed is gone
            Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmHWM") - before


def _warm_up(torch: Any) -> None:
    """What torch allocates once: thread pools, kernels' scratch space."""
    layer = torch.nn.Linear(64, 64)
    layer(torch.ones(8, 64)).sum().backward()
    torch.optim.AdamW(layer.parameters(), fused=True).step()


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _measured_in_a_process(recipe: str, backend: str, recompute: bool) -> float:
    command = [sys.executable, __file__, "--measure", recipe, backend, str(int(recompute))]
    # The allocator gives freed memory back, so that resident memory is what is in use.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "1048576",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        recipe, backend, recompute = arguments.measure
        print(measure(recipe, backend, bool(int(recompute))))
        return 0
    import torch
    import transformers

    rows = []
    for recipe, overrides in RECIPES.items():
        for recompute in (False, True):
            for backend in ("eager", "ort"):
                predicted = predicted_bytes(recipe, backend, recompute)
                measured = _measured_in_a_process(recipe, backend, recompute)
                row = {
                    "recipe": recipe,
                    "overrides": overrides,
                    "backend": backend,
                    "recompute": recompute,
                    "predicted_mib": round(predicted / 2**20, 1),
                    "measured_mib": round(measured / 2**20, 1),
                    "predicted_over_measured": round(predicted / measured, 3),
                }
                rows.append(row)
                print(row)
    record = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "tolerance": TOLERANCE,
        "results": rows,
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    off = [row for row in rows if abs(row["predicted_over_measured"] - 1) > TOLERANCE]
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())

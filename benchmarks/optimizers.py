"""Which of torch's AdamW is the fastest on a CPU, that `optim="adamw_ort_fused"` takes it there.

    python benchmarks/optimizers.py [--rounds 15] [--steps 3] [--threads 1]

An optimizer step alone, on copies of one set of parameters with random gradients: all weights of a
Llama of hidden size 256 with 4 layers, of hidden size 1024 with 2, and the many small matrices of
LoRA beside the linear layers of one with 16. One tensor after the other, `foreach` and `fused` take
turns. Writes optimizers.json beside this file, and exits with 1 where their weights differ or fused
isn't the fastest.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ort_train.bench.turns import spread
from ort_train.files import replacing
from ort_train.reports import provenance

if TYPE_CHECKING:
    import torch

FILE = Path(__file__).with_suffix(".json")
#: What adamw_ort_fused is on a CPU.
OURS = "fused"
WAYS: dict[str, dict[str, bool]] = {
    "single_tensor": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
CASES = {
    "llama_256": {"hidden_size": 256, "num_layers": 4, "vocab_size": 1000},
    "llama_1024": {"hidden_size": 1024, "num_layers": 2, "vocab_size": 32000},
    "lora_1024": {"hidden_size": 1024, "num_layers": 16, "vocab_size": 1000, "rank": 8},
}
# AdamW's update is at most some learning rates a step; fp32 in another order differs by 1e-6 of it.
LEARNING_RATE, TOLERANCE = 1e-3, 1e-7


def shapes(
    hidden_size: int, num_layers: int, vocab_size: int, rank: int | None = None
) -> list[tuple[int, ...]]:
    """Of the parameters that a Llama trains; with a rank, of LoRA's pairs beside its layers."""
    inner = int(2.75 * hidden_size)
    linear = [(hidden_size, hidden_size)] * 4 + [(inner, hidden_size)] * 2 + [(hidden_size, inner)]
    if rank is not None:
        return [shape for out, into in linear * num_layers for shape in ((rank, into), (out, rank))]
    layer = [*linear, (hidden_size,), (hidden_size,)]
    embedding = (vocab_size, hidden_size)
    return [embedding, *layer * num_layers, (hidden_size,), embedding]


def parameters(sizes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    """With gradients, the same each time."""
    import torch

    generator = torch.Generator().manual_seed(0)
    made = []
    for size in sizes:
        parameter = torch.nn.Parameter(torch.randn(size, generator=generator) * 0.02)
        parameter.grad = torch.randn(size, generator=generator) * 0.01
        made.append(parameter)
    return made


def measure(name: str, rounds: int, steps: int) -> dict[str, Any]:
    """A case's entry of the record."""
    import torch

    sizes = shapes(**CASES[name])
    weights = {way: parameters(sizes) for way in WAYS}
    optimizers = {
        way: torch.optim.AdamW(weights[way], lr=LEARNING_RATE, weight_decay=0.01, **arguments)
        for way, arguments in WAYS.items()
    }
    for optimizer in optimizers.values():
        optimizer.step()  # makes the moments
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    ways = list(WAYS)
    for number in range(rounds):
        first = number % len(ways)  # so that none always follows the same one
        for way in ways[first:] + ways[:first]:
            began = time.perf_counter()
            for _ in range(steps):
                optimizers[way].step()
            times[way].append((time.perf_counter() - began) / steps * 1e3)
    difference = max(
        float((ours - theirs).detach().abs().max())
        for way in WAYS
        for ours, theirs in zip(weights[way], weights["single_tensor"], strict=True)
    )
    return {
        "case": name,
        **CASES[name],
        "num_tensors": len(sizes),
        "num_parameters": sum(parameter.numel() for parameter in weights[OURS]),
        "weights_max_abs": difference,
        "step_ms": {way: spread(np.array(each)) for way, each in times.items()},
        "fused_times_faster_than": {
            way: spread(np.array(times[way]) / np.array(times[OURS])) for way in WAYS
        },
    }


def main() -> int:
    """Measure all cases; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each way")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps a turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", action="append", choices=CASES, help="measure this case alone")
    parser.add_argument("--out", type=Path, default=FILE, help="the record")
    args = parser.parse_args()
    started_at, machine = provenance.now(), provenance.machine(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    rows = []
    for name in args.only or CASES:
        rows.append(measure(name, args.rounds, args.steps))
        medians = {way: values["median"] for way, values in rows[-1]["step_ms"].items()}
        print(f"{name}: {medians} ms a step, weights within {rows[-1]['weights_max_abs']:.1e}")
    content = {**provenance.envelope(started_at, machine), "steps": args.steps, "cases": rows}
    with replacing(args.out) as file:
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    # What is as fast within the noise of a few percent would be as good.
    slower = [
        row["case"]
        for row in rows
        if any(values["median"] < 0.97 for values in row["fused_times_faster_than"].values())
    ]
    wrong = [row["case"] for row in rows if not row["weights_max_abs"] <= TOLERANCE]
    for what, names in (("fused isn't the fastest", slower), ("weights differ", wrong)):
        if names:
            print(f"{what}: {', '.join(names)}")
    return int(bool(slower or wrong))


if __name__ == "__main__":
    sys.exit(main())

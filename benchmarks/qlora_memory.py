"""Resident memory of QLoRA training, ONNX Runtime against eager bitsandbytes.

    python benchmarks/qlora_memory.py [--steps 10] [--double-quant] [--threads 1]

A Llama of 76 million 4-bit weights (hidden size 1024, 6 layers) trains on the CPU, each backend in
its own process. Writes qlora_memory.json beside this file, and exits with 1 where ORT's memory
grows by more than eager's and 5%.

Growth is counted from the moment in which all libraries are loaded, before there is a model:
`loaded` when the 4-bit model stands, `steady` after the last step, `peak` over all steps but the
first, in which the graph is built (`first_peak`; eager's first step builds nothing).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ort_train import record

FILE = Path(__file__).with_suffix(".json")
BACKENDS = ("eager", "ort")
SHAPE = (2, 128)  # samples, tokens
VOCAB_SIZE = 1000
TOLERANCE = 1.05
MODEL = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 128,
    "vocab_size": VOCAB_SIZE,
}


def status_mib(field: str) -> float:
    """A field of /proc/self/status in MiB: VmRSS, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def reset_peak() -> None:
    """VmHWM starts anew from what is in use now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps some of what was freed
    Path("/proc/self/clear_refs").write_text("5")


def measure(backend: str, steps: int, double_quant: bool, threads: int) -> dict[str, Any]:
    """One backend's memory in MiB and its losses, in this process."""
    import bitsandbytes  # noqa: F401
    import onnxruntime  # noqa: F401  # for eager, too: a library is no growth
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ort_train import wrap
    from ort_train.adapters import apply_adapter
    from ort_train.config import AdapterConfig
    from ort_train.ortmodule import OrtOptions, upstream
    from ort_train.quantization import Quantization, prepare, quantize

    torch.set_num_threads(threads)
    upstream.load()
    reset_peak()
    before = status_mib("VmRSS")
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **MODEL))
    quantization = Quantization(double_quant=double_quant)
    quantize(model, quantization)
    prepare(model, quantization)
    model = apply_adapter(
        model.train(), AdapterConfig(method="qlora", target_modules=["q_proj", "v_proj"])
    )
    model.config.use_cache = False
    reset_peak()
    loaded = status_mib("VmRSS")
    wrap(model, backend, options=OrtOptions(num_threads=threads))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(0, VOCAB_SIZE, SHAPE)
    losses, first_peak = [], 0.0
    for step in range(steps + 1):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        del loss
        if step == 0:
            first_peak = status_mib("VmHWM")
            reset_peak()
    return {
        "backend": backend,
        "loaded_mib": round(loaded - before, 1),
        "first_peak_mib": round(first_peak - before, 1),
        "peak_mib": round(status_mib("VmHWM") - before, 1),
        "steady_mib": round(status_mib("VmRSS") - before, 1),
        "loss": losses,
    }


def main() -> int:
    """Measure both backends in processes of their own; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--double-quant", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", choices=BACKENDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.backend:
        print(json.dumps(measure(args.backend, args.steps, args.double_quant, args.threads)))
        return 0
    results = []
    for backend in BACKENDS:
        command = [sys.executable, __file__, *sys.argv[1:], "--backend", backend]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results.append(json.loads(output.splitlines()[-1]))
        print({name: value for name, value in results[-1].items() if name != "loss"}, flush=True)
    eager, ort = results
    sha, is_dirty = record.git_state()
    content = {
        "command": record.command(),
        "machine": record.machine(args.threads),
        "versions": record.versions(),
        "git_sha": sha,
        "git_dirty": is_dirty,
        "shape": SHAPE,
        "double_quant": args.double_quant,
        "results": results,
        "peak_vs_eager": round(ort["peak_mib"] / eager["peak_mib"], 3),
        "steady_vs_eager": round(ort["steady_mib"] / eager["steady_mib"], 3),
    }
    with record.replacing(FILE) as file:
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print({name: content[name] for name in content if name.endswith("_vs_eager")})
    return int(max(content["peak_vs_eager"], content["steady_vs_eager"]) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())

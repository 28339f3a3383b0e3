"""Memory of `ort-train export`: a random Llama of 0.75 billion parameters, 3 GB in fp32.

    python benchmarks/export_memory.py [--graph fused] [--folder DIR]

The model is made in one process and exported in another, whose resident memory is sampled every
50 ms. Writes export_memory.json beside this file, and exits with 1 where the peak exceeds 2.2 times
the weights. Pages of mapped files count, although they can be dropped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from ort_train.files import replacing
from ort_train.reports import provenance

FILE = Path(__file__).with_suffix(".json")
LIMIT = 2.2
MODEL = {
    "vocab_size": 32000,
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 19,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 2048,
}


def make(folder: str) -> None:
    """Save the model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **MODEL)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def export(source: str, out: str, graph: str, result: Any) -> None:
    """Export it; sends resident memory in GiB before, at the peak, and the parity."""
    import onnxruntime  # noqa: F401  # a library is no growth
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from ort_train.inference import export_model

    process = psutil.Process()
    before = peak = process.memory_info().rss
    is_over = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not is_over.wait(0.05):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=sample)
    thread.start()
    started = time.perf_counter()
    exported = export_model(source, out, graph=graph)
    seconds = time.perf_counter() - started
    is_over.set()
    thread.join()
    assert exported.info.parity is not None
    result.send(
        {
            "before_gib": round(before / 2**30, 3),
            "peak_gib": round(peak / 2**30, 3),
            "export_s": round(seconds, 1),
            "model_onnx_mib": round(exported.model_file.stat().st_size / 2**20, 3),
            "parity": exported.info.parity.model_dump(),
        }
    )


def main() -> int:
    """Make, export, record; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--graph", choices=("fused", "traced"), default="fused")
    parser.add_argument("--folder", help="for 6 GB of files, removed at the end")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    context = multiprocessing.get_context("spawn")
    try:
        maker = context.Process(target=make, args=(str(folder / "model"),))
        maker.start()
        maker.join()
        weights = (folder / "model" / "model.safetensors").stat().st_size
        receiver, sender = context.Pipe(duplex=False)
        arguments = (str(folder / "model"), str(folder / "out"), args.graph, sender)
        exporter = context.Process(target=export, args=arguments)
        exporter.start()
        sender.close()
        result = receiver.recv()
        exporter.join()
    finally:
        shutil.rmtree(folder)
    sha, is_dirty = provenance.git_state()
    growth = result["peak_gib"] - result["before_gib"]
    content = {
        "command": provenance.command(),
        "machine": provenance.machine(),
        "versions": provenance.versions(),
        "git_sha": sha,
        "git_dirty": is_dirty,
        "model": {"architecture": "llama", **MODEL},
        "graph": args.graph,
        "weights_gib": round(weights / 2**30, 3),
        **result,
        "peak_vs_weights": round(growth * 2**30 / weights, 3),
    }
    with replacing(FILE) as file:
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print({name: content[name] for name in ("weights_gib", "peak_gib", "peak_vs_weights")})
    return int(content["peak_vs_weights"] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())

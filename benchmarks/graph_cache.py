"""What graphs on disk bring the first step of a fresh process.

    python benchmarks/graph_cache.py [--repeats 7] [--threads 1]

Llamas of 4 and of 24 layers: each first forward and backward of backend ort in a process of its
own, with the cache off, cold (an empty folder, which the graph is then written to) and warm (a
folder that an earlier process has written to), in turns. Writes graph_cache.json beside this file,
and exits with 1 where loss or gradients aren't the same bit for bit.

`first_step_s` is what `ort-train bench` calls so: importing ONNX Runtime and making the model come
before it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ort_train.bench.turns import spread
from ort_train.files import replacing
from ort_train.reports import provenance

FILE = Path(__file__).with_suffix(".json")
SHAPE = (2, 128)  # samples, tokens
MODELS: dict[str, dict[str, int]] = {
    f"llama_{num_layers}_layers": {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": SHAPE[1],
        "vocab_size": 1000,
    }
    for num_layers in (4, 24)
}
STATES = ("off", "cold", "warm")


def first_step(config: Mapping[str, int], threads: int) -> dict[str, Any]:
    """The first forward and backward of this process: its time, and what came out."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ort_train import OrtOptions, wrap
    from ort_train.backends import ort_forward
    from ort_train.forward import taken_over

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config)).train()
    model.config.use_cache = False
    ids_BT = torch.randint(0, config["vocab_size"], SHAPE)
    wrap(model, "ort", options=OrtOptions(num_threads=threads))
    began = time.perf_counter()
    loss = model(input_ids=ids_BT, labels=ids_BT).loss
    loss.backward()
    first_step_s = time.perf_counter() - began
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.grad.numpy().tobytes())
    stand_in = taken_over(model)
    assert stand_in is not None
    forward = ort_forward(stand_in)
    assert forward is not None
    return {
        "first_step_s": first_step_s,
        "graph_from_cache": forward.graph_from_cache,
        "loss": loss.item(),
        "gradients": digest.hexdigest(),
    }


def in_fresh_process(config: Mapping[str, int], threads: int, cache: str) -> dict[str, Any]:
    """`first_step` of a new process.

    Args:
        cache: the folder of its graphs, or "off".
    """
    command = [sys.executable, __file__, "--threads", str(threads), "--work", json.dumps(config)]
    environment = {**os.environ, "ORT_TRAIN_GRAPH_CACHE": cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a process ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, repeats: int, threads: int, folder: Path) -> dict[str, Any]:
    """A model's entry of the record.

    Args:
        folder: an empty one, for the graphs.
    """
    config = MODELS[name]
    warm = folder / "warm"
    # Not counted: it also has the libraries read from disk before any other.
    replies = [in_fresh_process(config, threads, str(warm))]
    times: dict[str, list[float]] = {state: [] for state in STATES}
    for turn in range(repeats):
        # From another one on in each turn, so that none always follows the same one.
        for state in (*STATES[turn % 3 :], *STATES[: turn % 3]):
            caches = {"off": "off", "cold": str(folder / f"cold-{turn}"), "warm": str(warm)}
            reply = in_fresh_process(config, threads, caches[state])
            if reply["graph_from_cache"] != (state == "warm"):
                raise RuntimeError(f"cache {state}: graph_from_cache {reply['graph_from_cache']}")
            replies.append(reply)
            times[state].append(reply["first_step_s"])
            print(f"{name}, cache {state}: {reply['first_step_s']:.2f} s", flush=True)
    off = np.array(times["off"])
    return {
        "model": name,
        "config": config,
        "entry_bytes": sum(file.stat().st_size for file in warm.rglob("*") if file.is_file()),
        "is_same": len({(reply["loss"], reply["gradients"]) for reply in replies}) == 1,
        "first_step_s": {state: spread(np.array(each)) for state, each in times.items()},
        # Over that of the process without a cache in the same turn.
        "vs_off": {state: spread(np.array(times[state]) / off) for state in ("cold", "warm")},
    }


def main() -> int:
    """Measure all models; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=7, help="processes of each state")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", action="append", choices=MODELS, help="measure this model alone")
    parser.add_argument("--out", type=Path, default=FILE, help="the record")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(first_step(json.loads(args.work), args.threads)))
        return 0
    started_at, machine = provenance.now(), provenance.machine(args.threads)
    results = []
    for name in args.only or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(name, args.repeats, args.threads, Path(folder)))
    content = {
        **provenance.envelope(started_at, machine),
        "shape": SHAPE,
        "protocol": {"repeats": args.repeats},
        "results": results,
    }
    with replacing(args.out) as file:
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for result in results:
        ratio = result["vs_off"]["warm"]["median"]
        print(f"{result['model']}: with a warm cache {ratio:.2f} of the time without one")
    return int(not all(result["is_same"] for result in results))


if __name__ == "__main__":
    sys.exit(main())

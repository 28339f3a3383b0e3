"""A stand-in for `ort_train.bench.worker`: speaks its protocol without a model.

What each backend does is told by the config's description, JSON of backend -> behaviour.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
from safetensors.numpy import save_file

STEP_MS = {"eager": 20.0, "compile": 16.0, "ort": 10.0}


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    config: dict = {}
    behaviour = None
    for line in sys.stdin:
        request = json.loads(line)
        name = request["request"]
        if name == "prepare":
            config = request["config"]
            behaviour = json.loads(config["description"] or "{}").get(config["train"]["backend"])
            if behaviour == "unavailable":
                reply = {"error": "no C++ compiler", "unavailable": True}
            elif behaviour == "die":
                # A child that outlives the worker must not hide its death.
                subprocess.Popen(["sleep", "30"], stdout=replies.fileno())
                print("Traceback: something about memory", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            elif behaviour == "hang":
                print("still compiling", file=sys.stderr, flush=True)
                time.sleep(60)
            else:
                reply = prepare(request, behaviour)
        elif name == "round":
            if behaviour == "die in a round":
                sys.exit(3)
            is_dense = config["train"]["ort"].get("label_sparsity") is False
            step_s = STEP_MS[config["train"]["backend"]] / 1e3 * (1.5 if is_dense else 1)
            steps = request["steps"]
            reply = {
                "step_s": [step_s] * steps,
                "forward_backward_s": [step_s * 0.75] * steps,
                "optimizer_s": [step_s * 0.25] * steps,
                "loss": [2.0 + (behaviour == "drift")] * steps,
            }
        else:
            reply = {"peak_gib": 0.5}
        print("a library's chatter on stdout")
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def prepare(request: dict, behaviour: str | None) -> dict:
    weight = np.ones((4, 4), np.float32)
    wrong = behaviour == "wrong gradient"
    save_file(
        {"weight": weight * (1 + wrong), "bias": np.zeros(4, np.float32)}, request["gradients"]
    )
    return {
        "first_step_s": 0.25,
        "first_loss": float("nan") if behaviour == "nan" else 3.0,
        "warmup_loss": [2.5] * request["warmup_steps"],
        "threads": request["threads"] or 2,
        "gpu": None,
        "batches": "other" if behaviour == "other data" else "same",
        "data": "made up",
        "model": {
            "architecture": "llama",
            "name": None,
            "num_parameters": 20,
            "num_trainable": 20,
            "adapter": "none",
        },
    }


main()

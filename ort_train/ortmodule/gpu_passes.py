"""Forward and backward passes of a graph on a GPU: the same device and stream as torch's.

ONNX Runtime launches its kernels on the device's default stream (gpu_memory.py) and torch, which
runs some of a graph's nodes, on its own current one, of its own current device. Only where the two
are the same does one wait for the other.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ort_train.errors import BackendUnavailableError, UnsupportedModelError

PROVIDER = "CUDAExecutionProvider"


def provider_options() -> dict[str, str]:
    """Options of ONNX Runtime's CUDA provider beside upstream's.

    Its own default rounds the factors of fp32 products to TF32 (10 bits); torch's doesn't.
    """
    return {"use_tf32": str(int(_allows_tf32()))}


def _allows_tf32() -> bool:
    matmul: Any = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and newer
        return matmul.fp32_precision == "tf32"
    return bool(matmul.allow_tf32)


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """What runs within, and what torch runs for it, belongs to this GPU and its default stream.

    Autocast is off, for a graph's types are its own: torch would compute a node in another one.

    Raises:
        UnsupportedModelError: where torch's current stream of the device is another.
    """
    stream, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    if stream != default:
        raise UnsupportedModelError(
            f"torch's current stream of {device} is {stream}, and backend 'ort' runs on the "
            "default stream, so that neither would wait for the other: call the model, and "
            "backward, outside of torch.cuda.stream(...)"
        )
    # ONNX Runtime makes its device the thread's current one, and leaves it at that (`OnRunStart`).
    with torch.cuda.device(device), torch.autocast("cuda", enabled=False):
        yield


def guard(agent: Any, device: torch.device) -> None:
    """Have a TrainingAgent run its passes :func:`on_device`.

    Raises:
        BackendUnavailableError: where its session isn't on a GPU: onnxruntime prints why, and goes
            on with its CPU provider alone (`onnxruntime_inference_collection.py`).
    """
    providers = agent._inference_session.get_providers()
    if PROVIDER not in providers:
        raise BackendUnavailableError(
            f"ONNX Runtime has {', '.join(providers)} for a module on {device}, and no {PROVIDER}: "
            "its own output above says why; `ort-train doctor` looks for the cause"
        )

    def guarded(run: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(run)
        def wrapper(*args: Any) -> None:
            with on_device(device):
                run(*args)

        return wrapper

    agent.run_forward = guarded(agent.run_forward)
    agent.run_backward = guarded(agent.run_backward)

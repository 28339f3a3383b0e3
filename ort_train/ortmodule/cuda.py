"""The CUDA 11 libraries that onnxruntime-training's wheel needs, loaded before it looks for them.

The 1.19.2 wheel is linked against CUDA 11.8 and cuDNN 8, which today's torch doesn't bring. The
nvidia-*-cu11 wheels (extra `gpu`) do, in folders where the dynamic linker doesn't look; a library
that is loaded already is found by its name alone. All their symbols carry versions
(`cublasCreate_v2@libcublas.so.11`), so they stand beside torch's CUDA 12 or 13. Without them ONNX
Runtime prints an error and trains on the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from ort_train.errors import BackendUnavailableError

DRIVER = "libcuda.so.1"
#: (folder under `nvidia/` in site-packages, library), each after those it needs.
LIBRARIES = (
    ("cuda_runtime", "libcudart.so.11.0"),
    ("cublas", "libcublasLt.so.11"),
    ("cublas", "libcublas.so.11"),
    ("cufft", "libcufft.so.10"),
    ("curand", "libcurand.so.10"),
    ("cuda_nvrtc", "libnvrtc.so.11.2"),
    ("cudnn", "libcudnn.so.8"),
)
REMEDY = "pip install 'ort_train[gpu]'"


def _can_load(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def driver_present() -> bool:
    """Whether NVIDIA's driver is installed. Without it the provider *ends the process*."""
    return _can_load(DRIVER)


def _candidates(folder: str, library: str) -> Iterator[str]:
    """Where a library may be: in the wheels of any site-packages, or where the linker looks."""
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(location) / folder / "lib" / library
        if path.is_file():
            yield str(path)
    yield library


def missing_libraries() -> list[str]:
    """Names of the libraries that can't be loaded; those that can are loaded by this."""
    # Local scope (the default) is enough: the linker matches a loaded library by its name. Global
    # scope would offer CUDA 11's symbols to all of the process.
    return [
        library
        for folder, library in LIBRARIES
        if not any(_can_load(candidate) for candidate in _candidates(folder, library))
    ]


def unavailable_reason() -> str | None:
    """Why ONNX Runtime can't use a GPU here (with the way out), or None."""
    if not driver_present():
        return f"no NVIDIA driver ({DRIVER}) is installed"
    missing = missing_libraries()
    if missing:
        return (
            f"onnxruntime-training needs the CUDA 11 libraries, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing: {REMEDY}"
        )
    return None


@functools.cache
def preload() -> None:
    """Load all libraries that ONNX Runtime's CUDA provider is linked against.

    Raises:
        BackendUnavailableError: without a driver or where a library is missing.
    """
    reason = unavailable_reason()
    if reason is not None:
        raise BackendUnavailableError(f"backend 'ort' can't run on CUDA here: {reason}")

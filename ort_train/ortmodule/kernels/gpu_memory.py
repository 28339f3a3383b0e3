"""torch's GPU allocator for ONNX Runtime's sessions, without a compiler.

Where an allocator is given, ONNX Runtime's CUDA provider takes all of its memory there, and runs
on the device's default stream (`cuda_execution_provider.cc`: `UseExternalAllocator`), which is
torch's, too. Without one, every pass would run on a stream of its own, and as a pass waits for
nothing (`inference_session.cc`, `PartialRun`), torch would read results that aren't there yet.

Upstream's extension (`torch_cpp_extensions/cuda/torch_gpu_allocator`) has to be compiled with
CUDA's headers. Where torch sees a GPU, ORTModule can't be constructed without it, nor on the CPU.
Two ctypes callbacks serve as well, as in aten.py: their addresses are all that is asked for.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import torch

from ort_train.ortmodule.kernels import aten

#: The device's default stream, as a cudaStream_t.
_DEFAULT_STREAM = 0


def _allocate(num_bytes: int) -> int | None:
    """The address of so many bytes on torch's current device, or null: the run then ends, and
    whoever started it raises what is kept here (torch's own OutOfMemoryError)."""
    allocate: Any = getattr(torch._C, "_cuda_cudaCachingAllocator_raw_alloc", None)
    try:
        return allocate(num_bytes, _DEFAULT_STREAM) or None
    except BaseException as error:
        aten.keep_error(error)
        return None


def _free(address: int | None) -> None:
    free: Any = getattr(torch._C, "_cuda_cudaCachingAllocator_raw_delete", None)
    if address is not None:
        free(address)


_Allocate = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)
_Free = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_EmptyCache = ctypes.CFUNCTYPE(None)
# Kept for the life of the process: ONNX Runtime holds their addresses.
_allocate_callback = _Allocate(_allocate)
_free_callback = _Free(_free)
_empty_cache_callback = _EmptyCache(torch.cuda.empty_cache)

#: Stands in for upstream's compiled module `torch_gpu_allocator`, with its three functions.
allocator = SimpleNamespace(
    gpu_caching_allocator_raw_alloc_address=lambda: aten.address_of(_allocate_callback),
    gpu_caching_allocator_raw_delete_address=lambda: aten.address_of(_free_callback),
    gpu_caching_allocator_empty_cache_address=lambda: aten.address_of(_empty_cache_callback),
)

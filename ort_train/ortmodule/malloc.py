"""Memory that torch frees stays with the process, so that the next step need not fetch it anew.

What ATen nodes return is freed within the step. glibc gives blocks above 32 MiB, and the top of
its heap, back to the kernel at once, and the next step pays for each page again: a quarter of the
time of a large weight's gradient. ONNX Runtime's own arena keeps its memory likewise.
"""

from __future__ import annotations

import ctypes
import functools

_M_TRIM_THRESHOLD = -1  # malloc.h
_M_MMAP_THRESHOLD = -3
_NEVER = 2**31 - 1


@functools.cache
def keep_freed() -> bool:
    """For the life of the process; returns whether its allocator is glibc's, which can be told."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all(library.mallopt(name, _NEVER) for name in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD))

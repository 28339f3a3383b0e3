"""Memory that a step frees stays for the next one.

What ATen nodes return is freed within the step or at the end of it, and the next step would pay for
each of its pages again: with the two gradients that a vocabulary of 32000 makes, a sixth of a
Llama's step in bf16 at hidden size 1024.

- Results of 8 MiB and more have blocks of their own, which are kept, in huge pages: kernels are
  faster there as well, a third for the loss over 256 tokens. A block is used again when its last
  tensor is gone, so a gradient that somebody holds is never written over. Where sizes differ from
  batch to batch, as they do without padding, a free block gives way to the larger one that serves
  both: what is kept is what the largest batch needs, not one block for each size.
- Results that follow one another, of several sizes, lie in one block: decoded 4-bit weights. In
  the heap each would leave a hole that what stays breaks up, by chance: up to a quarter of what a
  QLoRA run grew by.
- Of what is smaller, glibc gives the top of its heap back to the kernel at once, unless it is told
  to keep it: 7% of that step. ONNX Runtime's own arena keeps its memory likewise. Blocks of 32 MiB
  and more, of others then, glibc gives back all the same: kept, they would leave holes that raise a
  LoRA run's peak by 8%.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
import mmap
import sys
import threading
from collections.abc import Sequence

import torch

_M_TRIM_THRESHOLD = -1  # malloc.h
_M_MMAP_THRESHOLD = -3
_NEVER = 2**31 - 1
_LARGEST_THRESHOLD = 32 * 2**20  # as far as glibc raises its own
#: Of all kept blocks. A run that needs more has a peak that more should not be added to.
MAX_KEPT_BYTES = 2**30
#: A block serves results down to this part of its size, so that lengths of batches may differ, and
#: makes room for the block of a result up to the inverse of it.
_LEAST_USE = 0.5


class _Block(mmap.mmap):
    """Memory of one result after the other."""

    last_use: int


_min_kept_bytes = 8 * 2**20
_max_kept_bytes = 0  # none until keep_freed()
_blocks: list[_Block] = []
_scratch: list[_Block] = []  # one, or none yet
_uses = itertools.count()
_choosing = threading.Lock()


@functools.cache
def keep_freed() -> bool:
    """For the life of the process; returns whether its allocator is glibc's, which can be told."""
    global _max_kept_bytes
    _max_kept_bytes = max(_max_kept_bytes, MAX_KEPT_BYTES)
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = ((_M_TRIM_THRESHOLD, _NEVER), (_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD))
    return all(library.mallopt(name, value) for name, value in settings)


def trim() -> None:
    """Give free memory of the heap back to the kernel, where the allocator is glibc's."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def keep_all() -> None:
    """Keep the memory of all results but small ones, for the life of the process.

    For a profile: ONNX Runtime notes each kernel in small blocks of the heap, which stay, and glibc
    places one in what is left over beside an aligned result. The freed result is then too small for
    the next of its size, and each step takes new pages, several gigabytes in ten steps.
    """
    global _min_kept_bytes, _max_kept_bytes
    _min_kept_bytes, _max_kept_bytes = 2**16, sys.maxsize


def is_large(shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether a result has a block of its own."""
    return math.prod(shape) * dtype.itemsize >= _min_kept_bytes


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the CPU with undefined entries.

    Args:
        shape: sizes of the tensor.
        dtype: type of its entries.
    """
    if not is_large(shape, dtype):
        return torch.empty(shape, dtype=dtype)
    with _choosing:
        return _tensor(_block(math.prod(shape) * dtype.itemsize), shape, dtype)


def lasting(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """As :func:`empty`, for a tensor that outlives steps: it takes no kept block from others."""
    if not is_large(shape, dtype):
        return torch.empty(shape, dtype=dtype)
    return _tensor(_new_block(math.prod(shape) * dtype.itemsize), shape, dtype)


def _tensor(block: _Block, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(block, dtype=dtype, count=math.prod(shape)).view(shape)


def scratch(*shape: int, dtype: torch.dtype) -> torch.Tensor | None:
    """A tensor on the CPU with undefined entries, in the one block for what is soon gone.

    Args:
        shape: sizes of the tensor.
        dtype: type of its entries.

    Returns:
        None where the last one is still held, or where nothing is kept.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    with _choosing:
        if not _scratch or len(_scratch[0]) < num_bytes:
            _scratch.clear()
            if kept_bytes() + num_bytes > _max_kept_bytes:
                return None
            _scratch.append(_new_block(num_bytes))
        elif not _is_free(_scratch, 0):
            return None
        return _tensor(_scratch[0], shape, dtype)


def kept_bytes() -> int:
    """Size of all kept blocks, in use or not."""
    return sum(len(block) for block in (*_blocks, *_scratch))


def release() -> None:
    """Keep no block any longer; those in use are given back with their tensors."""
    global _blocks, _scratch
    _blocks, _scratch = [], []


def _block(num_bytes: int) -> _Block:
    """The smallest free block that fits, or a new one."""
    blocks = _blocks
    for index in sorted(range(len(blocks)), key=lambda i: len(blocks[i])):
        fits = _LEAST_USE * len(blocks[index]) <= num_bytes <= len(blocks[index])
        if fits and _is_free(blocks, index):
            blocks[index].last_use = next(_uses)
            return blocks[index]
    outgrown = [
        index
        for index in range(len(blocks))
        if _LEAST_USE * num_bytes <= len(blocks[index]) < num_bytes and _is_free(blocks, index)
    ]
    if outgrown and num_bytes <= _max_kept_bytes:
        del blocks[max(outgrown, key=lambda i: len(blocks[i]))]
    # Of sizes that are no longer asked for: the least recently used goes first.
    while num_bytes <= _max_kept_bytes < kept_bytes() + num_bytes:
        free = [index for index in range(len(blocks)) if _is_free(blocks, index)]
        if not free:
            break
        del blocks[min(free, key=lambda i: blocks[i].last_use)]
    block = _new_block(num_bytes)
    block.last_use = next(_uses)
    if kept_bytes() + num_bytes <= _max_kept_bytes:
        blocks.append(block)
    return block


def _new_block(num_bytes: int) -> _Block:
    block = _Block(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # a system without huge pages
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _is_free(blocks: list[_Block], index: int) -> bool:
    """Whether no tensor holds the block: the list does, and the argument of getrefcount."""
    return sys.getrefcount(blocks[index]) == 2

"""Ranks of a launch, and this rank's share of its machine."""

from __future__ import annotations

import os


def rank() -> int:
    """Global rank of this process; 0 outside of a launch."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this process writes files and speaks."""
    return rank() == 0


def local_world_size() -> int:
    """Ranks on this machine: torchrun says it in LOCAL_WORLD_SIZE, DeepSpeed in LOCAL_SIZE."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if name in os.environ:
            return max(1, int(os.environ[name]))
    return 1


def cores_per_rank() -> int:
    """This rank's share of the cores that the process may use, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size())


def share_cores() -> None:
    """Limit torch to this rank's share, unless the user chose a number of threads.

    torchrun sets OMP_NUM_THREADS for its ranks, the DeepSpeed launcher doesn't: its ranks would all
    take all cores.
    """
    import torch

    if local_world_size() > 1 and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(cores_per_rank())  # for what accelerate would set
        torch.set_num_threads(cores_per_rank())


def leave() -> None:
    """Leave the process group, if there is one, when all ranks have come this far."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

"""Ranks of a launch, their shares of a machine and of a batch, and what becomes of them."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

from ort_train.errors import ConfigError, RankError


def rank() -> int:
    """Global rank of this process; 0 outside of a launch."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Ranks of the launch; 1 outside of one."""
    return max(1, int(os.environ.get("WORLD_SIZE", "1")))


def is_main_process() -> bool:
    """Whether this process writes files and speaks."""
    return rank() == 0


def say(line: str) -> None:
    """Print a line once a launch."""
    if is_main_process():
        print(line, flush=True)


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


def accumulation_steps(
    global_batch_size: int | None, micro_batch_size: int, given_steps: int, num_ranks: int
) -> int:
    """Micro batches per optimizer step.

    Args:
        global_batch_size: samples per optimizer step over all ranks; None: `given_steps` holds.
        micro_batch_size: samples per rank per forward.
        given_steps: 1 is read as "not given" beside a global batch size.
        num_ranks: of the launch.

    Raises:
        ConfigError: where the ranks can't share the batch evenly, or `given_steps` says another.
    """
    if global_batch_size is None:
        return given_steps
    per_forward = micro_batch_size * num_ranks
    product = f"train.micro_batch_size {micro_batch_size} x {num_ranks} ranks"
    steps, rest = divmod(global_batch_size, per_forward)
    if rest or not steps:
        nearest = max(1, round(global_batch_size / per_forward)) * per_forward
        raise ConfigError(
            f"train.global_batch_size {global_batch_size} is not a multiple of {product} = "
            f"{per_forward}: set it to {nearest}, or change the micro batch or the number of ranks"
        )
    if given_steps not in (1, steps):
        raise ConfigError(
            f"train.global_batch_size {global_batch_size} means {steps} accumulation steps "
            f"({product}), but train.gradient_accumulation_steps is {given_steps}: set that to 1, "
            "which follows, or train.global_batch_size to null"
        )
    return steps


def check_port() -> None:
    """Refuse a port that another job holds, before the ranks wait for one another.

    torchrun listens on the port itself, and says so by itself.

    Raises:
        RankError: naming the port.
    """
    if rank() or "MASTER_PORT" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    port = int(os.environ["MASTER_PORT"])
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            raise RankError(
                f"port {port}, where the ranks are to meet, is in use ({error.strerror}): another "
                "job runs on this machine; launch with another --master_port"
            ) from None


class Roster:
    """Where each rank of the process group lives, so that a lost one can be named."""

    def __init__(self) -> None:
        import torch

        self._members: list[tuple[str, int]] = [(socket.gethostname(), os.getpid())]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            members: list[tuple[str, int]] = [("", 0)] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(members, self._members[0])
            self._members = members

    def lost(self) -> list[int]:
        """The ranks of this host whose process has ended."""
        host = socket.gethostname()
        return [
            number
            for number, (where, pid) in enumerate(self._members)
            if where == host and not _is_alive(pid)
        ]

    @contextlib.contextmanager
    def watched(self, way_out: str) -> Iterator[None]:
        """Turn a broken connection to another rank into an error that names the rank.

        Raises:
            RankError: in place of what torch.distributed raised.
        """
        try:
            yield
        except RuntimeError as error:
            if len(self._members) == 1 or not _is_broken_connection(error):
                raise
            if lost := self._wait_for_lost():
                who = f"rank {', '.join(map(str, lost))} has died"
            elif "timed out" in str(error).lower() or "timeout" in str(error).lower():
                who = (
                    "a rank has not answered in time (train.ddp_timeout_s): it hangs, or its host "
                    "is lost"
                )
            else:
                who = (
                    f"a rank on another host than {socket.gethostname()} has died or can't be "
                    "reached; its own output says why"
                )
            raise RankError(f"rank {rank()} stops: {who}. {way_out}") from error

    def _wait_for_lost(self, seconds: float = 2.0) -> list[int]:
        """A connection can break a moment before the process at its other end is gone."""
        import time

        deadline = time.monotonic() + seconds
        while not (lost := self.lost()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return lost


def _is_alive(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_broken_connection(error: RuntimeError) -> bool:
    """gloo's words, and the types of torch's errors about NCCL and the store."""
    import torch

    kinds = tuple(
        kind
        for name in ("DistBackendError", "DistNetworkError")
        if isinstance(kind := getattr(torch.distributed, name, None), type)
    )
    if isinstance(error, kinds):
        return True
    text = str(error).lower()
    return any(
        words in text for words in ("closed by peer", "connection reset", "broken pipe", "gloo/")
    )


def leave() -> None:
    """Leave the process group, if there is one, when all ranks have come this far."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

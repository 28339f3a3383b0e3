"""Ranks of a launch, their shares of a machine and of a batch, and what becomes of them."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

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


def take_device() -> None:
    """Make this rank's GPU the current one, where there are any: 4-bit weights are loaded onto it,
    before transformers' TrainingArguments would do the same."""
    import torch

    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        # As accelerate does: a rank may see its own GPU alone.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


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


#: Where MPI's launchers, mpirun and, with PMI-2, srun, say how many processes they started.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def check_launch() -> None:
    """Refuse an environment that only half says that this process is one of several ranks.

    Each of several processes would train alone, or the only one of them less than it was asked to.

    Raises:
        RankError: naming the variables.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    for name in (name for name in names if name in os.environ):
        try:
            int(os.environ[name])
        except ValueError:
            raise RankError(
                f"{name} is {os.environ[name]!r} in the environment, where a launcher sets a "
                "number: unset it, or launch with torchrun or deepspeed"
            ) from None
    if "WORLD_SIZE" not in os.environ:
        _check_other_launchers()
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if world_size() > 1 and missing:
        raise RankError(
            f"WORLD_SIZE is {world_size()} in the environment, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set: launch with torchrun or deepspeed, "
            "or unset WORLD_SIZE to train in one process"
        )
    if not 0 <= rank() < world_size():
        raise RankError(
            f"RANK is {rank()} in the environment, but WORLD_SIZE {world_size()}: launch with "
            "torchrun or deepspeed, or unset RANK to train in one process"
        )


def _check_other_launchers() -> None:
    for name in _MPI_SIZES:
        if os.environ.get(name, "1") != "1":
            raise RankError(
                f"{name} is {os.environ[name]} in the environment, so MPI started several "
                "processes, which wouldn't know of one another: have it start one on each machine, "
                "torchrun or deepspeed, which start the ranks there"
            )
    # It sets the port for several processes alone, and on a CPU starts one of them.
    if os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ:
        raise RankError(
            "`accelerate launch --cpu` starts one process, whatever --num_processes says: use "
            "`torchrun --nproc_per_node N`, or leave --num_processes out to train in one"
        )


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


def join(backend: str, timeout_s: int) -> None:
    """Make the process group of a launch of several ranks on CPUs. Collective.

    transformers leaves `ddp_timeout` out there (TrainingArguments._setup_devices, 4.57 to 5.23):
    its group would wait for 30 minutes whatever was asked for. It takes over one that is there.

    Args:
        backend: torch.distributed's name of one, "gloo".
        timeout_s: seconds that a rank waits for the others, here and in every later operation.

    Raises:
        RankError: where the others don't come.
    """
    import torch

    names = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    is_launched = world_size() > 1 and all(name in os.environ for name in names)
    if not is_launched or torch.distributed.is_initialized():
        return
    try:
        torch.distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except (torch.distributed.DistStoreError, torch.distributed.DistNetworkError) as error:
        raise RankError(
            f"rank {rank()} stops: not all of {world_size()} ranks came to "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within {timeout_s} s "
            "(train.ddp_timeout_s, ddp_timeout of the arguments): the others' output says why"
        ) from error


def limit_waits(timeout_s: int) -> None:
    """Set how long this rank waits for the others, in every process group that there is.

    DeepSpeed makes groups of its own, which know torch's default only: 30 minutes over gloo, 10
    over NCCL (deepspeed/comm/torch.py, new_group; up to 0.19).
    """
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    c10d = torch.distributed.distributed_c10d
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def leave() -> None:
    """Leave the process group, if there is one, when all ranks have come this far."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

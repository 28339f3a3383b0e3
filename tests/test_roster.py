"""Which rank is lost, by what the others see of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from ports import free_port

from ort_train import distributed, roster
from ort_train.errors import RankError
from ort_train.roster import Roster

ROOT = Path(__file__).parents[1]
_WAIT_S = 3
#: Ranks that meet, and wait for one of them that does something else.
_WORKER = f"""
import os, signal, time, torch
from ort_train import distributed, roster
roster._GRACE_S = 3.0
distributed.join("gloo", 60)
members = roster.Roster()
distributed.limit_waits({_WAIT_S})
torch.distributed.barrier()
if os.environ["RANK"] == os.environ["SILENT"]:
    print("silent", os.getpid(), flush=True)
    if os.environ["HOW"] == "suspended":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)
with members.watched("Resume"):
    torch.distributed.all_reduce(torch.zeros(()))
"""


def _outputs(world_size: int, silent: int, how: str) -> tuple[int, list[str]]:
    """The silent rank's process id, and the last line of every other rank's output."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared = {**address, "WORLD_SIZE": str(world_size)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            env={**os.environ, **shared, "RANK": str(n), "SILENT": str(silent), "HOW": how},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n in range(world_size)
    ]
    try:
        ends = []
        for number, process in enumerate(ranks):
            if number != silent:
                text, _ = process.communicate(timeout=90)
                assert process.returncode != 0
                ends.append(text.strip().splitlines()[-1])
        return ranks[silent].pid, ends
    finally:
        for process in ranks:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.distributed
def test_the_one_rank_of_several_that_hangs_is_named() -> None:
    pid, ends = _outputs(3, silent=2, how="hanging")
    for number, end in enumerate(ends):
        assert end == (
            f"[rank{number}]: ort_train.errors.RankError: rank {number} stops: "
            f"rank 2 (process {pid} on {socket.gethostname()}) has not answered in time "
            "(train.ddp_timeout_s): hanging, or the host is lost. Resume"
        )


@pytest.mark.slow
@pytest.mark.distributed
def test_a_suspended_rank_is_named_though_it_holds_the_store() -> None:
    pid, (end,) = _outputs(2, silent=0, how="suspended")
    assert f"rank 1 stops: rank 0 (process {pid} on {socket.gethostname()}) has not answered" in end
    assert "suspended. Resume" in end


def test_a_dead_rank_is_named() -> None:
    members = Roster()
    child = subprocess.Popen([sys.executable, "-c", ""])
    members._members = [(socket.gethostname(), os.getpid()), (socket.gethostname(), child.pid)]
    child.wait()
    with pytest.raises(RankError, match=r"rank 1 has died\. Resume"), members.watched("Resume"):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    with pytest.raises(RuntimeError, match="unrelated"), members.watched("Resume"):
        raise RuntimeError("unrelated")


def test_a_rank_on_another_host_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "_GRACE_S", 0.3)
    members = Roster()
    members._members = [(socket.gethostname(), os.getpid()), ("elsewhere", 7)]
    members._store = torch.distributed.HashStore()
    lost = r"rank 1 \(process 7 on elsewhere\) has died or can't be reached"
    with pytest.raises(RankError, match=lost), members.watched(""):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    members._store.set(roster._key(1), "")
    with pytest.raises(RankError, match="broke, though all of them live"), members.watched(""):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection reset")


def test_ranks_that_do_not_come_are_missed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(RankError, match=r"not all of 2 ranks came to 127.0.0.1:.* within 1 s"):
        distributed.join("gloo", timeout_s=1)


def test_every_group_gets_the_limit(tmp_path: Path) -> None:
    """DeepSpeed's groups have torch's default."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        groups = [torch.distributed.group.WORLD, torch.distributed.new_group([0])]
        distributed.limit_waits(7)
        for group in groups:
            backend = group._get_backend(torch.device("cpu"))
            assert backend.options._timeout == timedelta(seconds=7)
    finally:
        torch.distributed.destroy_process_group()

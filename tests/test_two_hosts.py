"""Training over two hosts: network namespaces with addresses of their own, joined by a cable.

Nothing leaves them: each has one end of a veth pair and no route to anywhere else.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_zero import WORKER, assert_same_trajectory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.usefixtures("shared_graphs"),
]

INTERFACE = "veth0"
PORT = 29400
TIMEOUT_S = 300


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """Address of each of two hosts, by the name of its namespace."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip: apt-get install iproute2")
    # 192.0.2.0/24 is reserved for examples (RFC 5737), so it can't be anybody's network.
    addresses = {f"ort{os.getpid()}{side}": f"192.0.2.{n}" for n, side in ((1, "a"), (2, "b"))}
    first, second = addresses
    try:
        try:
            for name in addresses:
                _ip("netns", "add", name)
            _ip(
                *("link", "add", INTERFACE, "netns", first, "type", "veth"),
                *("peer", "name", INTERFACE, "netns", second),
            )
            for name, address in addresses.items():
                _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
                _ip("-n", name, "link", "set", INTERFACE, "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces can't be made here: {error.stderr.strip()}")
        yield addresses
    finally:
        for name in addresses:  # a veth pair goes with either of its ends
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", name)


def _torchrun(rank: int, addresses: list[str]) -> list[str]:
    return [
        *("torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"),
        *("--rdzv_backend", "c10d", "--rdzv_id", "two_hosts"),
        *("--rdzv_endpoint", f"{addresses[0]}:{PORT}"),
        # Both share this machine's name, by which torchrun would tell which of them is meant.
        *("--rdzv_conf", f"is_host={int(rank == 0)}", "--local_addr", addresses[rank]),
    ]


def _deepspeed(rank: int, addresses: list[str], hostfile: Path) -> list[str]:
    hostfile.write_text("".join(f"{address} slots=1\n" for address in addresses))
    return [
        *("deepspeed.launcher.runner", "--hostfile", str(hostfile), "--no_ssh"),
        *("--node_rank", str(rank), "--master_addr", addresses[0], "--master_port", str(PORT)),
    ]


def _start(host: str, launcher: list[str], cases_file: Path, log: Path) -> subprocess.Popen:
    command = ["ip", "netns", "exec", host, sys.executable, "-m", *launcher]
    inherited = {n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE")}
    environment = {
        **inherited,
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "OMP_NUM_THREADS": "1",
    }
    with log.open("w") as output:
        return subprocess.Popen(
            [*command, str(WORKER), str(cases_file)],
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_zero2_over_two_hosts_trains_as_one_process(
    launcher: str, hosts: dict[str, str], alone: dict[str, Any], tmp_path: Path
) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    out = tmp_path / "two_hosts.pt"
    case = {"out": str(out), "run_dir": str(tmp_path / "run"), "deepspeed": "zero2"}
    cases_file = tmp_path / "cases.json"
    cases_file.write_text(json.dumps([case]))
    addresses = list(hosts.values())
    logs = {host: tmp_path / f"{host}.log" for host in hosts}
    processes = []
    for rank, host in enumerate(hosts):
        if launcher == "torchrun":
            options = _torchrun(rank, addresses)
        else:
            options = _deepspeed(rank, addresses, tmp_path / f"{host}.hostfile")
        processes.append(_start(host, options, cases_file, logs[host]))
    try:
        codes = [process.wait(timeout=TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
    assert codes == [0, 0], "".join(log.read_text()[-4000:] for log in logs.values())
    result = torch.load(out, weights_only=True)
    assert result["world_size"] == 2
    assert_same_trajectory(result, alone["full"])

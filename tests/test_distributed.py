"""Ranks, shares of cores, and training over two processes against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ports import free_port
from safetensors.torch import load_file

from ort_train import distributed
from ort_train.cli import main

pytestmark = pytest.mark.usefixtures("shared_graphs")

ROOT = Path(__file__).parents[1]
LAUNCH_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "ACCELERATE_USE_CPU",
)  # fmt: skip
LAUNCHERS = {
    "torchrun": ["torchrun", "--nproc_per_node", "2"],
    "deepspeed": ["deepspeed", "--num_accelerators", "2"],
}


def test_only_the_first_rank_is_the_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert distributed.is_main_process()
    monkeypatch.setenv("RANK", "2")
    assert not distributed.is_main_process()
    assert distributed.rank() == 2


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment"),
        ({"RANK": ""}, "RANK is '' in the environment"),
        ({"WORLD_SIZE": "2"}, "but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "but LOCAL_RANK is not set: launch with torchrun",
        ),
        ({"RANK": "1"}, "RANK is 1 in the environment, but WORLD_SIZE 1"),
        ({"PMI_SIZE": "4"}, "PMI_SIZE is 4 in the environment, so MPI started several processes"),
        (
            {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            "starts one process, whatever --num_processes says",
        ),
    ],
)
def test_half_a_launch_is_refused_before_work(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    variables: dict[str, str],
    expected: str,
) -> None:
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    command = ["train", "--recipe", "quickstart", "--tiny", f"output.dir={tmp_path / 'run'}"]
    assert main(command) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"LOCAL_RANK": "-1"},
        dict.fromkeys(("RANK", "LOCAL_RANK"), "0"),
        {"PMI_SIZE": "1", "ACCELERATE_USE_CPU": "True"},
        {"PMI_SIZE": "2", "WORLD_SIZE": "1"},  # MPI started torchrun
    ],
)
def test_one_process_is_a_launch(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    distributed.check_launch()


@pytest.mark.parametrize("variable", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert distributed.cores_per_rank() == 8
    monkeypatch.setenv(variable, "3")
    assert distributed.cores_per_rank() == 2
    monkeypatch.setenv(variable, "64")
    assert distributed.cores_per_rank() == 1


def test_a_chosen_number_of_threads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    distributed.share_cores()
    assert torch.get_num_threads() == before
    assert os.environ["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(("num_gpus", "taken"), [(4, 3), (1, 0)])  # its own alone, as with Slurm
def test_a_rank_takes_its_gpu(monkeypatch: pytest.MonkeyPatch, num_gpus: int, taken: int) -> None:
    found: list[int] = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    distributed.take_device()
    assert not found  # there is none
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    distributed.take_device()
    assert found == [taken]


def _train(launcher: list[str], folder: Path, wikitext: Path, micro_batch_size: int) -> Path:
    """Eight steps of the tiny quickstart; returns the run's folder."""
    command = [
        *launcher,
        str(ROOT / "launch" / "train.py"),
        *("--recipe", "quickstart", "--tiny"),
        "train.backend=ort",
        f"train.micro_batch_size={micro_batch_size}",
        "measure.baselines=[]",
        f"data.folder={wikitext}",
        f"output.dir={folder}",
    ]
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
    }
    done = subprocess.run(
        command,
        env={**environment, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def one(shared_graphs: None, tmp_path_factory: pytest.TempPathFactory, wikitext_dir: Path) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "one"
    return _train([sys.executable], folder, wikitext_dir, micro_batch_size=4)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_as_one(
    launcher: str, one: Path, tmp_path: Path, wikitext_dir: Path
) -> None:
    name, *options = LAUNCHERS[launcher]
    program = Path(sys.executable).parent / name
    if not program.is_file():
        pytest.skip(f"{name} is not installed")
    command = [str(program), *options, "--master_port", str(free_port())]
    two = _train(command, tmp_path / "two", wikitext_dir, micro_batch_size=2)

    logs = [json.loads((run / "record.json").read_text())["training"] for run in (one, two)]
    assert [log["world_size"] for log in logs] == [1, 2]
    losses = [[entry["loss"] for entry in log["log"] if "loss" in entry] for log in logs]
    # The global batch is the same; only the order of fp32 sums differs.
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    weights = [load_file(run / "model" / "model.safetensors") for run in (one, two)]
    difference = max((weights[0][n] - weights[1][n]).abs().max().item() for n in weights[0])
    # AdamW divides by the gradients' root mean square, which magnifies last-bit differences of
    # small gradients: at most a few percent of learning rate x steps (1e-3 x 8).
    assert difference < 2e-4

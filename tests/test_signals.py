"""Runs that are told to end, and runs that lose a rank."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from ports import free_port
from safetensors.torch import load_file

from ort_train.errors import StoppedBySignal
from ort_train.signals import StopOnSignal

pytestmark = pytest.mark.usefixtures("shared_graphs")

ROOT = Path(__file__).parents[1]
LAUNCHERS: dict[str, list[str]] = {
    "python": [],
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2"],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2"],
}


def _state(step: int, max_steps: int = 20) -> Any:
    return SimpleNamespace(global_step=step, max_steps=max_steps)


def _control() -> Any:
    return SimpleNamespace(should_save=False, should_training_stop=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_stops_at_the_end_of_the_step(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    args = SimpleNamespace(device=torch.device("cpu"))
    with StopOnSignal() as stop:
        control = _control()
        stop.on_step_end(args, _state(3), control)
        assert not control.should_save
        os.kill(os.getpid(), number)
        stop.on_step_end(args, _state(4), control)
        assert control.should_save
        assert control.should_training_stop
        assert stop.stopped
        error = stop.error(_state(4))
    assert signal.getsignal(number) is before
    assert isinstance(error, StoppedBySignal)
    assert f"{number.name} ended the run after step 4 of 20; checkpoint-4 is saved" in str(error)


def test_a_signal_in_the_last_step_changes_nothing() -> None:
    with StopOnSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        control = _control()
        stop.on_step_end(SimpleNamespace(device=torch.device("cpu")), _state(20), control)
    assert not control.should_save
    assert not stop.stopped


@contextlib.contextmanager
def _started(launcher: str, folder: Path, *overrides: str) -> Iterator[subprocess.Popen]:
    options = LAUNCHERS[launcher]
    if options:
        options = [*options, "--master_port", str(free_port())]
    command = [
        sys.executable,
        *options,
        str(ROOT / "launch" / "train.py"),
        *("--recipe", "quickstart", "--tiny", "measure.baselines=[]"),
        *(f"output.dir={folder}", "train.logging_steps=1", *overrides),
    ]
    inherited = {n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE")}
    with open(folder.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(
            command,
            env={**inherited, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_baselines_are_measured_leaves_nothing_behind(
    number: signal.Signals, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with _started("python", folder, "measure.baselines=[eager]", "measure.rounds=500") as process:
        log = folder.with_suffix(".log")
        _wait_until(lambda: "measuring" in log.read_text(), process, log)
        job = psutil.Process(process.pid)
        _wait_until(lambda: bool(job.children(recursive=True)), process, log)
        workers = job.children(recursive=True)
        process.send_signal(number)
        assert process.wait(timeout=60) == StoppedBySignal.EXIT_CODE, log.read_text()[-4000:]
    assert f"{number.name} ended the job before its first step" in log.read_text()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []
    assert not list(folder.glob("checkpoint-*"))


def _ranks(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The training processes below a launcher, by rank."""
    found = []
    for process in [
        psutil.Process(launcher.pid),
        *psutil.Process(launcher.pid).children(recursive=True),
    ]:
        with contextlib.suppress(psutil.Error):
            if "LOCAL_RANK" in process.environ() and "train.py" in " ".join(process.cmdline()):
                found.append(process)
    return sorted(found, key=lambda process: int(process.environ()["LOCAL_RANK"]))


def _wait_until(
    condition: Callable[[], bool], process: subprocess.Popen, log: Path, seconds: float = 180
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.1)


MANY_STEPS = ("train.max_steps=4000", "train.lr_scheduler=constant")


@contextlib.contextmanager
def _two_ranks(
    launcher: str, folder: Path, *overrides: str
) -> Iterator[tuple[subprocess.Popen, Path, list[psutil.Process]]]:
    """A launch in the midst of its training, its log, and its processes by rank."""
    if launcher == "deepspeed":
        pytest.importorskip("deepspeed")
    log = folder.with_suffix(".log")
    with _started(launcher, folder, *MANY_STEPS, *overrides) as process:
        _wait_until(lambda: "step 3/" in log.read_text(), process, log)
        ranks = _ranks(process)
        assert len(ranks) == 2
        yield process, log, ranks


@pytest.mark.slow
def test_a_stopped_job_ends_with_its_code_and_continues(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    with _started("python", tmp_path / "run", *MANY_STEPS) as process:
        _wait_until(lambda: "step 3/" in log.read_text(), process, log)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=60) == StoppedBySignal.EXIT_CODE, log.read_text()[-4000:]
    assert "SIGUSR1 ended the run after step" in log.read_text()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    step = int(checkpoint.name.partition("-")[2])
    assert not (tmp_path / "run" / "model").exists()

    resume = ("output.resume=auto", f"train.max_steps={step + 2}", "train.lr_scheduler=constant")
    with _started("python", tmp_path / "run", *resume) as process:
        assert process.wait(timeout=180) == 0, log.read_text()[-4000:]
    assert f"resuming from {checkpoint}" in log.read_text()
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["training"]["steps"] == step + 2
    assert load_file(tmp_path / "run" / "model" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.distributed
def test_one_rank_with_a_signal_stops_all(tmp_path: Path) -> None:
    """Signals to the launchers, and DeepSpeed's: tests of the job files."""
    with _two_ranks("torchrun", tmp_path / "run") as (process, log, ranks):
        ranks[1].send_signal(signal.SIGTERM)
        code = process.wait(timeout=90)
    text = log.read_text()
    assert code == 1, "torchrun's code whatever its ranks end with"
    assert text.count(f"exitcode  : {StoppedBySignal.EXIT_CODE} ") >= 1, text[-4000:]
    assert "ended the run after step" in text
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert {file.name for file in checkpoint.glob("rng_state_*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("launcher", "deepspeed"), [("torchrun", "null"), ("deepspeed", "zero2")])
def test_a_dead_rank_ends_the_others_and_is_named(
    tmp_path: Path, launcher: str, deepspeed: str
) -> None:
    option = f"train.deepspeed={deepspeed}"
    with _two_ranks(launcher, tmp_path / "run", option) as (process, log, (survivor, victim)):
        victim.kill()
        code = process.wait(timeout=60)
    assert code != 0
    assert not survivor.is_running()
    assert "rank 0 stops: rank 1 has died. Continue from the last checkpoint" in log.read_text()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("launcher", "deepspeed"), [("torchrun", "null"), ("deepspeed", "zero2")])
def test_a_rank_that_has_gone_silent_is_noticed_in_the_time_that_is_set(
    tmp_path: Path, launcher: str, deepspeed: str
) -> None:
    """As a host that has lost its power: no connection is closed."""
    # Enough for the first step, in which one rank may build its graph much sooner than the other.
    options = (f"train.deepspeed={deepspeed}", "train.ddp_timeout_s=20")
    with _two_ranks(launcher, tmp_path / "run", *options) as (process, log, (survivor, victim)):
        victim.suspend()
        try:
            _wait_until(lambda: not _runs(survivor), process, log, seconds=60)
        finally:
            victim.kill()  # a launcher would do so after another 30 seconds
        assert process.wait(timeout=60) != 0
    named = (
        f"rank 0 stops: rank 1 (process {victim.pid} on {socket.gethostname()}) has not answered"
    )
    assert f"{named} in time (train.ddp_timeout_s): suspended. Continue from" in log.read_text()


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.slow
@pytest.mark.distributed
def test_a_port_in_use_ends_the_launch_with_a_message(tmp_path: Path) -> None:
    """DeepSpeed's launcher leaves the port to rank 0; torchrun's says EADDRINUSE itself."""
    pytest.importorskip("deepspeed")
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        command = [sys.executable, *LAUNCHERS["deepspeed"], "--master_port"]
        command += [str(other.getsockname()[1]), str(ROOT / "launch" / "train.py")]
        command += ["--recipe", "quickstart", "--tiny", f"output.dir={tmp_path / 'run'}"]
        done = subprocess.run(
            [*command, "measure.baselines=[]", "train.deepspeed=zero2"],
            env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode != 0
    assert "is in use" in done.stderr
    assert "launch with another --master_port" in done.stderr

"""OpenMP's idle threads: they spin, but not while ONNX Runtime's do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ort_train import wrap
from ort_train.ortmodule import OrtOptions
from ort_train.ortmodule.kernels import openmp

ROOT = Path(__file__).parents[1]

#: Prints the processor time that other threads take while this one sleeps between operators.
_SCRIPT = """
import sys, time
import torch
from ort_train.ortmodule.kernels import openmp

torch.set_num_threads(2)
numbers = torch.ones(2**18)

def spun_s() -> float:
    before = time.process_time() - time.thread_time()
    for _ in range(20):
        numbers.add(1)
        time.sleep(0.006)
    return time.process_time() - time.thread_time() - before

print(spun_s())
openmp.quiet()
print(spun_s())
time.sleep(openmp.QUIET_S + 0.2) if "later" in sys.argv else openmp.wake()
print(spun_s())
openmp.quiet()
openmp.quiet()
print(spun_s())
"""


@pytest.fixture(scope="module", params=["wake", "later"])
def spun_s(request: pytest.FixtureRequest) -> list[float]:
    """Before, quiet, afterwards, and quiet again."""
    own = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    result = subprocess.run(
        [sys.executable, "-c", _SCRIPT, request.param],
        env={name: value for name, value in os.environ.items() if name not in own},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return [float(line) for line in result.stdout.splitlines()]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="on one core no thread spins")
def test_idle_threads_sleep_while_asked_to(spun_s: list[float]):
    before, quiet, after, again = spun_s
    # 20 times 4 ms (300,000 turns) against 100 turns: a fifth is far from both.
    assert max(quiet, again) < 0.2 * min(before, after)


def test_one_thread_needs_no_team(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(openmp.torch, "get_num_threads", lambda: 1)
    openmp.quiet()
    assert openmp._team is None


@pytest.mark.parametrize("asked", [True, False])
def test_only_spinning_asks_for_it(asked: bool, monkeypatch: pytest.MonkeyPatch):
    calls: list[None] = []
    monkeypatch.setattr(openmp, "quiet", lambda: calls.append(None))
    model = wrap(torch.nn.Linear(4, 4), backend="ort", options=OrtOptions(allow_spinning=asked))
    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()
    assert len(calls) == 2 * asked


def test_another_openmp_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(Path, "read_text", lambda self: "7f0 r-xp 0 0:0 1 /usr/lib/libiomp5.so\n")
    assert openmp._libgomp.__wrapped__() is None
    assert "KMP_BLOCKTIME" in caplog.text


@pytest.mark.skipif(openmp._libgomp() is None, reason="torch's OpenMP isn't libgomp here")
def test_an_environment_may_be_a_link(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The kernel names the files that a process has loaded without links."""
    link = tmp_path / "torch"
    link.symlink_to(Path(torch.__file__).parent, target_is_directory=True)
    monkeypatch.setattr(torch, "__file__", str(link / "__init__.py"))
    assert openmp._libgomp.__wrapped__() is not None

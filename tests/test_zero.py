"""Two processes under ZeRO and DistributedDataParallel against one, and against themselves resumed.

Each launch trains several cases, since starting one costs more than the training.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.usefixtures("shared_graphs"),
]

WORKER = Path(__file__).parent / "zero_worker.py"
#: Trajectories that two processes have to follow as one process without ORTModule does.
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "accumulated_and_clipped": {"accumulation": 2, "max_grad_norm": 0.5},
    "lora": {"adapter": "lora"},
    "packed": {"packed": True},
    **({"qlora": {"adapter": "qlora"}} if importlib.util.find_spec("bitsandbytes") else {}),
}
INTERRUPTED: dict[str, dict[str, Any]] = {
    "full_with_dropout": {"dropout": 0.1},
    "lora_with_dropout": {"dropout": 0.1, "adapter": "lora"},
    **(
        {"qlora_with_dropout": {"dropout": 0.1, "adapter": "qlora"}}
        if importlib.util.find_spec("bitsandbytes")
        else {}
    ),
}
# The logged losses are equal to a few last bits (1e-6) of an fp32 mean near 5.7.
LOSS_TOLERANCE = 1e-5
# AdamW divides by the gradients' root mean square, which magnifies last-bit differences of small
# gradients to a few percent of a step: 20 steps of at most 1e-3 end within 2e-4.
PARAMETER_TOLERANCE = 2e-4


def launch(folder: Path, cases: dict[str, dict[str, Any]], num_ranks: int) -> dict[str, Any]:
    """Trains the cases in one launch; their results by name."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {
        name: {"out": str(folder / f"{name}.pt"), "run_dir": str(folder / name), **case}
        for name, case in cases.items()
    }
    cases_file = folder / "cases.json"
    cases_file.write_text(json.dumps(list(fields.values())))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher = (
        [*torchrun, "--nproc_per_node", str(num_ranks)] if num_ranks > 1 else [sys.executable]
    )
    inherited = {n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [*launcher, str(WORKER), str(cases_file)],
        env={**inherited, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return {name: torch.load(case["out"], weights_only=True) for name, case in fields.items()}


Launch = Callable[..., dict[str, Any]]


def max_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Between the parameters of two results."""
    ours, theirs = one["parameters"], other["parameters"]
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def assert_same_trajectory(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert len(found["losses"]) == len(expected["losses"]) == 20
    assert found["losses"] == pytest.approx(expected["losses"], abs=LOSS_TOLERANCE, rel=0)
    assert max_difference(found, expected) < PARAMETER_TOLERANCE


def assert_wrap_order(result: dict[str, Any], outermost: str, case: str) -> None:
    model = "PeftModel" if "lora" in case else "LlamaForCausalLM"
    assert result["wrap_order"] == [outermost, "TrainingForward", model]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trajectories")


@pytest.fixture(scope="module")
def under_zero(shared_graphs: None, folder: Path) -> dict[str, Any]:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    cases = {
        **CASES,
        "eager": {"backend": "eager"},
        "compile": {"backend": "compile"},
        "zero1": {"deepspeed": "zero1"},
        "zero2_offload": {"deepspeed": "zero2_offload"},
        **{name: {**case, "save_steps": 10} for name, case in INTERRUPTED.items()},
    }
    cases = {name: {"deepspeed": "zero2", **case} for name, case in cases.items()}
    return launch(folder / "zero", cases, num_ranks=2)


@pytest.fixture(scope="module")
def under_ddp(shared_graphs: None, folder: Path) -> dict[str, Any]:
    cases = {
        **CASES,
        "eager": {"backend": "eager"},
        **{name: {**case, "save_steps": 10} for name, case in INTERRUPTED.items()},
    }
    return launch(folder / "ddp", cases, num_ranks=2)


@pytest.mark.parametrize("case", [*CASES, "eager", "compile", "zero1", "zero2_offload"])
def test_zero_trains_as_one_process_does(
    case: str, under_zero: dict[str, Any], alone: dict[str, Any]
) -> None:
    result = under_zero[case]
    # accelerate has prepared the model: Trainer skips that for models that are wrapped already.
    assert result["optimizer"] == "DeepSpeedOptimizerWrapper"
    assert_wrap_order(result, "DeepSpeedEngine", case)
    assert result["world_size"] == 2
    assert_same_trajectory(result, alone.get(case, alone["full"]))


@pytest.mark.parametrize("case", [*CASES, "eager"])
def test_ddp_trains_as_one_process_does(
    case: str, under_ddp: dict[str, Any], alone: dict[str, Any]
) -> None:
    result = under_ddp[case]
    assert result["optimizer"] == "AcceleratedOptimizer"
    assert_wrap_order(result, "DistributedDataParallel", case)
    assert result["world_size"] == 2
    assert_same_trajectory(result, alone.get(case, alone["full"]))


def _resumed(folder: Path, fields: dict[str, Any]) -> dict[str, Any]:
    cases = {
        name: {**case, **fields, "resume": str(folder / name / "checkpoint-10")}
        for name, case in INTERRUPTED.items()
    }
    return launch(folder / "resumed", cases, num_ranks=2)


def test_zero_resumes_bit_identically(under_zero: dict[str, Any], folder: Path) -> None:
    for name, result in _resumed(folder / "zero", {"deepspeed": "zero2"}).items():
        checkpoint = folder / "zero" / name / "checkpoint-10"
        files = {file.name for file in checkpoint.rglob("*")}
        for rank in range(2):
            assert f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" in files
            assert f"rng_state_{rank}.pth" in files
        assert not list(checkpoint.parent.glob(".*")), "what was staged has been renamed"
        assert result["losses"] == under_zero[name]["losses"], name
        without_dropout = under_zero[name.removesuffix("_with_dropout")]["losses"]
        pairs = zip(result["losses"], without_dropout, strict=True)
        assert max(abs(a - b) for a, b in pairs) > 10 * LOSS_TOLERANCE, "there was no dropout"
        assert max_difference(result, under_zero[name]) == 0.0, name


def test_ddp_resumes_bit_identically(under_ddp: dict[str, Any], folder: Path) -> None:
    for name, result in _resumed(folder / "ddp", {}).items():
        assert result["losses"] == under_ddp[name]["losses"], name
        assert max_difference(result, under_ddp[name]) == 0.0, name

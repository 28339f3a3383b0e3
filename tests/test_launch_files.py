"""Job files: their syntax, their fields, and what Slurm's do when the time is up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.usefixtures("shared_graphs")

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SBATCH = sorted(LAUNCH.glob("*.sbatch"))

# Stand-ins for Slurm's commands, for a job of one node whose step is a process here.
SLURM = {
    "srun": """
        overlap=0
        while [[ $1 == --* ]]; do [[ $1 == --overlap ]] && overlap=1; shift; done
        [[ $overlap == 0 ]] && echo $$ > "$SLURM_FAKE/step"
        exec "$@"
    """,
    "scontrol": """
        if [[ $1 == show ]]; then echo localhost; else echo "$@" >> "$SLURM_FAKE/scontrol"; fi
    """,
    "scancel": """
        [[ $1 == --signal=TERM && $2 == "$SLURM_JOB_ID.0" ]] || exit 1
        kill -TERM "$(cat "$SLURM_FAKE/step")"
    """,
}


@pytest.mark.parametrize("file", SBATCH, ids=lambda file: file.name)
def test_batch_scripts_are_bash(file: Path) -> None:
    subprocess.run(["bash", "-n", str(file)], check=True)
    text = file.read_text()
    assert text.startswith("#!/bin/bash\n")
    # Slurm reads its options only above the first command.
    header, _, rest = text.partition("\nset ")
    assert "#SBATCH" not in rest
    for option in ("--requeue", "--signal=B:USR1@300", "--ntasks-per-node=1"):
        assert f"#SBATCH {option}" in header.splitlines()


def _documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / "kubernetes" / name).read_text()))


def _check_pod(pod: dict[str, Any]) -> list[str]:
    """What every training pod needs; its command."""
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    # The launcher's patience ends before Kubernetes's.
    grace = pod["terminationGracePeriodSeconds"]
    assert 30 < int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < grace
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    command = container["command"]
    assert command[0] == "torchrun"
    script = command.index("launch/train.py")
    assert (ROOT / command[script]).is_file()
    assert "output.resume=auto" in command[script:]
    return command


def test_the_indexed_job_finds_its_first_pod() -> None:
    service, job = _documents("indexed_job.yaml")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    command = _check_pod(pod)
    assert f"--nnodes={spec['completions']}" in command
    assert spec["parallelism"] == spec["completions"]
    assert service["spec"]["clusterIP"] == "None"
    assert pod["subdomain"] == service["metadata"]["name"]
    first = f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert f"--master_addr={first}" in command
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    gpus = pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert f"--nproc_per_node={gpus}" in command
    # podFailurePolicy is only allowed with it.
    assert pod["restartPolicy"] == "Never"


def test_the_pytorchjob_has_a_master_and_workers_alike() -> None:
    (job,) = _documents("pytorchjob.yaml")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["replicas"] == 1
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    pod = replicas["Master"]["template"]["spec"]
    _check_pod(pod)
    assert pod["containers"][0]["name"] == "pytorch"
    gpus = pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert job["spec"]["nprocPerNode"] == str(gpus)


def test_the_hostfile_is_deepspeeds() -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    hosts = runner.fetch_hostfile(str(LAUNCH / "hostfile.example"))
    assert dict(hosts) == {"node-1": 8, "node-2": 8}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm_deepspeed.sbatch"])
def test_a_slurm_job_saves_and_requeues_when_its_time_is_up(script: str, tmp_path: Path) -> None:
    if "deepspeed" in script:
        pytest.importorskip("deepspeed")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in SLURM.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}")
        (programs / name).chmod(0o755)
    inherited = {n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE")}
    environment = {
        **inherited,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_FAKE": str(tmp_path),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "OUTPUT_DIR": str(tmp_path / "run"),
        "VENV": sys.prefix,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    arguments = ["--recipe", "quickstart", "--tiny", "measure.baselines=[]", "train.max_steps=4000"]
    arguments += ["train.logging_steps=1", "train.deepspeed=zero2"]
    log = tmp_path / "log"
    with log.open("w") as output:
        job = subprocess.Popen(
            ["bash", str(LAUNCH / script), *arguments],
            env=environment, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 180
        while "step 3/" not in log.read_text():
            assert job.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.2)
        job.send_signal(signal.SIGUSR1)  # to the batch script alone, as B: says
        code = job.wait(timeout=90)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert code == (85 if "deepspeed" in script else 1), log.read_text()[-4000:]
    assert (tmp_path / "scontrol").read_text() == f"requeue {os.getpid()}\n"
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
    assert not list(ROOT.glob(".hostfile.*"))

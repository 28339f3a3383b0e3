"""Findings of `ort-train doctor`: sound here, and right about installations that aren't."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import Future
from pathlib import Path

import pytest

from ort_train import checks, doctor
from ort_train.checks import Check

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions that are said to be installed; None: not installed."""
    changed: dict[str, str | None] = {}
    real = importlib.metadata.version

    def version(name: str) -> str:
        found = changed[name] if name in changed else real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    return changed


def only(findings) -> Check:
    (finding,) = findings
    return finding


def named(findings, name: str) -> Check:
    return next(check for check in findings if check.name == name)


def test_this_environment_has_no_problem():
    findings = doctor.run_checks()
    gpu = ("GPU", "CUDA 11 libraries")  # the tests run on the CPU, whatever the machine has
    assert not [c for c in findings if c.status == "problem" and c.name not in gpu]
    names = {check.name for check in findings}
    expected = {"Python", "torch", "onnxruntime", "backend ort on cpu", "GPU", "disk", "deepspeed"}
    assert expected <= names


def test_another_python_is_told_which_and_how(monkeypatch):
    info = namedtuple("info", "major minor micro releaselevel serial")
    monkeypatch.setattr(sys, "version_info", info(3, 13, 1, "final", 0))
    found = only(checks.check_python())
    assert found.status == "problem"
    assert "wheels up to Python 3.11" in found.detail
    assert "python3.11 -m venv" in found.remedy


def test_two_onnxruntimes_are_a_problem_with_both_commands(versions):
    versions["onnxruntime-gpu"] = "1.23.0"
    found = only(checks.check_onnxruntime())
    assert found.status == "problem"
    assert found.remedy == (
        "pip uninstall -y onnxruntime-training onnxruntime-gpu && "
        "pip install --force-reinstall --no-deps onnxruntime-training==1.19.2"
    )


def test_the_inference_onnxruntime_alone_is_replaced(versions):
    versions.update({"onnxruntime-training": None, "onnxruntime": "1.23.0"})
    found = only(checks.check_onnxruntime())
    assert found.status == "problem"
    assert found.remedy.startswith("pip uninstall -y onnxruntime && pip install onnxruntime-tr")


def test_another_release_of_onnxruntime_training_is_a_problem(versions):
    versions["onnxruntime-training"] = "1.17.1"
    assert only(checks.check_onnxruntime()).status == "problem"
    versions["onnxruntime-training"] = "1.19.2+cu118"
    assert only(checks.check_onnxruntime()).status == "ok"


def test_an_onnxruntime_with_files_missing_is_a_problem(monkeypatch):
    monkeypatch.setattr(checks, "_has_ortmodule", lambda: False)
    found = only(checks.check_onnxruntime())
    assert (found.status, "--force-reinstall" in found.remedy) == ("problem", True)


def test_ranges_come_from_the_packages_own_metadata(versions):
    versions.update({"torch": "2.4.1", "peft": None, "tqdm": "0.1", "transformers": "5.1.0rc1"})
    findings = list(checks.check_packages())
    assert named(findings, "torch").status == "problem"
    required = next(r for r in importlib.metadata.requires("ort_train") if r.startswith("torch<"))
    assert named(findings, "torch").remedy == f"pip install '{required}'"
    assert named(findings, "peft").detail == "not installed"
    assert named(findings, "tqdm").status == "problem"  # shown because it's wrong
    assert named(findings, "transformers").status == "ok"


def test_run_from_a_folder_says_so(versions):
    versions["ort_train"] = None
    found = only(checks.check_packages())
    assert (found.status, "pip install -e ." in found.remedy) == ("problem", True)


def test_a_missing_compiler_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    found = only(checks.check_compiler())
    assert (found.status, found.remedy) == ("warning", "apt-get install g++")


def test_a_gpu_machine_with_a_cpu_installation(monkeypatch):
    from ort_train.ortmodule import cuda

    torch = pytest.importorskip("torch")
    monkeypatch.setattr(cuda, "driver_present", lambda: True)
    monkeypatch.setattr(cuda, "missing_libraries", lambda: ["libcudnn.so.8"])
    monkeypatch.setattr(torch.version, "cuda", None)
    findings = list(checks.check_gpu())
    assert named(findings, "CUDA 11 libraries").remedy == "pip install 'ort_train[gpu]'"
    assert "CPU build" in named(findings, "GPU").detail
    assert {check.status for check in findings} == {"problem"}


@pytest.mark.parametrize(("capability", "statuses"), [((9, 0), {"ok"}), ((12, 0), {"warning"})])
def test_a_gpu_newer_than_the_wheel_is_a_warning(monkeypatch, capability, statuses):
    from ort_train.ortmodule import cuda

    torch = pytest.importorskip("torch")
    monkeypatch.setattr(cuda, "driver_present", lambda: True)
    monkeypatch.setattr(cuda, "missing_libraries", lambda: [])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability)
    findings = [check for check in checks.check_gpu() if check.name == "GPU"]
    assert {check.status for check in findings} - {"ok"} == statuses - {"ok"}


def test_a_gpu_without_driver_is_a_warning(monkeypatch):
    from ort_train.ortmodule import cuda

    monkeypatch.setattr(cuda, "driver_present", lambda: False)
    monkeypatch.setattr(checks, "_nvidia_device", lambda: True)
    assert only(checks.check_gpu()).status == "warning"


def test_backends_tell_what_they_cant(monkeypatch):
    from ort_train import backends

    monkeypatch.setattr(
        backends, "available", lambda name, precision, device: (name == "eager", "no luck")
    )
    findings = list(checks.check_backends())
    statuses = [named(findings, f"backend {n} on cpu").status for n in ("eager", "compile", "ort")]
    assert statuses == ["ok", "warning", "problem"]
    assert "fp32, bf16, fp16: no luck" in named(findings, "backend ort on cpu").detail


@pytest.mark.parametrize(
    ("reason", "status"),
    [(None, "ok"), ("HF_HUB_OFFLINE is set", "ok"), ("gives no answer within 3 s", "warning")],
)
def test_the_hub(reason, status):
    answer: Future[str | None] = Future()
    answer.set_result(reason)
    assert only(checks.check_hub(answer)).status == status


def test_little_disk_space_is_a_warning(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**30))
    assert {check.status for check in checks.check_disk()} == {"warning"}


def test_optional_packages_name_the_extra_that_brings_them(versions):
    versions.update({"deepspeed": None, "bitsandbytes": None})
    findings = list(checks.check_optional())
    assert "pip install 'ort_train[deepspeed]'" in named(findings, "deepspeed").detail
    assert named(findings, "deepspeed").status == "ok"
    versions["deepspeed"] = "0.1"
    assert named(checks.check_optional(), "deepspeed").status == "warning"


def test_a_check_that_raises_is_a_problem(monkeypatch):
    def broken():
        yield Check("first", "ok", "")
        raise OSError("libfoo.so: wrong ELF class")

    monkeypatch.setattr(checks, "check_ortmodule", broken)
    findings = doctor.run_checks()
    assert named(findings, "first").status == "ok"
    assert "OSError: libfoo.so" in named(findings, "ORTModule").detail


FINDINGS = [
    Check("one", "ok", "fine"),
    Check("two", "warning", "[gpu] is no markup", "pip install 'ort_train[gpu]'"),
    Check("three", "problem", "broken", "mend " + "very " * 30 + "long"),
]


@pytest.mark.parametrize("show", [doctor._print_table, doctor._print_plain])
def test_text_output_keeps_commands_whole(show, capsys):
    show(FINDINGS)
    output = capsys.readouterr().out
    assert "pip install 'ort_train[gpu]'" in output
    assert "very " * 30 in output
    assert output.splitlines()[-1] == "1 problem, 1 warning"


@pytest.mark.parametrize(("number", "code"), [(1, 0), (2, 0), (3, 1)])
def test_exit_code_and_json(number, code, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "run_checks", lambda: FINDINGS[:number])
    assert doctor.main(argparse.Namespace(json=True)) == code
    printed = json.loads(capsys.readouterr().out)
    assert [check["name"] for check in printed] == ["one", "two", "three"][:number]
    assert printed[0] == {"name": "one", "status": "ok", "detail": "fine", "remedy": ""}


def test_a_python_with_nothing_installed_gets_its_findings():
    code = "from ort_train.cli import main; import sys; sys.exit(main(['doctor']))"
    result = subprocess.run(
        [sys.executable, "-S", "-E", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "problem  onnxruntime: installed: none" in result.stdout
    assert "No module named 'torch'" in result.stdout
    assert "Traceback" not in result.stderr


def test_an_onnxruntime_that_comes_first_is_named(tmp_path, monkeypatch):
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = checks.check_onnxruntime()
    assert found.status == "problem"
    assert f"{tmp_path / 'onnxruntime'} is imported in its place" in found.detail
    assert f"take {tmp_path} off PYTHONPATH" in found.remedy


def test_nothing_is_folded_in_a_pipe(capsys):
    detail = "long " * 40
    doctor._print_table([Check("one", "ok", detail)])
    assert detail.strip() in capsys.readouterr().out

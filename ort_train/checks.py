"""Checks of an installation and its machine.

Each stands by itself and imports what it looks at when it runs, so that the others still tell
where torch or ONNX Runtime can't be imported, or on a Python that nothing was installed for.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ort_train import __version__, cache, toolchain

if TYPE_CHECKING:
    from packaging.requirements import Requirement

Status = Literal["ok", "warning", "problem"]

_SUPPORTED_PYTHONS = ((3, 10), (3, 11))
#: They all install the import package `onnxruntime`, and overwrite each other's files.
_ONNXRUNTIMES = (
    "onnxruntime-training",
    "onnxruntime-training-cpu",
    "onnxruntime",
    "onnxruntime-gpu",
)
_INSTALL = "pip install onnxruntime-training==1.19.2"
_REINSTALL = "pip install --force-reinstall --no-deps onnxruntime-training==1.19.2"
_OPTIONAL = {
    "deepspeed": "ZeRO, the deepspeed launcher",
    "bitsandbytes": "4-bit weights",
    "triton": "torch.compile and fused kernels on a GPU",
    "tensorboard": "report_to=tensorboard",
}
_MIN_MEMORY_GIB = 4.0
_MIN_DISK_GIB = 5.0
_HUB_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Check:
    """A finding.

    Attributes:
        status: "problem" where something has to be mended; "warning" where something can't be
            had that a run may do without.
        remedy: a command or a setting; empty where there is nothing to do.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


def check_python() -> Iterator[Check]:
    version = platform.python_version()
    if sys.version_info[:2] in _SUPPORTED_PYTHONS:
        yield Check("Python", "ok", f"{version} in {sys.prefix}")
    else:
        yield Check(
            "Python",
            "problem",
            f"{version}, but onnxruntime-training 1.19.2, the last release, has wheels up to "
            "Python 3.11, and today's transformers needs 3.10",
            "make an environment with Python 3.11: apt-get install python3.11-venv && python3.11 "
            "-m venv .venv (or: uv venv --python 3.11; conda create -n ort python=3.11)",
        )
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        yield Check(
            "Platform",
            "problem",
            f"{sys.platform} on {platform.machine()}: onnxruntime-training has wheels for Linux "
            "on x86-64 only",
            "use a Linux x86-64 machine, a container or WSL 2",
        )


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements() -> list[Requirement]:
    """What this package's installed metadata asks for, extras included."""
    from packaging.requirements import Requirement

    return [Requirement(line) for line in importlib.metadata.requires("ort_train") or ()]


def check_onnxruntime() -> Iterator[Check]:
    found = {name: version for name in _ONNXRUNTIMES if (version := installed_version(name))}
    training = next((name for name in found if "training" in name), None)
    listed = ", ".join(f"{name} {version}" for name, version in found.items()) or "none"
    if len(found) > 1:
        yield Check(
            "onnxruntime",
            "problem",
            f"{listed} share one import package and break each other",
            f"pip uninstall -y {' '.join(found)} && {_REINSTALL}",
        )
    elif training is None:
        yield Check(
            "onnxruntime",
            "problem",
            f"installed: {listed}; onnxruntime-training is needed",
            (f"pip uninstall -y {' '.join(found)} && " if found else "") + _INSTALL,
        )
    elif found[training].split("+")[0] != "1.19.2":
        yield Check(
            "onnxruntime",
            "problem",
            f"{listed}: the patches that it needs on today's torch are written for 1.19.2",
            _REINSTALL,
        )
    elif (other := _shadowing_onnxruntime(training)) is not None:
        yield Check(
            "onnxruntime",
            "problem",
            f"{listed}, but {other} is imported in its place",
            f"take {other.parent} off PYTHONPATH, or start from another folder",
        )
    elif not _has_ortmodule():
        yield Check(
            "onnxruntime",
            "problem",
            f"{listed}, but files of it are missing, as after another onnxruntime was removed",
            _REINSTALL,
        )
    else:
        yield Check("onnxruntime", "ok", listed)


def _onnxruntime_folder() -> Path | None:
    """Where Python finds the package that would be imported."""
    spec = importlib.util.find_spec("onnxruntime")
    return Path(spec.origin).parent if spec and spec.origin else None


def _shadowing_onnxruntime(distribution: str) -> Path | None:
    """A folder of that name which stands before the installed one on Python's path."""
    folder = _onnxruntime_folder()
    try:
        installed = Path(str(importlib.metadata.distribution(distribution).locate_file("")))
    except importlib.metadata.PackageNotFoundError:
        return None
    is_other = folder is not None and folder.parent.resolve() != installed.resolve()
    return folder if is_other else None


def _has_ortmodule() -> bool:
    folder = _onnxruntime_folder()
    return folder is not None and (folder / "training/ortmodule/ortmodule.py").is_file()


def check_packages() -> Iterator[Check]:
    if installed_version("ort_train") is None:
        yield Check(
            "ort_train",
            "problem",
            f"{__version__} runs from a folder, not installed: its requirements are not known",
            "pip install -e . -c constraints.txt, in that folder",
        )
        return
    yield Check("ort_train", "ok", __version__)
    shown = ("torch", "transformers", "accelerate", "peft", "onnx")
    others = 0
    for requirement in _requirements():
        marker = requirement.marker
        if requirement.name in _ONNXRUNTIMES or (marker and not marker.evaluate({"extra": ""})):
            continue
        version = installed_version(requirement.name)
        remedy = f"pip install '{requirement}'"
        if version is None:
            yield Check(requirement.name, "problem", "not installed", remedy)
        elif not requirement.specifier.contains(version, prereleases=True):
            detail = f"{version}, outside of the supported {requirement.specifier}"
            yield Check(requirement.name, "problem", detail, remedy)
        elif requirement.name in shown:
            yield Check(requirement.name, "ok", f"{version} ({requirement.specifier})")
        else:
            others += 1
    yield Check("other packages", "ok", f"{others} in range")


def check_compiler() -> Iterator[Check]:
    missing = toolchain.missing_tool()
    name = "C++ compiler"
    if missing is not None:
        what, _, remedy = missing.partition(": ")
        yield Check(
            name, "warning", f"{what} for torch.compile on CPU and compiled_extensions", remedy
        )
    else:
        yield Check(name, "ok", f"{' '.join(toolchain.find_compiler() or ())}, Python headers")


def check_backends() -> Iterator[Check]:
    import torch

    from ort_train.auto.candidates import CONCRETE_BACKENDS
    from ort_train.backends import available

    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for backend in CONCRETE_BACKENDS:
            answers = {name: available(backend, name, device) for name in ("fp32", "bf16", "fp16")}
            runs = [name for name, (can_run, _) in answers.items() if can_run]
            reasons = {name: reason for name, (can_run, reason) in answers.items() if not can_run}
            details = [", ".join(runs)] if runs else []
            if reasons:  # the first explains the others
                details.append(f"not {', '.join(reasons)}: {next(iter(reasons.values()))}")
            status: Status = "ok" if runs else "problem" if backend == "ort" else "warning"
            yield Check(f"backend {backend} on {device}", status, "; ".join(details))


def check_ortmodule() -> Iterator[Check]:
    from ort_train.ortmodule import upstream

    if upstream.unavailable_reason() is None:  # else it stands with the backends
        upstream.load()
        yield Check("ORTModule", "ok", "can be imported")


#: Of the GPUs that CUDA 11.8 knows (Hopper).
_NEWEST_CAPABILITY = (9, 0)


def _nvidia_device() -> bool:
    """Whether an NVIDIA display controller is on the PCI bus, driver or not."""
    for device in Path("/sys/bus/pci/devices").glob("*"):
        with contextlib.suppress(OSError):
            vendor, kind = (device / "vendor").read_text(), (device / "class").read_text()
            if vendor.strip() == "0x10de" and kind.startswith("0x03"):
                return True
    return False


def check_gpu() -> Iterator[Check]:
    from ort_train.ortmodule import cuda

    if not cuda.driver_present():
        if _nvidia_device():
            yield Check(
                "GPU",
                "warning",
                f"an NVIDIA GPU without its driver ({cuda.DRIVER}): training runs on the CPU",
                "install the NVIDIA driver; in a container, start it with --gpus all",
            )
        else:
            yield Check("GPU", "ok", "none: training runs on the CPU")
        return
    missing = cuda.missing_libraries()
    if missing:
        detail = f"the CUDA 11 libraries {', '.join(missing)} are missing: no backend ort on GPU"
        yield Check("CUDA 11 libraries", "problem", detail, cuda.REMEDY)
    else:
        yield Check("CUDA 11 libraries", "ok", "all found")
    import torch

    if torch.version.cuda is None:
        yield Check(
            "GPU",
            "problem",
            f"an NVIDIA driver, but torch {torch.__version__} is a CPU build",
            f"pip install --force-reinstall torch=={torch.__version__.split('+')[0]}",
        )
    elif not torch.cuda.is_available():
        detail = f"an NVIDIA driver, but torch {torch.__version__} finds no usable GPU"
        yield Check("GPU", "problem", detail, "nvidia-smi tells whether driver and GPU work")
    else:
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        detail = f"{', '.join(names)}; torch for CUDA {torch.version.cuda}"
        yield Check("GPU", "ok", f"{detail}; unverified on GPUs so far: docs/gpu.md")
        yield from _check_capability()


def _check_capability() -> Iterator[Check]:
    import torch

    for i in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(i)
        if capability > _NEWEST_CAPABILITY:
            yield Check(
                "GPU",
                "warning",
                f"{torch.cuda.get_device_name(i)} has compute capability "
                f"{'.'.join(map(str, capability))}, and onnxruntime-training 1.19.2 is built for "
                f"up to {'.'.join(map(str, _NEWEST_CAPABILITY))}: backend ort may not run there",
                "train with train.backend=compile on it, or with backend ort on an older GPU",
            )


def check_machine() -> Iterator[Check]:
    pages = {name: os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES")}
    total_gib, free_gib = (n * os.sysconf("SC_PAGE_SIZE") / 2**30 for n in pages.values())
    detail = f"{total_gib:.1f} GiB, {len(os.sched_getaffinity(0))} cores"
    if total_gib < _MIN_MEMORY_GIB:
        yield Check(
            "machine", "warning", detail, "train small models, or --tiny: memory will be short"
        )
    else:
        yield Check("machine", "ok", f"{detail}; {free_gib:.1f} GiB unused")


def check_disk() -> Iterator[Check]:
    for name, folder in (("disk", Path.cwd()), ("cache disk", cache.root())):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free_gib = shutil.disk_usage(existing).free / 2**30
        detail = f"{free_gib:.1f} GiB free at {existing}"
        if not os.access(existing, os.W_OK):
            yield Check(name, "warning", f"{existing} can't be written to", "chmod or move it")
        elif free_gib < _MIN_DISK_GIB:
            yield Check(name, "warning", detail, "free space: a checkpoint is 3 times its model")
        else:
            yield Check(name, "ok", detail)


def check_hub(problem: Future[str | None]) -> Iterator[Check]:
    reason = problem.result()
    if reason is None:
        yield Check("Hugging Face hub", "ok", "reachable")
    elif "HF_HUB_OFFLINE" in reason:
        yield Check("Hugging Face hub", "ok", f"not asked: {reason}")
    else:
        yield Check(
            "Hugging Face hub",
            "warning",
            reason,
            "recipes fall back to data.folder and to offline text; HF_HUB_OFFLINE=1 saves waiting",
        )


def hub_problem() -> str | None:
    """What keeps the hub from answering, or None; takes up to 3 s."""
    from ort_train.data import corpora as data

    return data.hub_problem("datasets/Salesforce/wikitext", _HUB_TIMEOUT_S)


def check_extensions() -> Iterator[Check]:
    from ort_train.ortmodule import extensions

    if not _has_ortmodule():
        return
    folder = extensions.cached()
    detail = f"built, in {folder}" if folder else "not built; needed by compiled_extensions only"
    yield Check("compiled extensions", "ok", detail)


def _extras() -> dict[str, tuple[str, Requirement]]:
    """Package -> the extra that brings it, and in which versions."""
    names = importlib.metadata.metadata("ort_train").get_all("Provides-Extra") or ()
    return {
        requirement.name: (extra, requirement)
        for extra in names
        if extra not in ("test", "dev")
        for requirement in _requirements()
        if requirement.marker and requirement.marker.evaluate({"extra": extra})
    }


def check_optional() -> Iterator[Check]:
    extras = _extras() if installed_version("ort_train") else {}
    for name, purpose in _OPTIONAL.items():
        version = installed_version(name)
        command, specifier = f"pip install {name}", None
        if name in extras:
            extra, requirement = extras[name]
            command, specifier = f"pip install 'ort_train[{extra}]'", requirement.specifier
        if version is None:
            yield Check(name, "ok", f"not installed, optional ({purpose}): {command}")
        elif specifier is not None and not specifier.contains(version, prereleases=True):
            detail = f"{version}, outside of the supported {specifier}"
            yield Check(name, "warning", detail, command)
        else:
            yield Check(name, "ok", f"{version} ({purpose})")

"""How a record came about: the command, when, on which machine, with which versions.

A record is published, so it holds no host name, no user name and no absolute path.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

# The flags that decide which matrix kernels torch (MKL, oneDNN) and ORT (MLAS) take.
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
# The folders of an absolute path that no known directory begins; not those of a URL.
_OTHER_DIRECTORIES = re.compile(r"(?<![\w.~>:/])/(?:[^\s/\"']+/)+")
PACKAGE_ROOT = Path(__file__).resolve().parents[2]


def now() -> str:
    """For `started_at`."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def envelope(started_at: str, machine: Mapping[str, Any]) -> dict[str, Any]:
    """What every kind of record says of how it came about; see `record.assemble`."""
    git_sha, git_dirty = git_state()
    return {
        "command": command(),
        "started_at": started_at,
        "machine": machine,
        "versions": versions(),
        "git_sha": git_sha,
        "git_dirty": git_dirty,
        "environment": thread_variables(),
    }


def machine(threads: int | None = None, gpu: str | None = None) -> dict[str, Any]:
    """This machine, as far as it bears on speed."""
    cpu, flags = _cpu()
    return {
        "cpu": cpu,
        "cores": _cores(),
        "threads": threads,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": gpu,
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "os": _os(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count() or 1


def _cpu() -> tuple[str, set[str]]:
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:  # not Linux
        pass
    model = fields.get("model name") or platform.processor() or platform.machine()
    return model, set((fields.get("flags") or fields.get("Features") or "").split())


def _os() -> str:
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        system = platform.system()
    return f"{system}, {platform.machine()}"


def thread_variables() -> dict[str, str]:
    """The variables that tell the threads of torch and its libraries how many to be and to wait."""
    prefixes = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_")
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith(prefixes)}


def versions() -> dict[str, str | None]:
    """Versions of what decides speed and numbers; null for what isn't installed."""
    import ort_train

    names = ("torch", "transformers", "onnxruntime", "onnx", "peft", "numpy")
    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= {name: _version(name) for name in names}
    # The training wheel carries the module `onnxruntime` under another distribution's name.
    found["onnxruntime"] = _version("onnxruntime-training") or found["onnxruntime"]
    found["ort_train"] = getattr(ort_train, "__version__", None) or _version("ort_train")
    return found


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def git_state() -> tuple[str | None, bool | None]:
    """The commit that this package runs from, and whether tracked files differ from it.

    Returns:
        (None, None) outside a checkout.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(PACKAGE_ROOT), *arguments],
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
        ).stdout.strip()

    try:
        # An environment may stand inside somebody else's repository: this file must be tracked.
        git("ls-files", "--error-unmatch", str(Path(__file__).resolve()))
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def command() -> str:
    """The command line of this process, without directories of this machine."""
    run_as_module = sys.modules["__main__"].__spec__
    if run_as_module is not None:
        program = f"python -m {run_as_module.name.removesuffix('.__main__')}"
    else:
        program = Path(sys.argv[0]).name or "python"
    return " ".join([program, *(scrub(word) for word in sys.argv[1:])])


def scrub(text: str) -> str:
    """Shorten the directories of this machine, so that a record can be published."""
    directories = {
        sys.prefix: "<env>",
        sys.base_prefix: "<python>",
        tempfile.gettempdir(): "<tmp>",
        str(PACKAGE_ROOT): "<ort_train>",
        str(Path.cwd()): ".",
        str(Path.home()): "~",
    }
    # From the innermost out: an environment may stand in the checkout, that in the temporary one.
    for directory, short in sorted(directories.items(), key=lambda item: -len(item[0])):
        if len(directory) > 1:  # "/" as home or working directory names nothing
            text = text.replace(directory, short)
    return _OTHER_DIRECTORIES.sub("", text)

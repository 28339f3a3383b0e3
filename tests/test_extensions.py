"""The cache of ORTModule's C++ extension; the real build is used in test_functions."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest

from ort_train import toolchain
from ort_train.errors import BackendUnavailableError
from ort_train.ortmodule import extensions


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """An empty cache and a compiler that writes a stand-in; the folders that it was given."""
    folders: list[Path] = []

    def compile_stand_in(compiler: list[str], source: Path, folder: Path) -> None:
        folders.append(folder)
        time.sleep(0.05)
        library = folder / extensions._LIBRARY
        library.write_bytes(b"machine code")
        (folder / extensions._CHECKSUM).write_text(extensions._checksum(library))

    monkeypatch.setenv("ORT_TRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(extensions, "missing_tool", lambda: None)
    monkeypatch.setattr(extensions, "find_compiler", lambda: ["true"])
    monkeypatch.setattr(extensions, "_compile", compile_stand_in)
    return folders


def test_a_build_is_made_once_and_leaves_nothing_else(builds):
    assert extensions.cached() is None
    library = extensions.build()
    assert library.read_bytes() == b"machine code"
    assert extensions.build() == library
    assert extensions.cached() == library.parent
    assert len(builds) == 1
    assert sorted(p.suffix for p in extensions.cache_folder().iterdir() if p.is_file()) == [".lock"]
    assert [p for p in extensions.cache_folder().iterdir() if p.is_dir()] == [library.parent]


def test_a_cached_build_needs_no_compiler(builds, monkeypatch):
    """As on the nodes of a cluster that share a home."""
    library = extensions.build()
    monkeypatch.setattr(extensions, "missing_tool", lambda: "a C++ compiler is needed")
    assert extensions.build() == library  # no headers, but a compiler
    monkeypatch.setattr(extensions, "find_compiler", lambda: None)
    assert extensions.build() == library
    library.write_bytes(b"machine")  # damaged: not taken
    with pytest.raises(BackendUnavailableError, match=r"a C\+\+ compiler"):
        extensions.build()
    assert len(builds) == 1


def test_another_compiler_makes_a_build_of_its_own(builds, monkeypatch):
    first = extensions.build()
    monkeypatch.setattr(extensions, "find_compiler", lambda: ["echo"])
    assert extensions.build() != first
    assert len(builds) == 2


def test_concurrent_builds_wait_for_the_first(builds):
    threads = [threading.Thread(target=extensions.build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1


@pytest.mark.parametrize("damage", ["truncated", "no checksum", "no library"])
def test_a_damaged_build_is_made_anew(builds, damage, caplog):
    library = extensions.build()
    if damage == "truncated":
        library.write_bytes(b"machine")
    else:
        name = extensions._CHECKSUM if damage == "no checksum" else extensions._LIBRARY
        (library.parent / name).unlink()
    assert extensions.build().read_bytes() == b"machine code"
    assert len(builds) == 2
    assert "damaged" in caplog.text


def test_other_versions_have_other_builds(builds, monkeypatch):
    first = extensions.build()
    monkeypatch.setattr(extensions, "_HEADER", "// another")
    assert extensions.build() != first
    monkeypatch.setattr(extensions.torch, "__version__", "2.12.1+cpu")
    assert "torch2.12.1+cpu" in extensions.build().parent.name
    assert len(builds) == 3


def test_without_a_compiler_the_way_out_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("ORT_TRAIN_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BackendUnavailableError, match=r"apt-get install g\+\+"):
        extensions.build()


def test_without_headers_the_way_out_is_named(monkeypatch, tmp_path):
    paths = {"include": str(tmp_path)}
    monkeypatch.setenv("ORT_TRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(toolchain, "find_compiler", lambda: ["g++"])
    monkeypatch.setattr(toolchain.sysconfig, "get_paths", lambda: paths)
    with pytest.raises(BackendUnavailableError, match=r"apt-get install python3\.\d+-dev"):
        extensions.build()


def test_a_failed_build_shows_the_compilers_errors_and_publishes_nothing(monkeypatch, tmp_path):
    script = tmp_path / "compiler"
    script.write_text("#!/bin/sh\necho 'all.cc:1: error: no such thing' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("ORT_TRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(extensions, "missing_tool", lambda: None)
    monkeypatch.setattr(extensions, "find_compiler", lambda: [str(script)])
    with pytest.raises(BackendUnavailableError, match="no such thing"):
        extensions.build()
    assert not [p for p in extensions.cache_folder().iterdir() if p.is_dir()]


def test_the_compiler_comes_from_the_environment_first(monkeypatch):
    monkeypatch.setenv("CXX", f"{sys.executable} -x c++")
    assert toolchain.find_compiler() == [sys.executable, "-x", "c++"]


@pytest.mark.slow
def test_the_real_extension_is_built_and_has_its_runners():
    if extensions.missing_tool():
        pytest.skip(f"no build here: {extensions.missing_tool()}")
    module = extensions.load()
    assert module.get_custom_function_forward_runner() != 0
    assert module.get_custom_function_backward_runner() != 0

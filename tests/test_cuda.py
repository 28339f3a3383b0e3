"""Preloading of the CUDA 11 libraries, in child processes: what is loaded stays loaded."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ort_train.errors import BackendUnavailableError
from ort_train.ortmodule import cuda

SITE = os.environ.get("ORT_TRAIN_CUDA11_SITE")  # a folder that the wheels were installed into
HAS_WHEELS = SITE is not None or next(cuda._candidates("cudnn", "libcudnn.so.8")).startswith("/")


def run_child(code: str, *site: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code with more folders on its path."""
    path = os.pathsep.join([*site, str(Path(__file__).resolve().parents[1])])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def compile_library(path: Path, name: str, source: str, *flags: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    source_path = path.parent / f"{name}.c"
    source_path.write_text(source)
    subprocess.run(
        ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", path, source_path, *flags],
        check=True,
    )


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site folder of libraries with the real names, a driver, and a provider that needs them."""
    if shutil.which("gcc") is None:
        pytest.skip("makes stand-in libraries with gcc, which is not installed")
    root = tmp_path_factory.mktemp("cuda11")
    built = []
    for number, (folder, name) in enumerate(cuda.LIBRARIES):
        path = root / "site/nvidia" / folder / "lib" / name
        compile_library(path, name, f"int symbol_{number}(void) {{ return {number}; }}")
        built.append(str(path))
    compile_library(root / "driver" / cuda.DRIVER, cuda.DRIVER, "int cuInit(int f) { return 0; }")
    calls = "".join(f"int symbol_{i}(void);" for i in range(len(built)))
    total = " + ".join(f"symbol_{i}()" for i in range(len(built)))
    compile_library(
        root / "provider.so", "provider.so", f"{calls} int total(void) {{ return {total}; }}",
        *built,
    )  # fmt: skip
    return root


def test_without_a_driver_nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(cuda, "driver_present", lambda: False)
    monkeypatch.setattr(cuda, "missing_libraries", lambda: pytest.fail("looked for libraries"))
    with pytest.raises(BackendUnavailableError, match="no NVIDIA driver"):
        cuda.preload()


def test_missing_libraries_are_named_with_the_extra(monkeypatch):
    monkeypatch.setattr(cuda, "driver_present", lambda: True)
    monkeypatch.setattr(cuda, "missing_libraries", lambda: ["libcudnn.so.8"])
    with pytest.raises(BackendUnavailableError, match=r"libcudnn\.so\.8 is.*ort_train\[gpu\]"):
        cuda.preload()


def test_a_library_that_needs_them_finds_the_preloaded_ones(stand_ins):
    load = f"import ctypes; print(ctypes.CDLL({str(stand_ins / 'provider.so')!r}).total())"
    driver = str(stand_ins / "driver")
    site = str(stand_ins / "site")
    without = run_child(load, site, LD_LIBRARY_PATH=driver)
    assert "cannot open shared object file" in without.stderr
    preload = "from ort_train.ortmodule import cuda; cuda.preload(); "
    after = run_child(preload + load, site, LD_LIBRARY_PATH=driver)
    assert after.stdout.split() == [str(sum(range(len(cuda.LIBRARIES))))], after.stderr


def test_they_are_found_where_the_linker_looks_too(stand_ins):
    folders = [stand_ins / "site/nvidia" / folder / "lib" for folder, _ in cuda.LIBRARIES]
    result = run_child(
        "from ort_train.ortmodule import cuda; print(cuda.missing_libraries())",
        LD_LIBRARY_PATH=os.pathsep.join(map(str, folders)),
    )
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    not HAS_WHEELS,
    reason="needs the nvidia-*-cu11 wheels (1.4 GB): pip install --target FOLDER them, and set "
    "ORT_TRAIN_CUDA11_SITE=FOLDER",
)
def test_the_real_provider_resolves_all_of_its_libraries():
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None
    capi = Path(str(spec.origin)).parent / "capi"
    # As onnxruntime does: the bridge first, for all to see. dlopen binds every symbol at once;
    # then the provider's constructors look for the driver.
    load = (
        "import ctypes, os; "
        f"[ctypes.CDLL(os.path.join({str(capi)!r}, f'libonnxruntime_providers_{{name}}.so'), "
        "os.RTLD_NOW | os.RTLD_GLOBAL) for name in ('shared', 'cuda')]"
    )
    session = (
        "import onnx, onnxruntime; from onnx import helper as h; "
        "x, y = (h.make_tensor_value_info(name, 1, [1]) for name in 'xy'); "
        "graph = h.make_graph([h.make_node('Relu', ['x'], ['y'])], 'g', [x], [y]); "
        "model = h.make_model(graph, opset_imports=[h.make_opsetid('', 17)], ir_version=8); "
        "onnxruntime.InferenceSession(model.SerializeToString(), "
        "providers=['CUDAExecutionProvider'])"
    )
    preload = "from ort_train.ortmodule import cuda; assert not cuda.missing_libraries(); "
    without = run_child(load)
    assert "libcublasLt.so.11: cannot open shared object file" in without.stderr
    after = run_child(preload + session, SITE or "")
    if cuda.driver_present():
        assert after.returncode == 0, after.stderr
    else:  # every library was found, and the driver alone is missing
        assert "cudaDriverWrapper" in after.stderr
        assert "cannot open shared object file" not in after.stderr
        assert "undefined symbol" not in after.stderr

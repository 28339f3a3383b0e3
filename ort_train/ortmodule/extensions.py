"""ORTModule's C++ extension for torch.autograd.Function, built on demand.

Upstream runs a Function inside a graph (operator PythonOp) through `torch_interop_utils`, C++ that
its wheel ships as source. `python -m torch_ort.configure` compiles it into site-packages, and from
torch 2.7 on ends in undefined symbols. Here the installed sources are adapted as text, compiled
out of tree and cached; nothing that is installed changes. The other extension, the ATen executor,
needs no compiler (aten.py).
"""

from __future__ import annotations

import functools
import glob
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import types
from pathlib import Path

import torch
from filelock import FileLock

from ort_train import cache
from ort_train.errors import BackendUnavailableError
from ort_train.toolchain import find_compiler, missing_tool

logger = logging.getLogger(__name__)

_NAME = "torch_interop_utils"
_LIBRARY = f"{_NAME}.so"
_CHECKSUM = "sha256"
_PACKAGE = "onnxruntime.training.ortmodule.torch_cpp_extensions"
#: Where ORTModule imports the extension from.
MODULE_NAME = f"{_PACKAGE}.{_NAME}"
_SOURCES = (
    "ctx_pool.cc",
    "custom_function_bw.cc",
    "custom_function_fw.cc",
    "custom_function_shared.cc",
    "torch_interop_utils.cc",
)

# In place of <torch/extension.h>, which brings in all of torch::nn and trebles the build's time.
_HEADER = """\
#pragma once
#include <ATen/ATen.h>
#include <ATen/DLConvertor.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_function.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>
#include <cstring>
#include <optional>
#include <ostream>
#include <typeinfo>

namespace ort_train {
// torch 2.7 and newer hide PyNode's typeinfo (pytorch/ort#198, microsoft/onnxruntime#24852), so no
// dynamic_cast to it links: the type is told by its name.
inline torch::autograd::PyNode* as_py_node(torch::autograd::Node* node) {
  return (node && !std::strcmp(typeid(*node).name(), "N5torch8autograd6PyNodeE"))
             ? static_cast<torch::autograd::PyNode*>(node)
             : nullptr;
}
// PyNode::obj is pyobj() in newer torch (2.13). Older ones inherit a pyobj() that is null here.
template <class N>
auto node_object(N* node, int) -> decltype(node->obj) { return node->obj; }
template <class N>
auto node_object(N* node, long) -> decltype(node->pyobj()) { return node->pyobj(); }
// THPFunction::cdata was a weak_ptr and is an owner in newer torch.
template <class C>
auto owner(C& cdata, int) -> decltype(cdata.lock()) { return cdata.lock(); }
template <class C>
C owner(C& cdata, long) { return cdata; }
// A Node's owner: std::shared_ptr, c10::intrusive_ptr in newer torch.
using NodePtr = std::decay_t<decltype(std::declval<const at::Tensor&>().grad_fn())>;
// torch::utils::tensor_fromDLPack is hidden in torch 2.7 and newer.
inline at::Tensor from_dlpack(PyObject* capsule) {
  auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
  TORCH_CHECK(managed != nullptr, "expected a capsule named dltensor");
  at::Tensor tensor = at::fromDLPack(managed);
  PyCapsule_SetName(capsule, "used_dltensor");
  return tensor;
}
// Upstream prints the exception of a Function and throws another. Kept, it reaches the user.
inline void keep_error() {
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  PyErr_NormalizeException(&type, &value, &traceback);
  if (traceback) PyException_SetTraceback(value, traceback);
  auto error = py::reinterpret_steal<py::object>(value);
  Py_XDECREF(type);
  Py_XDECREF(traceback);
  py::module_::import("ort_train.ortmodule.kernels.aten").attr("keep_error")(error);
}
// Upstream reports to stderr what is no error, and errors that are raised besides.
inline std::ostream& silence() {
  static std::ostream stream(nullptr);
  return stream;
}
}  // namespace ort_train
"""
_SUBSTITUTIONS = (
    ("<torch/extension.h>", '"ort_train.h"'),
    ("dynamic_cast<torch::autograd::PyNode*>", "ort_train::as_py_node"),
    ("py_node_fn->obj", "ort_train::node_object(py_node_fn, 0)"),
    ("py_fn->cdata.lock()", "ort_train::owner(py_fn->cdata, 0)"),
    ("std::shared_ptr<torch::autograd::Node>", "ort_train::NodePtr"),
    ("torch::utils::tensor_fromDLPack", "ort_train::from_dlpack"),
    ("PyErr_Print()", "ort_train::keep_error()"),
    ("std::cerr", "ort_train::silence()"),
    ("c10::optional", "std::optional"),
    ("c10::nullopt", "std::nullopt"),
)


def cache_folder() -> Path:
    """Where builds are kept: one folder for each combination of versions."""
    return cache.root() / "extensions"


def _command(compiler: list[str], folder: Path) -> list[str]:
    """The compiler's call: one translation unit, linked against the installed torch."""
    torch_folder = Path(torch.__file__).parent
    # torch's headers ask for C++20 from 2.12 on.
    standard = "c++20" if _torch_release() >= (2, 12) else "c++17"
    includes = (
        folder,
        torch_folder / "include",
        torch_folder / "include/torch/csrc/api/include",
        sysconfig.get_paths()["include"],
    )
    return [
        *compiler, "-shared", "-fPIC", "-O2", "-w", f"-std={standard}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-DTORCH_EXTENSION_NAME={_NAME}",
        *(f"-I{include}" for include in includes),
        str(folder / "all.cc"), "-o", str(folder / _LIBRARY), f"-L{torch_folder / 'lib'}",
        "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python",
    ]  # fmt: skip


def _torch_release() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _source_folder() -> Path:
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        raise BackendUnavailableError(
            "onnxruntime is not installed: pip install onnxruntime-training==1.19.2"
        )
    return Path(spec.origin).parent / "training/ortmodule/torch_cpp_extensions/cpu" / _NAME


def _key(source: Path) -> str:
    """Names a build by everything that its outcome depends on, but the compiler."""
    parts = [
        torch.__version__,
        str(torch.compiled_with_cxx11_abi()),
        sys.implementation.cache_tag,
        sysconfig.get_platform(),
        *_command([], Path("build")),
        _HEADER,
        repr(_SUBSTITUTIONS),
        *((source / name).read_text(encoding="utf-8") for name in _SOURCES),
    ]
    return f"torch{torch.__version__}-{sys.implementation.cache_tag}-{_digest(parts)}"


def _compiler_key(compiler: list[str]) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    return _digest([*compiler, version.stdout])


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _checksum(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _is_whole(folder: Path) -> bool:
    """Whether a cached build is what was built: loading a truncated library ends the process."""
    try:
        return (folder / _CHECKSUM).read_text() == _checksum(folder / _LIBRARY)
    except OSError:
        return False


def _compile(compiler: list[str], source: Path, folder: Path) -> None:
    """Put the extension and its checksum into an empty folder."""
    (folder / "ort_train.h").write_text(_HEADER)
    for path in source.iterdir():
        if path.suffix in (".cc", ".h"):
            text = path.read_text(encoding="utf-8")
            for old, new in _SUBSTITUTIONS:
                text = text.replace(old, new)
            (folder / path.name).write_text(text, encoding="utf-8")
    (folder / "all.cc").write_text("".join(f'#include "{name}"\n' for name in _SOURCES))
    result = subprocess.run(_command(compiler, folder), capture_output=True, text=True, check=False)
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if "error" in line]
        report = "\n".join((errors or result.stderr.splitlines())[:10])
        raise BackendUnavailableError(
            f"compiled_extensions: {compiler[0]} can't build ORTModule's extension for torch "
            f"{torch.__version__}; another compiler can be named in the variable CXX:\n{report}"
        )
    (folder / _CHECKSUM).write_text(_checksum(folder / _LIBRARY))


def cached() -> Path | None:
    """The folder of the build for what is installed here, or None where there is none.

    Of this machine's compiler; without one, of any.
    """
    key, compiler = _key(_source_folder()), find_compiler()
    if compiler is not None:
        folders = [cache_folder() / f"{key}-{_compiler_key(compiler)}"]
    else:
        folders = sorted(cache_folder().glob(f"{glob.escape(key)}-*"))
    return next(filter(_is_whole, folders), None)


def build() -> Path:
    """The extension's library for the installed torch, compiled where no whole one is cached.

    Builds of other processes are waited for. A build becomes visible all at once.

    Raises:
        BackendUnavailableError: without a compiler or Python's headers, or where the build fails.
    """
    if (whole := cached()) is not None:
        return whole / _LIBRARY
    missing = missing_tool()
    compiler = find_compiler()
    if missing is not None or compiler is None:
        raise BackendUnavailableError(
            f"compiled_extensions builds ORTModule's C++ extension, and {missing}"
        )
    source = _source_folder()
    root = cache_folder()
    folder = root / f"{_key(source)}-{_compiler_key(compiler)}"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if _is_whole(folder):
            return folder / _LIBRARY
        if folder.exists():
            logger.warning("%s is damaged: it is built anew", folder)
            shutil.rmtree(folder)
        logger.warning(
            "building ORTModule's extension for torch %s: takes a minute or two, once",
            torch.__version__,
        )
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=root, prefix="build-") as temporary:
            _compile(compiler, source, Path(temporary))
            published = Path(temporary) / "published"
            published.mkdir()
            for name in (_LIBRARY, _CHECKSUM):
                os.replace(Path(temporary) / name, published / name)
            os.replace(published, folder)
        logger.warning("built it in %.0f s, in %s", time.perf_counter() - started, folder)
    return folder / _LIBRARY


@functools.cache
def load() -> types.ModuleType:
    """The extension as a module, built first where it has to be.

    Raises:
        BackendUnavailableError: see :func:`build`.
    """
    library = build()
    spec = importlib.util.spec_from_file_location(_NAME, library)
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise BackendUnavailableError(
            f"compiled_extensions: {library} can't be loaded ({error}); remove its folder to have "
            "it built anew"
        ) from error
    return module


def enable() -> None:
    """Put the extension where ORTModule looks for it, in place of the stand-in."""
    sys.modules[MODULE_NAME] = load()

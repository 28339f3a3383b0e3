"""What using ORTModule leaves behind in the process: nothing outside of onnxruntime."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from ort_train import OrtOptions
from ort_train.errors import BackendUnavailableError
from ort_train.ortmodule import upstream

_PROBE = """
import logging, os, random, sys
import numpy, torch, torch.onnx, torch.utils.checkpoint

def state():
    from torch.onnx._internal.torchscript_exporter import registration
    registry = registration.registry
    symbolics = {
        (name, opset): function
        for name in registry.all_functions()
        for opset, function in registry.get_function_group(name)._functions._overrides.items()
    }
    return {
        "manual_seed": torch.manual_seed,
        "cuda.manual_seed": torch.cuda.manual_seed,
        "export": torch.onnx.export,
        "checkpoint": torch.utils.checkpoint.checkpoint,
        "checkpoint.CheckpointFunction": torch.utils.checkpoint.CheckpointFunction,
        "autograd.Function.apply": torch.autograd.Function.__dict__.get("apply"),
        "aliases": sorted(
            name for name in sys.modules
            if name.startswith("torch.onnx.") and "torchscript_exporter" not in name
            and ("_internal." in name or name.split(".")[-1] in ("_globals", "_type_utils"))
            and sys.modules[name].__name__ != name
        ),
        "attributes": sorted(set(dir(torch.onnx)) & {"_globals", "_type_utils"}),
        "environment": dict(os.environ),
        "root handlers": list(logging.getLogger().handlers),
        "root level": logging.getLogger().level,
        "symbolics": symbolics,
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "torch rng": torch.get_rng_state().tolist(),
        "numpy rng": str(numpy.random.get_state()),
        "random": random.getstate(),
        "deepspeed": "deepspeed" in sys.modules,
        "excepthook": sys.excepthook,
        "stdout": sys.stdout,
        "nvtx": torch.cuda.nvtx.range_push,
    }

def compare(before, what):
    after = state()
    for name, value in before.items():
        if after[name] != value:
            if isinstance(value, dict):
                keys = value.keys() | after[name].keys()
                keys = {key for key in keys if value.get(key) != after[name].get(key)}
                print(what, "changed", name, sorted(map(str, keys))[:5])
            else:
                print(what, "changed", name, str(value)[:80], "->", str(after[name])[:80])

class Good(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(9, 4)
        self.linear = torch.nn.Linear(4, 2)
    def forward(self, ids):
        return self.linear(self.embedding(ids)).sum()

class RaisesInTrace(Good):
    def forward(self, ids):
        raise FloatingPointError("in forward")

class NoSuchOperator(Good):
    def forward(self, ids):
        return torch.fft.rfft(self.linear.weight).abs().sum()

import torch.onnx._internal.torchscript_exporter.symbolic_helper
from ort_train import wrap
ids = torch.tensor([[1, 2]])
modules = {kind.__name__: kind() for kind in (Good, RaisesInTrace, NoSuchOperator)}
before = state()
for name, module in modules.items():
    wrap(module, backend="ort")
    compare(before, name + " wrap")
    try:
        module(ids).backward()
        print(name, "trained")
    except Exception as error:
        print(name, type(error).__name__)
    compare(before, name)
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def test_using_ort_changes_nothing_in_the_process():
    """Also where the export fails: in the module's own forward, or for want of an operator."""
    done = run_python(_PROBE)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if "changed" in line] == []
    assert lines == [
        "Good trained",
        "RaisesInTrace UnsupportedModelError",
        "NoSuchOperator UnsupportedModelError",
    ]


def test_the_import_brings_no_build_tools():
    done = run_python(
        """
        import sys
        from ort_train.ortmodule import upstream
        upstream.load()
        print([name for name in ("setuptools", "torch.utils.cpp_extension") if name in sys.modules])
        import torch.utils.cpp_extension
        print(hasattr(torch.utils.cpp_extension, "load_inline"))
        """
    )
    assert done.stdout.splitlines() == ["[]", "True"], done.stderr


def test_a_step_writes_nothing_to_the_terminal():
    """And swallows nothing that was printed before."""
    done = run_python(
        """
        import torch
        from ort_train import OrtOptions, wrap
        class Parts(torch.nn.Linear):
            def forward(self, x):
                y = super().forward(x)
                return (y[..., :2] * y[..., 2:]).sum() + y[..., 0].cumsum(0).sum()
        print("before")
        module = wrap(Parts(4, 4), backend="ort", options=OrtOptions(export_cache=False))
        module(torch.ones(2, 3, 4)).backward()
        print("after")
        """
    )
    assert done.returncode == 0
    assert done.stdout == "before\nafter\n"
    assert done.stderr == ""


def test_the_graph_is_the_same_in_each_process():
    """Whatever order Python gives sets of names there."""
    probe = f"""
        import hashlib, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from architectures import find, make_batch, make_model
        from trained_graphs import manager_of
        from ort_train import OrtOptions, wrap
        for model_type in ("bloom", "bart"):
            architecture = find(model_type)
            model = wrap(make_model(architecture), "ort", options=OrtOptions(export_cache=False))
            model(**make_batch(architecture, 2, 12, seed=0)).loss.backward()
            graph = manager_of(model)._onnx_models.optimized_model
            print(hashlib.sha256(graph.SerializeToString(deterministic=True)).hexdigest())
        """
    runs = [run_python(probe, PYTHONHASHSEED=seed) for seed in ("0", "1", "2")]
    hashes = [run.stdout.split() for run in runs]
    assert len(hashes[0]) == 2, runs[0].stderr
    assert hashes[0] == hashes[1] == hashes[2]


def test_streams_without_a_descriptor():
    """As in notebooks and under test runners."""
    done = run_python(
        """
        import io, sys, torch
        from ort_train import wrap
        sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
        module = wrap(torch.nn.Linear(2, 2), backend="ort")
        module(torch.ones(1, 2)).sum().backward()
        """
    )
    assert done.returncode == 0, done.stderr


def test_module_that_was_refused_still_trains_eagerly_and_after_the_mend():
    done = run_python(
        """
        import torch
        from ort_train import wrap, unwrap
        class Sometimes(torch.nn.Linear):
            bad = True
            def forward(self, x):
                x = super().forward(x)
                return torch.fft.rfft(x).abs().sum() if self.bad else x.sum()
        module = wrap(Sometimes(2, 2), backend="ort")
        x = torch.eye(2)
        for _ in range(2):  # a failed build is tried again, not kept half-made
            try:
                module(x)
            except RuntimeError as error:
                print("fft" in str(error), "backend='compile'" in str(error))
        module.bad = False
        module(x).backward()
        print(module.weight.grad.tolist())
        module.bad = True
        unwrap(module)(x).backward()
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True True", "True True", "[[1.0, 1.0], [1.0, 1.0]]"]


@pytest.mark.parametrize(
    ("version", "expected"),
    [(None, "is not installed: pip install"), ("1.18.0", "only 1.19.2 is supported")],
)
def test_missing_or_other_onnxruntime_is_named(
    version: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(upstream, "installed_version", lambda: version)
    reason = upstream.unavailable_reason()
    assert reason is not None
    assert expected in reason
    from ort_train import available

    assert available("ort") == (False, reason)


def test_other_python_is_named(monkeypatch: pytest.MonkeyPatch):
    info: Any = type("Info", (tuple,), {"major": 3, "minor": 12})((3, 12, 1))
    monkeypatch.setattr(sys, "version_info", info)
    reason = upstream.unavailable_reason()
    assert reason is not None
    assert "Python 3.12" in reason
    assert "python3.11" in reason


def test_local_build_of_the_supported_version_is_accepted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(upstream, "installed_version", lambda: "1.19.2+cpu")
    assert upstream.unavailable_reason() is None


def test_import_that_fails_is_a_backend_unavailable_error():
    done = run_python(
        """
        import sys, torch
        sys.modules["onnxruntime.training"] = None
        from ort_train import wrap
        from ort_train.errors import BackendUnavailableError
        module = wrap(torch.nn.Linear(2, 2), backend="ort")
        try:
            module(torch.ones(1, 2))
        except BackendUnavailableError as error:
            print("doctor" in str(error))
        """
    )
    assert done.stdout.strip() == "True", done.stderr
    assert issubclass(BackendUnavailableError, RuntimeError)


def test_an_export_needs_no_second_model() -> None:
    """The exporter's shape inference would transpose every weight, and keep the results."""
    code = """
        import ctypes
        from pathlib import Path
        import torch
        from ort_train import wrap

        def mib(field):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

        def step(size, layers):
            parts = [torch.nn.Linear(size, size) for _ in range(layers)]
            model = wrap(torch.nn.Sequential(*parts).requires_grad_(False), "ort")
            model.append(torch.nn.Linear(size, 1))
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = mib("VmRSS")
            model(torch.ones(2, 3, size)).sum().backward()  # of rank 3: weights are transposed
            return mib("VmHWM") - before

        step(8, 1)  # libraries
        print(step(2048, 12))
    """
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True
    )
    # The model has 192 MiB; it was 193 before, and is 11.
    assert float(output.stdout.split()[-1]) < 96


def test_threads_export_one_after_the_other():
    """What an export replaces in torch belongs to the process."""
    entered = threading.Event()

    def export() -> None:
        with upstream.export_scope(OrtOptions(), lambda model: None):
            entered.set()

    other = threading.Thread(target=export)
    with upstream.export_scope(OrtOptions(), lambda model: None):
        other.start()
        assert not entered.wait(0.5)
    other.join()
    assert entered.is_set()

"""Runs in a child process: whether Triton interprets or compiles is decided when it is imported.

    python triton_worker.py interpret|compile FOLDER

FOLDER holds subgraphs as `*.onnx` with numbers for all dimensions and, of the same name, `*.npz`
with their inputs. Prints one JSON line a subgraph; `interpret` writes `NAME.outI.npz` too, one for
each configuration.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

TARGETS = (80, 90)  # compute capabilities: A100, H100


def load(path: Path) -> tuple[Any, list[torch.Tensor]]:
    model = onnx.load(path)
    arrays = np.load(path.with_suffix(".npz"))
    tensors = [torch.from_numpy(arrays[value.name].copy()) for value in model.graph.input]
    return model, [t.to(torch.uint8) if t.dtype == torch.bool else t for t in tensors]


def interpret(path: Path) -> dict[str, Any]:
    """Every configuration that autotuning would choose from, one after another."""
    from triton.runtime.autotuner import Autotuner

    from ort_train.ortmodule.triton import kernels as triton_kernels

    model, inputs = load(path)
    function = triton_kernels.generate(model, [list(t.shape) for t in inputs])
    scope = function.__globals__
    tuned = {name: value for name, value in scope.items() if isinstance(value, Autotuner)}
    num_configs = max([len(kernel.configs) for kernel in tuned.values()], default=1)
    names = [value.name for value in model.graph.output]
    for index in range(num_configs):
        for name, kernel in tuned.items():
            config = kernel.configs[min(index, len(kernel.configs) - 1)]
            scope[name] = _Launcher(kernel.fn, config.kwargs)
        torch.manual_seed(0)
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        arrays = {name: t.numpy() for name, t in zip(names, outputs, strict=True)}
        np.savez(path.with_suffix(f".out{index}.npz"), **arrays)
    scope.update(tuned)
    return {"num_configs": num_configs}


class _Launcher:
    """A kernel with one configuration, without the autotuner, which measures on a GPU."""

    def __init__(self, kernel: Any, constants: dict[str, int]):
        self._kernel, self._constants = kernel, constants

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args: self._kernel[grid](*args, **self._constants)


class _Recorder:
    """Stands in a generated module for a kernel, and notes how it would be launched."""

    def __init__(self, kernel: Any, launches: list[Any]):
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self._launches.append((self._kernel, args, kwargs))


def compile_all(path: Path) -> dict[str, Any]:
    """Every kernel, with every configuration that autotuning would try, for every target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    from ort_train.ortmodule.triton import kernels as triton_kernels

    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    model, inputs = load(path)
    function = triton_kernels.generate(model, [list(t.shape) for t in inputs])
    scope = function.__globals__
    kernels = {n: v for n, v in scope.items() if isinstance(v, Autotuner | JITFunction)}
    scope.update({name: _Recorder(kernel, launches) for name, kernel in kernels.items()})
    function(*inputs)
    scope.update(kernels)  # an equal subgraph gets the same module
    binaries = []
    for kernel, args, kwargs in launches:
        configs = [(kwargs, kwargs.get("num_warps", 4))]
        if isinstance(kernel, Autotuner):
            configs = [(config.kwargs, config.num_warps) for config in kernel.configs]
            kernel = kernel.fn
        for constants, num_warps in configs:
            constexprs = {k: v for k, v in constants.items() if k in kernel.arg_names}
            signature = dict(zip(kernel.arg_names, map(_type, args), strict=False))
            signature |= dict.fromkeys(constexprs, "constexpr")
            for capability in TARGETS:
                compiled = triton.compile(
                    ASTSource(fn=kernel, signature=signature, constexprs=constexprs),
                    target=GPUTarget("cuda", capability, 32),
                    options={"num_warps": num_warps},
                )
                cubin = compiled.asm["cubin"]
                ptx = compiled.asm["ptx"]
                is_whole = cubin[:4] == b"\x7fELF" and f".target sm_{capability}" in ptx
                binaries.append({"capability": capability, "is_whole": is_whole})
    return {"num_kernels": len(launches), "binaries": binaries}


def _type(value: Any) -> str:
    if isinstance(value, int):
        return "i32"
    assert isinstance(value, torch.Tensor)
    names = {
        torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
        torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8",
    }  # fmt: skip
    return f"*{names[value.dtype]}"


if __name__ == "__main__":
    mode, folder = sys.argv[1], Path(sys.argv[2])
    for path in sorted(folder.glob("*.onnx")):
        try:
            answer = (interpret if mode == "interpret" else compile_all)(path)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[-1500:]}
        print(json.dumps({"name": path.stem, **answer}), flush=True)

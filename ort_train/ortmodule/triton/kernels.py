"""ONNX Runtime's generator of Triton kernels (`onnxruntime.training.ort_triton`) on Triton 3.

It is frozen at 1.19.2 and was written for Triton 2. What is mended here lies inside `onnxruntime`
alone, names its bug, and is applied once a process, where Triton kernels are asked for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import json
import math
import os
import re
from collections.abc import Callable
from typing import Any

from ort_train.cache import root
from ort_train.errors import BackendUnavailableError
from ort_train.ortmodule import upstream

_PACKAGE = "onnxruntime.training.ort_triton"
REMEDY = "pip install 'ort_train[triton]' -c constraints.txt"


def unavailable_reason() -> str | None:
    """Why Triton kernels can't be generated here (with the way out), or None.

    ORTModule itself only logs a missing Triton and trains on without (`options.py`).
    """
    if importlib.util.find_spec("triton") is None:
        return f"the package triton is not installed: {REMEDY}"
    capi: Any = importlib.import_module("onnxruntime.capi._pybind_state")
    if not capi.is_triton_enabled():
        return "this onnxruntime-training is built without Triton: use the CUDA wheel, 1.19.2"
    return None


def _deterministic_names(executor: Any, ir: Any, utils: Any) -> None:
    """The names of functions, kernels and unnamed nodes follow from the graph.

    They are drawn by `uuid4` (`_utils.py`, `gen_unique_name`) and stand in the source, by whose
    hash both ONNX Runtime and Triton cache: every run generated and compiled all kernels anew.
    """
    generate = executor._gen_module
    counter = itertools.count()

    def name(prefix: str) -> str:
        return f"{prefix}_{next(counter)}"

    @functools.wraps(generate)
    def generate_module(*args: Any) -> Any:
        nonlocal counter
        counter = itertools.count()
        return generate(*args)

    executor._gen_module = generate_module
    for module in (executor, ir, utils):
        module.gen_unique_name = name


def _names_and_constants(ir: Any) -> None:
    """What stands for values in a kernel's source (`_ir.py`, `KernelNode.gen_variable_names`).

    Values inside a kernel are a set of names: which of two alike names gets the suffix depends on
    Python's hash seed, and with it the source. Constants are written by `str`, which makes of NaN
    (the mean loss over no label) and of infinities names that nothing defines.
    """
    generate = ir.KernelNode.gen_variable_names

    @functools.wraps(generate)
    def gen_variable_names(self: Any) -> None:
        self.internal_args = dict.fromkeys(sorted(self.internal_args))
        generate(self)
        for name in self.constants:
            variable = self.var_map[name]
            if self.var_map.get(variable) in ("nan", "inf", "-inf"):
                self.var_map[variable] = f'float("{self.var_map[variable]}")'

    ir.KernelNode.gen_variable_names = gen_variable_names


def _only_where_asked_for(package: Any) -> None:
    """The fuser takes part in every CUDA session from the first that asks for it on
    (`graph_transformer_utils.cc`): those with `fusion="none"` find nothing that it may take.

    Args:
        package: `ort_triton`, which hands its `get_config` to ONNX Runtime.
    """
    read = package.get_config

    @functools.wraps(read)
    def get_config() -> str:
        if os.environ.get("ORTMODULE_USE_TRITON") == "1":
            return read()
        return json.dumps({"ops": {}, "initializer": "none", "min_nodes": 2})

    package.get_config = get_config


def _own_cache(cache: Any) -> None:
    """Sources lie in this package's cache folder. Upstream's (`_cache.py`) is
    `/tmp/ort_triton_USER`: any user of the machine can make it first and put code into it."""

    def folder() -> str:
        path = root() / "ort_triton"
        path.mkdir(parents=True, exist_ok=True)
        return str(path)

    cache._cache_dir = folder


def _device_of_inputs(codegen: Any) -> None:
    """Outputs are made where the inputs are.

    The generated function allocates with `device="cuda"`, the current device, which need not be
    that of its inputs and isn't there in Triton's interpreter (`_codegen.py`, `ModuleNode`).
    """
    generate = codegen.TritonCodegen.ModuleNode

    @functools.wraps(generate)
    def module_node(self: Any, node: Any, context: Any, buffer: Any, indent: int) -> None:
        first = context.get_variable_name(node.inputs[0].name)
        start = len(buffer.buffer)
        generate(self, node, context, buffer, indent)
        buffer.buffer[start:] = [
            line.replace('device="cuda"', f"device={first}.device")
            for line in buffer.buffer[start:]
        ]

    codegen.TritonCodegen.ModuleNode = module_node


def _conditions(codegen: Any) -> None:
    """Conditions arrive as uint8, and Triton 3 warns that `tl.where` will refuse those."""
    templates = codegen.TritonCodegen._COMPUTE_CODE_TEMPLATES
    templates["Where"] = "{indent}{o0} = tl.where({i0} != 0, {i1}, {i2})\n"
    templates["DropoutGrad"] = (
        "{indent}p = 1.0 - {i2}\n{indent}{o0} = tl.where({i1} != 0, {i0} / p, 0.0)\n"
    )


_POWERS = {2.0: "Pow2", 3.0: "Pow3", 0.5: "Sqrt"}


def _powers_and_quotients(codegen: Any) -> None:
    """Pow by a constant, and the quotient of integers.

    `_codegen.py`, `ComputeNode`, compares the *text* of an exponent with 2, 3 and 0.5, so that all
    powers became `tl.math.pow`, which Triton 3 hasn't got. `/` of integers is a float in Triton,
    which is wrong beyond 2**24; `//` truncates, as ONNX asks.
    """
    generate = codegen.TritonCodegen.ComputeNode
    templates = codegen.TritonCodegen._COMPUTE_CODE_TEMPLATES
    templates["Pow"] = "{indent}{o0} = libdevice.pow({i0}, {i1})\n"
    templates["DivInt"] = "{indent}{o0} = {i0} // {i1}\n"

    def renamed(node: Any, context: Any) -> str:
        if node.op_type == "Pow":
            exponent = context.get_internal_variable_name(node.inputs[1].name)
            return _POWERS.get(_number(exponent), "Pow")
        if node.op_type == "Div" and not node.outputs[0].dtype.is_floating_point:
            return "DivInt"
        return node.op_type

    @functools.wraps(generate)
    def compute_node(self: Any, node: Any, context: Any, buffer: Any, indent: int) -> None:
        original, node._op_type = node._op_type, renamed(node, context)
        try:
            generate(self, node, context, buffer, indent)
        finally:
            node._op_type = original

    codegen.TritonCodegen.ComputeNode = compute_node
    _with_import(codegen, "from triton.language.extra import libdevice")


def _number(text: str) -> float:
    """The value of a constant's text; NaN for a variable's name."""
    return float(text) if re.fullmatch(r"-?\d+(\.\d*)?(e[+-]?\d+)?", text) else math.nan


def _with_import(codegen: Any, line: str) -> None:
    generate: Callable[..., str] = codegen.codegen

    @functools.wraps(generate)
    def with_import(*args: Any) -> str:
        return f"{line}\n{generate(*args)}"

    codegen.codegen = with_import


def prepare(debug: bool) -> None:
    """Have ONNX Runtime's CUDA sessions use the mended generator.

    Args:
        debug: write each subgraph and its kernels into `triton_debug/` of the working directory.
            Upstream reads its switch when it is imported (`triton_op_executor.py`).

    Raises:
        BackendUnavailableError: with the reason and the way out.
    """
    load()._DEBUG_MODE = debug


@functools.cache
def load() -> Any:
    """The generator's module `triton_op_executor`, mended.

    Raises:
        BackendUnavailableError: with the reason and the way out.
    """
    reason = unavailable_reason()
    if reason is not None:
        raise BackendUnavailableError(f"Triton kernels can't be generated here: {reason}")
    upstream.load()
    executor: Any = importlib.import_module(f"{_PACKAGE}.triton_op_executor")
    cache, codegen, ir, utils = (
        importlib.import_module(f"{_PACKAGE}.{name}")
        for name in ("_cache", "_codegen", "_ir", "_utils")
    )
    _deterministic_names(executor, ir, utils)
    _names_and_constants(ir)
    _only_where_asked_for(importlib.import_module(_PACKAGE))
    _own_cache(cache)
    _device_of_inputs(codegen)
    _conditions(codegen)
    _powers_and_quotients(codegen)
    executor.codegen = codegen.codegen  # imported by name
    return executor


def generate(model: Any, shapes: list[list[int]], key: int = 0) -> Callable[..., Any]:
    """The function that computes a fused subgraph by Triton kernels.

    Args:
        model: the subgraph, an onnx.ModelProto.
        shapes: of its inputs, in their order.
        key: tells subgraphs apart in ONNX Runtime's debug files.

    Returns:
        A function of the inputs as torch tensors (bool ones as uint8: DLPack of ONNX Runtime has no
        bool) that returns its output, or a tuple of them.
    """
    name, module = load()._gen_module(key, model, shapes)
    return getattr(module, name)

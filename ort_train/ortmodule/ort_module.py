"""Upstream's ORTModule around a graph module: with our settings, and steps of its build changed."""

from __future__ import annotations

import contextlib
from typing import Any

from ort_train.ortmodule import backward, cuda, gpu_passes, leftovers, session, upstream
from ort_train.ortmodule.export.graph_module import GraphModule
from ort_train.ortmodule.options import OrtOptions
from ort_train.ortmodule.passes import output_gradients
from ort_train.ortmodule.triton import kernels as triton_kernels


def recomputes(options: OrtOptions) -> bool:
    """Whether activations are computed again in backward."""
    return options.recompute != "none" or options.recompute_config is not None


def construct(graph_module: GraphModule, options: OrtOptions, is_on_cpu: bool) -> Any:
    """An ORTModule, which has no graph yet.

    Args:
        graph_module: what it will export.
        options: how ONNX Runtime builds and runs the graph.
        is_on_cpu: whether all of a call's tensors are.
    """
    if not is_on_cpu:
        cuda.preload()
    if options.fusion == "triton":
        triton_kernels.prepare(options.triton_debug)
    ortmodule = upstream.load()
    debug = ortmodule.DebugOptions(
        log_level=ortmodule.LogLevel[options.log_level.upper()],
        save_onnx=options.save_onnx,
        onnx_prefix=options.onnx_prefix,
    )
    ort_module = ortmodule.ORTModule(graph_module, debug)
    manager = ort_module._torch_module._execution_manager(True)
    if not (recomputes(options) or options.log_level in ("verbose", "info")):
        # Plans for a recomputation that wasn't asked for, which upstream prints only at these
        # levels: a session and a simplification of their sizes by sympy take longer than the
        # session that runs (`_training_manager.py`, `_create_execution_agent`).
        manager._runtime_inspector.memory_ob._is_enabled = False
    _change_build(manager, options, type(graph_module.module).__name__)
    return ort_module


def _change_build(manager: Any, options: OrtOptions, name: str) -> None:
    """Add what is ours to the steps of a TrainingManager's build."""
    session_config = manager._get_session_config
    build_graph = manager._build_graph
    create_session = manager._create_execution_agent
    function = manager._forward_class

    def with_our_settings() -> Any:
        session_options, providers, provider_options = session_config()
        session.configure(session_options, options)
        if gpu_passes.PROVIDER in providers:
            provider_options[0] |= gpu_passes.provider_options()
        return session_options, providers, provider_options

    def with_scalars(config: Any) -> None:
        build_graph(config)
        output_gradients.accept_scalars(manager)

    def without_leftovers() -> None:
        is_on_gpu = manager._device.type == "cuda"
        with gpu_passes.on_device(manager._device) if is_on_gpu else contextlib.nullcontext():
            create_session()
        if is_on_gpu:
            gpu_passes.guard(manager._execution_agent, manager._device)
        backward.check(manager, function, name)
        leftovers.release(manager)

    manager._get_session_config = with_our_settings
    manager._build_graph = with_scalars
    manager._create_execution_agent = without_leftovers

"""Passes on a GPU, as far as a machine without one can tell: what is asked of torch and of ONNX
Runtime, with stand-ins for torch's CUDA functions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trained_graphs import engines, manager_of

from ort_train import OrtOptions, wrap
from ort_train.errors import BackendUnavailableError, UnsupportedModelError
from ort_train.ortmodule import gpu_passes
from ort_train.ortmodule.call import describe_call
from ort_train.ortmodule.engine import Engine
from ort_train.ortmodule.kernels import aten, gpu_memory

GPU = torch.device("cuda:1")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """torch as it is where it sees a GPU; its current device and stream are attributes."""
    state = SimpleNamespace(device=0, stream="default")

    @contextlib.contextmanager
    def device(of: torch.device) -> Iterator[None]:
        before, state.device = state.device, of.index
        yield
        state.device = before

    for name, function in {
        "is_available": lambda: True,
        "get_rng_state": lambda: None,
        "device": device,
        "current_stream": lambda device: state.stream,
        "default_stream": lambda device: "default",
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    return state


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of torch's allocator; all of its memory lies at 4096."""
    asked: list[Any] = []

    def allocate(num_bytes: int, stream: int) -> int:
        if num_bytes > 2**30:
            raise torch.OutOfMemoryError("CUDA out of memory")
        asked.append((num_bytes, stream))
        return 4096

    name = "_cuda_cudaCachingAllocator_raw"
    monkeypatch.setattr(torch._C, f"{name}_alloc", allocate, raising=False)
    monkeypatch.setattr(torch._C, f"{name}_delete", asked.append, raising=False)
    return asked


def test_a_module_on_the_cpu_trains_where_torch_sees_a_gpu(gpu):
    """ORTModule's constructor asks for the allocator there, whatever the module's device is."""
    model = wrap(torch.nn.Linear(3, 2), backend="ort")
    model(torch.ones(4, 3)).sum().backward()
    assert torch.equal(model.weight.grad, torch.full((2, 3), 4.0))
    assert gpu.device == 0


def test_a_session_on_a_gpu_has_torchs_memory_and_the_default_stream(gpu, monkeypatch):
    model = wrap(torch.nn.Linear(3, 2), backend="ort")
    model(torch.ones(4, 3)).sum().backward()
    manager = manager_of(model)
    monkeypatch.setattr(manager._graph_transition_manager, "_device", GPU)
    _, providers, (options, _) = manager._get_session_config()
    assert providers == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert options["device_id"] == "1"
    # With these it runs on stream 0, and it refuses them beside a stream of the user's.
    assert options["gpu_external_alloc"] == str(aten.address_of(gpu_memory._allocate_callback))
    assert options["gpu_external_free"] == str(aten.address_of(gpu_memory._free_callback))
    assert options["gpu_external_empty_cache"] not in ("0", "None")
    assert "user_compute_stream" not in options


@pytest.mark.parametrize(("precision", "expected"), [("highest", "0"), ("high", "1")])
def test_fp32_products_are_rounded_where_torchs_are(precision, expected):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert gpu_passes.provider_options() == {"use_tf32": expected}
    finally:
        torch.set_float32_matmul_precision(before)


def called_at(address: int, kind: Any, *arguments: Any) -> Any:
    """What ONNX Runtime gets that calls a C function at this address."""
    return kind(address)(*arguments)


def test_memory_comes_from_torch_on_the_default_stream(memory):
    allocate = gpu_memory.allocator.gpu_caching_allocator_raw_alloc_address()
    free = gpu_memory.allocator.gpu_caching_allocator_raw_delete_address()
    assert called_at(allocate, gpu_memory._Allocate, 512) == 4096
    called_at(free, gpu_memory._Free, 4096)
    called_at(free, gpu_memory._Free, None)  # of no bytes
    assert memory == [(512, 0), 4096]


def test_no_memory_is_torchs_own_error(memory):
    allocate = gpu_memory.allocator.gpu_caching_allocator_raw_alloc_address()
    assert called_at(allocate, gpu_memory._Allocate, 2**31) is None
    with pytest.raises(torch.OutOfMemoryError):
        aten.raise_pending()


def agent(run: Callable[..., None], *providers: str) -> Any:
    session = SimpleNamespace(get_providers=lambda: list(providers))
    return SimpleNamespace(run_forward=run, run_backward=run, _inference_session=session)


def test_a_pass_runs_on_its_device_without_autocast(gpu):
    seen: list[Any] = []

    def run(*arguments: Any) -> None:
        seen.append((arguments, gpu.device, torch.is_autocast_enabled("cuda")))

    guarded = agent(run, "CUDAExecutionProvider", "CPUExecutionProvider")
    gpu_passes.guard(guarded, GPU)
    torch.set_autocast_enabled("cuda", True)
    try:
        guarded.run_forward(1, 2)
        guarded.run_backward(3)
        assert torch.is_autocast_enabled("cuda")
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert seen == [((1, 2), 1, False), ((3,), 1, False)]
    assert gpu.device == 0


def test_a_pass_on_another_stream_is_refused(gpu):
    guarded = agent(lambda: pytest.fail("it ran"), "CUDAExecutionProvider")
    gpu_passes.guard(guarded, GPU)
    gpu.stream = "a side stream"
    with pytest.raises(UnsupportedModelError, match=r"a side stream.*outside of torch\.cuda\.str"):
        guarded.run_backward()


def test_a_session_that_fell_back_to_the_cpu_is_refused():
    with pytest.raises(BackendUnavailableError, match=r"CPUExecutionProvider for .* cuda:1"):
        gpu_passes.guard(agent(lambda: None, "CPUExecutionProvider"), GPU)


def test_a_graph_serves_calls_under_the_autocast_that_it_was_traced_under(gpu):
    """A trace writes autocast's types into the graph."""
    model = wrap(torch.nn.Linear(3, 2), backend="ort")
    model(torch.ones(4, 3)).sum().backward()
    torch.set_autocast_enabled("cuda", True)
    try:
        model(torch.ones(4, 3)).sum().backward()
    finally:
        torch.set_autocast_enabled("cuda", False)
    model(torch.ones(5, 3)).sum().backward()
    assert len(engines(model)) == 2


def test_a_number_of_a_call_leaves_its_module_on_the_gpu():
    schema, _ = describe_call((), {"num_items_in_batch": 3})
    module = torch.nn.Linear(3, 2)
    assert Engine(module, module.forward, schema, OrtOptions())._is_on_cpu
    module.weight = torch.nn.Parameter(module.weight.to("meta"))  # any device but the CPU
    assert not Engine(module, module.forward, schema, OrtOptions())._is_on_cpu

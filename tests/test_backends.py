"""One wrap for all backends: names, availability, and what each does to a module's calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ort_train import available, backends, decision, unwrap, wrap
from ort_train.errors import BackendUnavailableError, ConfigError, UnsupportedModelError
from ort_train.forward import taken_over

MakeModel = Callable[..., Any]


def batch(rows: int = 2, length: int = 8) -> dict[str, torch.Tensor]:
    ids = torch.randint(300, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


# --- availability ---


def test_eager_and_ort_are_available_here():
    assert available("eager") == (True, "")
    assert available("ort") == (True, "")
    assert available("auto") == (True, "")


def test_unknown_names_are_all_said():
    with pytest.raises(ConfigError) as caught:
        available("onnx", "int8")
    assert len(caught.value.problems) == 2


def test_compile_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    from torch._inductor import cpp_builder

    for name in ("get_cpp_compiler", "_get_cpp_compiler"):
        cache_clear = getattr(getattr(cpp_builder, name, None), "cache_clear", None)
        if cache_clear:
            cache_clear()
    can_run, reason = available("compile")
    assert not can_run
    assert "needs a C++ compiler" in reason
    with pytest.raises(BackendUnavailableError, match=r"C\+\+ compiler"):
        wrap(torch.nn.Linear(1, 1), backend="compile")


def test_compile_without_pythons_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    if not available("compile")[0]:
        pytest.skip("no C++ compiler here, which is looked for first")
    monkeypatch.setattr(backends.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert available("compile") == (
        False, "torch.compile on CPU needs Python's headers: apt-get install python3-dev",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "precision", "expected"),
    [
        ("ort", "fp16", "fp16 training needs a GPU"),
        ("eager", "fp16", "fp16 training needs a GPU"),
        ("auto", "fp16", "fp16 training needs a GPU"),
    ],
)
def test_precisions_that_a_cpu_lacks(backend: str, precision: str, expected: str):
    can_run, reason = available(backend, precision)
    assert not can_run
    assert expected in reason
    with pytest.raises(BackendUnavailableError, match=expected):
        wrap(torch.nn.Linear(1, 1), backend=backend, precision=precision)  # type: ignore[arg-type]


def test_wrap_refuses_what_is_no_module():
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, not a function"):
        wrap(lambda x: x, backend="eager")  # type: ignore[arg-type]


def test_wrap_refuses_data_parallel():
    with pytest.raises(ConfigError, match="DistributedDataParallel"):
        wrap(torch.nn.DataParallel(torch.nn.Linear(1, 1)), backend="ort")


# --- eager ---


def test_eager_is_the_module_itself(tiny_llama: MakeModel):
    model = tiny_llama()
    expected = model(**batch())
    wrap(model, backend="eager")
    found = model(**batch())
    assert torch.equal(found.loss, expected.loss)
    assert type(found) is type(expected)
    assert unwrap(model) is model
    assert taken_over(model) is None


def test_eager_bf16_is_autocast_in_training_only(tiny_llama: MakeModel):
    model = tiny_llama()
    plain = copy.deepcopy(model)
    wrap(model, backend="eager", precision="bf16")
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(**batch())
    found = model(**batch())
    assert found.logits.dtype is torch.bfloat16
    assert torch.equal(found.loss, expected.loss)
    found.loss.backward()
    assert model.lm_head.weight.grad.dtype is torch.float32
    assert model.eval()(**batch()).logits.dtype is torch.float32


@pytest.mark.parametrize("backend", ["eager", "ort", "auto"])
def test_unwrap_restores_and_wrap_may_follow(tiny_llama: MakeModel, backend: Any):
    model = tiny_llama()
    own = model.forward
    wrap(model, backend=backend)
    assert model.forward != own
    unwrap(model)
    assert model.forward == own
    assert unwrap(model) is model  # of an unwrapped one: nothing to do
    wrap(model, backend="eager")
    with pytest.raises(UnsupportedModelError, match="wrapped already"):
        wrap(model, backend="eager")


def test_forward_of_the_instance_comes_back(tiny_llama: MakeModel):
    """As accelerate or a patch of the user's leaves one."""
    module = torch.nn.Linear(2, 2)
    patched = lambda x: module.weight.sum() * x  # noqa: E731
    module.forward = patched
    wrap(module, backend="eager")
    assert module(torch.ones(1)).requires_grad
    unwrap(module)
    assert module.forward is patched


def test_signature_is_the_models(tiny_llama: MakeModel):
    """transformers' Trainer reads it to know which columns a model takes."""
    import inspect

    model = tiny_llama()
    before = inspect.signature(model.forward)
    wrap(model, backend="ort")
    assert inspect.signature(model.forward) == before


def test_module_without_parameters():
    module = wrap(torch.nn.ReLU(), backend="ort")
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0]


def test_hooks_of_the_module_run_once_a_call():
    module = torch.nn.Linear(2, 2)
    seen: list[str] = []
    module.register_forward_pre_hook(lambda *args: seen.append("before"))
    module.register_forward_hook(lambda *args: seen.append("after"))
    wrap(module, backend="ort")
    for _ in range(2):
        module(torch.ones(1, 2)).sum().backward()
    assert seen == ["before", "after"] * 2


# --- compile ---


@pytest.mark.slow
def test_compile_computes_what_eager_does_and_leaves_eval_alone():
    if not available("compile")[0]:
        pytest.skip(available("compile")[1])
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU(), torch.nn.Linear(4, 1))
    eager = copy.deepcopy(module)
    wrap(module, backend="compile")
    x = torch.randn(3, 4)
    for _ in range(2):
        found, expected = module(x).sum(), eager(x).sum()
        assert torch.allclose(found, expected, atol=1e-6)  # fp32, four-term sums
        module.zero_grad()
        eager.zero_grad()
        found.backward()
        expected.backward()
        for p, q in zip(module.parameters(), eager.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, atol=1e-6)
    frames = torch._dynamo.utils.counters["frames"]["total"]
    module.eval()(torch.randn(9, 4))
    with torch.no_grad():
        module.train()(torch.randn(7, 4))
    assert torch._dynamo.utils.counters["frames"]["total"] == frames
    assert list(module.state_dict()) == list(eager.state_dict())
    assert decision(module) is None

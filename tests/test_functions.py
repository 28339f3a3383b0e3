"""A torch.autograd.Function in a graph keeps its backward or is refused, never traced through."""

from __future__ import annotations

import copy
import importlib
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ort_train import OrtOptions, wrap
from ort_train.errors import UnsupportedModelError
from ort_train.ortmodule.export import functions


class StraightThrough(torch.autograd.Function):
    """Rounds; its gradient is half of what came in, where autograd's would be zero."""

    fails_in: str | None = None

    @staticmethod
    def forward(ctx, x, step):
        if StraightThrough.fails_in == "forward":
            raise ValueError("no forward today")
        return torch.round(x / step) * step

    @staticmethod
    def backward(ctx, grad):
        if StraightThrough.fails_in == "backward":
            raise ValueError("no backward today")
        return grad * 0.5, None


class WithSymbolic(StraightThrough):
    @staticmethod
    def symbolic(g, x, step):
        return g.op("Identity", x)


bound_early = StraightThrough.apply  # the usual way, at a module's top


class Quantized(torch.nn.Module):
    def __init__(self, function: Any = bound_early):
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(8, 16)
        self.down = torch.nn.Linear(16, 4)
        self.function = function

    def forward(self, x):
        return self.down(self.function(torch.tanh(self.up(x)), 0.25)).square().mean()


def gradients(module: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    module.zero_grad()
    loss = module(x)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("function", [bound_early, WithSymbolic.apply], ids=["plain", "symbolic"])
def test_a_function_is_refused_by_name(function):
    module = wrap(Quantized(function), backend="ort")
    name = function.__self__.__qualname__
    with pytest.raises(UnsupportedModelError, match=rf"{name}.*compiled_extensions=true"):
        module(torch.randn(3, 8))
    assert "__getattribute__" not in vars(torch.autograd.function.FunctionMeta)


def test_a_module_that_swallows_the_refusal_is_refused_all_the_same():
    def traced_or_not(x, step):
        try:
            return bound_early(x, step)
        except Exception:
            return x

    module = wrap(Quantized(traced_or_not), backend="ort")
    with pytest.raises(UnsupportedModelError, match="StraightThrough"):
        module(torch.randn(3, 8))


def test_other_threads_are_left_alone():
    results: list[torch.Tensor] = []
    with functions.refused():
        thread = threading.Thread(target=lambda: results.append(bound_early(torch.ones(1), 1.0)))
        thread.start()
        thread.join()
    assert results


def test_functions_of_integers_are_no_matter():
    class Successor(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x + 1

    with functions.refused():
        assert Successor.apply(torch.tensor(1)) == 2


def _inputs(name: str) -> list[Any]:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        tensor = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return tensor.requires_grad_()

    if name == "GeLUFunction":
        return [leaf(50)]
    assert name == "HadaWeight"
    return [leaf(5, 2), leaf(2, 7), leaf(5, 2), leaf(2, 7), torch.tensor(0.7)]


@pytest.mark.parametrize("path", sorted(functions.SAFE_TO_INLINE))
def test_inlined_functions_have_the_derivative_of_their_forward(path):
    module_name, _, name = path.rpartition(".")
    if name == "CheckpointFunction":
        pytest.skip("its backward is autograd of its forward by construction")
    function = getattr(importlib.import_module(module_name), name)
    inputs = _inputs(name)
    leaves = [x for x in inputs if x.requires_grad]
    written = function.apply(*inputs)
    context = SimpleNamespace(save_for_backward=lambda *saved: None)
    traced = function.forward(context, *inputs)
    cotangent = torch.randn_like(traced)
    for mine, autograds in zip(
        torch.autograd.grad(written, leaves, cotangent),
        torch.autograd.grad(traced, leaves, cotangent),
        strict=True,
    ):
        # GeLUFunction's constants have 8 digits.
        torch.testing.assert_close(mine, autograds, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_with_compiled_extensions_a_functions_own_backward_is_used():
    eager = Quantized()
    module = wrap(copy.deepcopy(eager), backend="ort", options=OrtOptions(compiled_extensions=True))
    for batch in (3, 5):
        x = torch.randn(batch, 8)
        loss, grads = gradients(module, x)
        eager_loss, eager_grads = gradients(eager, x)
        # fp32 sums of at most 16 terms below 1
        torch.testing.assert_close(loss, eager_loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grads, eager_grads, rtol=1e-5, atol=1e-6)
        assert eager_grads[0].abs().max() > 1e-4  # autograd of round would give zeros
    # One module's extensions are not the next one's.
    with pytest.raises(UnsupportedModelError, match="StraightThrough"):
        wrap(Quantized(), backend="ort")(x)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_an_error_inside_a_function_reaches_the_user(stage, monkeypatch, capfd):
    module = wrap(Quantized(), backend="ort", options=OrtOptions(compiled_extensions=True))
    x = torch.randn(3, 8)
    module(x).backward()
    monkeypatch.setattr(StraightThrough, "fails_in", stage)
    with pytest.raises(ValueError, match=f"no {stage} today"):
        module(x).backward()
    monkeypatch.setattr(StraightThrough, "fails_in", None)
    module(x).backward()
    assert "custom_function" not in capfd.readouterr().err


@pytest.mark.slow
def test_memory_efficient_gradients_accumulate_as_eagers(tiny_llama):
    eager = tiny_llama()
    options = OrtOptions(compiled_extensions=True, mem_efficient_grad_management=True)
    module = wrap(copy.deepcopy(eager), backend="ort", options=options)
    for length in (9, 12):
        ids = torch.randint(300, (2, length))
        for model in (eager, module):
            model(input_ids=ids, labels=ids).loss.backward()
    for mine, eagers in zip(module.parameters(), eager.parameters(), strict=True):
        # fp32 sums over 24 tokens, gradients below 1
        torch.testing.assert_close(mine.grad, eagers.grad, rtol=1e-4, atol=1e-6)

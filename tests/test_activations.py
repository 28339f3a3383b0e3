"""GELU in its forms, and ReLU: through backend ort as eagerly, their gradients by torch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from test_products import operators, relative_errors
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ort_train import OrtOptions, wrap
from ort_train.ortmodule.kernels import direct
from ort_train.ortmodule.passes import activations

ERF, TANH = "ort_train::gelu_grad", "ort_train::gelu_tanh_grad"
RELU = "ort_train::relu_grad"


class Layers(torch.nn.Module):
    """An activation of a product with a bias, and of one without."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first = torch.nn.Linear(24, 32)
        self.second = torch.nn.Linear(32, 16, bias=False)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.second(self.function(self.first(x)))).square().sum()


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("gelu", ERF),
        ("gelu_new", TANH),
        ("gelu_fast", TANH),
        ("gelu_pytorch_tanh", TANH),
        ("gelu_accurate", TANH),
        ("relu", RELU),
    ],
)
def test_as_eager(name: str, operator: str) -> None:
    torch.manual_seed(0)
    eager = Layers(ACT2FN[name])
    ours = wrap(copy.deepcopy(eager), "ort", options=OrtOptions(num_threads=1))
    for shape in ((2, 5, 24), (3, 7, 24)):
        x = 4 * torch.randn(shape)  # both tails, too
        losses = []
        for module in (eager, ours):
            module.zero_grad()
            losses.append(module(x))
            losses[-1].backward()
        # fp32 in another order of operations
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
        assert max(relative_errors(ours, eager).values()) < 1e-5
    assert operators(ours).count(operator) == 2


@pytest.mark.parametrize(("operator", "form"), [(ERF, "none"), (TANH, "tanh")])
@pytest.mark.parametrize("has_bias", [False, True])
def test_gradient_of_gelu(operator: str, form: str, has_bias: bool) -> None:
    assert activations  # registers the functions
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(4, 5, 8, generator=generator)).requires_grad_()
    bias = [torch.randn(8, generator=generator)] * has_bias
    grad = torch.randn(4, 5, 8, generator=generator)
    found = direct.find(operator.encode())(grad, x.detach(), *bias)
    (expected,) = torch.autograd.grad(F.gelu(sum(bias, x), approximate=form), x, grad)
    # torch's own kernel in both; the bias is added alike.
    torch.testing.assert_close(found, expected, rtol=0, atol=0)

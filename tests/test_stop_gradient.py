"""What a forward detaches gets no gradient through ONNX Runtime either.

Sums of a few numbers near 1 in fp32, in another order: 1e-6. A gradient that flows where none
should is of the size of the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from trained_graphs import operators

from ort_train import OrtOptions, unwrap, wrap
from ort_train.errors import UnsupportedModelError

TOLERANCE = {"atol": 1e-6, "rtol": 1e-5}

Stop = Callable[[torch.nn.Linear, torch.Tensor], torch.Tensor]


def _detach(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return layer(x).detach()


def _data(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return layer(x).data


def _data_of_weight(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, layer.weight.data, layer.bias)


def _no_grad(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return layer(x).tanh()


@torch.no_grad()
def _decorated(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return layer(x)


def _inference_mode(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        result = layer(x)
    return result.clone()


def _set_grad_enabled(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    with torch.set_grad_enabled(False):
        return layer(x)


def _enabled_again(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        stopped = layer(x)
        with torch.enable_grad():
            flowing = layer(2 * x)
        stopped = stopped * layer(3 * x)
    return stopped * flowing


def _straight_through(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    result = layer(x)
    return result + (result.round() - result).detach()


class _Net(torch.nn.Module):
    def __init__(self, stop: Stop):
        super().__init__()
        torch.manual_seed(0)
        self.stopped = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 4)
        self.stop = stop

    def forward(self, x: torch.Tensor, both: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        target = self.stop(self.stopped, x)
        result = self.head(target)
        return (result * self.stopped(x) if both else result), target


def _assert_as_eager(module: torch.nn.Module, **fields: Any) -> None:
    for rows, value in ((3, 0.3), (2, -0.7)):  # traced with one, run with the other as well
        x = torch.linspace(value, 1, rows * 4).view(rows, 4)
        eager = unwrap(copy.deepcopy(module))
        are_differentiable = []
        for each in (module, eager):
            each.zero_grad()
            results = each(x, **fields)
            are_differentiable.append([result.requires_grad for result in results])
            results[0].square().sum().backward()
        assert are_differentiable[0] == are_differentiable[1]
        for (name, found), expected in zip(
            module.named_parameters(), eager.parameters(), strict=True
        ):
            if expected.grad is None:
                assert found.grad is None or not found.grad.any(), name
            else:
                torch.testing.assert_close(found.grad, expected.grad, **TOLERANCE, msg=name)


STOPS = [
    _detach, _data, _data_of_weight, _no_grad, _decorated, _inference_mode, _set_grad_enabled,
    _enabled_again, _straight_through,
]  # fmt: skip


@pytest.mark.parametrize("stop", STOPS)
def test_no_gradient_flows_through(stop: Stop):
    _assert_as_eager(wrap(_Net(stop), backend="ort"))


@pytest.mark.parametrize("stop", [_detach, _no_grad])
def test_a_part_that_gets_no_gradient_at_all(stop: Stop):
    _assert_as_eager(wrap(_Net(stop), backend="ort"), both=False)


def test_recomputed_activations_stop_gradients_as_well():
    options = OrtOptions(recompute="layerwise")
    _assert_as_eager(wrap(_Net(_straight_through), backend="ort", options=options))


def test_gradients_of_the_input():
    """As of inputs_embeds: a batch is trained through, where it asks for it."""
    modules = (
        _Net(_detach).requires_grad_(False),
        wrap(_Net(_detach).requires_grad_(False), backend="ort"),
    )
    found = []
    for module in modules:
        x = torch.linspace(-1, 1, 8).view(2, 4).requires_grad_()
        module(x)[0].sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found, **TOLERANCE)


def test_a_graph_of_no_trained_values_is_left_as_it_was():
    """The rotary embedding is computed without gradients, of positions alone."""

    class Scaled(torch.nn.Module):
        def __init__(self, is_stopped: bool):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))
            self.is_stopped = is_stopped

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.set_grad_enabled(not self.is_stopped):
                angles = x.cos() * 2
            return (self.weight * (angles.detach() if self.is_stopped else angles)).sum()

    found = []
    for is_stopped in (False, True):
        module = wrap(Scaled(is_stopped), backend="ort")
        module(torch.ones(2, 4)).backward()
        found.append(operators(module))
    assert found[0] == found[1]


def test_torch_is_as_before():
    before = torch.no_grad.__enter__, torch.inference_mode.__exit__, torch.Tensor.data
    module = wrap(_Net(_no_grad), backend="ort")
    module(torch.ones(2, 4))
    assert before == (torch.no_grad.__enter__, torch.inference_mode.__exit__, torch.Tensor.data)
    assert torch.is_grad_enabled()


def test_nothing_trained_leads_to_the_outputs():
    module = _Net(_detach)
    module.head.requires_grad_(False)
    wrap(module, backend="ort")
    with pytest.raises(UnsupportedModelError, match="nothing that it returns depends on a param"):
        module(torch.ones(2, 4), both=False)

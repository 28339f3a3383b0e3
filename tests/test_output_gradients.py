"""Outputs that backward brings no gradient for cost nothing; those that it does are followed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from trained_graphs import graph_of, manager_of

from ort_train import unwrap, wrap
from ort_train.ortmodule.graph import GraphIndex
from ort_train.ortmodule.kernels.aten import operator_name
from ort_train.ortmodule.passes import output_gradients

# fp32 carries 24 bits: sums in another order differ by some 1e-7 at these sizes, a gradient that is
# left out by 1e-3 and more.
GRADIENT = 2e-6


def loss_alone(outputs: Any) -> torch.Tensor:
    return outputs.loss


def logits_alone(outputs: Any) -> torch.Tensor:
    return outputs.logits.square().mean()


def both(outputs: Any) -> torch.Tensor:
    return outputs.loss + outputs.logits.square().mean()


def gradients(module: Any, ids: torch.Tensor, objective: Callable[..., Any]) -> list[torch.Tensor]:
    module.zero_grad()
    objective(module(input_ids=ids, labels=ids)).backward()
    return [parameter.grad.clone() for parameter in module.parameters()]


def graph_info(module: torch.nn.Module) -> Any:
    return manager_of(module)._graph_info


@pytest.fixture(scope="module")
def wrapped(tiny_llama: Callable[..., Any]) -> Any:
    return wrap(tiny_llama().train(), "ort")


@pytest.mark.parametrize("objective", [loss_alone, logits_alone, both])
@pytest.mark.parametrize("shape", [(2, 12), (3, 7)])
def test_one_graph_serves_every_objective(
    wrapped: Any, objective: Callable[..., Any], shape: tuple[int, int]
) -> None:
    ids = torch.randint(300, shape, generator=torch.Generator().manual_seed(1))
    expected = gradients(unwrap(copy.deepcopy(wrapped)), ids, objective)
    for found, wanted in zip(gradients(wrapped, ids, objective), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=GRADIENT, rtol=1e-4)


def test_no_zeros_are_made_for_the_logits(wrapped: Any) -> None:
    ids = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(1))
    gradients(wrapped, ids, loss_alone)
    assert graph_info(wrapped).user_output_names == ["output-0", "output-1"]
    assert graph_info(wrapped).output_grad_indices_require_full_shape == [0]
    with torch.profiler.profile(record_shapes=True) as profile:
        gradients(wrapped, ids, loss_alone)
    zeros = [event.input_shapes for event in profile.events() if event.name == "aten::zero_"]
    assert zeros  # of the loss's gradient, or the optimizer's
    assert [[2, 12, 300]] not in [shapes[:1] for shapes in zeros]


def test_without_a_gradient_of_the_logits_that_of_the_loss_is_not_copied() -> None:
    first = torch.randn(3, 4)
    assert output_gradients._add(first, torch.tensor(0.0)) is first
    other = torch.randn(3, 4)
    kept = first.clone()
    found = output_gradients._add(first, other, torch.tensor(0.0))
    assert torch.equal(found, kept + other)
    assert torch.equal(first, kept)


def test_the_sum_of_what_torch_computed_is_torchs(wrapped: Any) -> None:
    ids = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(1))
    gradients(wrapped, ids, loss_alone)
    index = GraphIndex(graph_of(wrapped))
    names = output_gradients._aliases("output-1_grad", index)
    readers = [n for name in names for n in index.consumers(name) if n.op_type != "Identity"]
    # A kernel of ONNX Runtime would need another tensor of the logits' size.
    assert [operator_name(node) for node in readers] == [output_gradients.ADD]


class TwoHeads(torch.nn.Module):
    """Its first output is added to nothing in the graph, its second to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = self.body(x)
        return hidden.tanh(), hidden, hidden


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_outputs_of_one_value(used: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    eager = TwoHeads()
    module = wrap(copy.deepcopy(eager), "ort")
    x = torch.randn(3, 4)

    def objective(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return sum((n + 1) * outputs[n].square().sum() for n in used)

    for each in (eager, module):
        objective(each(x)).backward()
    for found, wanted in zip(module.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, atol=GRADIENT, rtol=1e-5)

"""Backward passes whose gradients would be wrong are refused, as torch refuses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import padded_batch as batch

from ort_train import unwrap, wrap
from ort_train.errors import BackwardError

pytestmark = pytest.mark.usefixtures("shared_graphs")

MakeModel = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tiny_llama: MakeModel, shared_graphs: None) -> Any:
    return wrap(tiny_llama(), backend="ort")


@pytest.fixture(autouse=True)
def _without_gradients(model: Any) -> None:
    model.zero_grad()


def _step_of_optimizer(model: Any, inputs: dict[str, Any], outputs: Any) -> None:
    model(**batch(seed=1)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()


def _reused_buffer(model: Any, inputs: dict[str, Any], outputs: Any) -> None:
    inputs["input_ids"].fill_(3)


def _scaled_logits(model: Any, inputs: dict[str, Any], outputs: Any) -> None:
    with torch.no_grad():
        outputs.logits.div_(2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_step_of_optimizer, "weight '"),
        (_reused_buffer, "argument 'input_ids'"),
        (_scaled_logits, "output 1"),
    ],
)
def test_what_backward_reads_was_written_to(model: Any, change: Callable[..., None], named: str):
    inputs = batch()
    outputs = model(**inputs)
    change(model, inputs, outputs)
    with pytest.raises(BackwardError, match=f"^{named}.* was written to in place"):
        outputs.loss.backward()
    model(**batch()).loss.backward()  # the next one is none the worse


def test_what_backward_does_not_read_may_be_written_to(model: Any):
    inputs = batch()
    loss = model(**inputs).loss
    loss /= 2
    inputs["input_ids"] = inputs["input_ids"].clone().fill_(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    loss.backward()
    assert model.lm_head.weight.grad.any()


def test_batches_of_inference_mode(model: Any):
    """Their tensors have no version to compare."""
    with torch.inference_mode():
        inputs = batch()
    model(**inputs).loss.backward()
    assert model.lm_head.weight.grad.any()


def test_second_backward(model: Any):
    loss = model(**batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(BackwardError, match=r"a second backward through one forward of Llama"):
        (2 * loss).backward()


def test_gradients_of_gradients(model: Any):
    """They would be missing from a penalty on gradients, in silence."""
    loss = model(**batch()).loss
    with pytest.raises(BackwardError, match="create_graph=True asks for gradients of Llama"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


def test_eager_refuses_the_same(tiny_llama: MakeModel):
    """Else ours would refuse what users may do."""
    for change in (_step_of_optimizer, _reused_buffer):
        eager = unwrap(tiny_llama())
        inputs = batch()
        outputs = eager(**inputs)
        change(eager, inputs, outputs)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outputs.loss.backward()

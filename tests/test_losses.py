"""The cross entropy that torch computes for a graph's loss nodes, against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ort_train.ortmodule import aten, losses


def run(name: str, *inputs: Any) -> Any:
    assert losses  # registers the functions
    with torch.no_grad():
        return aten._direct[f"ort_train::{name}".encode()](*inputs)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", [-100, 7])
@pytest.mark.parametrize("kept", ["all", "some", "none"])
def test_as_torchs(reduction: str, ignored: int, kept: str):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(64, 501, generator=generator)).requires_grad_()
    labels = torch.randint(8, 501, (64,), generator=generator)
    if kept != "all":
        labels[:: 1 if kept == "none" else 3] = ignored
    index = [] if ignored == -100 else [torch.tensor(ignored)]
    loss, log_probs = run(f"cross_entropy_{reduction}", logits, labels, *index)
    factor = torch.tensor(1.7)
    gradient = run(f"cross_entropy_{reduction}_grad", factor, log_probs, labels, *index)

    expected = torch.nn.functional.cross_entropy(
        logits, labels, ignore_index=ignored, reduction=reduction
    )
    (expected_gradient,) = torch.autograd.grad(factor * expected, logits)
    # The same formula in another order: units in the last place.
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)

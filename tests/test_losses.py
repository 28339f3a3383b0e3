"""The cross entropy that torch computes for a graph's loss nodes, against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ort_train.ortmodule.kernels import direct
from ort_train.ortmodule.passes import losses


def run(name: str, *inputs: Any) -> Any:
    assert losses  # registers the functions
    with torch.no_grad():
        return direct.find(f"ort_train::{name}".encode())(*inputs)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", [-100, 7])
@pytest.mark.parametrize("kept", ["all", "some", "none", "no rows"])
@pytest.mark.parametrize("part_entries", [2**20, 10 * 501, 1], ids=["whole", "parts", "rows"])
def test_as_torchs(
    monkeypatch: pytest.MonkeyPatch, reduction: str, ignored: int, kept: str, part_entries: int
):
    monkeypatch.setattr(losses, "_PART_ENTRIES", part_entries)
    generator = torch.Generator().manual_seed(0)
    num_rows = 0 if kept == "no rows" else 64
    logits = (4 * torch.randn(num_rows, 501, generator=generator)).requires_grad_()
    labels = torch.randint(8, 501, (num_rows,), generator=generator)
    if kept in ("some", "none"):
        labels[:: 1 if kept == "none" else 3] = ignored
    index = [] if ignored == -100 else [torch.tensor(ignored)]
    loss = run(f"cross_entropy_{reduction}", logits, labels, *index)
    factor = torch.tensor(1.7)
    gradient = run(f"cross_entropy_{reduction}_grad", factor, logits, labels, *index)

    expected = torch.nn.functional.cross_entropy(
        logits, labels, ignore_index=ignored, reduction=reduction
    )
    (expected_gradient,) = torch.autograd.grad(factor * expected, logits)
    # The same formula in another order: units in the last place.
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)

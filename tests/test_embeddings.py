"""Gradients of embeddings, alone and added to the head's, against torch's.

The order of additions differs: 1e-7 of what is added, 2e-6 at these sizes.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from trained_graphs import operators

from ort_train import OrtOptions, wrap
from ort_train.ortmodule.kernels import onednn
from ort_train.ortmodule.passes import products

SIZE, WIDTH = 40, 24


class Tied(torch.nn.Module):
    """Two lookups and the head share one weight."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(SIZE, WIDTH, **settings)
        self.mix = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = self.mix(self.embedding(ids)) * self.embedding(ids.flip(-1))
        logits = hidden @ self.embedding.weight.t()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize(
    "settings", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}], ids=str
)
def test_tied_weights_as_eager(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_MIN_ENTRIES", 1)
    torch.manual_seed(0)
    eager = Tied(**settings)
    options = OrtOptions(export_cache=False)
    ours = wrap(copy.deepcopy(eager), "ort", options=options)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        ids, labels = (torch.randint(SIZE, (3, 7 + seed), generator=generator) for _ in range(2))
        ids[0, :4] = 3  # often, and the padding
        for model in (eager, ours):
            model.zero_grad()
            model(ids, labels).backward()
        for found, exact in zip(ours.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(found.grad, exact.grad, rtol=1e-5, atol=2e-6)
    names = operators(ours)
    # Only products that torch computes are added to.
    is_added = onednn.unavailable_reason() is None
    assert names.count("ort_train::add_embedding_gradient") == (2 if is_added else 0)
    assert ("embedding_backward" in names) != is_added


def test_gradients_of_earlier_steps_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added in place is the step's own memory, never what somebody holds."""
    monkeypatch.setattr(products, "_MIN_ENTRIES", 1)
    torch.manual_seed(0)
    ours = wrap(Tied(), "ort", options=OrtOptions(export_cache=False))
    held = []
    for seed in range(3):
        ids = torch.randint(SIZE, (3, 7), generator=torch.Generator().manual_seed(seed))
        ours.zero_grad()
        ours(ids, ids).backward()
        held.append((ours.embedding.weight.grad, ours.embedding.weight.grad.clone()))
    for gradient, copied in held:
        assert torch.equal(gradient, copied)

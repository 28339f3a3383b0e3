"""What bf16 products hand on to each other, and to biases and activations, without fp32 in between.

Entries that are bf16's already stay the same when they are widened, moved and rounded again, so
leaving that out changes no bit where nothing is computed in between. Where an activation is, it is
computed in bf16 as under autocast; tests/test_products.py holds its errors to autocast's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import architectures
import pytest
import torch
from torch.nn import functional as F
from trained_graphs import graph_of, operators

from ort_train import OrtOptions, wrap
from ort_train.ortmodule.kernels import onednn
from ort_train.ortmodule.kernels.aten import BF16_SUFFIX, operator_name
from ort_train.ortmodule.passes import bf16_values, products

pytestmark = pytest.mark.skipif(
    not onednn.has_bf16(), reason="this CPU doesn't multiply in bf16: products are emulated, slowly"
)
MOVES = ("Reshape", "Transpose", "Identity", "Split", "Concat")


@pytest.fixture(autouse=True)
def every_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices, too, go to oneDNN."""
    monkeypatch.setattr(products, "_MIN_SIDE", 1)


def built(module: torch.nn.Module) -> Any:
    # Not from disk: these tests change how graphs are made.
    return wrap(module, "ort", precision="bf16", options=OrtOptions(export_cache=False))


def rounded_sources(module: torch.nn.Module) -> set[str]:
    """The operators whose results are rounded, moves left aside."""
    graph = graph_of(module)
    producers = {name: node for node in graph.node for name in node.output}
    found = set()
    for node in graph.node:
        if operator_name(node) == "ort_train::to_bf16":
            source = producers.get(node.input[0])
            while source is not None and source.op_type in MOVES:
                source = producers.get(source.input[0])
            found.add("a parameter" if source is None else operator_name(source))
    return found


def gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_leaving_out_what_changes_nothing_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = architectures.find("t5")  # its activation is ReLU
    first = architectures.make_model(architecture).train()
    second = copy.deepcopy(first)
    ours = built(first)
    batches = [architectures.make_batch(architecture, 2, 12, seed=seed) for seed in range(2)]
    found = [gradients(ours, batch) for batch in batches]
    monkeypatch.setattr(bf16_values, "keep", lambda *arguments: 0)
    widened = built(second)
    for each, batch in zip(found, batches, strict=True):
        for name, gradient in gradients(widened, batch).items():
            assert torch.equal(each[name], gradient), name
    assert not any("product" in name for name in rounded_sources(ours))
    assert any("product" in name for name in rounded_sources(widened))


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "phi", "whisper"])
def test_no_product_is_rounded_that_only_products_read(model_type: str) -> None:
    architecture = architectures.find(model_type)
    model = built(architectures.make_model(architecture).train())
    gradients(model, architectures.make_batch(architecture, 2, 12, seed=0))
    sources = rounded_sources(model)
    assert not any("product" in name or "relu" in name for name in sources), sources
    assert "ort_train::cross_entropy_mean_grad" not in sources
    names = operators(model)
    assert any(name.endswith(BF16_SUFFIX) for name in names)


class Layers(torch.nn.Module):
    """A product that a norm reads as well, and one that is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(16, 32)
        self.norm = torch.nn.LayerNorm(32)
        self.second = torch.nn.Linear(32, 16)
        self.third = torch.nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.first(x)
        y = self.second(self.norm(x)) + self.second(x)
        returned = self.third(y)
        return (returned @ returned.transpose(-1, -2)).square().mean(), returned


def test_what_others_read_stays_in_fp32() -> None:
    exact = Layers()
    ours = built(copy.deepcopy(exact))
    x = torch.randn(2, 6, 16)
    loss, returned = ours(x)
    assert returned.dtype == torch.float32
    loss.backward()
    exact(x)[0].backward()
    for (name, p), q in zip(ours.named_parameters(), exact.parameters(), strict=True):
        # Five products in a row, each rounded by 2e-3 and some of it twice.
        assert (p.grad - q.grad).norm() < 0.05 * q.grad.norm(), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "activation", [F.relu, F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh")]
)
def test_biases_and_activations_as_eager(
    monkeypatch: pytest.MonkeyPatch, activation: Callable[..., torch.Tensor], precision: str
) -> None:
    monkeypatch.setattr(products, "_MIN_ENTRIES", 1)

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate = torch.nn.Linear(16, 32), torch.nn.Linear(16, 32)
            self.down = torch.nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(activation(self.gate(x)) * (self.up(x) * 0.3)).square().mean()

    torch.manual_seed(0)
    exact = Block()
    autocast = wrap(copy.deepcopy(exact), "eager", precision=precision)
    options = OrtOptions(export_cache=False)
    ours = wrap(copy.deepcopy(exact), "ort", precision=precision, options=options)
    errors = {"ours": 0.0, "autocast": 0.0}
    for seed in range(4):
        x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(seed))
        for model in (exact, autocast, ours):
            model.zero_grad()
            model(x).backward()
        for name, model in (("ours", ours), ("autocast", autocast)):
            for p, q in zip(model.parameters(), exact.parameters(), strict=True):
                errors[name] += float((p.grad - q.grad).square().sum())
    names = operators(ours)
    assert "Add" not in names  # the products add the biases
    if precision == "fp32":
        norm = sum(float(q.grad.square().sum()) for q in exact.parameters())
        assert errors["ours"] ** 0.5 < 1e-5 * norm**0.5  # another order of summation
    else:
        assert 0 < errors["ours"] ** 0.5 <= 1.2 * errors["autocast"] ** 0.5

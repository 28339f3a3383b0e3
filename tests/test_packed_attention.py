"""Attention over each sample's own tokens, against torch's own over the padded batch.

Tolerances of kernels are those of test_attention_kernels.py, of models those of test_sparsity.py,
for their reasons.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_attention_kernels import TOLERANCE, causal, gradients, relative_error
from test_sparsity import BOTH, PADDING, assert_same_step, batch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from trained_graphs import operators

from ort_train import wrap
from ort_train.errors import UnsupportedModelError
from ort_train.ortmodule.kernels import attention_kernels, onednn, packed_attention

B, HEADS, KEY_HEADS, T, SIZE = 5, 4, 2, 24, 16


def shown(name: str) -> torch.Tensor:
    """(B, T), bool: the tokens that attention_mask shows."""
    places = torch.arange(T)
    if name == "all":
        return torch.ones(B, T, dtype=torch.bool)
    lengths = torch.tensor([9, 9, T, 0, 1])[:, None]
    right = places < lengths
    if name == "holes":
        right[2, 5:11] = False
        right[0, 0] = False
    return right.flip(1) if name == "left" else right


def masks(kind: str, tokens: torch.Tensor) -> torch.Tensor:
    """(B, 1, T or 1, T): what each query sees."""
    keys = tokens[:, None, None]
    if kind == "bidirectional":
        return keys
    if kind == "packed":  # two samples a row
        first = torch.arange(T) < 7
        return causal(T) & (first[:, None] == first) & keys & tokens[:, None, :, None]
    return causal(T) & keys


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("min_fused", [1, 10_000], ids=["fused", "by products"])
@pytest.mark.parametrize("kind", ["causal", "bidirectional", "packed"])
@pytest.mark.parametrize("padding", ["right", "left", "holes", "all"])
def test_kernels_as_torch(
    monkeypatch: pytest.MonkeyPatch, padding: str, kind: str, min_fused: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(attention_kernels, "_MIN_FUSED_TOKENS", min_fused)
    torch.manual_seed(0)
    tokens = shown(padding)
    if padding != "all":
        tokens[4, 2] = True
    kept = tokens.clone()
    kept[1, -1] = kept[3, 0] = True  # padding whose label counts
    mask = masks(kind, tokens)
    query, grad = torch.randn(2, B, HEADS, T, SIZE).unbind()
    key, value = torch.randn(2, B, KEY_HEADS, T, SIZE).unbind()
    # What lies where nothing is kept is of no account.
    inputs = [each.masked_fill(~kept[:, None, :, None], 1e3) for each in (query, key, value)]
    leaves = [each.requires_grad_() for each in inputs]
    with sdpa_kernel(SDPBackend.MATH):
        exact = F.scaled_dot_product_attention(*leaves, attn_mask=mask, enable_gqa=True)
    exact.backward(grad * kept[:, None, :, None])

    rows = kept.flatten().nonzero().squeeze(1)

    def packed(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().transpose(1, 2).flatten(0, 1)[rows].transpose(0, 1)[None]

    rounded = [packed(tensor).to(dtype) for tensor in leaves]
    runs = packed_attention.find_runs(mask.view(torch.uint8), rows)  # as ONNX Runtime has it
    rest = (torch.tensor(SIZE**-0.5), runs)
    output, for_gradient = packed_attention.attention(*rounded, *rest, mask, rows)
    found = packed_attention.attention_gradient(
        packed(grad).to(dtype), *rounded, *rest, output, for_gradient, mask, rows
    )
    assert relative_error(output, packed(exact)) < TOLERANCE[dtype]
    for each, tensor in zip(found, leaves, strict=True):
        assert each.shape == packed(tensor).shape
        assert relative_error(each, packed(tensor.grad)) < TOLERANCE[dtype]


def test_samples_of_one_length_are_one_run() -> None:
    rows = torch.arange(B * T)
    whole = packed_attention.find_runs(masks("causal", shown("all")), rows)
    assert whole.tolist() == [[0, B * T, B, attention_kernels.CAUSAL]]
    tokens = shown("right")
    rows = tokens.flatten().nonzero().squeeze(1)
    # Left padding and holes are gone: what is left is causal. The sample of padding has no run, and
    # one token sees all there is.
    expected = [[0, 18, 2], [18, 18 + T, 1], [18 + T, 19 + T, 1]]
    found = packed_attention.find_runs(masks("causal", tokens), rows)
    assert found[:, :3].tolist() == expected
    kinds = [attention_kernels.CAUSAL, attention_kernels.CAUSAL, attention_kernels.ALL]
    assert found[:, 3].tolist() == kinds


def with_holes(rows: int, length: int, density: float, seed: int) -> dict[str, torch.Tensor]:
    inputs = batch(rows, length, density, seed)
    inputs["attention_mask"][:, 3::7] = 0
    inputs["labels"][:, 3::7] = -100
    return inputs


def num_packed(model: torch.nn.Module) -> int:
    names = operators(model)
    assert "Softmax" not in names
    assert not any(name in names for name in attention_kernels.OPERATORS.values())
    return names.count(packed_attention.OPERATOR)


@pytest.mark.parametrize("fields", [{}, {"num_key_value_heads": 4}], ids=["grouped", "whole"])
def test_a_decoder_as_eager(tiny_llama: Callable[..., Any], fields: dict[str, int]) -> None:
    eager = tiny_llama(**fields)
    model = wrap(copy.deepcopy(eager), "ort", options=BOTH)
    for seed, density in enumerate((0.01, 0.1, 0.5, 1.0)):
        inputs = batch(4, 24, density, seed)
        assert_same_step(eager, model, inputs)
        inputs = {name: value.flip(1) for name, value in inputs.items()}
        inputs["attention_mask"][1], inputs["labels"][1] = 0, -100
        assert_same_step(eager, model, inputs)
        assert_same_step(eager, model, with_holes(4, 24, density, seed))
    assert num_packed(model) == 2
    # Nothing is padded on the way to it: what is packed is ids, labels, angles, not q, k and v.
    assert operators(model).count("ort_train::unpack_rows") < 6


def test_an_encoder_as_eager() -> None:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = BertConfig(
        vocab_size=300, num_hidden_layers=2, hidden_dropout_prob=0,
        attention_probs_dropout_prob=0, **sizes,
    )  # fmt: skip
    eager = BertForMaskedLM(config).train()
    model = wrap(copy.deepcopy(eager), "ort", options=BOTH)
    for seed, density in enumerate((0.1, 0.5, 1.0)):
        assert_same_step(eager, model, batch(4, 24, density, seed))
        assert_same_step(eager, model, with_holes(4, 24, density, seed))
    assert num_packed(model) == 2


def test_packed_rows_as_eager(tiny_llama: Callable[..., Any]) -> None:
    """attention_mask of four axes."""
    eager = tiny_llama()
    model = wrap(copy.deepcopy(eager), "ort", options=PADDING)
    inputs = batch(B, T, 1.0, seed=3)
    for padding in ("right", "all"):
        tokens = shown(padding)
        inputs["attention_mask"] = masks("packed", tokens)
        inputs["labels"] = inputs["input_ids"].masked_fill(~tokens, -100)
        assert_same_step(eager, model, inputs)
    assert num_packed(model) == 2


@pytest.mark.skipif(not onednn.has_bf16(), reason="this CPU doesn't multiply in bf16")
def test_a_model_in_bf16_is_as_exact_as_autocast(tiny_llama: Callable[..., Any]) -> None:
    exact_model = tiny_llama()
    ours = wrap(copy.deepcopy(exact_model), "ort", precision="bf16", options=BOTH)
    autocast = wrap(copy.deepcopy(exact_model), "eager", precision="bf16")
    errors = {"ours": 0.0, "autocast": 0.0}
    for seed, density in enumerate((0.3, 0.6, 1.0)):
        inputs = batch(4, 40, density, seed)
        exact = gradients(exact_model, **inputs)
        for name, model in (("ours", ours), ("autocast", autocast)):
            for found, wanted in zip(gradients(model, **inputs), exact, strict=True):
                errors[name] += float((found - wanted).square().sum())
    assert 0 < errors["ours"] ** 0.5 <= 1.2 * errors["autocast"] ** 0.5
    assert f"{packed_attention.OPERATOR}_in_bf16" in operators(ours)


def test_onnx_runtimes_nodes_where_they_are_asked_for(tiny_llama: Callable[..., Any]) -> None:
    eager = tiny_llama()
    options = replace(BOTH, attention="onnxruntime")
    model = wrap(copy.deepcopy(eager), "ort", options=options)
    assert_same_step(eager, model, batch(4, 24, 0.5))
    assert operators(model).count("Softmax") == 2


class Unmasked(torch.nn.Module):
    """Attention that sees padding: its mask, if any, is causal alone."""

    def __init__(self, is_masked: bool) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 8)
        self.key = torch.nn.Linear(8, 8)
        self.is_masked = is_masked

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(input_ids) * attention_mask[..., None]
        heads = [
            each.view(*input_ids.shape, 2, 4).transpose(1, 2)
            for each in (hidden, self.key(hidden), hidden)
        ]
        places = torch.arange(input_ids.shape[1])
        mask = (places[:, None] >= places)[None, None] if self.is_masked else None
        output = F.scaled_dot_product_attention(*heads, attn_mask=mask)
        return (output.transpose(1, 2) * attention_mask[..., None, None]).sum()


@pytest.mark.parametrize("is_masked", [False, True])
def test_refused_where_the_mask_is_another(is_masked: bool) -> None:
    model = wrap(Unmasked(is_masked), "ort", options=PADDING)
    inputs = batch(2, 8, 0.5, vocab=11)
    with pytest.raises(UnsupportedModelError, match="attention_mask isn't among what"):
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])

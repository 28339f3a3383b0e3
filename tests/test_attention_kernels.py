"""Attention that torch runs as one node, against torch's own in fp32 without a fused kernel.

The kernels sum in another order: 4e-7 of the norm at these sizes. In bf16 each product's result is
rounded by 2e-3, of four in a row; a wrong gradient is off by 1e-1 and more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from trained_graphs import engines, operators

from ort_train import OrtOptions, wrap
from ort_train.errors import ConfigError, UnsupportedModelError
from ort_train.ortmodule.kernels import attention_kernels, onednn

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def causal(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def left_padded(length: int) -> torch.Tensor:
    """(2, 1, length, length); the first queries of each sample see nothing."""
    mask = causal(length).repeat(2, 1, 1, 1)
    mask[0, ..., :3] = False
    mask[1, ..., :5] = False
    return mask


MASKS: dict[str, Callable[[int], torch.Tensor | None]] = {
    "none": lambda length: None,
    "all": lambda length: torch.ones(2, 1, length, length, dtype=torch.bool),
    "causal": lambda length: causal(length)[None, None],
    "keys": lambda length: (torch.arange(length) < length - 2).view(1, 1, 1, length),
    "left padded": left_padded,
}


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mask_name", MASKS)
@pytest.mark.parametrize("length", [7, 260], ids=["by products", "fused"])
def test_kernels_as_torch(length: int, mask_name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, length, 16, requires_grad=True) for _ in range(3)]
    mask = MASKS[mask_name](length)
    with sdpa_kernel(SDPBackend.MATH):
        exact = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    grad = torch.randn_like(exact)
    exact.backward(grad)

    rounded = [tensor.detach().to(dtype) for tensor in inputs]
    kind = torch.tensor(attention_kernels.ALL)
    if mask is not None:
        kind = attention_kernels.mask_kind(mask.view(torch.uint8))  # as ONNX Runtime has it
    rest = (torch.tensor(16**-0.5), kind)
    output, kept = attention_kernels.attention(*rounded, *rest, mask)
    found = attention_kernels.attention_gradient(
        grad.to(dtype), *rounded, *rest, output, kept, mask
    )
    assert kept.shape[-1] == (1 if length == 260 else length)
    assert relative_error(output, exact.detach()) < TOLERANCE[dtype]
    for each, tensor in zip(found, inputs, strict=True):
        assert relative_error(each, tensor.grad) < TOLERANCE[dtype]


def test_what_a_mask_shows() -> None:
    kinds = {name: make(9) for name, make in MASKS.items() if name != "none"}
    found = {name: int(attention_kernels.mask_kind(mask)) for name, mask in kinds.items()}
    other = attention_kernels.OTHER
    assert found == {
        "all": attention_kernels.ALL,
        "causal": attention_kernels.CAUSAL,
        "keys": other,
        "left padded": other,
    }
    assert int(attention_kernels.mask_kind(causal(9)[:4])) == other  # fewer queries than keys


def test_long_batches_are_found() -> None:
    ids, scores = torch.zeros(2, 600, dtype=torch.long), torch.zeros(2, 5000)
    assert not attention_kernels.is_faster("fp32", [ids, scores])
    assert attention_kernels.is_faster("bf16", [ids, scores])
    assert attention_kernels.is_faster("fp32", [torch.zeros(1, 1024, dtype=torch.long)])
    assert not attention_kernels.is_faster("bf16", [torch.zeros(4096, dtype=torch.long)])


def gradients(model: torch.nn.Module, **batch: Any) -> list[torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def frozen_before_the_first_key(model: Any) -> Any:
    """As with adapters on q and v: nobody wants the gradient of the first layer's key."""
    first = model.model.layers[0]
    for part in (model.model.embed_tokens, first.input_layernorm, first.self_attn.k_proj):
        part.requires_grad_(False)
    return model


def batches(length: int) -> list[dict[str, torch.Tensor]]:
    """Whole rows, then rows padded at the right, of another length."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for size, padding in ((length, 0), (length - 4, 6)):
        ids = torch.randint(300, (2, size), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, size - padding :] = 0
        labels = ids.masked_fill(mask == 0, -100)
        result.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return result


@pytest.mark.parametrize("min_fused", [8, 10_000], ids=["fused", "by products"])
def test_a_model_as_eager(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, min_fused: int
) -> None:
    monkeypatch.setattr(attention_kernels, "_MIN_FUSED_TOKENS", min_fused)
    eager = frozen_before_the_first_key(tiny_llama()).train()
    model = wrap(copy.deepcopy(eager), "ort", options=OrtOptions(attention="torch"))
    for batch in batches(24):
        exact = gradients(eager, **batch)
        for found, wanted in zip(gradients(model, **batch), exact, strict=True):
            # fp32 in another order: 1e-6 of a gradient's largest entries.
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-6)
    names = operators(model)
    assert names.count("ort_train::masked_attention") == len(eager.model.layers)
    assert names.count(attention_kernels.KIND) == 1
    assert "Softmax" not in names


@pytest.mark.skipif(not onednn.has_bf16(), reason="this CPU doesn't multiply in bf16")
def test_a_model_in_bf16_is_as_exact_as_autocast(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_kernels, "_MIN_FUSED_TOKENS", 8)
    exact_model = frozen_before_the_first_key(tiny_llama()).train()
    options = OrtOptions(attention="torch")
    ours = wrap(copy.deepcopy(exact_model), "ort", precision="bf16", options=options)
    autocast = wrap(copy.deepcopy(exact_model), "eager", precision="bf16")
    errors = {"ours": 0.0, "autocast": 0.0}
    for batch in batches(40):
        exact = gradients(exact_model, **batch)
        for name, model in (("ours", ours), ("autocast", autocast)):
            for found, wanted in zip(gradients(model, **batch), exact, strict=True):
                errors[name] += float((found - wanted).square().sum())
    assert 0 < errors["ours"] ** 0.5 <= 1.2 * errors["autocast"] ** 0.5
    assert "ort_train::masked_attention_in_bf16" in operators(ours)


def test_ignored_labels_are_left_out_behind_it(tiny_llama: Callable[..., Any]) -> None:
    eager = tiny_llama().train()
    options = OrtOptions(attention="torch", label_sparsity=True)
    model = wrap(copy.deepcopy(eager), "ort", options=options)
    for batch in batches(24):
        batch["labels"][:, ::2] = -100
        exact = gradients(eager, **batch)
        for found, wanted in zip(gradients(model, **batch), exact, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-6)  # another order
    (engine,) = engines(model)
    assert engine.savings.flops_per_ignored_label > 0
    assert "ort_train::masked_attention" in operators(model)


def test_auto_leaves_short_batches_to_onnxruntime(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (batch, _) = batches(24)
    for min_tokens, is_torch in ((25, False), (24, True)):
        monkeypatch.setitem(attention_kernels._MIN_TOKENS, "fp32", min_tokens)
        options = OrtOptions(export_cache=False)  # these thresholds are no part of its key
        model = wrap(tiny_llama().train(), "ort", options=options)
        gradients(model, **batch)
        assert any("attention" in name for name in operators(model)) == is_torch


class Dropped(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x * self.scale, x, x, dropout_p=0.5).sum()


def test_what_was_asked_for_and_cant_be_is_an_error() -> None:
    module = wrap(Dropped(), "ort", options=OrtOptions(attention="torch"))
    with pytest.raises(UnsupportedModelError, match="dropout, with attention='torch'"):
        module(torch.randn(1, 2, 4, 8))
    with pytest.raises(ConfigError, match=r"attention='torch' and recompute exclude each other"):
        OrtOptions(attention="torch", recompute="layerwise")
    with pytest.raises(ConfigError, match="attention='flash' is not one of"):
        OrtOptions(attention="flash")
    assert OrtOptions(attention="torch").device_problems("cuda")
    assert not OrtOptions(attention="torch").device_problems("cpu")

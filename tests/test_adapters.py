"""ort_train.adapters: only the adapter trains, and every target is met."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ort_train.adapters import apply_adapter, trainable_summary
from ort_train.config import AdapterConfig
from ort_train.errors import ModelError


def lora(**fields) -> AdapterConfig:
    return AdapterConfig(**{"method": "lora", "r": 4, "alpha": 8, **fields})


def test_none_leaves_the_model_alone(tiny_llama):
    model = tiny_llama()
    assert apply_adapter(model, AdapterConfig()) is model
    trainable, total = trainable_summary(model)
    assert trainable == total == sum(p.numel() for p in model.parameters())


def test_lora_trains_its_own_weights_only(tiny_llama):
    plain = trainable_summary(tiny_llama())[1]
    model = apply_adapter(tiny_llama(), lora(target_modules=["q_proj", "v_proj"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2  # A and B of two modules in two layers
    assert all("lora_" in name and ("q_proj" in name or "v_proj" in name) for name in trained)
    # q is 64 x 64, v is 64 x 32.
    assert trainable_summary(model) == (2 * 4 * (128 + 96), plain + 2 * 4 * (128 + 96))


def test_lora_starts_as_the_model_itself(tiny_llama):
    ids = torch.arange(32).reshape(2, 16)
    plain = tiny_llama()(input_ids=ids).logits
    adapted = apply_adapter(tiny_llama(), lora())(input_ids=ids).logits
    torch.testing.assert_close(adapted, plain)


def test_settings_reach_peft(tiny_llama):
    model = apply_adapter(tiny_llama(), lora(dropout=0.25, target_modules=["o_proj"]))
    module = model.get_submodule("base_model.model.model.layers.0.self_attn.o_proj")
    assert module.scaling["default"] == 2.0
    assert module.lora_dropout["default"].p == 0.25


def test_all_linear_leaves_the_head_out(tiny_llama):
    model = apply_adapter(tiny_llama(), lora())
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("down_proj" in name for name in names)
    assert not any("lm_head" in name for name in names)


@pytest.mark.filterwarnings("error:fan_in_fan_out")
def test_gpt2s_transposed_linear_layers():
    sizes = {"vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    model = apply_adapter(GPT2LMHeadModel(GPT2Config(**sizes)), lora(target_modules=["c_attn"]))
    assert trainable_summary(model)[0] == 4 * (32 + 96)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_porj"], r"q_porj: did you mean q_proj.*linear modules: down_proj, gate_proj"),
        (["q_proj", "query"], r"match no module of LlamaForCausalLM: query: "),
        (["proj"], "match no module"),
        ([], "is empty: name modules, or set it to all-linear"),
        (["mlp"], "can't all take an adapter: .*Linear modules of this model: down_proj"),
    ],
)
def test_targets_that_match_nothing_or_the_wrong_thing(tiny_llama, targets, expected):
    with pytest.raises(ModelError, match=f"(?s){expected}"):
        apply_adapter(tiny_llama(), lora(target_modules=targets))

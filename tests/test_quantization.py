"""ort_train.quantization: models in 4 bits, and what is refused."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ort_train import job, quantization
from ort_train.adapters import apply_adapter, trainable_summary
from ort_train.config import AdapterConfig, ModelConfig, RunConfig, parse
from ort_train.data.tokenizer import make_tokenizer
from ort_train.errors import ConfigError, ModelError
from ort_train.models import load_model
from ort_train.quantization import Quantization
from ort_train.recipes import load_recipe

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer("to be or not to be", 300)


@pytest.fixture
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes", reason="needs the extra qlora")


def make(tokenizer: Any, quantization: Quantization | None, **fields: Any) -> Any:
    config = ModelConfig(architecture="llama", config={**SIZES, **fields})
    return load_model(config, tokenizer, 0, 32, quantization)


def with_adapter(**values: Any) -> RunConfig:
    return parse(
        {
            "model": {"architecture": "llama"},
            "train": {"max_steps": 1, "precision": values.pop("precision", "fp32")},
            "adapter": values,
        }
    )


def test_a_made_models_linear_layers_are_quantized(tokenizer, bitsandbytes):
    plain = make(tokenizer, None)
    model = make(tokenizer, Quantization("fp4", True))
    kinds = {name.rpartition(".")[2]: type(part) for name, part in model.named_modules()}
    assert kinds["q_proj"] is kinds["down_proj"] is bitsandbytes.nn.Linear4bit
    assert kinds["lm_head"] is torch.nn.Linear
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.quant_state.quant_type == "fp4"
    assert layer.weight.quant_state.nested
    assert layer.compute_dtype == torch.float32
    # Rounding to 16 levels: the weights are those of the same seed.
    decoded = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    weight = plain.model.layers[0].mlp.up_proj.weight
    assert torch.nn.functional.cosine_similarity(decoded.flatten(), weight.flatten(), 0) > 0.98
    quantization.dequantize(model, torch.float32)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, decoded)
    assert trainable_summary(plain)[1] == trainable_summary(model)[1]


def test_only_the_adapter_trains(tokenizer, bitsandbytes):
    model = apply_adapter(make(tokenizer, Quantization()), AdapterConfig(method="qlora"))
    trained, total = trainable_summary(model)
    assert 0 < trained < total
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())
    # 4-bit weights count as what they stand for.
    plain = apply_adapter(make(tokenizer, None), AdapterConfig(method="lora"))
    assert (trained, total) == trainable_summary(plain)


def test_gpt2s_transposed_layers_are_quantized_too(tokenizer, bitsandbytes):
    config = ModelConfig(architecture="gpt2", config={"n_embd": 64, "n_layer": 1, "n_head": 4})
    plain = load_model(config, tokenizer, 0, 32)
    model = load_model(config, tokenizer, 0, 32, Quantization())
    assert isinstance(model.transformer.h[0].attn.c_attn, bitsandbytes.nn.Linear4bit)
    ids = torch.arange(32)[None]
    expected, found = (m.eval()(input_ids=ids).logits for m in (plain, model))
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.99
    model = apply_adapter(model.train(), AdapterConfig(method="qlora"))
    model(input_ids=ids, labels=ids).loss.backward()


def test_settings_come_from_the_recipe():
    assert quantization.of_run(with_adapter(method="lora")) is None
    assert quantization.of_run(with_adapter(method="qlora")) == Quantization()
    config = with_adapter(method="qlora", quant_type="fp4", double_quant=True, precision="bf16")
    assert quantization.of_run(config) == Quantization("fp4", True, "bfloat16")
    config = with_adapter(method="qlora", compute_dtype="float16", precision="bf16")
    assert quantization.of_run(config) == Quantization(compute_dtype="float16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA kernels take bf16")
def test_onnxruntime_decodes_to_fp32_on_a_cpu():
    """Its products are rounded to bf16 by themselves."""
    config = with_adapter(method="qlora", precision="bf16")
    assert quantization.of_run(config) == Quantization(compute_dtype="bfloat16")
    assert quantization.of_run_here(config) == Quantization(compute_dtype="float32")
    config = with_adapter(method="qlora", precision="bf16", compute_dtype="bfloat16")
    assert quantization.of_run_here(config) == Quantization(compute_dtype="bfloat16")


@pytest.mark.parametrize("method", ["none", "lora"])
@pytest.mark.parametrize(
    "setting", [{"quant_type": "nf4"}, {"double_quant": False}, {"compute_dtype": "float32"}]
)
def test_settings_that_would_be_ignored_are_refused(method, setting):
    with pytest.raises(ConfigError, match=r"set adapter.method=qlora"):
        with_adapter(method=method, **setting)


def test_without_bitsandbytes_the_extra_is_named(tokenizer, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "bitsandbytes" else find_spec(name),
    )
    with pytest.raises(ConfigError, match=r"pip install 'ort_train\[qlora\]'"):
        job.check(load_recipe("mistral_qlora", tiny=True))
    with pytest.raises(ModelError, match=r"pip install 'ort_train\[qlora\]'"):
        make(tokenizer, Quantization())


def test_quantized_weights_are_not_fine_tuned(tokenizer, bitsandbytes, tmp_path: Path):
    make(tokenizer, Quantization("fp4")).save_pretrained(tmp_path)
    config = ModelConfig(name_or_path=str(tmp_path))
    with pytest.raises(ModelError, match=r"can't be trained themselves: set adapter.method=qlora"):
        load_model(config, tokenizer, 0, 32)
    with pytest.raises(ModelError, match=r"adapter.quant_type=fp4 and adapter.double_quant=false"):
        load_model(config, tokenizer, 0, 32, Quantization("nf4"))
    model = load_model(config, tokenizer, 0, 32, Quantization("fp4"))
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8


def test_a_model_without_linear_layers_is_refused(bitsandbytes):
    class Bare(torch.nn.Module):
        def get_output_embeddings(self) -> None:
            return None

    with pytest.raises(ModelError, match="no linear layer to quantize"):
        quantization.quantize(Bare(), Quantization())  # type: ignore[arg-type]


def test_layers_that_bitsandbytes_misreads_are_refused(tokenizer, bitsandbytes):
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("the faulty kernel is for AVX-512")
    with pytest.raises(ModelError, match=r"2 linear layers have \[160\] columns"):
        make(tokenizer, Quantization(), intermediate_size=160)


@pytest.mark.parametrize(("double_quant", "bits"), [(False, 4.5), (True, 4.127)])
def test_bits_per_weight(double_quant: bool, bits: float):
    assert Quantization(double_quant=double_quant).bits_per_weight == pytest.approx(bits, abs=1e-3)


def test_commands_leave_out_one_line_of_bitsandbytes_and_no_other() -> None:
    """Its import warns of kernels for inference; peft imports it for every adapter."""
    pytest.importorskip("bitsandbytes", reason="needs the extra qlora")
    code = (
        "import logging, sys; from ort_train import cli; cli.main(['recipes']); import peft; "
        "from bitsandbytes.backends.cpu import ops; ops.logger.warning('a real fault'); "
        "print('bitsandbytes' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "True"
    assert "a real fault" in done.stderr
    assert "gemm_4bit_forward" not in done.stderr

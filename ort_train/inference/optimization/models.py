"""Small models whose graphs the passes are measured on, with seeded random weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch

from ort_train.errors import ConfigError

#: What each has that a pass could act on.
MODELS = {
    "llama": "no biases: its linear layers are bare products",
    "gpt2": "biases, whose products the exporter writes as Gemm itself",
    "phi": "biases, added to products of three dimensions",
    "mlp": "biases, added to products of two dimensions, which is all that Gemm takes",
}
NUM_LAYERS = 2
VOCAB_SIZE = 1000
_OPSET = 17


def check_sizes(model: str, hidden: int, heads: int) -> list[str]:
    """What is wrong with a model's sizes."""
    if model != "mlp" and hidden % (2 * heads):
        return [f"hidden {hidden} isn't {heads} heads of an even size: change one of them"]
    return []


def make_model(name: str, hidden: int, heads: int) -> torch.nn.Module:
    """A model of one input and one output, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    if name == "mlp":
        return _BiasedLayers(hidden).eval()
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": heads,
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if name != "gpt2":
        sizes["intermediate_size"] = 4 * hidden
    config = AutoConfig.for_model(name, **sizes)
    return _Logits(AutoModelForCausalLM.from_config(config)).eval()


def make_input(name: str, hidden: int, batch_size: int, seq_len: int) -> np.ndarray:
    """Random ids (batch_size, seq_len), or features (batch_size x seq_len, hidden) for mlp."""
    rng = np.random.default_rng(0)
    if name == "mlp":
        return rng.standard_normal((batch_size * seq_len, hidden)).astype(np.float32)
    return rng.integers(0, VOCAB_SIZE, (batch_size, seq_len))


def export(name: str, hidden: int, heads: int, values: np.ndarray, file: Path) -> None:
    """Write the model's graph as torch.onnx traces it, with the input's own shape.

    Known shapes give the passes most to act on: fuse_matmul_add_bias_into_gemm needs them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: the input's shape is meant to be fixed
        torch.onnx.export(
            make_model(name, hidden, heads),
            (torch.from_numpy(values),),
            str(file),
            dynamo=False,
            opset_version=_OPSET,
            input_names=["input"],
            output_names=["output"],
        )


def check_known(names: list[str]) -> None:
    """Refuse models that there are not.

    Raises:
        ConfigError: with all of them.
    """
    from ort_train.near import near_matches

    if unknown := [name for name in names if name not in MODELS]:
        raise ConfigError(
            [f"--models {name!r} is unknown: {near_matches(name, MODELS)}" for name in unknown]
        )


class _Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        # Without a mask transformers looks for packed samples by aten::diff, which isn't exported.
        mask = torch.ones_like(ids)
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


class _BiasedLayers(torch.nn.Module):
    """Eight layers of relu(x W + b); torch.nn.Linear would be exported as Gemm."""

    def __init__(self, size: int):
        super().__init__()
        layers = range(4 * NUM_LAYERS)
        self.weights = torch.nn.ParameterList(torch.randn(size, size) / size**0.5 for _ in layers)
        self.biases = torch.nn.ParameterList(torch.randn(size) for _ in layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = torch.relu(x @ weight + bias)
        return x

"""Quantized exports compute what PyTorch does on the same rounded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from decoders import FUSED, TRACED, make_decoder
from transformers import AutoModelForCausalLM

from ort_train.inference import export_model, load_folder
from ort_train.inference.benchmark.engines import ENGINES
from ort_train.inference.benchmark.run import _distance
from ort_train.inference.generation.session import DecoderSession
from ort_train.inference.quantization.quantize import Scheme, quantize_folder
from ort_train.inference.quantization.rounded import round_weight, write_rounded

#: Of accuracy level 0, where only the order of fp32 sums is another. What level 4 may be off by, as
#: it rounds inputs to 8 bits, is in engines.py.
EXACT = 1e-5
PROMPTS_BT = np.random.default_rng(0).integers(3, 300, (2, 24))


def ort_logits(folder: Path) -> np.ndarray:
    """Of the last token of PROMPTS_BT: all but one as the prompt, then a step with the cache."""
    session = DecoderSession(load_folder(folder), 1)
    decoding = session.start(PROMPTS_BT[:, :-1].tolist(), PROMPTS_BT.shape[1])
    return decoding.step(PROMPTS_BT[:, -1]).copy()


def torch_logits(folder: Path) -> np.ndarray:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(PROMPTS_BT)).logits[:, -1].numpy()


def export(name: str, folder: Path) -> None:
    """`folder`/model and its export, `folder`/fp32."""
    kind, fields = {**FUSED, **TRACED}[name]
    make_decoder(kind, **fields).save_pretrained(folder / "model")
    export_model(folder / "model", folder / "fp32", say=lambda _: None)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounded")
    export("llama", folder)
    return folder


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize(("block_size", "symmetric"), [(128, False), (32, False), (32, True)])
def test_llama_has_pytorchs_logits(
    block_size: int, symmetric: bool, level: int, llama: Path, tmp_path: Path
) -> None:
    scheme = Scheme("int4", block_size, symmetric, level)
    quantize_folder(llama / "fp32", tmp_path / "int4", scheme)
    write_rounded(llama / "model", tmp_path / "rounded", "int4", scheme)
    expected = torch_logits(tmp_path / "rounded")
    tolerance = EXACT if level == 0 else ENGINES["ort-int4"].tolerance
    assert _distance(ort_logits(tmp_path / "int4"), expected) < tolerance
    # Rounding itself changes more than what is allowed: the check tells the two models apart.
    assert _distance(torch_logits(llama / "model"), expected) > ENGINES["ort-int4"].tolerance


@pytest.mark.parametrize("name", ["phi", "gemma", "qwen3", "gpt2"])
def test_other_architectures_have_pytorchs_logits(name: str, tmp_path: Path) -> None:
    """Parallel and biased, scaled by no power of 2, tied with norms of queries, transposed."""
    export(name, tmp_path)
    scheme = Scheme("int4", accuracy_level=0)
    quantize_folder(tmp_path / "fp32", tmp_path / "int4", scheme)
    write_rounded(tmp_path / "model", tmp_path / "rounded", "int4", scheme)
    found, expected = ort_logits(tmp_path / "int4"), torch_logits(tmp_path / "rounded")
    assert _distance(found, expected) < EXACT


@pytest.mark.parametrize("part", ["scales", "zero_points", "q4"])
def test_one_wrong_layer_is_seen(part: str, llama: Path, tmp_path: Path) -> None:
    """Half of one product's numbers of this part are those of other rows."""
    quantize_folder(llama / "fp32", tmp_path / "int4", Scheme("int4", 32, accuracy_level=0))
    write_rounded(llama / "model", tmp_path / "rounded", "int4", Scheme("int4", 32))
    graph = onnx.load(tmp_path / "int4" / "model.onnx").graph
    name = f"/model/layers.1/mlp/up_proj/MatMul.{part}"
    (tensor,) = (one for one in graph.initializer if one.name == name)
    data = bytearray(tensor.raw_data)
    middle = len(data) // 2
    changed = bytes(data[middle // 2 : middle] + data[: middle // 2] + data[middle:])
    assert changed != bytes(data)
    model = onnx.load(tmp_path / "int4" / "model.onnx")
    for one in model.graph.initializer:
        if one.name == name:
            one.raw_data = changed
    (tmp_path / "int4" / "model.onnx.data").unlink()
    onnx.save(
        model,
        tmp_path / "int4" / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
    )
    error = _distance(ort_logits(tmp_path / "int4"), torch_logits(tmp_path / "rounded"))
    assert error > 100 * EXACT


def test_q4_0_is_llama_cpps_formula() -> None:
    """ggml's quantize_row_q4_0: the largest magnitude at -8, and its scale in half precision."""
    weight = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    for row, found in zip(
        weight.reshape(-1, 32), round_weight(weight, "q4_0").reshape(-1, 32), strict=True
    ):
        scale = row[np.abs(row).argmax()] / -8
        numbers = np.minimum(15, np.trunc(row / scale + 8.5)) - 8
        assert np.array_equal(found, numbers * np.float32(np.float16(scale)))

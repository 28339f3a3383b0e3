"""Training on an NVIDIA GPU: what docs/gpu.md lists as unverified. None of it runs without one.

Tolerances: in fp32 the GPU sums in another order than torch, and TF32 is off; fp16 carries 11 bits
and bf16 8, and a gradient here is a sum of some hundred products. A wrong graph is off by 1e-1 and
more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ort_train import OrtOptions, ORTTrainer, ORTTrainingArguments, quantization, unwrap, wrap
from ort_train.adapters import apply_adapter
from ort_train.config import AdapterConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

GRADIENT = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}  # of a tensor's norm
LOSS = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 5e-2}

MakeModel = Callable[..., Any]


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def step(model: Any, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), grads


def assert_as_eager(model: Any, precision: str = "fp32", options: Any = None) -> None:
    """Two shapes of a batch through a model on the GPU, against a copy that runs eagerly."""
    eager = wrap(copy.deepcopy(model), "eager", precision)
    ours = wrap(model, "ort", precision, options)
    for seed, shape in enumerate(((2, 12), (3, 32))):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(300, shape, generator=generator).cuda()
        (loss, found), (expected_loss, expected) = step(ours, ids), step(eager, ids)
        assert abs(loss - expected_loss) < LOSS[precision]
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            distance = (found[name] - gradient).norm()
            assert distance <= GRADIENT[precision] * gradient.norm(), name
    unwrap(ours)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_whole_model(tiny_llama: MakeModel, precision: str) -> None:
    assert_as_eager(tiny_llama().cuda().train(), precision)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights(tiny_llama: MakeModel, dtype: torch.dtype) -> None:
    precision = "fp16" if dtype == torch.float16 else "bf16"
    model = tiny_llama().to(dtype).cuda().train()
    eager, ours = copy.deepcopy(model), wrap(model, "ort")
    ids = torch.randint(300, (2, 12)).cuda()
    (loss, found), (expected_loss, expected) = step(ours, ids), step(eager, ids)
    assert abs(loss - expected_loss) < LOSS[precision]
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= GRADIENT[precision] * gradient.norm(), name


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_lora(tiny_llama: MakeModel, precision: str) -> None:
    model = apply_adapter(tiny_llama(), AdapterConfig(method="lora", target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    assert_as_eager(model.cuda().train(), precision)


@pytest.mark.parametrize("double_quant", [False, True])
def test_qlora(tiny_llama: MakeModel, double_quant: bool) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra qlora")
    model = tiny_llama().cuda()
    how = quantization.Quantization(double_quant=double_quant)
    quantization.quantize(model, how)
    quantization.prepare(model, how)
    adapter = AdapterConfig(method="qlora", target_modules=["q_proj"])
    assert_as_eager(apply_adapter(model, adapter).cuda().train())


@pytest.mark.parametrize(
    "options",
    [
        {"recompute": "layerwise"},
        {"fusion": "triton"},
        {"tuning": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options(tiny_llama: MakeModel, options: dict[str, Any]) -> None:
    assert_as_eager(tiny_llama().cuda().train(), options=OrtOptions(**options))


def train(model: Any, folder: Path, **fields: Any) -> list[float]:
    args = ORTTrainingArguments(
        str(folder), max_steps=10, logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True, learning_rate=1e-3, per_device_train_batch_size=4, **fields,
    )  # fmt: skip
    rows = torch.randint(300, (40, 16), generator=torch.Generator().manual_seed(0)).tolist()
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    trainer = ORTTrainer(model, args, train_dataset=dataset)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_ort_fused"])
def test_ten_steps_follow_eager(tiny_llama: MakeModel, tmp_path: Path, optimizer: str) -> None:
    """adamw_ort_fused is ONNX Runtime's FusedAdam, which its wheel compiles with nvcc."""
    expected = train(tiny_llama(), tmp_path / "eager", backend="eager")
    found = train(tiny_llama(), tmp_path / "ort", backend="ort", optim=optimizer)
    assert found == pytest.approx(expected, abs=1e-3)  # fp32 summed in another order, ten times

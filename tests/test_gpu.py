"""Training on an NVIDIA GPU: what docs/gpu.md lists as unverified. None of it runs without one.

Tolerances: in fp32 ONNX Runtime sums in another order than torch, and TF32 is off for both; fp16
carries 11 bits and bf16 8, and a gradient here is a sum of some hundred products. A wrong graph is
off by 1e-1 and more.
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
from ort_train.errors import UnsupportedModelError

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


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_operators_that_torch_runs(precision: str) -> None:
    """With a number of the batch, a mask, and gradients of two inputs."""
    from transformers.modeling_outputs import CausalLMOutput

    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding = torch.nn.Embedding(300, 16)
            self.linear = torch.nn.Linear(16, 16)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
            x = torch.nn.functional.elu(self.linear(self.embedding(input_ids)))
            y = torch.hypot(x, x.cumsum(1)).masked_scatter(x > 0, x)
            best = y.kthvalue(input_ids.shape[1] // 4, -1).values
            loss = torch.nn.functional.huber_loss(y.amax(-1), best)
            return CausalLMOutput(loss=loss)

    assert_as_eager(Odd().cuda().train(), precision)


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


def test_the_second_gpu(tiny_llama: MakeModel) -> None:
    """Another one than torch's current, which stays what it is."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    eager = tiny_llama().to("cuda:1").train()
    ours = wrap(copy.deepcopy(eager), "ort")
    ids = torch.randint(300, (2, 12)).to("cuda:1")
    (loss, found), (expected_loss, expected) = step(ours, ids), step(eager, ids)
    assert torch.cuda.current_device() == 0
    assert abs(loss - expected_loss) < LOSS["fp32"]
    for name, gradient in expected.items():
        assert found[name].device == gradient.device
        assert (found[name] - gradient).norm() <= GRADIENT["fp32"] * gradient.norm(), name


def test_another_stream_is_refused(tiny_llama: MakeModel) -> None:
    model = wrap(tiny_llama().cuda().train(), "ort")
    ids = torch.randint(300, (2, 12)).cuda()
    with (
        torch.cuda.stream(torch.cuda.Stream()),
        pytest.raises(UnsupportedModelError, match="default stream"),
    ):
        model(input_ids=ids, labels=ids)


def test_a_pass_waits_for_torch_and_torch_for_it() -> None:
    """Kernels of both, on large matrices, one after the other many times: what doesn't wait reads
    what isn't there yet. Also the nodes that torch runs inside the graph, the embedding's."""
    torch.manual_seed(0)
    layers = (torch.nn.Embedding(64, 2048), *(torch.nn.Linear(2048, 2048) for _ in range(4)))
    eager = torch.nn.Sequential(*layers).cuda().train()
    ours = wrap(copy.deepcopy(eager), "ort")
    ids = torch.randint(64, (16, 256)).cuda()
    for _ in range(20):
        losses = []
        for model in (eager, ours):
            for parameter in model.parameters():
                parameter.grad = None
                parameter.data.mul_(1.0001)  # by torch, right before the pass
            loss = model(ids).square().mean()
            loss.backward()
            losses.append((loss, [p.grad.square().sum() for p in model.parameters()]))
        for expected, found in zip(*losses, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=0.0)


def test_memory_is_torchs_own(tiny_llama: MakeModel) -> None:
    """What the benchmark reads as the peak, and plan predicts."""
    model = wrap(tiny_llama(hidden_size=512, intermediate_size=2048).cuda().train(), "ort")
    ids = torch.randint(300, (8, 128)).cuda()
    step(model, ids)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(input_ids=ids, labels=ids).loss.backward()
    activations = 2 * 8 * 128 * 2048 * 4  # bytes, of the widest values of both layers
    assert torch.cuda.max_memory_allocated() - before > activations


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

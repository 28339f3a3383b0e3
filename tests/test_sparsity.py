"""Ignored labels and padding left out of the graph: loss and gradients stay eager's.

Tolerances are those of test_architectures.py, for its reasons.
"""

from __future__ import annotations

import copy
import functools
import io
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import architectures
import pytest
import torch
from architectures import ARCHITECTURES, Architecture, make_batch
from test_architectures import (
    GRADIENT_TOLERANCE,
    assert_as_eager,
    flipped,
    step_with_same_loss,
)
from trained_graphs import engines

from ort_train import OrtOptions, wrap
from ort_train.errors import UnsupportedModelError

LABELS = OrtOptions(num_threads=1, label_sparsity=True)
PADDING = OrtOptions(num_threads=1, padding_sparsity=True)
BOTH = OrtOptions(num_threads=1, label_sparsity=True, padding_sparsity=True)

MakeModel = Callable[..., Any]

#: What can't leave ignored labels out: JetMoe's experts hide its hidden states' shape.
REFUSED = {"jetmoe": "can't leave out ignored labels: Reshape"}
#: These begin a decoder's input with the last label, and each row needs one, in eager, too.
NEED_A_LABEL = {"mbart", "plbart"}
#: What can't leave padding out, and the operator at which its tokens mix.
MIXES_TOKENS = {
    **REFUSED,
    **dict.fromkeys(
        # Experts get the tokens of all samples, sorted.
        ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared",
         "flex_olmo", "minimax", "hunyuan_v1_moe", "dots1", "glm4_moe", "ernie4_5_moe"],
        "TopK",
    ),
    **dict.fromkeys(["deepseek_v3", "glm4_moe_lite", "youtu"], "ScatterND"),  # interleaved rotary
    **dict.fromkeys(["lfm2", "squeezebert", "nystromformer"], "convolution"),
    **dict.fromkeys(["convbert", "longt5"], "Pad"),
    "mobilebert": "Pad",  # each token's embedding beside its neighbours'
    "gpt_oss": "max",
    "diffllama": "Tile",
    "doge": "ReduceMax",
    "whisper": "embeds no input_ids",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch(rows: int, length: int, density: float, seed: int = 0, vocab: int = 300) -> dict:
    """Samples of random lengths, padded on the right; the first third of each is no label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (rows, length), generator=generator)
    lengths = (density * length * (0.5 + torch.rand(rows, generator=generator))).long()
    lengths = lengths.clamp(1, length) if density < 1 else torch.full((rows,), length)
    positions = torch.arange(length)
    mask = (positions < lengths[:, None]).long()
    labels = ids.masked_fill((mask == 0) | (positions < lengths[:, None] // 3), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def assert_same_step(eager: Any, ours: Any, inputs: dict[str, Any]) -> None:
    """As assert_as_eager, for losses that may be NaN."""
    step_with_same_loss(eager, ours, inputs, nan_ok=True)
    for (name, parameter), twin in zip(eager.named_parameters(), ours.parameters(), strict=True):
        tolerance = {"atol": 1e-6, "rtol": GRADIENT_TOLERANCE, "equal_nan": True}
        torch.testing.assert_close(twin.grad, parameter.grad, **tolerance, msg=name)


# --- parity


@pytest.fixture
def exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several graphs of one model and batch are made from one export, the longest part of each."""
    original = torch.onnx.export
    kept: list[bytes] = []

    @functools.wraps(original)
    def export(model: Any, inputs: Any, file: io.BytesIO, **fields: Any) -> None:
        if not kept:
            original(model, inputs, file, **fields)
            kept.append(file.getvalue())
        else:
            file.write(kept[0])

    monkeypatch.setattr(torch.onnx, "export", export)


@pytest.mark.usefixtures("exported_once")
@pytest.mark.parametrize(
    "architecture",
    [each for each in ARCHITECTURES if each.task != "image"],
    ids=lambda a: a.model_type,
)
def test_as_eager(architecture: Architecture, caplog: pytest.LogCaptureFixture):
    eager = architectures.make_model(architecture)
    # First, as attention is then exported as one node, where it can be.
    assert_padding_as_eager(architecture, eager, caplog)
    assert_labels_as_eager(architecture, eager)


def assert_labels_as_eager(architecture: Architecture, eager: Any) -> None:
    ours = wrap(copy.deepcopy(eager), "ort", options=LABELS)
    inputs = make_batch(architecture, 2, 12, seed=0)
    if architecture.model_type in REFUSED:
        with pytest.raises(UnsupportedModelError, match=REFUSED[architecture.model_type]):
            ours(**inputs)
        return
    assert_as_eager(eager, ours, inputs)
    sparse = make_batch(architecture, 3, 16, seed=1)
    sparse["labels"][:, :7] = -100
    if architecture.model_type not in NEED_A_LABEL:
        sparse["labels"][1] = -100
    assert_as_eager(eager, ours, sparse)
    (engine,) = engines(ours)
    assert engine.savings.flops_per_ignored_label >= 3 * 2 * 32 * 128  # the head's, at least


def assert_padding_as_eager(
    architecture: Architecture, eager: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ours = wrap(copy.deepcopy(eager), "ort", options=BOTH)
    inputs = make_batch(architecture, 2, 12, seed=0)
    if architecture.model_type in MIXES_TOKENS:
        with pytest.raises(UnsupportedModelError, match=MIXES_TOKENS[architecture.model_type]):
            ours(**inputs)
        return
    assert_as_eager(eager, ours, inputs)
    sparse = make_batch(architecture, 4, 16, seed=1)
    for row, length in enumerate((3, 16, 9, 1)):
        sparse["attention_mask"][row, length:] = 0
        if architecture.task != "seq2seq":
            sparse["labels"][row, length:] = -100
    assert_as_eager(eager, ours, sparse)
    assert_as_eager(eager, ours, flipped(architecture, make_batch(architecture, 1, 9, seed=2)))
    (engine,) = engines(ours)
    assert engine.savings.flops_per_padding > 3 * 2 * 32 * 32
    assert ("the decoder's is computed" in caplog.text) == (architecture.task == "seq2seq")


@pytest.mark.parametrize("options", [LABELS, PADDING, BOTH], ids=["labels", "padding", "both"])
@pytest.mark.parametrize("first", [0.01, 1.0])
def test_any_density_in_one_graph(tiny_llama: MakeModel, options: OrtOptions, first: float):
    eager = tiny_llama()
    ours = wrap(copy.deepcopy(eager), "ort", options=options)
    for seed, density in enumerate((first, 0.5, 1.0, 0.01)):
        assert_same_step(eager, ours, batch(4, 24, density, seed))
    assert len(engines(ours)) == 1


@pytest.mark.parametrize("options", [LABELS, PADDING, BOTH], ids=["labels", "padding", "both"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_of_padding_and_batches_without_labels(
    tiny_llama: MakeModel, options: OrtOptions, attention: str
):
    eager = tiny_llama(attn_implementation=attention)
    ours = wrap(copy.deepcopy(eager), "ort", options=options)
    inputs = batch(3, 12, 0.7)
    inputs["attention_mask"][1] = 0
    inputs["labels"][1] = -100
    assert_same_step(eager, ours, inputs)
    nothing = {**inputs, "labels": torch.full_like(inputs["labels"], -100)}
    assert_same_step(eager, ours, nothing)  # NaN: the mean over no token
    assert math.isnan(ours(**nothing).loss.item())
    padding = {**nothing, "attention_mask": torch.zeros_like(inputs["attention_mask"])}
    assert_same_step(eager, ours, padding)
    assert_same_step(eager, ours, inputs)


@pytest.mark.parametrize("options", [LABELS, BOTH], ids=["labels", "both"])
def test_sum_over_items_in_batch(tiny_llama: MakeModel, options: OrtOptions):
    """transformers' way with gradient accumulation: a sum, divided by the whole batch's count."""
    eager = tiny_llama()
    ours = wrap(copy.deepcopy(eager), "ort", options=options)
    for count, density in ((40, 0.5), (7, 0.1)):
        assert_same_step(eager, ours, {**batch(4, 24, density), "num_items_in_batch": count})
    inputs = batch(2, 12, 0.5)
    inputs["labels"].fill_(-100)
    assert_same_step(eager, ours, {**inputs, "num_items_in_batch": 7})
    assert ours(**inputs, num_items_in_batch=7).loss.item() == 0
    assert len(engines(ours)) == 1


@pytest.mark.parametrize("options", [LABELS, PADDING, BOTH], ids=["labels", "padding", "both"])
@pytest.mark.parametrize("products", ["onnxruntime", "auto"])
def test_head_that_is_large_enough_for_onednn(
    tiny_llama: MakeModel, options: OrtOptions, products: Any
):
    """products.py takes 64 x 8192 weights, whose gradients' shapes ONNX Runtime doesn't know."""
    eager = tiny_llama(vocab_size=8192)
    ours = wrap(copy.deepcopy(eager), "ort", options=replace(options, products=products))
    for density in (0.5, 1.0):
        assert_same_step(eager, ours, batch(3, 12, density))


@pytest.mark.parametrize("options", [PADDING, BOTH], ids=["padding", "both"])
def test_labels_on_padding_count_as_in_eager(tiny_llama: MakeModel, options: OrtOptions):
    """`labels = input_ids`, the padding's included."""
    eager = tiny_llama()
    ours = wrap(copy.deepcopy(eager), "ort", options=options)
    inputs = batch(3, 12, 0.5)
    assert_same_step(eager, ours, {**inputs, "labels": inputs["input_ids"]})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_on_the_left(tiny_llama: MakeModel, attention: str):
    """The last token of it predicts the first real one, and attends to nothing."""
    eager = tiny_llama(attn_implementation=attention)
    ours = wrap(copy.deepcopy(eager), "ort", options=BOTH)
    inputs = {name: value.flip(1) for name, value in batch(4, 12, 0.5).items()}
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    assert_same_step(eager, ours, inputs)


@pytest.mark.parametrize("options", [LABELS, PADDING, BOTH], ids=["labels", "padding", "both"])
def test_twenty_steps_as_eager(tiny_llama: MakeModel, options: OrtOptions):
    courses = []
    for backend in ("eager", "ort"):
        model = wrap(tiny_llama(), backend, options=options).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for seed in range(20):
            inputs = batch(4, 10 + seed % 7, density=(0.3, 0.6, 1.0)[seed % 3], seed=seed)
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        courses.append(losses)
    # 20 steps of rounding in another order, of losses near 6.
    assert courses[1] == pytest.approx(courses[0], abs=2e-5)


def test_lora(tiny_llama: MakeModel):
    from test_engine import lora

    eager = lora(tiny_llama())
    ours = wrap(copy.deepcopy(eager), "ort", options=BOTH)
    for density in (0.5, 0.2):
        eager.zero_grad()
        ours.zero_grad()
        inputs = batch(4, 16, density)
        eager(**inputs).loss.backward()
        ours(**inputs).loss.backward()
        for (name, p), twin in zip(eager.named_parameters(), ours.parameters(), strict=True):
            if p.requires_grad:
                torch.testing.assert_close(twin.grad, p.grad, atol=1e-6, rtol=1e-3, msg=name)


def test_inputs_embeds(tiny_llama: MakeModel):
    def input_gradient(module: Any) -> torch.Tensor:
        inputs = batch(3, 8, 0.6)
        embeds = torch.linspace(-1, 1, 3 * 8 * 64).reshape(3, 8, 64).requires_grad_()
        module(
            inputs_embeds=embeds, attention_mask=inputs["attention_mask"], labels=inputs["labels"]
        ).loss.backward()
        assert embeds.grad is not None
        return embeds.grad

    eager = tiny_llama()
    ours = wrap(copy.deepcopy(eager), "ort", options=BOTH)
    torch.testing.assert_close(input_gradient(ours), input_gradient(eager), atol=2e-6, rtol=1e-4)


# --- logits


def custom_step(module: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Gradients of a loss of one's own on outputs.logits, beside the model's."""
    module.zero_grad()
    outputs = module(**inputs)
    loss = torch.nn.functional.cross_entropy(
        outputs.logits.flatten(0, 1), inputs["labels"].flatten(), label_smoothing=0.1
    )
    (loss + outputs.loss).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def test_logits_are_computed_when_read(tiny_llama: MakeModel, caplog: pytest.LogCaptureFixture):
    eager = tiny_llama()
    ours = wrap(copy.deepcopy(eager), "ort", options=LABELS)
    inputs = batch(3, 12, 0.6)
    outputs = ours(**inputs)
    assert len(engines(ours)) == 1
    assert outputs.logits.dtype is torch.float32  # known without them
    assert len(engines(ours)) == 1
    with caplog.at_level(logging.WARNING, "ort_train"):
        found = custom_step(ours, inputs)
    assert "label_sparsity saves nothing from now on" in caplog.text
    expected = custom_step(eager, inputs)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-6, rtol=1e-3, msg=name)
    assert outputs.logits.shape == (3, 12, 300)
    custom_step(ours, batch(2, 9, 0.5))
    assert len(engines(ours)) == 2


def test_logits_in_a_tuple(tiny_llama: MakeModel):
    ours = wrap(tiny_llama(), "ort", options=LABELS)
    inputs = batch(3, 12, 0.6)
    loss, logits = ours(**inputs, return_dict=False)[:2]
    loss.backward()
    torch.testing.assert_close(logits.mean(), ours.eval()(**inputs).logits.mean())


def test_logits_of_another_step_are_refused(tiny_llama: MakeModel):
    ours = wrap(tiny_llama(), "ort", options=LABELS)
    outputs = ours(**batch(2, 8, 0.5))
    with torch.no_grad():
        next(ours.parameters()).mul_(0.5)
    with pytest.raises(UnsupportedModelError, match="its weights have changed since"):
        outputs.logits.sum()
    dropping = wrap(tiny_llama(attention_dropout=0.5), "ort", options=LABELS)
    with pytest.raises(UnsupportedModelError, match="it has dropout"):
        dropping(**batch(2, 8, 0.5)).logits.sum()


def test_outputs_on_padding_are_zero(tiny_llama: MakeModel):
    eager = tiny_llama()
    ours = wrap(copy.deepcopy(eager), "ort", options=PADDING)
    inputs = batch(3, 12, 0.5)
    found = ours(**inputs, output_hidden_states=True)
    expected = eager(**inputs, output_hidden_states=True)
    is_real = inputs["attention_mask"].bool()
    for name in ("logits", "hidden_states"):
        for a, b in zip(found[name], expected[name], strict=True):
            if name == "hidden_states":
                torch.testing.assert_close(a[is_real], b[is_real], atol=1e-5, rtol=1e-4)
                assert not a[~is_real].any()
    assert not found.logits[~is_real].any()


# --- what is refused


def test_refused_without_a_loss(tiny_llama: MakeModel):
    ours = wrap(tiny_llama(), "ort", options=LABELS)
    inputs = batch(2, 8, 0.5)
    del inputs["labels"]
    with pytest.raises(UnsupportedModelError, match=r"finds no cross entropy.*pass labels"):
        ours(**inputs)


def test_refused_without_a_mask(tiny_llama: MakeModel):
    ours = wrap(tiny_llama(), "ort", options=PADDING)
    inputs = batch(2, 8, 0.5)
    del inputs["attention_mask"]
    with pytest.raises(UnsupportedModelError, match="called without attention_mask"):
        ours(**inputs)


class _TokenLoss(torch.nn.Module):
    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 4)
        self.head = torch.nn.Linear(4, 11)
        self.reduction = reduction

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.embedding(input_ids))[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), reduction=self.reduction
        )
        return {"loss": loss.mean(), "logits": logits}


def test_shift_of_logits():
    """A module of one's own, and the older way to shift: the last position is cut off."""
    torch.manual_seed(0)
    eager = _TokenLoss("mean")
    ours = wrap(copy.deepcopy(eager), "ort", options=LABELS)
    for rows in (2, 3):
        ids = torch.arange(rows * 6).reshape(rows, 6) % 11
        labels = ids.masked_fill(ids % 3 == 0, -100)
        for module in (eager, ours):
            module.zero_grad()
            module(ids, labels)["loss"].backward()
        for expected, found in zip(eager.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad)  # fp32, sums of 30 terms
    (engine,) = engines(ours)
    assert engine.savings.flops_per_ignored_label == 3 * 2 * 4 * 11


def test_refused_loss_of_each_token():
    ours = wrap(_TokenLoss("none"), "ort", options=LABELS)
    ids = torch.arange(8).reshape(2, 4)
    with pytest.raises(UnsupportedModelError, match="returns a loss of each token"):
        ours(ids, ids)


# --- the trainer


def test_log_and_arguments(tiny_llama: MakeModel, tmp_path):
    import datasets

    from ort_train import ORTTrainer, ORTTrainingArguments
    from ort_train.errors import ConfigError

    fields = {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "padding_sparsity": True,
    }
    inputs = batch(4, 12, 0.5)
    rows = datasets.Dataset.from_dict({name: value.tolist() for name, value in inputs.items()})
    arguments = ORTTrainingArguments(**fields, label_sparsity=True)
    trainer = ORTTrainer(model=tiny_llama(), args=arguments, train_dataset=rows)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    mask, labels = inputs["attention_mask"], inputs["labels"]
    densities = [sum(log[name] for log in logs) / 2 for name in ("token_density", "label_density")]
    expected = [mask.float().mean().item(), (labels != -100).float().mean().item()]
    assert densities == pytest.approx(expected, abs=1e-4)
    assert all(log["tflops_avoided"] > 0 for log in logs)
    with pytest.raises(ConfigError, match=r"label_smoothing_factor=0\.1 takes all logits"):
        ORTTrainingArguments(**fields, label_sparsity=True, label_smoothing_factor=0.1)
    with pytest.raises(ConfigError, match="backend is 'eager'"):
        ORTTrainingArguments(**fields, backend="eager")

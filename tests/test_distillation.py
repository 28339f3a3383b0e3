"""ort_train.distillation: the loss is the formula's, training by ONNX Runtime a plain loop's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from ort_train import ORTTrainingArguments
from ort_train.config import parse
from ort_train.distillation import DistillationTrainer, Distiller, distillation_loss
from ort_train.errors import ConfigError, ModelError
from ort_train.recipes import load_recipe

BLOCK, VOCAB, STEPS, BATCH, ACCUMULATION = 16, 300, 4, 2, 2
LEARNING_RATE = 1e-2  # so that a wrong gradient shows after a few steps
# fp32 sums in another order, over four steps of AdamW.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def teacher(tiny_llama: Any) -> Any:
    # Dropout: only a teacher in evaluation mode says the same twice.
    return tiny_llama(seed=7, hidden_size=96, head_dim=24, attention_dropout=0.5)


def student(tiny_llama: Any) -> Any:
    return tiny_llama(seed=1, num_hidden_layers=1)


def rows() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    shape = (STEPS * BATCH * ACCUMULATION, BLOCK)
    ids_NT = torch.randint(0, VOCAB, shape, generator=generator)
    labels_NT = ids_NT.clone()
    labels_NT[::3, :5] = -100  # batches of different numbers of predicted tokens
    columns = {"input_ids": ids_NT, "attention_mask": torch.ones_like(ids_NT), "labels": labels_NT}
    return Dataset.from_dict({name: tensor.tolist() for name, tensor in columns.items()})


def trainer(folder: Path, model: Any, teacher: Any, backend: str, **kwargs: Any) -> Any:
    args = ORTTrainingArguments(
        str(folder),
        backend=backend,
        ort_options={"num_threads": 1} if backend == "ort" else {},
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        **kwargs,
    )
    data = rows()
    made = DistillationTrainer(
        model, args, teacher=teacher, temperature=3.0, alpha=0.3, train_dataset=data,
        eval_dataset=data,
    )  # fmt: skip
    made._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
    return made


def plain_loss(student_logits: Any, teacher_logits: Any, labels: Any, items: int) -> torch.Tensor:
    """The formula, token by token, with probabilities."""
    total = torch.zeros(())
    for row in range(labels.shape[0]):
        for position in range(1, labels.shape[1]):
            label = labels[row, position]
            if label == -100:
                continue
            own, other = student_logits[row, position - 1], teacher_logits[row, position - 1]
            p, q = torch.softmax(other / 3.0, -1), torch.softmax(own / 3.0, -1)
            divergence = (p * (p / q).log()).sum()
            total = total - 0.3 * torch.softmax(own, -1)[label].log() + 0.7 * 9.0 * divergence
    return total / items


def plain_loop(model: Any, teacher: Any) -> list[float]:
    """Distillation in plain PyTorch: losses of each optimizer step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    data, losses = rows().with_format("torch"), []
    model.train()
    teacher = copy.deepcopy(teacher).eval()
    for step in range(STEPS):
        start = step * BATCH * ACCUMULATION
        items = int((data[start : start + BATCH * ACCUMULATION]["labels"][:, 1:] != -100).sum())
        total = 0.0
        for micro in range(ACCUMULATION):
            first = start + micro * BATCH
            batch = data[first : first + BATCH]
            ids, mask = batch["input_ids"], batch["attention_mask"]
            with torch.no_grad():
                taught = teacher(input_ids=ids, attention_mask=mask).logits
            logits = model(input_ids=ids, attention_mask=mask).logits
            loss = plain_loss(logits, taught, batch["labels"], items)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def test_loss_is_the_formula() -> None:
    torch.manual_seed(0)
    own, other = torch.randn(2, 6, 11, requires_grad=True), torch.randn(2, 6, 11)
    labels = torch.randint(0, 11, (2, 6))
    labels[0, :4] = -100
    expected = plain_loss(own, other, labels, items=7)
    loss = distillation_loss(own, other, labels, 3.0, 0.3)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)  # fp32 sums of 7 tokens
    (gradient,) = torch.autograd.grad(loss, own)
    (expected_gradient,) = torch.autograd.grad(expected, own)
    assert (gradient - expected_gradient).abs().max() < 1e-6
    halved = distillation_loss(own, other, labels, 3.0, 0.3, num_items=14)
    assert halved.item() == pytest.approx(loss.item() / 2, rel=1e-6)


def test_the_ends_of_alpha() -> None:
    torch.manual_seed(0)
    own, labels = torch.randn(1, 5, 7), torch.randint(0, 7, (1, 5))
    cross_entropy = torch.nn.functional.cross_entropy(own[0, :-1], labels[0, 1:]).item()
    text = distillation_loss(own, torch.randn(1, 5, 7), labels, 2.0, 1.0)
    assert text.item() == pytest.approx(cross_entropy, rel=1e-6)
    assert distillation_loss(own, own, labels, 2.0, 0.0).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("backend", ["eager", "ort"])
def test_training_is_a_plain_loops(
    backend: str, tmp_path: Path, tiny_llama: Any, teacher: Any
) -> None:
    expected_model = student(tiny_llama)
    expected = plain_loop(expected_model, teacher)
    model = student(tiny_llama)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    made = trainer(tmp_path, model, teacher, backend)
    made.train()
    losses = [log["loss"] for log in made.state.log_history if "loss" in log]
    assert losses == pytest.approx(expected, abs=TOLERANCE)
    for (name, found), reference in zip(
        model.named_parameters(), expected_model.parameters(), strict=True
    ):
        assert (found - reference).abs().max() < TOLERANCE * 10, name  # AdamW's steps are of 1e-2
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_evaluation_is_by_the_text_alone(tmp_path: Path, tiny_llama: Any, teacher: Any) -> None:
    model = student(tiny_llama)
    data = rows().with_format("torch")
    losses = []
    with torch.no_grad():
        for start in range(0, len(data), BATCH):
            losses.append(model.eval()(**data[start : start + BATCH]).loss)
    made = trainer(tmp_path, model, teacher, "eager")
    # A mean of means: transformers' own.
    assert made.evaluate()["eval_loss"] == pytest.approx(
        torch.stack(losses).mean().item(), rel=1e-5
    )


def test_a_benchmark_measures_the_same_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ort_train.bench.worker import Session

    monkeypatch.chdir(tmp_path)
    overrides = ["data.source=offline", "train.backend=eager", "distill.alpha=0.25"]
    config = load_recipe("quickstart_distill", overrides, tiny=True)
    session = Session(
        config.model_dump(mode="json"), 2, 1, None, str(tmp_path / "gradients.safetensors")
    )
    assert isinstance(session.distiller, Distiller)
    assert session.distiller.alpha == 0.25
    model, taught = copy.deepcopy(session.model), session.distiller.teacher
    batch = session.batches[0]
    ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = distillation_loss(
        model(**ids).logits, taught(**ids).logits, batch["labels"], 2.0, 0.25
    )
    assert session.start()["first_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_what_does_not_go_together(tmp_path: Path, tiny_llama: Any, teacher: Any) -> None:
    with pytest.raises(ModelError, match="the student predicts 200 tokens and the teacher 300"):
        trainer(tmp_path, tiny_llama(vocab_size=200), teacher, "eager")
    with pytest.raises(ConfigError, match="use_module_with_loss"):
        trainer(tmp_path, student(tiny_llama), teacher, "ort", use_module_with_loss=True)
    with pytest.raises(ConfigError, match="compute_loss_func"):
        DistillationTrainer(student(tiny_llama), teacher=teacher, compute_loss_func=lambda: None)
    with pytest.raises(ConfigError, match=r"temperature 0 .*\n.*alpha 2"):
        Distiller(teacher, 0, 2)


def config(**distill: Any) -> dict[str, Any]:
    return {
        "model": {"architecture": "llama"},
        "train": {"max_steps": 1},
        "distill": distill,
    }


@pytest.mark.parametrize(
    ("distill", "expected"),
    [
        ({"alpha": 0.5}, "distill.alpha 0.5 is read with a distill.teacher only"),
        ({"teacher": {}}, "no teacher: set distill.teacher.name_or_path"),
        ({"teacher": {"architecture": "llama", "vocab_size": 512}}, "set model.vocab_size"),
        ({"teacher": {"architectur": "llama"}}, "did you mean distill.teacher.architecture"),
        ({"teacher": {"architecture": "llama"}, "temperature": 0.0}, "distill.temperature"),
    ],
)
def test_configs_that_make_no_sense(distill: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse(config(**distill))


def test_a_teacher_that_was_not_trained_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ort_train import job

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"train the teacher first .* --recipe quickstart"):
        job.run(load_recipe("quickstart_distill"))
    assert not list(tmp_path.iterdir())


def test_tiny_makes_another_teacher_than_the_student() -> None:
    from ort_train.data.tokenizer import make_tokenizer
    from ort_train.distillation import load_distiller
    from ort_train.models import load_model

    tiny = load_recipe("quickstart_distill", ["distill.teacher.name_or_path=a/b"], tiny=True)
    assert tiny.distill.teacher is not None
    assert tiny.distill.teacher.name_or_path is None
    assert tiny.model.tokenizer is None
    tokenizer = make_tokenizer("to be or not to be", 300)
    made = load_model(tiny.model, tokenizer, tiny.train.seed, tiny.data.block_size)
    weight = load_distiller(tiny, tokenizer, made).teacher.lm_head.weight
    assert not torch.equal(weight, made.lm_head.weight)

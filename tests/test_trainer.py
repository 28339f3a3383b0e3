"""ORTTrainer against transformers' Trainer: the same losses, weights, evaluations and files."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from ort_train import ORTTrainer, ORTTrainingArguments
from ort_train.backends import ort_forward
from ort_train.errors import ConfigError, DataError, NonFiniteLossError
from ort_train.forward import taken_over

pytestmark = pytest.mark.usefixtures("shared_graphs")

MakeModel = Callable[..., Any]
# A loss near 6 in fp32: 1e-6 from the order of summation, grown by a few AdamW steps.
LOSS = 2e-5
# AdamW divides a gradient by its own size: where that is all rounding, so is the direction of a
# step of 1e-3. See test_engine.
WEIGHTS = 2e-4


def samples(num: int = 24, length: int = 10, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(num):
        ids = torch.randint(300, (length,), generator=generator)
        mask = torch.ones_like(ids)
        mask[length - i % 4 :] = 0
        labels = ids.masked_fill(mask == 0, -100)
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def common(output_dir: Path, **fields: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 6,  # enough for 2 checkpoints and 2 epochs of these samples
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **fields,
    }


def ort_trainer(model: Any, output_dir: Path, kind: Any = ORTTrainer, **fields: Any) -> ORTTrainer:
    """An ORTTrainer; fields that Trainer takes itself go to it, the others to its arguments."""
    own = {
        name: fields.pop(name)
        for name in (
            "compute_metrics", "callbacks", "compute_loss_func", "model_init", "eval_dataset",
            "preprocess_logits_for_metrics", "optimizers", "train_dataset", "processing_class",
        )
        if name in fields
    }  # fmt: skip
    own.setdefault("train_dataset", samples())
    own.setdefault("eval_dataset", samples(8, seed=9))
    args = ORTTrainingArguments(**common(output_dir, **fields))
    return kind(model=model, args=args, data_collator=default_data_collator, **own)


def plain_trainer(model: Any, output_dir: Path, kind: Any = Trainer, **fields: Any) -> Trainer:
    own = {n: fields.pop(n) for n in ("compute_metrics", "compute_loss_func") if n in fields}
    return kind(
        model=model,
        args=TrainingArguments(**common(output_dir, **fields)),
        data_collator=default_data_collator,
        train_dataset=samples(),
        eval_dataset=samples(8, seed=9),
        **own,
    )


def losses(trainer: Trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def assert_same_weights(found: Any, expected: Any, atol: float = WEIGHTS) -> None:
    expected = expected.state_dict()
    assert found.state_dict().keys() == expected.keys()
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=atol, rtol=0, msg=name)


def adapted(model: Any, **fields: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    targets = ["q_proj", "v_proj"]
    return get_peft_model(
        model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **fields)
    )


# --- the same training ---


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="plain"),
        pytest.param({"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}, id="accumulation"),
        pytest.param({"label_smoothing_factor": 0.1}, id="label smoothing"),
        pytest.param({"gradient_checkpointing": True}, id="gradient checkpointing"),
        pytest.param({"lr_scheduler_type": "cosine", "warmup_steps": 2, "optim": "sgd"}, id="sgd"),
    ],
)
def test_trains_as_transformers(tiny_llama: MakeModel, tmp_path: Path, fields: dict[str, Any]):
    ours = ort_trainer(tiny_llama(), tmp_path / "ort", **fields)
    theirs = plain_trainer(tiny_llama(), tmp_path / "eager", **fields)
    found, expected = ours.train(), theirs.train()
    assert losses(ours) == pytest.approx(losses(theirs), abs=LOSS)
    assert found.training_loss == pytest.approx(expected.training_loss, abs=LOSS)
    assert found.global_step == expected.global_step == 6
    assert_same_weights(ours.model, theirs.model)


def test_trains_an_adapter_as_transformers(tiny_llama: MakeModel, tmp_path: Path):
    ours = ort_trainer(adapted(tiny_llama()), tmp_path / "ort")
    theirs = plain_trainer(adapted(tiny_llama()), tmp_path / "eager")
    ours.train()
    theirs.train()
    assert losses(ours) == pytest.approx(losses(theirs), abs=LOSS)
    assert_same_weights(ours.model, theirs.model)


def test_gradient_checkpointing_of_the_model_recomputes_in_the_graph(
    tiny_llama: MakeModel, tmp_path: Path
):
    """As in notebooks, where it is enabled on the model and not in the arguments."""
    recomputed = []
    for is_enabled in (False, True):
        model = tiny_llama()
        if is_enabled:
            model.gradient_checkpointing_enable()
        folder = tmp_path / str(is_enabled)
        trainer = ort_trainer(model, folder, max_steps=2, save_onnx=True, onnx_prefix="graph")
        trainer.train()
        (graph,) = folder.glob("graph_execution_model_training.onnx")
        recomputed.append(graph.read_bytes().count(b"_recompute"))
    assert recomputed[0] == 0
    assert recomputed[1] > 0


def test_epochs_and_a_last_smaller_batch(tiny_llama: MakeModel, tmp_path: Path):
    fields = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 5}
    ours = ort_trainer(tiny_llama(), tmp_path / "ort", **fields)
    theirs = plain_trainer(tiny_llama(), tmp_path / "eager", **fields)
    ours.train()
    theirs.train()
    assert ours.state.global_step == theirs.state.global_step == 10
    assert losses(ours) == pytest.approx(losses(theirs), abs=LOSS)


def weighted_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> Any:
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    total = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return 2.0 * total / (num_items_in_batch if num_items_in_batch is not None else labels.numel())


@pytest.mark.parametrize(("in_graph", "accumulation"), [(False, 1), (True, 2)])
def test_compute_loss_func(
    tiny_llama: MakeModel, tmp_path: Path, in_graph: bool, accumulation: int
):
    fields = {"compute_loss_func": weighted_loss, "gradient_accumulation_steps": accumulation}
    ours = ort_trainer(tiny_llama(), tmp_path / "ort", use_module_with_loss=in_graph, **fields)
    theirs = plain_trainer(tiny_llama(), tmp_path / "eager", **fields)
    ours.train()
    theirs.train()
    assert losses(ours) == pytest.approx(losses(theirs), abs=2 * LOSS)  # twice the loss
    assert_same_weights(ours.model, theirs.model)


@pytest.mark.parametrize(("smoothing", "accumulation"), [(0.0, 2), (0.1, 1)])
def test_loss_in_the_graph(
    tiny_llama: MakeModel, tmp_path: Path, smoothing: float, accumulation: int
):
    fields = {
        "label_smoothing_factor": smoothing,
        "gradient_accumulation_steps": accumulation,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    ours = ort_trainer(tiny_llama(), tmp_path / "ort", use_module_with_loss=True, **fields)
    theirs = plain_trainer(tiny_llama(), tmp_path / "eager", **fields)
    ours.train()
    theirs.train()
    assert losses(ours) == pytest.approx(losses(theirs), abs=LOSS)
    evaluated = [log["eval_loss"] for log in ours.state.log_history if "eval_loss" in log]
    expected = [log["eval_loss"] for log in theirs.state.log_history if "eval_loss" in log]
    assert evaluated == pytest.approx(expected, abs=LOSS)
    assert_same_weights(ours.model, theirs.model)
    # One graph: the number of labels in a batch is an input, not a constant.
    assert len(ort_forward(ours._stand_in).engines) == 1


def overriding(parent: Any) -> Any:
    class Weighted(parent):
        """The example of transformers' documentation: labels stay in the inputs."""

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.get("labels")
            outputs = model(**inputs)
            logits = outputs.get("logits")
            weight = torch.linspace(0.5, 1.5, logits.shape[-1])
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), weight=weight
            )
            return (loss, outputs) if return_outputs else loss

    return Weighted


def test_overridden_compute_loss(tiny_llama: MakeModel, tmp_path: Path):
    ours = ort_trainer(tiny_llama(), tmp_path / "ort", kind=overriding(ORTTrainer))
    theirs = plain_trainer(tiny_llama(), tmp_path / "eager", kind=overriding(Trainer))
    ours.train()
    theirs.train()
    assert losses(ours) == pytest.approx(losses(theirs), abs=LOSS)
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], abs=LOSS)
    assert_same_weights(ours.model, theirs.model)


def test_overridden_compute_loss_and_loss_in_the_graph_exclude_each_other(
    tiny_llama: MakeModel, tmp_path: Path
):
    with pytest.raises(ConfigError, match="pass compute_loss_func instead"):
        ort_trainer(tiny_llama(), tmp_path, kind=overriding(ORTTrainer), use_module_with_loss=True)


# --- evaluation and prediction ---


def accuracy(prediction: Any) -> dict[str, float]:
    logits, labels = prediction.predictions, prediction.label_ids
    return {"accuracy": float((logits.argmax(-1) == labels).mean()), "rows": len(labels)}


def test_evaluate_and_predict_are_transformers(tiny_llama: MakeModel, tmp_path: Path):
    model = tiny_llama()
    ours = ort_trainer(model, tmp_path / "ort", compute_metrics=accuracy)
    theirs = plain_trainer(copy.deepcopy(model), tmp_path / "eager", compute_metrics=accuracy)
    found, expected = ours.evaluate(), theirs.evaluate()
    for name in ("eval_loss", "eval_accuracy", "eval_rows"):
        assert found[name] == expected[name]  # eval runs the module's own forward: equal bits
    test_set = samples(6, seed=4)
    assert np.array_equal(ours.predict(test_set).predictions, theirs.predict(test_set).predictions)
    ours.train()
    theirs.train()
    found, expected = ours.evaluate(), theirs.evaluate()
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], abs=LOSS)
    metrics = ours.predict(test_set).metrics
    assert metrics is not None
    assert metrics["test_rows"] == 6


def test_evaluation_during_training_leaves_the_training_alone(
    tiny_llama: MakeModel, tmp_path: Path
):
    quiet = ort_trainer(tiny_llama(), tmp_path / "a")
    evaluating = ort_trainer(tiny_llama(), tmp_path / "b", eval_strategy="steps", eval_steps=2)
    quiet.train()
    evaluating.train()
    assert losses(quiet) == losses(evaluating)
    assert sum("eval_loss" in log for log in evaluating.state.log_history) == 3


def test_preprocessed_logits_and_named_eval_sets(tiny_llama: MakeModel, tmp_path: Path):
    trainer = ort_trainer(
        tiny_llama(),
        tmp_path,
        eval_dataset={"a": samples(4), "b": samples(5)},
        compute_metrics=lambda p: {"shape": p.predictions.ndim},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    metrics = trainer.evaluate()
    assert metrics["eval_a_shape"] == metrics["eval_b_shape"] == 2


def scored(model: Any, output_dir: Path, scores: list[float], **fields: Any) -> ORTTrainer:
    """A checkpoint every two steps; the one with the highest score is loaded at the end."""
    values = iter(scores)
    return ort_trainer(
        model,
        output_dir,
        compute_metrics=lambda p: {"score": next(values)},
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        **fields,
    )


def test_metric_decides_the_best_checkpoint(tiny_llama: MakeModel, tmp_path: Path):
    trainer = scored(tiny_llama(), tmp_path, [0.1, 0.9, 0.2], save_total_limit=2)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    names = sorted(path.name for path in tmp_path.glob("*checkpoint*"))
    assert names == ["checkpoint-4", "checkpoint-6"]
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert_same_weights(trainer.model, best, atol=0)


def test_best_adapter_is_loaded_at_the_end(tiny_llama: MakeModel, tmp_path: Path):
    trainer = scored(adapted(tiny_llama()), tmp_path, [0.9, 0.1, 0.2])
    trainer.train()
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    own = trainer.model.state_dict()
    for name, value in saved.items():
        module, _, kind = name.rpartition(".")
        assert torch.equal(own[f"{module}.default.{kind}"], value)


# --- callbacks, logs ---


class _Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.events: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda *args, **kwargs: self.events.append(name)
        return super().__getattribute__(name)


def test_callbacks_see_transformers_events(tiny_llama: MakeModel, tmp_path: Path):
    fields = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    recorders = _Recorder(), _Recorder()
    ort_trainer(tiny_llama(), tmp_path / "a", callbacks=[recorders[0]], **fields).train()
    theirs = plain_trainer(tiny_llama(), tmp_path / "b", **fields)
    theirs.add_callback(recorders[1])
    theirs.train()
    # on_init_end comes before add_callback.
    found = [event for event in recorders[0].events if event != "on_init_end"]
    assert found == [event for event in recorders[1].events if event != "on_init_end"]
    assert found.count("on_step_end") == 3


def test_logs_carry_speed(tiny_llama: MakeModel, tmp_path: Path):
    trainer = ort_trainer(tiny_llama(), tmp_path, logging_steps=2)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 3
    assert all(log["it_per_s"] > 0 for log in logs)
    # 4 rows of 10 tokens a step.
    assert all(log["tokens_per_s"] == pytest.approx(log["it_per_s"] * 40, rel=0.01) for log in logs)


# --- the model outside of training ---


def test_model_is_the_users_object_and_itself_afterwards(tiny_llama: MakeModel, tmp_path: Path):
    model = tiny_llama()
    trainer = ort_trainer(model, tmp_path)
    trainer.train()
    assert trainer.model is model
    assert "forward" not in vars(model)
    assert taken_over(model) is None
    copy.deepcopy(model)


def test_model_is_itself_after_an_error_in_training(tiny_llama: MakeModel, tmp_path: Path):
    class Stop(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise ZeroDivisionError("a callback's own")

    model = tiny_llama()
    with pytest.raises(ZeroDivisionError, match="a callback's own"):
        ort_trainer(model, tmp_path, callbacks=[Stop()]).train()
    assert taken_over(model) is None


def test_saved_model_loads(tiny_llama: MakeModel, tmp_path: Path):
    trainer = ort_trainer(tiny_llama(), tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same_weights(loaded, trainer.model, atol=0)


def test_saved_adapter_is_the_adapter_alone(tiny_llama: MakeModel, tmp_path: Path):
    from peft import PeftModel

    trainer = ort_trainer(adapted(tiny_llama()), tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "checkpoint-6"):
        files = {path.name for path in folder.iterdir()}
        assert "adapter_model.safetensors" in files
        assert not any(name.startswith("model") for name in files)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved")
    assert_same_weights(loaded, trainer.model, atol=0)


def test_train_twice_goes_on(tiny_llama: MakeModel, tmp_path: Path):
    ours = ort_trainer(tiny_llama(), tmp_path / "a")
    theirs = plain_trainer(tiny_llama(), tmp_path / "b")
    for trainer in (ours, theirs):
        trainer.train()
        trainer.evaluate()
        trainer.train()
    assert losses(ours) == pytest.approx(losses(theirs), abs=LOSS)
    assert_same_weights(ours.model, theirs.model)


def test_model_init(tiny_llama: MakeModel, tmp_path: Path):
    trainer = ort_trainer(None, tmp_path, model_init=lambda: tiny_llama())
    trainer.train()
    first = losses(trainer)
    trainer.train()
    assert losses(trainer) == pytest.approx(first)  # a new model from the same seed


def test_hyperparameter_search(tiny_llama: MakeModel, tmp_path: Path):
    trainer = ort_trainer(
        None, tmp_path, model_init=lambda: tiny_llama(), eval_strategy="steps", eval_steps=3,
        save_strategy="steps", save_steps=3, max_steps=3,
    )  # fmt: skip
    rates = [1e-5, 1e-2]
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", rates)},
        n_trials=2,
        backend="optuna",
        direction="minimize",
        sampler=_grid(rates),
    )
    assert best.hyperparameters["learning_rate"] == 1e-2
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == ["run-0", "run-1"]
    assert [path.name for path in (tmp_path / "run-0").iterdir()] == ["checkpoint-3"]


def _grid(rates: list[float]) -> Any:
    import optuna

    return optuna.samplers.GridSampler({"learning_rate": rates})


# --- resuming ---


@pytest.mark.parametrize("method", ["full", "lora"])
def test_resumed_run_is_the_uninterrupted_one_to_the_bit(
    tiny_llama: MakeModel, tmp_path: Path, method: str
):
    """With dropout, a shuffled sampler, a schedule and accumulation."""

    def model() -> Any:
        made = tiny_llama(attention_dropout=0.2, attn_implementation="eager")
        return adapted(made, lora_dropout=0.1) if method == "lora" else made

    fields = {
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "cosine",
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 6,
    }
    whole = ort_trainer(model(), tmp_path / "whole", **fields)
    whole.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                control.should_training_stop = True

    first = ort_trainer(model(), tmp_path / "parts", callbacks=[Stop()], **fields)
    first.train()
    torch.manual_seed(12345)  # another process has another state
    second = ort_trainer(model(), tmp_path / "parts", **fields)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 6
    assert losses(second) == losses(whole)
    assert_same_weights(second.model, whole.model, atol=0)


@pytest.mark.parametrize(
    ("begin", "end"), [(plain_trainer, ort_trainer), (ort_trainer, plain_trainer)]
)
def test_a_run_goes_on_under_the_other_trainer(
    tiny_llama: MakeModel, tmp_path: Path, begin: Any, end: Any
):
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    first = begin(tiny_llama(), tmp_path, **fields)
    first.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    second = end(tiny_llama(), tmp_path, **fields)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 4
    assert_same_weights(second.model, first.model)


def test_a_checkpoint_with_all_steps_is_trained_no_further(
    tiny_llama: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """transformers' Trainer takes one step more, wherever that isn't the end of an epoch."""
    fields = {"save_strategy": "steps", "save_steps": 2, "backend": "eager"}
    done = ort_trainer(tiny_llama(), tmp_path, max_steps=6, **fields)
    done.train()
    for max_steps in (6, 5):
        again = ort_trainer(tiny_llama(seed=1), tmp_path, max_steps=max_steps, **fields)
        result = again.train(resume_from_checkpoint=True)
        assert f"the checkpoint has all of {max_steps} steps" in caplog.text
        assert result.global_step == again.state.global_step == 6
        assert losses(again) == losses(done)
        assert_same_weights(again.model, done.model, atol=0)
    more = ort_trainer(tiny_llama(seed=1), tmp_path, max_steps=7, **fields)
    more.train(resume_from_checkpoint=True)
    assert more.state.global_step == 7


def test_resume_without_a_checkpoint(tiny_llama: MakeModel, tmp_path: Path):
    from ort_train.errors import CheckpointError

    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        ort_trainer(tiny_llama(), tmp_path).train(resume_from_checkpoint=True)


# --- backends ---


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_other_backends(
    tiny_llama: MakeModel, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
):
    from ort_train.auto import trial

    monkeypatch.setattr(trial, "CONCRETE_BACKENDS", ("eager", "ort"))  # compiling takes long
    ours = ort_trainer(tiny_llama(), tmp_path / "a", backend=backend)
    theirs = plain_trainer(tiny_llama(), tmp_path / "b")
    ours.train()
    theirs.train()
    assert losses(ours) == pytest.approx(losses(theirs), abs=LOSS)


def test_eager_under_bf16_autocast_is_transformers(tiny_llama: MakeModel, tmp_path: Path):
    ours = ort_trainer(tiny_llama(), tmp_path / "a", backend="eager", bf16=True)
    theirs = plain_trainer(tiny_llama(), tmp_path / "b", bf16=True)
    ours.train()
    theirs.train()
    assert losses(ours) == losses(theirs)  # the same kernels


@pytest.mark.filterwarnings("ignore:this CPU has no bf16 products")
def test_bf16_through_ort(tiny_llama: MakeModel, tmp_path: Path):
    ours = ort_trainer(tiny_llama(), tmp_path / "a", backend="ort", bf16=True)
    theirs = plain_trainer(tiny_llama(), tmp_path / "b", bf16=True)
    ours.train()
    theirs.train()
    # Losses around 6, in bf16: rounding differs by some 1e-3 (see test_products.py).
    assert losses(ours) == pytest.approx(losses(theirs), abs=5e-3)
    assert losses(ours) != losses(theirs)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"backend": "onnx"}, "is not one of eager, compile, ort, auto"),
        ({"fp16": True}, "fp16 training needs a GPU"),
        ({"torch_compile": True}, "set backend='compile' instead"),
        ({"ort_options": {"num_thread": 1}}, "did you mean num_threads"),
        ({"ort_options": "{"}, "is not JSON"),
        ({"ort_options": "[1]"}, "ort_options"),
        ({"save_onnx": True}, "give onnx_prefix"),
        ({"onnx_log_level": "LOUD"}, "log_level='loud'"),
        ({"backend": "eager", "ort_options": {"num_threads": 1}}, "would be ignored"),
    ],
)
def test_arguments_that_contradict(tmp_path: Path, fields: dict[str, Any], match: str):
    with pytest.raises(ConfigError, match=match):
        ORTTrainingArguments(**common(tmp_path, **fields))


def test_plain_training_arguments_are_refused(tiny_llama: MakeModel, tmp_path: Path):
    with pytest.raises(ConfigError, match="takes ORTTrainingArguments"):
        ORTTrainer(tiny_llama(), TrainingArguments(**common(tmp_path)))  # type: ignore[arg-type]


def test_options_reach_the_graph(tiny_llama: MakeModel, tmp_path: Path):
    trainer = ort_trainer(
        tiny_llama(), tmp_path, ort_options='{"num_threads": 1, "recompute": "layerwise"}'
    )
    trainer.train()
    assert ort_forward(trainer._stand_in).options.recompute == "layerwise"


def test_plain_module_that_returns_its_loss(tmp_path: Path):
    class Regression(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = torch.nn.Linear(3, 1)

        def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
            y = self.linear(x).squeeze(-1)
            if labels is None:
                return {"y": y}
            return {"loss": (y - labels).square().mean(), "y": y}

    data = [{"x": torch.randn(3), "labels": torch.tensor(1.0)} for _ in range(8)]
    found = []
    for kind, arguments in ((ORTTrainer, ORTTrainingArguments), (Trainer, TrainingArguments)):
        trainer = kind(model=Regression(), args=arguments(**common(tmp_path)), train_dataset=data)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], abs=LOSS)


# --- bad input ---


@pytest.mark.parametrize("bad", [300, 4096, -1])
@pytest.mark.parametrize("field", ["labels", "input_ids"])
def test_ids_outside_the_vocabulary_are_named_before_the_step(
    tiny_llama: MakeModel, tmp_path: Path, field: str, bad: int
):
    rows = samples(8)
    for row in rows:
        row[field] = row[field].clone()
    rows[2][field][3] = bad
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    trainer = ort_trainer(model, tmp_path, train_dataset=rows, per_device_train_batch_size=8)
    with pytest.raises(DataError, match=rf"{field}.* {bad} .*row \d.*vocabulary of 300"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_ids_are_checked_in_evaluation_too(tiny_llama: MakeModel, tmp_path: Path):
    rows = samples(4)
    rows[1]["labels"][0] = 999
    trainer = ort_trainer(tiny_llama(), tmp_path, eval_dataset=rows)
    with pytest.raises(DataError, match="999"):
        trainer.evaluate()


def test_ignored_labels_are_no_error(tiny_llama: MakeModel, tmp_path: Path):
    rows = samples(4)
    rows[0]["labels"][:5] = -100
    ort_trainer(tiny_llama(), tmp_path, train_dataset=rows, max_steps=1).train()


class _TurnsNan(TrainerCallback):
    """Poisons a weight after some step, so that the next loss is NaN."""

    def __init__(self, step: int, value: float):
        self.step, self.value = step, value

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                kwargs["model"].lm_head.weight[0, 0] = self.value


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("backend", ["ort", "eager"])
def test_non_finite_loss_names_the_step_and_what_was_saved(
    tiny_llama: MakeModel, tmp_path: Path, value: float, backend: str
):
    trainer = ort_trainer(
        tiny_llama(),
        tmp_path,
        backend=backend,
        callbacks=[_TurnsNan(3, value)],
        save_strategy="steps",
        save_steps=2,
        gradient_accumulation_steps=2,
    )
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "at step 4 (micro-batch 1 of 2" in message
    assert "the last checkpoint is checkpoint-2" in message
    assert trainer.state.global_step == 3


def test_infinite_loss_of_one_micro_batch_is_seen_in_accumulation(
    tiny_llama: MakeModel, tmp_path: Path
):
    class Sometimes(ORTTrainer):
        calls = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            loss = super().compute_loss(*args, **kwargs)
            return loss * math.inf if self.calls == 6 else loss

    trainer = ort_trainer(
        tiny_llama(), tmp_path, kind=Sometimes, gradient_accumulation_steps=4, max_steps=4
    )
    with pytest.raises(NonFiniteLossError, match=r"inf at step 2 \(micro-batch 2 of 4"):
        trainer.train()


def test_unsupported_model_is_named_before_any_weight_changed(tmp_path: Path):
    from ort_train.errors import UnsupportedModelError

    class Odd(torch.nn.Linear):
        def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, Any]:
            return {"loss": torch.fft.rfft(super().forward(x)).abs().sum()}

    data = [{"x": torch.randn(4)} for _ in range(8)]
    args = ORTTrainingArguments(**common(tmp_path, remove_unused_columns=False))
    model = Odd(4, 4)
    with pytest.raises(UnsupportedModelError, match="fft"):
        ORTTrainer(model=model, args=args, train_dataset=data).train()
    assert taken_over(model) is None
    assert not isinstance(model, PreTrainedModel)


# --- adamw_ort_fused ---


def test_adamw_ort_fused_is_adamw(
    tiny_llama: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """On a CPU: the definition of Loshchilov and Hutter (2019), in fp64."""
    settings = {"optim": "adamw_ort_fused", "weight_decay": 0.1, "adam_beta1": 0.8}
    trainer = ort_trainer(tiny_llama(), tmp_path, adam_beta2=0.95, adam_epsilon=1e-6, **settings)
    kind, arguments = trainer.get_optimizer_cls_and_kwargs(trainer.args)
    assert "on CPU this is torch's fused AdamW" in caplog.text
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(40, generator=generator))
    expected = weight.detach().double()
    mean, square = torch.zeros_like(expected), torch.zeros_like(expected)
    optimizer = kind([weight], weight_decay=0.1, **arguments)
    rate = trainer.args.learning_rate
    for step in range(1, 6):
        weight.grad = torch.randn(40, generator=generator)
        optimizer.step()
        gradient = weight.grad.double()
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.95 * square + 0.05 * gradient**2
        update = (mean / (1 - 0.8**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-6)
        expected = expected * (1 - rate * 0.1) - rate * update
    # Weights near 1 in fp32 are rounded by 6e-8 in each of five steps.
    torch.testing.assert_close(weight.detach().double(), expected, atol=5e-7, rtol=0)


# --- what auto chooses ---


def auto_trainer(
    model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, fastest: str, **fields: Any
) -> ORTTrainer:
    """One whose trial finds a named candidate the fastest."""
    from ort_train.auto import trial

    monkeypatch.setattr(trial, "CONCRETE_BACKENDS", ("eager", "ort"))  # compiling takes long
    monkeypatch.setattr(
        trial.Trial,
        "_timed_ms",
        lambda self, which, call: 1.0 if str(which) == fastest else 2.0,
    )
    return ort_trainer(model, folder, backend="auto", **fields)


@pytest.mark.filterwarnings("ignore:this CPU has no bf16 products")
def test_precision_auto_trains_and_evaluates_in_bf16(
    tiny_llama: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from ort_train.auto import trial

    monkeypatch.setattr(trial, "no_bf16", lambda device_type: None)
    ours = auto_trainer(tiny_llama(), tmp_path / "a", monkeypatch, "eager bf16", precision="auto")
    theirs = plain_trainer(tiny_llama(), tmp_path / "b", bf16=True)
    ours.train()
    theirs.train()
    assert ours.decision is not None
    assert (ours.decision.backend, ours.decision.precision) == ("eager", "bf16")
    # The first step is the trial's, in fp32: losses around 6 then differ by some 1e-3.
    assert losses(ours) == pytest.approx(losses(theirs), abs=5e-3)
    theirs.model.load_state_dict(ours.model.state_dict())
    found, expected = (trainer.predict(trainer.eval_dataset) for trainer in (ours, theirs))
    assert found.metrics["test_loss"] == expected.metrics["test_loss"]  # the same kernels
    assert {parameter.dtype for parameter in ours.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("fields", "sparsity"),
    [
        ({}, ("label_sparsity", "padding_sparsity")),
        ({"label_sparsity": False}, ("padding_sparsity",)),
    ],
)
def test_auto_leaves_out_what_the_user_left_open(
    tiny_llama: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    sparsity: tuple[str, ...],
):
    fastest = " + ".join(("ort fp32", *sparsity))
    ours = auto_trainer(tiny_llama(), tmp_path / "a", monkeypatch, fastest, **fields)
    ours.train()
    assert ours.decision is not None
    assert ours.decision.sparsity == sparsity
    assert any("token_density" in log for log in ours.state.log_history)
    theirs = plain_trainer(tiny_llama(), tmp_path / "b")
    theirs.train()
    assert losses(ours) == pytest.approx(losses(theirs), abs=LOSS)


@pytest.mark.parametrize(
    ("fields", "only_loss"),
    [
        ({}, True),
        ({"label_smoothing_factor": 0.1}, False),
        ({"label_smoothing_factor": 0.1, "use_module_with_loss": True}, True),
        ({"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.loss}, False),
    ],
)
def test_auto_knows_whether_more_than_the_loss_is_read(
    tiny_llama: MakeModel, tmp_path: Path, fields: dict[str, Any], only_loss: bool
):
    assert ort_trainer(tiny_llama(), tmp_path, **fields)._reads_only_loss() == only_loss


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"precision": "auto"}, "chosen by backend 'auto'"),
        ({"precision": "fp8"}, "not one of fp32, bf16, fp16, auto"),
        ({"precision": "fp32", "bf16": True}, "contradicts bf16=True"),
    ],
)
def test_precision_is_checked(tmp_path: Path, fields: dict[str, Any], match: str):
    with pytest.raises(ConfigError, match=match):
        ORTTrainingArguments(str(tmp_path), **fields)


def test_precision_sets_transformers_flags(tmp_path: Path):
    args = ORTTrainingArguments(str(tmp_path), backend="eager", precision="bf16")
    assert (args.bf16, args.fp16, args.train_precision) == (True, False, "bf16")

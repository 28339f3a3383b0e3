"""Scripts for Optimum's ORTTrainer (v1.16 to 1.27): the import line is all that changes.

Calls are those of optimum's examples/onnxruntime/training (run_glue, run_clm, run_qa,
run_summarization) and of its documentation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import HfArgumentParser, TrainingArguments, default_data_collator
from transformers.trainer_utils import get_last_checkpoint, speed_metrics

from ort_train import (
    ORTOptimizerNames,
    ORTSeq2SeqTrainer,
    ORTSeq2SeqTrainingArguments,
    ORTTrainer,
    ORTTrainingArguments,
)
from ort_train.errors import ConfigError

pytestmark = pytest.mark.usefixtures("shared_graphs")

MakeModel = Callable[..., Any]
NATIVE = {each.name for each in fields(TrainingArguments)}


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Any."})


def rows(num: int = 8, length: int = 8) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(300, (length,), generator=generator) for _ in range(num)]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in made]


def parse(*arguments: str, kind: Any = ORTTrainingArguments) -> Any:
    parser = HfArgumentParser((ModelArguments, kind))
    return parser.parse_args_into_dataclasses(["--model_name_or_path", "x", *arguments])[1]


def tokenizer() -> Any:
    from ort_train.data.tokenizer import make_tokenizer

    return make_tokenizer("some text to learn from " * 20, 300)


# --- arguments ---


@pytest.mark.filterwarnings("ignore:.*is now called:FutureWarning")
def test_command_line_of_the_examples(tmp_path: Path):
    args = parse(
        *f"--output_dir {tmp_path} --do_train --do_eval --overwrite_output_dir --no_cuda "
        "--evaluation_strategy steps --eval_steps 5 --optim adamw_ort_fused --save_onnx "
        "--onnx_prefix model --onnx_log_level WARNING --use_module_with_loss "
        "--per_gpu_train_batch_size 2 --warmup_ratio 0.1 --fp16_opt_level O1".split(),
        "--report_to",
        "none",
    )
    assert args.do_train
    assert args.overwrite_output_dir
    assert args.use_cpu
    assert args.eval_strategy == "steps"
    assert args.optim == ORTOptimizerNames.ADAMW_ORT_FUSED
    assert args.onnx_prefix == "model"
    assert args.use_module_with_loss
    assert args.per_device_train_batch_size == 2
    assert args.get_warmup_steps(50) == 5
    options = args.make_ort_options()
    assert (options.save_onnx, options.onnx_prefix, options.log_level) == (True, "model", "warning")


def test_new_fields_on_the_command_line(tmp_path: Path):
    args = parse(
        "--output_dir", str(tmp_path), "--use_cpu", "--backend", "ort", "--ort_options",
        '{"num_threads": 1}',
    )  # fmt: skip
    assert args.make_ort_options().num_threads == 1


def test_arguments_from_a_json_file(tmp_path: Path):
    file = tmp_path / "args.json"
    file.write_text(
        '{"output_dir": "x", "use_cpu": true, "ort_options": {"num_threads": 1}, '
        '"optim": "adamw_ort_fused"}'
    )
    (args,) = HfArgumentParser(ORTTrainingArguments).parse_json_file(str(file))
    assert args.make_ort_options().num_threads == 1
    assert ORTTrainingArguments(**_settable(args.to_dict())).optim == "adamw_ort_fused"


def _settable(values: dict[str, Any]) -> dict[str, Any]:
    return {n: values[n] for n in ("output_dir", "use_cpu", "optim", "ort_options", "backend")}


@pytest.mark.filterwarnings("ignore:.*is now called:FutureWarning")
@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ({"evaluation_strategy": "epoch"}, "eval_strategy", "epoch"),
        ({"no_cuda": True}, "use_cpu", True),
        ({"optim": "adamw_hf"}, "optim", "adamw_torch"),
        ({"adafactor": True}, "optim", "adafactor"),
        ({"group_by_length": True}, "train_sampling_strategy", "group_by_length"),
        ({"include_inputs_for_metrics": True}, "include_for_metrics", ["inputs"]),
        ({"use_legacy_prediction_loop": False}, "use_legacy_prediction_loop", False),
        ({"per_gpu_eval_batch_size": 3}, "per_device_eval_batch_size", 3),
        ({"push_to_hub_model_id": "me/it"}, "hub_model_id", "me/it"),
    ],
)
def test_older_names(tmp_path: Path, old: dict[str, Any], new: str, value: Any):
    if new not in NATIVE and set(old) <= NATIVE:
        pytest.skip(f"transformers {transformers.__version__} has the older name alone: {old}")
    args = ORTTrainingArguments(**{"output_dir": str(tmp_path), "use_cpu": True, **old})
    assert getattr(args, new) == value


def test_older_name_says_the_new_one(tmp_path: Path):
    with pytest.warns(FutureWarning, match="evaluation_strategy is now called eval_strategy"):
        ORTTrainingArguments(str(tmp_path), use_cpu=True, evaluation_strategy="epoch")


@pytest.mark.parametrize(
    "old", [{"save_safetensors": False}, {"half_precision_backend": "apex"}, {"past_index": 2}]
)
def test_what_transformers_dropped_is_refused_not_ignored(tmp_path: Path, old: dict[str, Any]):
    if set(old) <= NATIVE:
        pytest.skip(f"transformers {transformers.__version__} has it still: {old}")
    with pytest.raises(ConfigError, match="isn't supported any more"):
        ORTTrainingArguments(str(tmp_path), use_cpu=True, **old)


# --- construction ---


def arguments(output_dir: Path, kind: Any = ORTTrainingArguments, **fields: Any) -> Any:
    return kind(
        output_dir=str(output_dir),
        use_cpu=True,
        max_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        **fields,
    )


def metrics(prediction: Any) -> dict[str, float]:
    return {"rows": len(prediction.label_ids)}


def test_positional_order_of_optimum(tiny_llama: MakeModel, tmp_path: Path):
    own = tokenizer()
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = ORTTrainer(
        model, arguments(tmp_path), default_data_collator, rows(), rows(4), own, None, metrics,
        [], (optimizer, schedule), lambda logits, labels: logits.argmax(-1),
    )  # fmt: skip
    assert trainer.processing_class is own
    assert trainer.tokenizer is own
    assert trainer.compute_metrics is metrics
    assert trainer.compute_loss_func is None
    assert trainer.optimizer is optimizer
    trainer.train()
    assert trainer.evaluate()["eval_rows"] == 4
    short = ORTTrainer(
        model, arguments(tmp_path), default_data_collator, rows(), rows(4), own, None, metrics
    )
    assert short.compute_metrics is metrics


def test_positional_order_of_transformers(tiny_llama: MakeModel, tmp_path: Path):
    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return outputs.logits.mean()

    shared = (tiny_llama(), arguments(tmp_path), default_data_collator, rows(), rows(4))
    trainer = ORTTrainer(*shared, None, None, loss, metrics, [])
    assert trainer.compute_loss_func is loss
    assert trainer.compute_metrics is metrics
    assert ORTTrainer(*shared, None, None, loss).compute_loss_func is loss


def test_tokenizer_and_processing_class_exclude_each_other(tiny_llama: MakeModel, tmp_path: Path):
    own = tokenizer()
    with pytest.raises(ConfigError, match="older name of processing_class"):
        ORTTrainer(tiny_llama(), arguments(tmp_path), tokenizer=own, processing_class=own)


# --- the scripts ---


def test_body_of_run_clm(tiny_llama: MakeModel, tmp_path: Path):
    training_args = arguments(
        tmp_path, do_train=True, do_eval=True, optim="adamw_ort_fused", resume_from_checkpoint=None
    )
    last_checkpoint = None
    if training_args.do_train and not training_args.overwrite_output_dir:
        last_checkpoint = get_last_checkpoint(training_args.output_dir)
    trainer = ORTTrainer(
        model=tiny_llama(),
        args=training_args,
        train_dataset=rows() if training_args.do_train else None,
        eval_dataset=rows(4) if training_args.do_eval else None,
        tokenizer=tokenizer(),
        data_collator=default_data_collator,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=-1),
    )
    train_result = trainer.train(resume_from_checkpoint=last_checkpoint)
    trainer.save_model()
    trainer.log_metrics("train", train_result.metrics)
    trainer.save_metrics("train", train_result.metrics)
    trainer.save_state()
    found = trainer.evaluate()
    assert math.exp(found["eval_loss"]) > 1
    trainer.log_metrics("eval", found)
    trainer.save_metrics("eval", found)
    files = {path.name for path in tmp_path.iterdir()}
    expected = "model.safetensors tokenizer.json train_results.json eval_results.json"
    assert {*expected.split(), "trainer_state.json", "all_results.json"} <= files


class QuestionAnsweringORTTrainer(ORTTrainer):
    """trainer_qa.py of the examples, as it stands there."""

    def __init__(self, *args, eval_examples=None, post_process_function=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_examples = eval_examples
        self.post_process_function = post_process_function

    def evaluate(
        self, eval_dataset=None, eval_examples=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        eval_dataloader = self.get_eval_dataloader(eval_dataset)
        compute_metrics = self.compute_metrics
        self.compute_metrics = None
        eval_loop = (
            self.prediction_loop if self.args.use_legacy_prediction_loop else self.evaluation_loop
        )
        start_time = time.time()
        try:
            output = eval_loop(
                eval_dataloader,
                description="Evaluation",
                prediction_loss_only=True if compute_metrics is None else None,
                ignore_keys=ignore_keys,
                metric_key_prefix=metric_key_prefix,
            )
        finally:
            self.compute_metrics = compute_metrics
        total_batch_size = self.args.eval_batch_size * self.args.world_size
        output.metrics.update(
            speed_metrics(
                metric_key_prefix,
                start_time,
                num_samples=output.num_samples,
                num_steps=math.ceil(output.num_samples / total_batch_size),
            )
        )
        self.log(output.metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, output.metrics
        )
        return output.metrics


def test_subclass_of_run_qa(tmp_path: Path):
    from transformers import BertConfig, BertForQuestionAnswering

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = BertForQuestionAnswering(BertConfig(vocab_size=300, num_attention_heads=2, **sizes))
    data = [
        {**{k: r[k] for k in ("input_ids", "attention_mask")}, "start_positions": 1,
         "end_positions": 2}
        for r in rows()
    ]  # fmt: skip
    trainer = QuestionAnsweringORTTrainer(
        model=model,
        args=arguments(tmp_path, evaluation_strategy="steps", eval_steps=1),
        train_dataset=data,
        eval_dataset=data,
        eval_examples=data,
        data_collator=default_data_collator,
    )
    trainer.train()
    assert sum("eval_loss" in log for log in trainer.state.log_history) == 2


def bart() -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=300, d_model=32, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
            decoder_ffn_dim=64, max_position_embeddings=32, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
        )
    )  # fmt: skip


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_body_of_run_summarization(tmp_path: Path, smoothing: float):
    def text_metrics(prediction: Any) -> dict[str, float]:
        assert prediction.predictions.ndim == 2  # generated ids, not logits
        return {"length": float(np.count_nonzero(prediction.predictions != 0, axis=1).mean())}

    training_args = arguments(
        tmp_path,
        ORTSeq2SeqTrainingArguments,
        predict_with_generate=True,
        generation_max_length=6,
        generation_num_beams=2,
        label_smoothing_factor=smoothing,
    )
    model = bart()
    trainer = ORTSeq2SeqTrainer(
        model=model,
        args=training_args,
        train_dataset=rows(),
        eval_dataset=rows(4),
        processing_class=tokenizer(),
        data_collator=default_data_collator,
        compute_metrics=text_metrics,
    )
    result = trainer.train()
    assert result.training_loss > 1
    found = trainer.evaluate(metric_key_prefix="eval")
    assert 1 <= found["eval_length"] <= 20
    predicted = trainer.predict(rows(4), metric_key_prefix="predict", max_length=5, num_beams=1)
    assert predicted.predictions.shape[0] == 4
    assert predicted.metrics is not None
    assert "predict_length" in predicted.metrics


def test_seq2seq_trains_as_transformers(tmp_path: Path):
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    losses = []
    for kind, args_kind in (
        (ORTSeq2SeqTrainer, ORTSeq2SeqTrainingArguments),
        (Seq2SeqTrainer, Seq2SeqTrainingArguments),
    ):
        model = bart()
        for module in model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        trainer = kind(
            model=model,
            args=arguments(tmp_path, args_kind),
            train_dataset=rows(),
            data_collator=default_data_collator,
        )
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    # fp32, two AdamW steps: see test_trainer.
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


def test_save_onnx_writes_beside_the_results(tiny_llama: MakeModel, tmp_path: Path):
    args = arguments(tmp_path, save_onnx=True, onnx_prefix="mine", onnx_log_level="ERROR")
    ORTTrainer(model=tiny_llama(), args=args, train_dataset=rows()).train()
    assert {path.name.split("_")[0] for path in tmp_path.glob("*.onnx")} == {"mine"}


def test_inference_with_ort_is_unknown_since_v1_16(tiny_llama: MakeModel, tmp_path: Path):
    trainer = ORTTrainer(model=tiny_llama(), args=arguments(tmp_path), eval_dataset=rows(4))
    with pytest.raises(TypeError, match="inference_with_ort"):
        trainer.evaluate(inference_with_ort=True)  # type: ignore[call-arg]

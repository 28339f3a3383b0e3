"""Tasks: causal, masked and sequence-to-sequence models, from a recipe to its model."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_architectures import OPTIONS, assert_as_eager

from ort_train import job, prune, wrap
from ort_train.bench.worker import build
from ort_train.config import ModelConfig, RunConfig, parse
from ort_train.data import tasks
from ort_train.data.tokenizer import load_tokenizer, make_tokenizer
from ort_train.errors import ConfigError, DataError, ModelError
from ort_train.models import load_model
from ort_train.plan import show
from ort_train.recipes import load_recipe

pytestmark = pytest.mark.usefixtures("shared_graphs")

TEXT = "the quick brown fox jumps over the lazy dog, which is none the wiser for it. " * 50
IGNORED = -100
OFFLINE = ["data.source=offline", "measure.baselines=[]"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(TEXT, 300, with_mask=True)


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    ids = torch.randint(4, 300, (6, 64), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row.tolist()} for row in ids]


def tiny(name: str, *overrides: str) -> RunConfig:
    return load_recipe(name, [*OFFLINE, *overrides], tiny=True)


# --- batches


def test_masked_batches(tokenizer, rows):
    ids = torch.tensor([row["input_ids"] for row in rows])
    batch = tasks.masked_batch(rows, tokenizer, seed=1)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["attention_mask"].eq(1).all()
    is_masked = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][is_masked], ids[is_masked])
    assert torch.equal(batch["input_ids"][~is_masked], ids[~is_masked])
    # Of 384 tokens; the share's standard deviation is 0.018, here are four.
    assert is_masked.float().mean() == pytest.approx(tasks.MASKED_SHARE, abs=0.073)
    # Eight of ten masked ones; of some 58, the share's deviation is 0.053.
    hidden = batch["input_ids"][is_masked] == tokenizer.mask_token_id
    assert hidden.float().mean() == pytest.approx(0.8, abs=0.21)


def test_masks_follow_from_seed_and_batch_alone(tokenizer, rows):
    mask = functools.partial(tasks.masked_batch, tokenizer=tokenizer)
    torch.manual_seed(0)
    first = mask(rows[:2], seed=1)["labels"]
    state = torch.get_rng_state()
    mask(rows[2:4], seed=1)
    assert torch.equal(mask(rows[:2], seed=1)["labels"], first)
    assert torch.equal(torch.get_rng_state(), state)  # dropout's numbers stay
    assert not torch.equal(mask(rows[:2], seed=2)["labels"], first)
    assert not torch.equal(mask([rows[0], rows[2]], seed=1)["labels"][0], first[0])


def test_a_short_batch_is_masked_until_something_is_predicted(tokenizer, rows):
    for row in rows:
        short = [{"input_ids": row["input_ids"][:2]}]
        assert (tasks.masked_batch(short, tokenizer, 0)["labels"] != IGNORED).any()


def test_special_tokens_are_not_masked(tokenizer):
    special = [{"input_ids": [tokenizer.eos_token_id] * 8}]
    with pytest.raises(DataError, match="a batch of 8 tokens has none that can be masked"):
        tasks.masked_batch(special, tokenizer, 0)


def test_halved_batches():
    batch = tasks.halved_batch([{"input_ids": [1, 2, 3, 4, 5]}, {"input_ids": [6, 7, 8, 9, 10]}])
    assert batch["input_ids"].tolist() == [[1, 2], [6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 1]]
    assert batch["labels"].tolist() == [[3, 4, 5], [8, 9, 10]]
    assert tasks.max_length("seq2seq", 5) == 3


# --- models and tokenizers


@pytest.mark.parametrize(
    ("architecture", "task", "expected"),
    [
        ("t5", "causal-lm", r"a causal language model \(.* has it for model.task=seq2seq$"),
        ("t5", "masked-lm", r"a masked language model \(.* has it for model.task=seq2seq$"),
        ("llama", "masked-lm", r"a masked language model \(.* has it for model.task=causal-lm$"),
        ("llama", "seq2seq", r"a sequence-to-sequence model \(.* for model.task=causal-lm$"),
        ("bert", "seq2seq", "has it for model.task=causal-lm or model.task=masked-lm$"),
        ("vit", "masked-lm", "transformers has no such model$"),
    ],
)
def test_architectures_that_dont_fit_the_task(tokenizer, architecture, task, expected):
    with pytest.raises(ModelError, match=expected):
        load_model(ModelConfig(architecture=architecture, task=task), tokenizer, 0, 8)


def test_a_sequence_to_sequence_model_needs_positions_for_half_a_block(tokenizer):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "max_position_embeddings": 16}
    config = ModelConfig(architecture="bart", task="seq2seq", config=sizes)
    model = load_model(config, tokenizer, 0, 32)
    assert type(model) is transformers.BartForConditionalGeneration
    assert model.config.decoder_start_token_id == tokenizer.pad_token_id
    with pytest.raises(
        ModelError, match=r"half of data.block_size 33 exceeds .* data.block_size=32"
    ):
        load_model(config, tokenizer, 0, 33)


def test_a_masked_model_needs_a_mask_token(tmp_path, tokenizer):
    made = load_tokenizer(ModelConfig(architecture="bert", task="masked-lm", vocab_size=300), TEXT)
    assert made.mask_token_id == 3
    assert len(made) == 300
    assert make_tokenizer(TEXT, 300).mask_token is None  # nor of the cache
    with pytest.raises(ModelError, match="256 bytes and 4 special tokens: set it to 260 or more"):
        make_tokenizer(TEXT, 259, with_mask=True)
    make_tokenizer(TEXT, 300).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no mask token, which model.task masked-lm needs"):
        load_tokenizer(ModelConfig(tokenizer=str(tmp_path), task="masked-lm"))


# --- recipes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data": {"format": "instructions"}}, "data.format instructions is for .* causal-lm"),
        ({"data": {"block_size": 1}}, "data.block_size 1 can't be halved for model.task seq2seq"),
        (
            {"model": {"config": {"max_position_embeddings": 8}}, "data": {"block_size": 17}},
            "half of data.block_size 17 exceeds .* set data.block_size=16 or",
        ),
        ({"distill": {"teacher": {"architecture": "llama"}}}, "both to causal-lm, or distill"),
    ],
)
def test_what_contradicts_the_task(changes, expected):
    model = {"architecture": "bart", "task": "seq2seq", **changes.get("model", {})}
    with pytest.raises(ConfigError, match=expected) as caught:
        parse({"train": {"max_steps": 1}, **changes, "model": model})
    assert len(caught.value.problems) == 1


def test_a_teacher_of_another_task():
    values = {"model": {"architecture": "llama"}, "train": {"max_steps": 1}}
    values["distill"] = {"teacher": {"architecture": "bert", "task": "masked-lm"}}
    with pytest.raises(ConfigError, match="the teacher's masked-lm"):
        parse(values)


def test_commands_for_causal_models_say_so(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model.task seq2seq: prune reads a text"):
        prune.prune_folder(tmp_path, tmp_path / "out", "2:4", overrides=["model.task=seq2seq"])
    with pytest.raises(ConfigError, match=r"halves of model.task seq2seq"):
        show(load_recipe("bench_t5"), 1, 1, 80.0)
    assert show(tiny("bench_bert"), 1, 1, 80.0)


@pytest.mark.parametrize("name", ["bench_gpt2", "bench_bert", "bench_t5"])
def test_benchmark_shapes_train_as_eager(name):
    model, batches, source, _ = build(tiny(name), num_batches=3)
    assert ("masked" in source, "half" in source) == (name == "bench_bert", name == "bench_t5")
    again = build(tiny(name), num_batches=3)[1]
    for batch, same in zip(batches, again, strict=True):
        assert all(torch.equal(batch[key], same[key]) for key in batch)
    ours = wrap(copy.deepcopy(model), "ort", options=OPTIONS)
    for batch in batches[1:]:
        assert_as_eager(model, ours, batch)


@pytest.mark.parametrize("name", ["bench_bert", "bench_t5"])
def test_an_adapter_of_another_task(tmp_path, name):
    from peft import PeftModel

    quick = [f"output.dir={tmp_path}", "train.max_steps=2", "adapter.method=lora"]
    config = tiny(name, *quick, "train.ort={num_threads: 1}")
    result = job.run(config)
    # Two steps leave a guess among 512 tokens; one that sees its labels is far below. T5's first
    # guesses are too sure of themselves: 850.
    assert 256 < result.perplexity < 2000
    base = load_model(config.model, load_tokenizer(config.model, TEXT), config.train.seed, 64)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "model"))
    expected = "SEQ_2_SEQ_LM" if name == "bench_t5" else None
    assert adapted.peft_config["default"].task_type == expected


def test_accumulated_gradients_are_the_mean_over_micro_batches(tmp_path: Path):
    """Plain SGD, no dropout, as many labels in each: two halves of a batch train as the whole."""
    weights = []
    for micro, accumulation in ((4, 1), (2, 2)):
        out = tmp_path / f"by_{micro}"
        overrides = [
            f"output.dir={out}",
            f"train.micro_batch_size={micro}",
            f"train.gradient_accumulation_steps={accumulation}",
            "model.config.dropout_rate=0.0",
            "train.optimizer=sgd",
            "train.max_grad_norm=0",
            "train.learning_rate=0.1",
            "train.lr_scheduler=constant",
            "train.max_steps=2",
            "train.backend=eager",
        ]
        job.run(tiny("bench_t5", *overrides))
        made = transformers.AutoModelForSeq2SeqLM.from_pretrained(out / "model")
        weights.append(torch.cat([p.detach().flatten() for p in made.parameters()]))
    # Sums of fp32 in another order; a step of twice the size changes weights by 1e-2.
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=0)

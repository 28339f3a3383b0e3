"""ort_train.data.packing: samples that share a row train as each by itself would.

Tolerances are those of test_architectures.py, for its reasons.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import architectures
import pytest
import torch
from architectures import ARCHITECTURES
from test_architectures import GRADIENT_TOLERANCE, LOSS_TOLERANCE
from trained_graphs import forward_of

from ort_train import OrtOptions, job, wrap
from ort_train.config import DataConfig, ModelConfig, parse
from ort_train.data import packing
from ort_train.data.instructions import pad_batch
from ort_train.data.packing import check_model, pack, packed_batch, plan_rows
from ort_train.data.samples import make_samples
from ort_train.errors import ConfigError, ModelError, UnsupportedModelError
from ort_train.metrics import SparsityMeter
from ort_train.recipes import load_recipe

ROW = 24
#: Lengths that fill rows of 24 tokens to the last, to all but one, and badly.
LENGTHS = (3, 7, 24, 5, 1, 9, 2, 14, 6)
FAMILIES = ("llama", "mistral", "phi", "gemma", "gpt2", "qwen3")
BY_NAME = {each.model_type: each for each in ARCHITECTURES}


def make_model(name: str, attention: str = "sdpa") -> Any:
    architecture = BY_NAME[name]
    if "sliding_window" in architecture.config:  # shorter than a row, which is refused
        config = {**architecture.config, "sliding_window": ROW}
        architecture = architectures.Architecture(name, config=config)
    return architectures.make_model(architecture, attention=attention)


def dataset(vocab: int = 128, seed: int = 0) -> Any:
    """Samples of which the first third is a prompt."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(vocab, (length,), generator=generator).tolist()
        labels = [-100] * (length // 3) + ids[length // 3 :]
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    return Dataset.from_list(rows)


def batches(attention: str = "sdpa", seed: int = 0) -> tuple[dict, dict]:
    """The same samples packed, and one a row."""
    samples = dataset(seed=seed)
    packed = packed_batch(list(pack(samples, ROW, 0, seed=0)), attention)
    return packed, pad_batch(list(samples), pad_id=0)


def step(model: Any, inputs: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found: tuple[float, dict], expected: tuple[float, dict]) -> None:
    assert found[0] == pytest.approx(expected[0], abs=LOSS_TOLERANCE)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            found[1][name], gradient, atol=1e-6, rtol=GRADIENT_TOLERANCE, msg=name
        )


# --- which samples go where


def test_rows_are_full_and_hold_every_sample_once():
    lengths = [1 + (7 * i) % 64 for i in range(500)]
    rows = plan_rows(lengths, 64, seed=1)
    assert sorted(index for row in rows for index in row) == list(range(500))
    sizes = [sum(lengths[index] for index in row) for row in rows]
    assert max(sizes) <= 64
    assert len(rows) == -(-sum(lengths) // 64)  # as few as there can be
    assert rows == plan_rows(lengths, 64, seed=1) != plan_rows(lengths, 64, seed=2)
    first = [max(lengths[index] for index in row) for row in rows[: len(rows) // 2]]
    assert min(first) < 40  # not the longest samples first


def test_rows_carry_positions_and_labels_of_each_sample():
    samples = dataset()
    rows = pack(samples, ROW, pad_id=99, seed=0)
    assert len(rows) == 3
    found = []
    for row in rows:
        assert {len(values) for values in row.values()} == {ROW}
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], ROW], strict=True):
            piece = {name: values[start:end] for name, values in row.items()}
            assert piece["position_ids"] == list(range(end - start))
            assert piece["labels"][0] == -100
            if piece["attention_mask"][0]:
                found.append((piece["input_ids"], piece["labels"][1:]))
            else:
                assert set(piece["input_ids"]) == {99}
                assert set(piece["labels"]) == {-100}
                assert end == ROW
    assert sorted(found) == sorted((s["input_ids"], s["labels"][1:]) for s in samples)


def test_mask_is_block_diagonal():
    rows = list(pack(dataset(), ROW, 0, seed=0))
    mask = packed_batch(rows, "sdpa")["attention_mask"]
    assert mask.shape == (3, 1, ROW, ROW)
    for row, mask_TT in zip(rows, mask[:, 0], strict=True):
        sample = torch.tensor([p == 0 for p in row["position_ids"]]).cumsum(0)
        for i in range(ROW):
            for j in range(ROW):
                sees = row["attention_mask"][i] and sample[i] == sample[j] and j <= i
                assert mask_TT[i, j] == bool(sees)
    added = packed_batch(rows, "eager", "bfloat16")["attention_mask"]
    assert added.dtype is torch.bfloat16
    assert torch.equal(added == 0, mask)


# --- parity


@pytest.mark.parametrize(
    ("name", "attention"), [*((name, "sdpa") for name in FAMILIES), ("llama", "eager")]
)
def test_as_samples_alone(name: str, attention: str):
    """ONNX Runtime on packed rows against eager on one sample a row; label by label, too."""
    eager = make_model(name, attention)
    check_model(eager, functools.partial(packed_batch, attention=attention), ROW)
    ours = wrap(copy.deepcopy(eager), "ort", options=OrtOptions(num_threads=1))
    for seed in range(2):
        packed, alone = batches(attention, seed)
        expected = step(eager, alone)
        assert_same(step(eager, packed), expected)
        assert_same(step(ours, packed), expected)
    with torch.no_grad():
        found, expected = (
            torch.nn.functional.cross_entropy(
                eager.eval()(**inputs).logits[:, :-1].flatten(0, 1),
                inputs["labels"][:, 1:].flatten(),
                reduction="none",
            )
            for inputs in (packed, alone)
        )
    found, expected = (losses[losses > 0].sort().values for losses in (found, expected))
    torch.testing.assert_close(found, expected, atol=LOSS_TOLERANCE, rtol=0)


@pytest.mark.slow
def test_compiled(tiny_llama):
    eager = tiny_llama(vocab_size=128)
    compiled = wrap(copy.deepcopy(eager), "compile")
    packed, alone = batches()
    assert_same(step(compiled, packed), step(eager, alone))


def test_rows_of_other_sizes_in_one_graph(tiny_llama):
    eager = tiny_llama(vocab_size=128)
    ours = wrap(copy.deepcopy(eager), "ort", options=OrtOptions(num_threads=1, label_sparsity=True))
    _, alone = batches()
    expected = step(eager, alone)
    for size in (ROW, 40, 71):
        packed = packed_batch(list(pack(dataset(), size, 0, seed=0)), "sdpa")
        assert_same(step(ours, packed), expected)


@pytest.mark.parametrize("labels", [False, True])
def test_padding_at_the_ends_of_rows_is_left_out(tiny_llama, labels: bool):
    eager = tiny_llama(vocab_size=128)
    options = OrtOptions(num_threads=1, padding_sparsity=True, label_sparsity=labels)
    ours = wrap(copy.deepcopy(eager), "ort", options=options)
    _, alone = batches()
    expected = step(eager, alone)
    for size in (ROW, 40, 71):
        packed = packed_batch(list(pack(dataset(), size, 0, seed=0)), "sdpa")
        assert_same(step(ours, packed), expected)
    saved = forward_of(ours).savings
    assert saved.flops_per_padding > 0
    meter = SparsityMeter()
    meter.add(packed, saved.flops_per_padding, 0)
    window = meter.take_window()
    assert window["token_density"] == round(sum(LENGTHS) / packed["input_ids"].numel(), 4)
    model = wrap(tiny_llama(vocab_size=128), "ort", options=options)
    packed = packed_batch(list(pack(dataset(), ROW, 0, seed=0)), "eager")
    with pytest.raises(UnsupportedModelError, match=r"4 axes must hold booleans"):
        model(**packed)


# --- what is refused


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bloom", "takes no position_ids"),
        ("lfm2", "layers of conv samples of a row would meet"),
        ("minimax", "layers of linear_attention"),
        ("openai-gpt", "can't be called with packed rows"),
        ("gptj", "logits for a packed sample aren't those for the sample alone"),
        ("t5", "an encoder-decoder has two sequences"),
    ],
)
def test_models_that_cannot_are_named(name: str, reason: str):
    # gptj adds the mask to its scores, whatever is asked for, and gets one of booleans here.
    model = architectures.make_model(BY_NAME[name])
    with pytest.raises(ModelError, match=rf"architecture {name}: .*{reason}"):
        check_model(model, functools.partial(packed_batch, attention="sdpa"), 6)
    assert model.training


def test_a_convolution_is_noticed_by_its_numbers(monkeypatch: pytest.MonkeyPatch):
    """Where no config tells."""
    model = architectures.make_model(BY_NAME["lfm2"])
    monkeypatch.setattr(packing, "_ATTENTION_LAYERS", {"conv", "full_attention"})
    with pytest.raises(ModelError, match="aren't those for the sample alone"):
        check_model(model, functools.partial(packed_batch, attention="sdpa"), 6)


def test_windows_below_a_row_are_refused():
    model = architectures.make_model(BY_NAME["mistral"])
    collate = functools.partial(packed_batch, attention="sdpa")
    check_model(model, collate, 6)
    with pytest.raises(ModelError, match=r"sliding_window 6, .* set data.block_size=6 or less"):
        check_model(model, collate, 7)


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        ({}, "text blocks have no padding: set data.format=instructions"),
        ({"format": "instructions", "padding": "longest"}, "isn't read with data.packing"),
    ],
)
def test_settings_that_contradict(data: dict[str, Any], rule: str):
    values = {"model": {"architecture": "llama"}, "train": {"max_steps": 1}}
    with pytest.raises(ConfigError, match=rule):
        parse({**values, "data": {"packing": True, **data}})


# --- through a recipe


def test_samples_of_a_recipe():
    model = ModelConfig(architecture="llama", vocab_size=300)
    data = DataConfig(
        format="instructions", source="offline", packing=True, block_size=64, max_train_blocks=99
    )
    samples = make_samples(data, model, max_train=5, seed=3)
    assert "99 samples packed into" in samples.source
    assert len(samples.train) == 5
    batch = samples.collate([samples.train[0], samples.train[1]])
    assert batch["attention_mask"].shape == (2, 1, 64, 64)
    again = make_samples(data, model, seed=3)
    assert again.train[:5] == samples.train[:]
    assert again.evaluation is not None


def test_trains_and_resumes(tmp_path, capsys):
    def settings(folder: str, *more: str) -> list[str]:
        return [
            "measure.baselines=[]",
            "model.architecture=llama",
            "data.source=offline",
            "data.packing=true",
            "data.max_eval_blocks=20",
            "train.max_steps=4",
            "train.save_steps=2",
            "train.ort={num_threads: 1, label_sparsity: true}",
            f"output.dir={tmp_path / folder}",
            *more,
        ]

    whole = job.run(load_recipe("orca2_7b_lora", settings("whole"), tiny=True))
    assert "packed into" in capsys.readouterr().out
    import shutil

    shutil.copytree(tmp_path / "whole", tmp_path / "halfway")
    shutil.rmtree(tmp_path / "halfway" / "checkpoint-4")
    more = ["output.resume=auto"]
    resumed = job.run(load_recipe("orca2_7b_lora", settings("halfway", *more), tiny=True))
    assert resumed.perplexity == pytest.approx(whole.perplexity, rel=1e-5)  # as printed digits

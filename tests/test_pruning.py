"""ort_train.pruning and `ort-train prune`: the masks are exact, and training keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from ort_train.cli import main
from ort_train.config import parse
from ort_train.errors import ConfigError, ExportError, ModelError
from ort_train.prune import prune_folder
from ort_train.pruning import KeepZeros, linear_layers, mask_2_4, mask_smallest, prune_model

OVERRIDES = ["data.source=offline", "data.block_size=32", "data.max_eval_blocks=4"]


def test_two_of_four_stay() -> None:
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.0, 0.0, 0.0, -1.0], [5, 5, 5, 5, -1, 2, -3, 4]])
    kept = [[0, 1, 1, 0, 1, 0, 0, 1], [1, 1, 0, 0, 0, 0, 1, 1]]
    assert mask_2_4(weight).int().tolist() == kept


def test_two_of_four_are_the_largest_everywhere() -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 64)
    mask = mask_2_4(weight)
    assert (mask.reshape(-1, 4).sum(1) == 2).all()
    groups, kept = weight.abs().reshape(-1, 4), mask.reshape(-1, 4)
    smallest_kept = groups.masked_fill(~kept, float("inf")).amin(1)
    assert (groups.masked_fill(kept, 0.0).amax(1) <= smallest_kept).all()


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.75])
def test_unstructured_zeros_are_the_smallest(sparsity: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(33, 17)
    mask = mask_smallest(weight, sparsity)
    assert int((~mask).sum()) == round(sparsity * weight.numel())
    assert weight[~mask].abs().max() <= weight[mask].abs().min()


def test_a_models_linear_layers_are_pruned_and_nothing_else(tiny_llama: Any) -> None:
    dense, model = tiny_llama(), tiny_llama()
    reports = prune_model(model, "2:4", exclude=["model.layers.0.mlp.*"])
    names = {report.name for report in reports}
    assert "model.layers.0.self_attn.q_proj" in names
    assert not any("layers.0.mlp" in name or "lm_head" in name for name in names)
    assert len(reports) == 2 * 7 - 3
    for report in reports:
        assert report.num_zeros == report.num_weights // 2
        assert 0.8 < report.kept_norm < 1  # of normal weights, 0.93
    for name, parameter in model.named_parameters():
        before = dense.get_parameter(name)
        mask = (
            mask_2_4(before)
            if name.removesuffix(".weight") in names
            else torch.ones_like(before, dtype=torch.bool)
        )
        assert torch.equal(parameter, before * mask), name


def test_conv1d_is_pruned_along_its_inputs() -> None:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 50}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    reports = prune_model(model, "2:4")
    assert len(reports) == 4
    weight = model.transformer.h[0].attn.c_attn.weight  # (inputs, outputs)
    assert ((weight.T.reshape(-1, 4) == 0).sum(1) == 2).all()
    assert not ((weight.reshape(-1, 4) == 0).sum(1) == 2).all()


@pytest.mark.parametrize("backend", ["eager", "ort"])
def test_training_keeps_the_zeros_and_moves_the_rest(
    backend: str, tiny_llama: Any, tmp_path: Path
) -> None:
    from datasets import Dataset

    from ort_train import ORTTrainer, ORTTrainingArguments

    def train(name: str) -> Any:
        model = tiny_llama()
        prune_model(model, sparsity=0.5)
        args = ORTTrainingArguments(
            str(tmp_path),
            backend=name,
            ort_options={"num_threads": 1} if name == "ort" else {},
            max_steps=3,
            learning_rate=1e-2,
            weight_decay=0.1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        ids = torch.randint(0, 300, (32, 16), generator=torch.Generator().manual_seed(0)).tolist()
        data = Dataset.from_dict({"input_ids": ids, "labels": ids})
        trainer = ORTTrainer(model, args, train_dataset=data)
        trainer.add_callback(KeepZeros(model))
        trainer.train()
        return model

    before = tiny_llama()
    prune_model(before, sparsity=0.5)
    model = train(backend)
    reference = plain_training(tiny_llama)
    for name, layer in linear_layers(model):
        zeros = before.get_submodule(name).weight == 0
        assert torch.equal(layer.weight == 0, zeros), name
        moved = (layer.weight - before.get_submodule(name).weight)[~zeros].abs()
        assert moved.median() > 1e-3
        difference = layer.weight - reference.get_submodule(name).weight
        # fp32 sums in another order; AdamW's steps are of 1e-2.
        assert difference.abs().max() < 1e-3, name


def plain_training(tiny_llama: Any) -> Any:
    """The same three steps in plain PyTorch: step, then mask."""
    from transformers import Trainer, TrainingArguments

    model = tiny_llama()
    prune_model(model, sparsity=0.5)
    masks = {name: layer.weight.detach() != 0 for name, layer in linear_layers(model)}
    ids = torch.randint(0, 300, (32, 16), generator=torch.Generator().manual_seed(0))
    args = TrainingArguments("unused", max_steps=3, report_to=[], use_cpu=True)
    order = Trainer(model, args, train_dataset=[{"input_ids": row} for row in ids])
    batches = [batch["input_ids"] for batch in order.get_train_dataloader()][:3]
    norms = {n for n, _ in model.named_parameters() if "norm" in n}
    groups = [
        {"params": [p for n, p in model.named_parameters() if n not in norms], "weight_decay": 0.1},
        {"params": [p for n, p in model.named_parameters() if n in norms], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    model.train()
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 3)  # the linear schedule
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, layer in linear_layers(model):
                layer.weight.mul_(masks[name])
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any) -> Path:
    from ort_train.data.tokenizer import make_tokenizer

    path = tmp_path_factory.mktemp("model") / "model"
    tiny_llama(vocab_size=512).save_pretrained(path)
    make_tokenizer("to be or not to be", 300).save_pretrained(path)
    return path


@pytest.mark.parametrize("steps", [0, 3])
def test_the_command(
    steps: int, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    out = tmp_path / "pruned"
    arguments = ["prune", str(folder), "--out", str(out), "--pattern", "2:4", "--steps", str(steps)]
    settings = [*OVERRIDES, "data.max_train_blocks=16", "train.micro_batch_size=2"]
    assert main([*arguments, *settings, "train.ort={num_threads: 1}"]) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    dense = AutoModelForCausalLM.from_pretrained(folder)
    prune_model(dense, "2:4")
    for name, layer in linear_layers(model):
        weight = dense.get_submodule(name).weight
        assert torch.equal(layer.weight == 0, weight == 0)
        assert torch.equal(layer.weight, weight) == (steps == 0)
    report = json.loads((out / "prune.json").read_text())
    stages = {stage["stage"]: stage for stage in report["stages"]}
    assert list(stages) == ["dense", "pruned", *(["tuned"] if steps else [])]
    assert [stage["zeros"] for stage in stages.values()] == [0.0, *[0.5] * (len(stages) - 1)]
    assert stages["dense"]["perplexity"] != stages["pruned"]["perplexity"]
    if steps:
        assert stages["tuned"]["loss"] < stages["pruned"]["loss"]
    shown = capsys.readouterr().out
    assert f"{stages['pruned']['perplexity']:.2f}" in shown
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--sparsity", "1.5"], "sparsity 1.5 must be between 0 and 1"),
        (["--pattern", "2:4", "--exclude", "*"], "no linear layer to prune"),
        (["--pattern", "2:4", "--exclude", "layers.0.*"], "--exclude 'layers.0.*' matches none"),
        (["--pattern", "2:4", "output.dir=x"], "output.dir is what --out says"),
        (["--pattern", "2:4", "train.max_steps=9"], "train.max_steps is what --steps says"),
        (["--pattern", "2:4", "model.name_or_path=x"], "model.name_or_path is what MODEL says"),
        (["--pattern", "2:4", "--steps", "-1"], "--steps -1 must be 0 or more"),
        (["--pattern", "2:4", "data.block_sze=3"], "did you mean data.block_size"),
    ],
)
def test_what_is_asked_wrongly(
    arguments: list[str],
    expected: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = str(tmp_path / "out")
    assert main(["prune", str(folder), *OVERRIDES, *arguments, "--out", out]) == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_pruned(tiny_llama: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"needs inputs in fours.*--exclude, or use --sparsity"):
        prune_model(torch.nn.Sequential(torch.nn.Linear(6, 4)), "2:4")
    with pytest.raises(ConfigError, match="one of pattern and sparsity"):
        prune_model(tiny_llama())
    with pytest.raises(ConfigError, match="pattern '1:4' is unknown"):
        prune_model(tiny_llama(), "1:4")
    with pytest.raises(ModelError, match="no zeros to keep"):
        KeepZeros(tiny_llama())
    assert main(["prune", str(tmp_path), "--out", str(tmp_path / "o"), "--pattern", "2:4"]) == 2


def test_a_model_that_sees_what_it_predicts_is_refused(tmp_path: Path) -> None:
    """Its perplexity would mean nothing."""
    from transformers import BertConfig

    BertConfig(vocab_size=300).save_pretrained(tmp_path / "bert")
    with pytest.raises(ExportError, match="bert that reads both ways"):
        prune_folder(tmp_path / "bert", tmp_path / "out", "2:4")


def test_zeros_can_only_be_kept_in_trained_weights() -> None:
    values = {
        "model": {"architecture": "llama"},
        "train": {"max_steps": 1, "keep_zeros": True},
        "adapter": {"method": "lora"},
    }
    with pytest.raises(ConfigError, match=r"set train\.keep_zeros=false"):
        parse(values)

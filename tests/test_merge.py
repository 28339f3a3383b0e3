"""ort_train.merge: what a run saves of an adapter, and the plain model that it becomes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny_runs import train_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from ort_train import job, quantization
from ort_train.cli import main
from ort_train.errors import CheckpointError, ModelError
from ort_train.merge import merge
from ort_train.models import load_model
from ort_train.recipes import load_recipe

IDS = torch.arange(3, 51).reshape(2, 24)
# fp32 sums in another order: x(W + BA) in place of xW + (xA)B.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_adapter(tmp_path_factory.mktemp("runs") / "lora")


@pytest.fixture(scope="module")
def qlora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("bitsandbytes", reason="needs the extra qlora")
    folder = tmp_path_factory.mktemp("runs") / "qlora"
    return train_adapter(folder, "adapter.method=qlora", "adapter.double_quant=true")


def load_base(run: Path) -> Any:
    config = load_recipe(run / "config.yaml")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    return load_model(
        config.model,
        tokenizer,
        config.train.seed,
        config.data.block_size,
        quantization.of_run(config),
    )


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def load_plain_peft(run: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(load_base(run), str(run / "model"))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapter_loads_into_a_plain_peft_model(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes", reason="needs the extra qlora")
    trained: list[torch.nn.Module] = []
    save = job._save_model
    monkeypatch.setattr(
        job,
        "_save_model",
        lambda trainer, *rest: (trained.append(trainer.model), save(trainer, *rest)),
    )
    run = train_adapter(tmp_path / "run", f"adapter.method={method}")
    expected = logits(trained[0])
    assert (logits(load_plain_peft(run)) - expected).abs().max() == 0.0
    assert (logits(load_base(run)) - expected).abs().max() > 1e-3  # the adapter does something


def test_lora_merges(lora_run: Path, tmp_path: Path) -> None:
    said = merge(lora_run, tmp_path / "merged")
    assert "into the original weights of llama" in said
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged) - logits(load_plain_peft(lora_run))).abs().max() < TOLERANCE
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 512
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_qlora_merges_onto_the_base_that_it_says(
    base: str, qlora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [] if base == "dequantized" else ["--base", base]  # the default
    assert main(["merge", str(qlora_run), "--out", str(tmp_path / "merged"), *arguments]) == 0
    assert f"into the {base} weights" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert getattr(merged.config, "quantization_config", None) is None
    difference = (logits(merged) - logits(load_plain_peft(qlora_run))).abs().max()
    # The original base differs from what was trained by what quantization cost.
    assert difference < TOLERANCE if base == "dequantized" else 1e-3 < difference < 1


def test_an_exported_qlora_run_computes_what_was_trained(qlora_run: Path, tmp_path: Path) -> None:
    """The graph against the 4-bit base with its adapter, and against the merged model."""
    from ort_train.inference import export_model
    from ort_train.inference.generation.session import DecoderSession

    exported = export_model(qlora_run, tmp_path / "exported")
    assert exported.info.kind == "fused"
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    decoding = DecoderSession(exported, 1).start(IDS[:, :16].tolist(), IDS.shape[1])
    found = [decoding.logits.copy()]
    found += [decoding.step(IDS[:, position]).copy() for position in range(16, IDS.shape[1])]
    merge(qlora_run, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for model in (load_plain_peft(qlora_run), merged):
        expected = logits(model)[:, 15:].numpy()
        assert np.abs(np.stack(found, 1) - expected).max() < TOLERANCE
    # Both the adapter and the 4 bits are in it.
    base = logits(load_base(qlora_run))[:, 15:].numpy()
    assert np.abs(np.stack(found, 1) - base).max() > 1e-3


def test_a_local_base_is_quantized_in_loading_and_left_as_it_is(
    tiny_llama: Any, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra qlora")
    from ort_train.data.tokenizer import make_tokenizer

    base = tmp_path / "base"
    tiny_llama(vocab_size=512).save_pretrained(base)
    make_tokenizer("to be or not to be", 300).save_pretrained(base)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    recipe = {
        "model": {"name_or_path": str(base), "architecture": "llama"},
        "data": {"block_size": 32, "source": "offline", "max_train_blocks": 16},
        "adapter": {"method": "qlora", "quant_type": "fp4"},
        "train": {"max_steps": 2, "micro_batch_size": 2, "ort": {"num_threads": 1}},
        "measure": {"baselines": []},
        "output": {"dir": str(tmp_path / "run")},
    }
    recipe["data"]["max_eval_blocks"] = 4
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    config = load_recipe(tmp_path / "mine.yaml")
    job.run(config)
    merge(tmp_path / "run", tmp_path / "merged")
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = logits(load_plain_peft(tmp_path / "run"))
    assert (logits(merged) - expected).abs().max() < TOLERANCE


def test_an_adapter_on_a_tied_head_leaves_the_embedding(tmp_path: Path) -> None:
    from decoders import make_decoder

    from ort_train.adapters import apply_adapter
    from ort_train.config import AdapterConfig
    from ort_train.merge import untie_adapted_head

    model = make_decoder("llama", tie_word_embeddings=True)
    adapted: Any = apply_adapter(model, AdapterConfig(method="lora", target_modules=["lm_head"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        want = adapted.eval()(ids).logits
        untie_adapted_head(adapted)
        adapted.merge_and_unload(safe_merge=True).save_pretrained(tmp_path)
        found = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits
    # fp32 sums in another order, on logits of some 10; with the embedding changed: 1.
    assert (found - want).abs().max() < 1e-4


def test_nothing_is_overwritten(lora_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not an empty folder"):
        merge(lora_run, tmp_path)
    with pytest.raises(CheckpointError, match=r"can't be made, as .*mine.txt' is no folder"):
        merge(lora_run, tmp_path / "mine.txt" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_has_no_adapter_is_refused(lora_run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run of ort_train"):
        merge(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(CheckpointError, match="no QLoRA run"):
        merge(lora_run, tmp_path / "out", base="dequantized")
    run = tmp_path / "run"
    run.mkdir()
    values = yaml.safe_load((lora_run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(CheckpointError, match="holds no adapter"):
        merge(run, tmp_path / "out")
    values["adapter"]["method"] = "none"
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(CheckpointError, match="plain transformers model already"):
        merge(run, tmp_path / "out")


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size"])
def test_an_adapter_of_another_base_is_refused(field: str, lora_run: Path, tmp_path: Path) -> None:
    import shutil

    run = shutil.copytree(lora_run, tmp_path / "run")
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["model"]["config"][field] *= 2
    values["model"]["config"]["head_dim"] = None
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ModelError, match="of another base"):
        merge(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("adapter_model.safetensors", "its adapter can't be read"),
        ("adapter_config.json", "its adapter can't be read"),
        ("tokenizer.json", "its tokenizer can't be loaded"),
    ],
)
def test_a_run_that_is_cut_off_is_refused(
    file: str, what: str, lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(lora_run, run)
    (run / "model" / file).write_bytes((lora_run / "model" / file).read_bytes()[:40])
    assert main(["merge", str(run), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert f"isn't whole, {what}" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()

"""ort_train.fingerprint: an adapter goes with the base that it was trained beside, in any form."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ort_train import ORTTrainer, ORTTrainingArguments, checkpoints, fingerprint, job, quantization
from ort_train.adapters import apply_adapter
from ort_train.config import AdapterConfig
from ort_train.errors import CheckpointError
from ort_train.merge import merge
from ort_train.recipes import load_recipe

MakeModel = Callable[..., Any]
LORA = AdapterConfig(method="lora", target_modules=["q_proj"])


def quantized(model: Any, double: bool) -> Any:
    pytest.importorskip("bitsandbytes", reason="needs the extra qlora")
    quantization.quantize(model, quantization.Quantization(double_quant=double))
    return model


def adapted(model: Any) -> Any:
    return model if hasattr(model, "peft_config") else apply_adapter(model, LORA)


FORMS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda model: model,
    "bf16": lambda model: model.to(torch.bfloat16),
    "nf4": lambda model: quantized(model, double=False),
    "nf4 double": lambda model: quantized(model, double=True),
    "adapted": adapted,
}


@pytest.mark.parametrize("saved", FORMS)
@pytest.mark.parametrize("found", FORMS)
def test_forms_of_one_base_agree_and_another_base_differs(
    saved: str, found: str, tiny_llama: MakeModel, tmp_path: Path
) -> None:
    fingerprint.write(adapted(FORMS[saved](tiny_llama())), tmp_path)
    fingerprint.check(FORMS[found](tiny_llama()), tmp_path)
    with pytest.raises(CheckpointError, match="trained beside another base"):
        fingerprint.check(FORMS[found](tiny_llama(seed=1)), tmp_path)


def test_a_decoded_base_agrees(tiny_llama: MakeModel, tmp_path: Path) -> None:
    model = quantized(tiny_llama(), double=False)
    fingerprint.write(apply_adapter(copy.deepcopy(model), LORA), tmp_path)
    quantization.dequantize(model, torch.float32)
    fingerprint.check(model, tmp_path)


def test_one_changed_layer_is_found(tiny_llama: MakeModel, tmp_path: Path) -> None:
    """As in a base that an earlier adapter was merged into."""
    fingerprint.write(apply_adapter(tiny_llama(), LORA), tmp_path)
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[1].self_attn.v_proj.weight.mul_(1.001)
    with pytest.raises(CheckpointError, match=r"1 of \d+ tensors .*layers\.1\.self_attn\.v_proj"):
        fingerprint.check(other, tmp_path)


def test_what_is_trained_with_the_adapter_is_no_part_of_the_base(
    tiny_llama: MakeModel, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    fingerprint.write(model, tmp_path)
    names = json.loads((tmp_path / fingerprint.FILE).read_text())
    assert names.keys() == dict(tiny_llama().named_parameters()).keys()
    fingerprint.check(tiny_llama(), tmp_path)


def test_nothing_is_written_for_a_whole_model(tiny_llama: MakeModel, tmp_path: Path) -> None:
    fingerprint.write(tiny_llama(), tmp_path)
    assert not list(tmp_path.iterdir())
    fingerprint.check(tiny_llama(), tmp_path)  # an adapter of an older version has none, either


@pytest.mark.parametrize("text", ["{", "[]", '{"lm_head.weight": 1}'])
def test_a_damaged_file_is_named(text: str, tiny_llama: MakeModel, tmp_path: Path) -> None:
    (tmp_path / fingerprint.FILE).write_text(text)
    with pytest.raises(CheckpointError, match="damaged"):
        fingerprint.check(tiny_llama(), tmp_path)


def test_a_checkpoint_is_not_resumed_on_another_base(tiny_llama: MakeModel, tmp_path: Path) -> None:
    args = ORTTrainingArguments(
        str(tmp_path), backend="eager", max_steps=1, save_steps=1, report_to=[], disable_tqdm=True
    )
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8
    ORTTrainer(apply_adapter(tiny_llama(), LORA), args, train_dataset=rows).train()
    (checkpoint,) = checkpoints.list_checkpoints(tmp_path)
    checkpoints.verify(checkpoint, apply_adapter(tiny_llama(), LORA))
    other = apply_adapter(tiny_llama(seed=1), LORA)
    with pytest.raises(CheckpointError, match="trained beside another base"):
        checkpoints.verify(checkpoint, other)
    (checkpoint / fingerprint.FILE).unlink()  # the way out
    checkpoints.verify(checkpoint, other)


def test_a_run_is_not_merged_into_another_base(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [
        "measure.baselines=[]",
        "data.source=offline",
        "train.max_steps=1",
        "train.backend=eager",
        f"output.dir={run}",
    ]
    job.run(load_recipe("quickstart_lora", settings, tiny=True))
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["train"]["seed"] += 1
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(CheckpointError, match="trained beside another base"):
        merge(run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    shutil.rmtree(run)

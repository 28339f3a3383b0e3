"""Checkpoints are whole or not there; resuming names what is wrong before anything is loaded."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import default_data_collator

from ort_train import ORTTrainer, ORTTrainingArguments, checkpoints
from ort_train.errors import CheckpointError

MakeModel = Callable[..., Any]


def trainer_for(model: Any, output_dir: Path, kind: Any = ORTTrainer, **fields: Any) -> ORTTrainer:
    ids = torch.arange(8)
    row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    args = ORTTrainingArguments(
        **{
            "output_dir": str(output_dir),
            "backend": "eager",  # what is written doesn't depend on it, and eager starts at once
            "use_cpu": True,
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "save_strategy": "steps",
            "save_steps": 1,
            "report_to": [],
            "disable_tqdm": True,
            **fields,
        }
    )
    return kind(
        model=model, args=args, train_dataset=[row] * 8, data_collator=default_data_collator
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- writing ---


def test_checkpoints_are_transformers_own(tiny_llama: MakeModel, tmp_path: Path):
    trainer_for(tiny_llama(), tmp_path).train()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    expected = {
        "config.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt",
        "trainer_state.json", "training_args.bin",
    }  # fmt: skip
    assert expected <= set(names(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("limit", [1, 2])
def test_total_limit_keeps_the_newest(tiny_llama: MakeModel, tmp_path: Path, limit: int):
    trainer_for(tiny_llama(), tmp_path, save_total_limit=limit).train()
    assert names(tmp_path) == [f"checkpoint-{i}" for i in range(4 - limit, 4)]


def test_error_while_writing_leaves_no_checkpoint(tiny_llama: MakeModel, tmp_path: Path):
    class Failing(ORTTrainer):
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            super()._save_optimizer_and_scheduler(output_dir)
            if self.state.global_step == 2:
                raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        trainer_for(tiny_llama(), tmp_path, Failing).train()
    assert names(tmp_path) == ["checkpoint-1"]
    second = trainer_for(tiny_llama(), tmp_path)
    second.train(resume_from_checkpoint=True)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_killed_while_writing_leaves_no_checkpoint(tiny_llama: MakeModel, tmp_path: Path):
    code = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from transformers import LlamaConfig, LlamaForCausalLM
        from test_checkpoints import ORTTrainer, trainer_for
        class Killed(ORTTrainer):
            def _save_rng_state(self, output_dir):
                super()._save_rng_state(output_dir)
                if self.state.global_step == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128))
        trainer_for(model, {str(tmp_path)!r}, Killed).train()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert names(tmp_path) == [checkpoints.STAGING_FOLDER, "checkpoint-1"]
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["checkpoint-1"]
    with pytest.raises(CheckpointError, match="was not finished"):
        checkpoints.verify(tmp_path / checkpoints.STAGING_FOLDER / "checkpoint-2", tiny_llama())
    trainer_for(tiny_llama(), tmp_path).train(resume_from_checkpoint=True)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_left_over_files_of_a_killed_write_are_not_taken_over(
    tiny_llama: MakeModel, tmp_path: Path
):
    stale = tmp_path / checkpoints.STAGING_FOLDER / "checkpoint-1"
    stale.mkdir(parents=True)
    (stale / "stale.bin").write_bytes(b"from a run that was killed")
    trainer_for(tiny_llama(), tmp_path, max_steps=1).train()
    assert "stale.bin" not in names(tmp_path / "checkpoint-1")


def test_checkpoint_of_the_same_name_is_replaced_whole(tiny_llama: MakeModel, tmp_path: Path):
    old = tmp_path / "checkpoint-1"
    old.mkdir()
    (old / "stale.bin").write_bytes(b"of another run")
    trainer_for(tiny_llama(), tmp_path, max_steps=1).train()
    assert names(tmp_path) == ["checkpoint-1"]
    assert "stale.bin" not in names(old)


_Usage = namedtuple("_Usage", "total used free")


def test_no_room_is_said_before_a_byte_is_written(
    tiny_llama: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(2**30, 2**30 - 1000, 1000))
    with pytest.raises(CheckpointError, match=r"needs 0.02 GiB.* 0.00 GiB free.*Nothing was"):
        trainer_for(tiny_llama(), tmp_path / "new" / "run").train()
    assert not list(tmp_path.rglob("*checkpoint*"))


def test_needed_room_is_an_upper_bound_near_the_size(tiny_llama: MakeModel, tmp_path: Path):
    model = tiny_llama(hidden_size=512, intermediate_size=1024)  # 40 MB: the files around vanish
    trainer_for(model, tmp_path, max_steps=1).train()
    size = sum(file.stat().st_size for file in (tmp_path / "checkpoint-1").rglob("*"))
    needed = checkpoints.required_bytes(model)
    assert size <= needed <= 1.5 * size
    assert checkpoints.required_bytes(model, with_optimizer=False) < needed
    model.requires_grad_(False)
    assert checkpoints.required_bytes(model) == checkpoints.required_bytes(model, False)


# --- resuming ---


@pytest.fixture(scope="module")
def finished_run(tiny_llama: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    trainer_for(tiny_llama(), run, max_steps=2).train()
    return run


@pytest.fixture
def checkpoint(finished_run: Path, tmp_path: Path) -> Path:
    """The second checkpoint of a run of two steps, to be damaged."""
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run" / "checkpoint-2"


def resume(model: Any, checkpoint: Path | bool, output_dir: Path) -> None:
    trainer_for(model, output_dir).train(resume_from_checkpoint=checkpoint)


def test_absent_checkpoint_names_the_present_ones(tiny_llama: MakeModel, checkpoint: Path):
    with pytest.raises(CheckpointError, match="not a folder; there are checkpoint-1, checkpoint-2"):
        resume(tiny_llama(), checkpoint.with_name("checkpoint-7"), checkpoint.parent)


def test_truncated_weights(tiny_llama: MakeModel, checkpoint: Path):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model.safetensors.* is damaged"):
        resume(tiny_llama(), checkpoint, checkpoint.parent)


def test_damaged_state(tiny_llama: MakeModel, checkpoint: Path):
    (checkpoint / "trainer_state.json").write_text('{"global_step": ')
    with pytest.raises(CheckpointError, match=r"trainer_state.json.* is damaged"):
        resume(tiny_llama(), checkpoint, checkpoint.parent)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_damaged_optimizer_schedule_or_random_state(
    tiny_llama: MakeModel, checkpoint: Path, name: str, damage: str
):
    file = checkpoint / name
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"junk")
    model = tiny_llama(seed=3)
    before = model.lm_head.weight.clone()
    with pytest.raises(CheckpointError, match=rf"{name}.* is damaged"):
        resume(model, checkpoint, checkpoint.parent)
    assert torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_absent_optimizer_is_not_a_fresh_one_in_silence(
    tiny_llama: MakeModel, checkpoint: Path, name: str
):
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        resume(tiny_llama(), checkpoint, checkpoint.parent)


def test_absent_weights(tiny_llama: MakeModel, checkpoint: Path):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        resume(tiny_llama(), checkpoint, checkpoint.parent)


def test_checkpoint_of_another_model(tiny_llama: MakeModel, checkpoint: Path):
    with pytest.raises(CheckpointError, match=r"of another shape.*is \(300, 64\), the model's is"):
        resume(tiny_llama(vocab_size=400), checkpoint, checkpoint.parent)
    with pytest.raises(CheckpointError, match="foreign tensors"):
        resume(tiny_llama(num_hidden_layers=1), checkpoint, checkpoint.parent)


def test_checkpoint_that_lacks_layers_of_the_model(tiny_llama: MakeModel, checkpoint: Path):
    with pytest.raises(CheckpointError, match=r"lacks .*layers\.2"):
        resume(tiny_llama(num_hidden_layers=3), checkpoint, checkpoint.parent)


def test_tied_weights_are_saved_once_and_resume(tiny_llama: MakeModel, tmp_path: Path):
    trainer_for(tiny_llama(tie_word_embeddings=True), tmp_path, max_steps=1).train()
    trainer = trainer_for(tiny_llama(tie_word_embeddings=True), tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3


def test_saved_model_is_no_checkpoint(tiny_llama: MakeModel, tmp_path: Path):
    tiny_llama().save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="it is a saved model, not a checkpoint"):
        resume(tiny_llama(), tmp_path / "model", tmp_path / "run")


def test_adapter_checkpoints(tiny_llama: MakeModel, checkpoint: Path, tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    def adapted(rank: int) -> Any:
        config = LoraConfig(r=rank, target_modules=["q_proj"], task_type="CAUSAL_LM")
        return get_peft_model(tiny_llama(), config)

    trainer_for(adapted(4), tmp_path / "lora", max_steps=1).train()
    own = tmp_path / "lora" / "checkpoint-1"
    resume(adapted(4), own, tmp_path / "lora")
    with pytest.raises(CheckpointError, match="of another shape"):
        resume(adapted(8), own, tmp_path / "lora")
    with pytest.raises(CheckpointError, match="of another model"):
        resume(adapted(4), checkpoint, tmp_path / "lora2")
    with pytest.raises(CheckpointError, match="of another model"):
        resume(tiny_llama(), own, tmp_path / "full")


@pytest.mark.parametrize("kind", ["modules_to_save", "bias", "ia3", "prompt"])
def test_checkpoints_of_other_adapters(kind: str, tiny_llama: MakeModel, tmp_path: Path):
    """What is trained beside LoRA's own weights, and adapters that are none of LoRA's."""
    import peft

    def adapted(seed: int = 0, **fields: Any) -> Any:
        model = tiny_llama(seed=seed, **fields)
        common = {"task_type": "CAUSAL_LM"}
        configs = {
            "modules_to_save": lambda: peft.LoraConfig(
                r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], **common
            ),
            "bias": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], bias="all", **common),
            "ia3": lambda: peft.IA3Config(
                target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **common
            ),
            "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, **common),
        }
        return peft.get_peft_model(model, configs[kind]())

    trained = adapted(attention_bias=kind == "bias")
    trainer_for(trained, tmp_path / "run", max_steps=1).train()
    own = tmp_path / "run" / "checkpoint-1"
    checkpoints.verify(own, adapted(attention_bias=kind == "bias"))
    with pytest.raises(CheckpointError, match="trained beside another base"):
        checkpoints.verify(own, adapted(seed=1, attention_bias=kind == "bias"))
    with pytest.raises(CheckpointError, match="of another model"):
        checkpoints.verify(own, adapted(hidden_size=32, attention_bias=kind == "bias"))
    resume(adapted(attention_bias=kind == "bias"), own, tmp_path / "run")


def test_list_ignores_what_is_no_whole_checkpoint(tmp_path: Path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-x", "checkpoint-11"):
        (tmp_path / name).mkdir()
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-x"):
        (tmp_path / name / "trainer_state.json").write_text("{}")
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path)] == [
        "checkpoint-9", "checkpoint-10",
    ]  # fmt: skip
    assert checkpoints.list_checkpoints(tmp_path / "absent") == []


def test_publish_survives_an_earlier_attempt(tmp_path: Path):
    staged, final = tmp_path / "staged", tmp_path / "checkpoint-1"
    for folder, text in (
        (staged, "new"),
        (final, "old"),
        (tmp_path / ".checkpoint-1.previous", "x"),
    ):
        folder.mkdir()
        (folder / "file").write_text(text)
    checkpoints.publish(staged, final)
    assert (final / "file").read_text() == "new"
    assert names(tmp_path) == ["checkpoint-1"]
    assert os.path.isdir(final)


def test_ranks_that_found_different_checkpoints_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def gather(names: list[str], own: str) -> None:
        names[:] = [own, "none"]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"rank 0: .*checkpoint-2; rank 1: none.*all hosts"):
        checkpoints.to_resume(True, str(tmp_path), None, world_size=2, with_deepspeed=False)
    assert checkpoints.to_resume(None, str(tmp_path), None, 2, False) is None

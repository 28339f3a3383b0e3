"""DeepSpeed configs: shipped ones, the user's own, and what a recipe contradicts in them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from ort_train import distributed, zero
from ort_train.config import RunConfig
from ort_train.errors import CheckpointError, ConfigError, RankError
from ort_train.recipes import load_recipe


@pytest.fixture
def recipe() -> RunConfig:
    return load_recipe("quickstart", tiny=True)


def _problems(recipe: RunConfig, num_ranks: int = 2, **train: Any) -> list[str]:
    changed = recipe.train.model_copy(update=train)
    return zero.problems_of_recipe(changed, num_ranks)


@pytest.fixture
def _with_deepspeed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")


@pytest.mark.usefixtures("_with_deepspeed")
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2_offload"])
def test_shipped_configs_follow_any_recipe(recipe: RunConfig, name: str) -> None:
    assert name in zero.shipped()
    assert _problems(recipe, deepspeed=name) == []
    values = zero.resolve(name)
    assert values["zero_optimization"]["stage"] == int(name[4])
    assert ("offload_optimizer" in values["zero_optimization"]) == name.endswith("offload")


@pytest.mark.usefixtures("_with_deepspeed")
def test_all_contradictions_are_reported_at_once(recipe: RunConfig, tmp_path: Path) -> None:
    own = {
        "train_micro_batch_size_per_gpu": 7,
        "gradient_accumulation_steps": 3,
        "train_batch_size": 42,
        "gradient_clipping": 0.3,
        "fp16": {"enabled": True},
        "optimizer": {"type": "Lion", "params": {"lr": 1.0, "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupLR"},
        "zero_optimisation": {"stage": 2},
    }
    file = tmp_path / "own.json"
    file.write_text(json.dumps(own))
    problems = _problems(recipe, deepspeed=str(file))
    text = "\n".join(problems)
    for expected in (
        "train.deepspeed.train_micro_batch_size_per_gpu 7 contradicts train.micro_batch_size 2",
        "train.deepspeed.gradient_accumulation_steps 3 contradicts",
        "train.deepspeed.train_batch_size 42 contradicts train.micro_batch_size x "
        "train.gradient_accumulation_steps x 2 ranks = 4",
        "train.deepspeed.gradient_clipping 0.3 contradicts train.max_grad_norm 1.0",
        "train.deepspeed.fp16.enabled True contradicts train.precision fp32",
        "train.deepspeed.optimizer.type Lion contradicts train.optimizer adamw_torch_fused",
        "train.deepspeed.optimizer.params.lr 1.0 contradicts train.learning_rate",
        "train.deepspeed.scheduler would take the place of",
        "unknown key zero_optimisation: did you mean zero_optimization?",
    ):
        assert expected in text
    assert len(problems) == 9


@pytest.mark.usefixtures("_with_deepspeed")
def test_a_config_of_the_users_own_is_taken(recipe: RunConfig) -> None:
    own = {
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": "auto"}},
        "train_micro_batch_size_per_gpu": 2,
    }
    assert _problems(recipe, deepspeed=own) == []
    # What it leaves out follows the recipe, and isn't DeepSpeed's default.
    assert zero.resolve(own)["gradient_clipping"] == "auto"


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"stage": 3}, "stage 3 splits the parameters themselves"),
        ({"stage": 4}, "stage 4 is unknown: set 1 or 2"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param needs ZeRO-3"),
    ],
)
def test_stages_that_cannot_work_are_refused(recipe: RunConfig, own: dict, message: str) -> None:
    assert message in "\n".join(_problems(recipe, deepspeed={"zero_optimization": own}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zero22", "did you mean"),
        ("{", "is not JSON"),
        ("[1]", "neither a shipped config"),
    ],
)
def test_what_is_no_config_is_named(recipe: RunConfig, name: str, message: str) -> None:
    (problem,) = _problems(recipe, deepspeed=name)
    assert message in problem
    assert problem.startswith("train.deepspeed")


def test_compiled_optimizers_are_named_where_nothing_can_build_them(
    recipe: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero, "_can_compile", lambda: False)
    monkeypatch.setattr(zero, "_has_gpu", lambda: False)
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    problems = _problems(recipe, deepspeed={"zero_optimization": offload})
    assert "zero_force_ds_cpu_optimizer false" in problems[0]
    optimizer = {"type": "AdamW", "params": {}}
    problems = _problems(recipe, deepspeed={"optimizer": optimizer})
    assert "torch_adam" in problems[0]


def test_without_deepspeed_the_extra_is_named(
    recipe: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero.importlib.util, "find_spec", lambda name: None)
    (problem,) = _problems(recipe, deepspeed="zero2")
    assert "ort_train[deepspeed]" in problem


def test_training_arguments_refuse_zero3_and_contradictions(tmp_path: Path) -> None:
    from ort_train.trainer import ORTTrainingArguments

    with pytest.raises(ConfigError, match="stage 3") as caught:
        ORTTrainingArguments(
            output_dir=str(tmp_path),
            deepspeed={"zero_optimization": {"stage": 3}, "gradient_clipping": 0.25},
        )
    assert any("contradicts max_grad_norm 1.0" in problem for problem in caught.value.problems)


def test_the_job_refuses_before_it_starts(recipe: RunConfig, tmp_path: Path) -> None:
    from ort_train import job

    train = recipe.train.model_copy(
        update={"deepspeed": {"zero_optimization": {"stage": 3}}, "global_batch_size": 3}
    )
    output = recipe.output.model_copy(update={"dir": str(tmp_path / "run")})
    with pytest.raises(ConfigError) as caught:
        job.run(recipe.model_copy(update={"train": train, "output": output}))
    assert len(caught.value.problems) >= 2
    assert not (tmp_path / "run").exists()


def test_accumulation_follows_from_the_global_batch() -> None:
    steps = distributed.accumulation_steps
    assert steps(None, 4, 3, 2) == 3
    assert steps(64, 4, 1, 2) == 8
    assert steps(64, 4, 8, 2) == 8
    with pytest.raises(ConfigError, match=r"30 is not a multiple of .* 4 x 2 ranks = 8: set it to"):
        steps(30, 4, 1, 2)
    with pytest.raises(ConfigError, match="set it to 8"):
        steps(4, 4, 1, 2)
    with pytest.raises(ConfigError, match="means 8 accumulation steps"):
        steps(64, 4, 2, 2)


def test_a_tiny_run_forgets_the_global_batch() -> None:
    config = load_recipe("quickstart", ["train.global_batch_size=512"], tiny=True)
    assert config.train.global_batch_size == 512  # an override stays
    base = load_recipe("quickstart", ["train.global_batch_size=512"])
    from ort_train.recipes import tiny

    assert tiny(base).train.global_batch_size is None


def test_deepspeeds_launcher_means_zero2(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CROSS_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert zero.chosen(None) is None
    assert zero.chosen("zero1") == "zero1"
    monkeypatch.setenv("CROSS_SIZE", "1")
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert zero.chosen(None) == "zero2"
    assert zero.chosen("none") is None


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(RankError, match=rf"port {port}.*is in use"):
            distributed.check_port()
        monkeypatch.setenv("RANK", "1")
        distributed.check_port()  # only the rank that listens has to


def test_a_checkpoint_of_another_launch_is_refused(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from ort_train import checkpoints

    model = torch.nn.Linear(2, 2)
    folder = tmp_path / "checkpoint-4"
    (folder / "global_step4").mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "latest").write_text("global_step4")
    save_file(model.state_dict(), folder / "model.safetensors")
    for rank in range(2):
        torch.save({}, folder / f"rng_state_{rank}.pth")
        (folder / "global_step4" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    checkpoints.verify(folder, model, world_size=2, with_deepspeed=True)
    assert checkpoints.saved_world_size(folder) == 2
    with pytest.raises(CheckpointError, match="of 2 ranks, and this launch has 4"):
        checkpoints.verify(folder, model, world_size=4, with_deepspeed=True)
    with pytest.raises(CheckpointError, match="saved with DeepSpeed and can't be resumed without"):
        checkpoints.verify(folder, model, world_size=2)
    (folder / "latest").unlink()
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({}, folder / name)
    checkpoints.verify(folder, model, world_size=1)
    with pytest.raises(CheckpointError, match="saved without DeepSpeed"):
        checkpoints.verify(folder, model, world_size=2, with_deepspeed=True)

"""ort_train.config: a run is checked as a whole, and every problem is told at once."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from ort_train import cache
from ort_train.config import (
    LR_SCHEDULERS,
    OPTIMIZERS,
    ModelConfig,
    RunConfig,
    keys,
    parse,
    to_yaml,
)
from ort_train.errors import ConfigError


def made(**sections) -> dict:
    """The least that makes a run, with sections laid over it."""
    values = {"model": {"architecture": "llama"}, "train": {"max_steps": 2}}
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    return values


def problems(values) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(values)
    return caught.value.problems


def test_the_least_config_takes_the_defaults():
    config = parse(made())
    assert config.train.backend == "ort"
    assert config.data.block_size == 128
    assert str(config.output_dir) == "runs/run"


def test_output_dir_expands_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(parse(made(output={"dir": "~/out"})).output_dir) == "/home/someone/out"


def test_output_dir_in_an_unknown_home(monkeypatch):
    with pytest.raises(ConfigError, match="'~nobody-here/out' starts in a home folder that isn't"):
        parse(made(output={"dir": "~nobody-here/out"})).output_dir  # noqa: B018


def test_without_a_home_another_cache_is_asked_for(monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    monkeypatch.delenv("ORT_TRAIN_CACHE")
    with pytest.raises(ConfigError, match="or set HOME; ORT_TRAIN_CACHE names another folder"):
        cache.root()


def test_config_is_frozen():
    config = parse(made())
    with pytest.raises(ValidationError, match="frozen"):
        config.train.max_steps = 3


def test_yaml_round_trip():
    config = parse(
        made(
            adapter={"method": "lora", "target_modules": ["q_proj"]},
            train={"learning_rate": 1e-5, "ort": {"num_threads": 2}},
            data={"folder": "größe"},
        )
    )
    assert parse(yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (made(model={"architectur": "x"}), "unknown key model.architectur: did you mean model.a"),
        (made(train={"max_stepz": 1}), "unknown key train.max_stepz: did you mean train.max_steps"),
        ({**made(), "max_steps": 3}, "unknown key max_steps: did you mean train.max_steps?"),
        ({**made(), "trian": {}}, "unknown key trian: did you mean train?"),
        (made(train={"block_size": 3}), "key train.block_size: did you mean data.block_size?"),
        (made(model={"nam": "x"}), "unknown key model.nam: did you mean model.name_or_path?"),
        ({**made(), "zzz": 1}, "unknown key zzz: there are name, description, model, data"),
        (made(adapter={"zzz": 1}), "unknown key adapter.zzz: section adapter has method, r, alpha"),
        ({**made(), 1: 2}, "unknown key 1: there are"),
    ],
)
def test_unknown_keys_name_the_nearest(values, expected):
    (problem,) = problems(values)
    assert expected in problem


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("train", "micro_batch_size", "five", "'five' should be a valid integer"),
        ("train", "micro_batch_size", 0, "0 should be greater than 0"),
        ("train", "micro_batch_size", 2.5, "2.5 should be a valid integer"),
        ("train", "learning_rate", True, "True should be a valid number"),
        ("train", "learning_rate", float("nan"), "nan should be a finite number"),
        ("train", "backend", "onnx", "'onnx' should be 'ort', 'eager', 'compile' or 'auto'"),
        ("train", "report_to", "wandb", "'wandb' should be a valid list"),
        ("train", "seed", 2**32, "should be less than 4294967296"),
        ("train", "optimizer", "adamw_ort_fuse", "is unknown: did you mean adamw_ort_fused"),
        ("train", "lr_scheduler", "cosin", "is unknown: did you mean cosine"),
        ("model", "vocab_size", 100, "100 should be greater than or equal to 259"),
        ("model", "trust_remote_code", "yes", "'yes' should be a valid boolean"),
        ("data", "folder", 3, "3 should be a valid string"),
        ("adapter", "dropout", 1, "1 should be less than 1"),
        ("adapter", "target_modules", 3, "3 should be a valid list or should be 'all-linear'"),
        ("measure", "baselines", ["eager", "ort"], "should be 'eager' or 'compile'"),
    ],
)
def test_wrong_values_are_named_with_the_rule(section, key, value, expected):
    (problem,) = problems(made(**{section: {key: value}}))
    assert problem.startswith(f"{section}.{key}: ")
    assert expected in problem


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({**made(), "data": None}, "data: None should be a section"),
        ({**made(), "data": 3}, "data: 3 should be a section"),
        ({**made(), "name": "a/b"}, "name: 'a/b' String should match pattern"),
        ([], "a config is a mapping of sections, not []"),
    ],
)
def test_misshapen_configs(values, expected):
    (problem,) = problems(values)
    assert expected in problem


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"train": {"max_steps": 1}}, "no model: set model.name_or_path"),
        ({"model": {"architecture": "llama"}}, "no length of training"),
        (made(train={"epochs": 1}), "both set the length of training"),
        (made(model={"tokenizer": "gpt2", "vocab_size": 300}), "model.tokenizer brings its own"),
        (made(model={"name_or_path": "x", "vocab_size": 300}), "model.name_or_path brings its own"),
        (made(model={"revision": "main"}), "model.revision main needs model.name_or_path"),
        (made(model={"vocab_size": 300, "config": {"vocab_size": 299}}), "is below"),
        (
            made(model={"config": {"max_position_embeddings": 64}}),
            "data.block_size 128 exceeds model.config.max_position_embeddings 64: "
            "set data.block_size=64",
        ),
        (made(model={"config": {"n_positions": 64}}), "exceeds model.config.n_positions 64"),
        (made(data={"source": "hub", "folder": "x"}), "data.folder x isn't read"),
        (
            made(model={"dtype": "float16"}, train={"precision": "fp16"}),
            "needs float32 weights",
        ),
        (made(train={"precision": "auto"}), "train.precision auto is chosen by train.backend auto"),
    ],
)
def test_contradictions(values, expected):
    (problem,) = problems(values)
    assert expected in problem


def test_all_problems_at_once():
    found = problems(
        {
            "model": {"name_or_path": 5, "config": {"max_position_embeddings": 8}},
            "train": {"max_stepz": 5, "micro_batch_size": "x"},
            "colour": "red",
        }
    )
    text = "\n".join(found)
    for expected in ("name_or_path: 5", "max_stepz", "micro_batch_size: 'x'", "colour", "exceeds"):
        assert expected in text
    # What a faulty value or misspelt key left unset isn't told a second time.
    assert len(found) == 5
    assert "no model" not in text
    assert "no length" not in text


def test_config_error_survives_pickling():
    error = ConfigError(problems({}))
    assert pickle.loads(pickle.dumps(error)).problems == error.problems


def test_architecture_may_stand_beside_a_loaded_model():
    assert parse(made(model={"name_or_path": "some/model"})).model.architecture == "llama"


def test_keys_are_those_of_the_sections():
    found = set(keys())
    assert {"name", "model.architecture", "output.resume", "distill.teacher.dtype"} <= found
    assert "distill.teacher" not in found  # a section of a section
    assert len(keys()) == 2 + len(ModelConfig.model_fields) - 1 + sum(
        len(field.annotation.model_fields)
        for name, field in RunConfig.model_fields.items()
        if name not in ("name", "description")
    )


def test_optimizers_and_schedulers_are_those_of_transformers():
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    # Later releases may add names, which are then missing here.
    assert set(OPTIMIZERS) - {"adamw_ort_fused"} == {name.value for name in OptimizerNames}
    assert set(LR_SCHEDULERS) == {name.value for name in SchedulerType}


def test_importing_configs_and_recipes_loads_nothing_heavy():
    code = (
        "import sys, ort_train.config, ort_train.recipes; ort_train.recipes.list_recipes();"
        "print([m for m in ('torch', 'transformers', 'datasets', 'onnxruntime') "
        "if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"

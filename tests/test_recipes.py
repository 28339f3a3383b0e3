"""ort_train.recipes: recipes are found, derived, overridden and shrunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from ort_train import recipes
from ort_train.config import DataConfig, ModelConfig, TrainConfig, keys, parse, to_yaml
from ort_train.errors import ConfigError
from ort_train.recipes import list_recipes, load_recipe, tiny

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
BASE = {"model": {"architecture": "llama"}, "train": {"max_steps": 4}}


def write(folder: Path, name: str, values: dict | str) -> Path:
    path = folder / name
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


def fails(*args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_recipe_resolves(name):
    config = load_recipe(name)
    assert config.name == name
    assert config.description
    assert parse(yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_recipe_has_a_tiny_form(name):
    config, small = load_recipe(name), load_recipe(name, tiny=True)
    assert small == tiny(config)
    assert small.model.name_or_path is None
    assert small.model.config["hidden_size"] == 64
    assert small.model.vocab_size == 512
    assert small.data.block_size <= 64
    assert small.train.max_steps <= 8
    assert small.data.max_eval_blocks <= 8
    for kept in ("backend", "optimizer", "lr_scheduler", "learning_rate", "seed"):
        assert getattr(small.train, kept) == getattr(config.train, kept)
    assert small.model.architecture == config.model.architecture
    assert small.adapter == config.adapter
    assert small.data.source == config.data.source
    assert small.data.format == config.data.format
    assert small.measure.baselines == config.measure.baselines


def test_the_list_names_what_a_recipe_trains():
    listed = {info.name: info for info in list_recipes()}
    assert sorted(listed) == NAMES
    assert listed["quickstart"].architecture == "llama"
    assert listed["quickstart"].method == "none"
    assert listed["quickstart_lora"].method == "lora"
    assert listed["quickstart_lora"].path == FOLDER / "quickstart_lora.yaml"


def test_the_readme_lists_every_key():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    # A teacher's keys are a model's, which are told once.
    told = {"distill.teacher" if key.startswith("distill.teacher.") else key for key in keys()}
    assert [key for key in sorted(told) if f"| `{key}` |" not in text] == []


def choices(annotation: Any) -> set[str]:
    """Those of a Literal, wherever in a type it stands."""
    parts = get_args(annotation)
    return set().union(*({part} if isinstance(part, str) else choices(part) for part in parts))


def test_the_readme_lists_every_choice():
    lines = (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    for section, kind in (("model", ModelConfig), ("data", DataConfig), ("train", TrainConfig)):
        for name, field in kind.model_fields.items():
            told = "".join(line for line in lines if line.startswith(f"| `{section}.{name}` |"))
            assert [each for each in choices(field.annotation) if f"`{each}`" not in told] == []


def test_installed_recipes_come_before_a_checkouts(tmp_path, monkeypatch):
    package = tmp_path / "ort_train"
    (package / "shipped_recipes").mkdir(parents=True)
    write(package / "shipped_recipes", "packed.yaml", BASE)
    (tmp_path / "recipes").mkdir()  # a foreign folder beside the installed package
    write(tmp_path / "recipes", "foreign.yaml", BASE)
    monkeypatch.setattr(recipes, "__file__", str(package / "recipes.py"))
    assert [info.name for info in list_recipes()] == ["packed"]
    assert load_recipe("packed").train.max_steps == 4


def test_bench_shapes():
    for hidden, vocabulary in ((256, 1000), (512, 32000), (1024, 32000)):
        config = load_recipe(f"bench_llama_{hidden}")
        fields = config.model.config
        assert fields["hidden_size"] == hidden
        assert fields["num_attention_heads"] == fields["num_key_value_heads"] == hidden // 64
        assert fields["intermediate_size"] == 2.75 * hidden
        assert fields["vocab_size"] == vocabulary
        assert (config.train.micro_batch_size, config.data.block_size) == (2, 128)
    for name, task, block_size in (
        ("gpt2", "causal-lm", 128),
        ("bert", "masked-lm", 128),
        ("t5", "seq2seq", 256),  # of which each of its halves reads one
    ):
        config = load_recipe(f"bench_{name}")
        assert (config.model.architecture, config.model.task) == (name, task)
        assert (config.train.micro_batch_size, config.data.block_size) == (2, block_size)


# --- derivation


def test_a_recipe_holds_only_what_it_changes(tmp_path):
    base = {
        **BASE,
        "name": "other",
        "description": "the base",
        "adapter": {"method": "lora", "target_modules": ["q_proj", "v_proj"]},
    }
    base["model"] = {"architecture": "llama", "config": {"hidden_size": 8, "rms_norm_eps": 1e-5}}
    write(tmp_path, "base.yaml", base)
    (tmp_path / "sub").mkdir()
    path = write(
        tmp_path / "sub",
        "child one.yaml",
        {
            "extends": "../base.yaml",
            "model": {"config": {"hidden_size": 16}},
            "adapter": {"target_modules": ["k_proj"]},
            "train": {"max_steps": None, "epochs": 1},
        },
    )
    config = load_recipe(path)
    assert (config.name, config.description) == ("child_one", "")
    assert config.model.config == {"hidden_size": 16, "rms_norm_eps": 1e-5}
    assert config.adapter.target_modules == ["k_proj"]
    assert (config.train.max_steps, config.train.epochs) == (None, 1)


def test_a_users_recipe_may_extend_the_shipped_one_of_its_name(tmp_path):
    path = write(tmp_path, "quickstart.yaml", "extends: quickstart\ntrain: {max_steps: 3}\n")
    assert load_recipe(path).train.max_steps == 3
    assert load_recipe(path).model == load_recipe("quickstart").model


def test_a_circle_is_refused(tmp_path):
    write(tmp_path, "a.yaml", {"extends": "b.yaml"})
    write(tmp_path, "b.yaml", {"extends": "a.yaml"})
    message = fails(tmp_path / "a.yaml")
    assert "in a circle" in message
    assert "b.yaml -> " in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("extends: 3", "extends: 3 should be a recipe's name or path"),
        ("extends: quickstar", "unknown recipe 'quickstar': did you mean quickstart"),
        ("extends: gone.yaml", "can't read recipe"),
        ("train: [", "is not YAML"),
        ("- 1", "should be a mapping of sections"),
        ("train:\n  max_steps: 1\n  max_steps: 2\n", "key max_steps stands twice (line 3"),
        ("", "no model"),
        ("name: {{ name }}\n", "a key is no plain word (text in braces needs quotes) (line 1"),
        ("~: 3\nextends: quickstart\n", "unknown key None"),
        ("on: 3\nextends: quickstart\n", "unknown key True"),
        ("extends: ~nobody-here/base.yaml", "starts in a home folder that isn't known here"),
    ],
)
def test_broken_recipes(tmp_path, text, expected):
    assert expected in fails(write(tmp_path, "mine.yaml", text))


def test_recipe_that_is_not_text(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"name: \xff\xfe")
    assert "can't read recipe" in fails(path)


def test_unknown_recipes_name_the_nearest(tmp_path):
    assert "unknown recipe 'quickstrat': did you mean quickstart" in fails("quickstrat")
    assert "there are bench_bert, bench_gpt2" in fails("zzz")
    message = fails(tmp_path / "quickstart.yaml")
    assert "no recipe file" in message
    assert "did you mean quickstart" in message


def test_a_folder_is_no_recipe(tmp_path, monkeypatch):
    assert "is a folder: name a .yaml file" in fails(tmp_path)
    write(tmp_path, "config.yaml", BASE)
    assert f"is a folder: name {tmp_path / 'config.yaml'}" in fails(tmp_path)
    (tmp_path / "quickstart").mkdir()  # as in runs/: the shipped one is still meant
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart").name == "quickstart"


def test_a_files_name_that_begins_with_a_dash_or_a_dot_names_its_run(tmp_path):
    assert load_recipe(write(tmp_path, "-mine.yaml", BASE)).name == "_mine"
    assert load_recipe(write(tmp_path, ".mine.yaml", BASE)).name == "_mine"


# --- overrides


def test_overrides_are_yaml():
    config = load_recipe(
        "quickstart",
        [
            "train.learning_rate=1e-3",
            "adapter.method=lora",
            "adapter.target_modules=[q_proj, o_proj]",
            "train.eval_steps=5",
            "data.max_eval_blocks=null",
            "model.config.hidden_size=64",
            "output.dir=a=b",
        ],
    )
    assert config.train.learning_rate == 1e-3
    assert config.adapter.target_modules == ["q_proj", "o_proj"]
    assert config.train.eval_steps == 5
    assert config.data.max_eval_blocks is None
    assert config.model.config["hidden_size"] == 64
    assert config.model.config["num_hidden_layers"] == 4
    assert config.output.dir == "a=b"


def test_an_override_replaces_a_mapping():
    assert load_recipe("quickstart", ["model.config={}"]).model.config == {}


def test_all_malformed_overrides_at_once():
    with pytest.raises(ConfigError) as caught:
        load_recipe("quickstart", ["train.max_steps", "=3", "a b=3", "train.report_to=[a"])
    assert len(caught.value.problems) == 4
    assert "override 'train.max_steps' should be section.key=value" in str(caught.value)


def test_override_problems_are_the_configs():
    message = fails("quickstart", ["train.max_stepz=3", "max_steps=3", "train.micro_batch_size=x"])
    assert "3 problems" in message
    assert "did you mean train.max_steps?" in message
    assert "override train.max_steps.x: max_steps holds 300" in fails(
        "quickstart", ["train.max_steps.x=1"]
    )


# --- tiny


def test_tiny_keeps_what_an_override_names():
    config = load_recipe(
        "quickstart",
        ["train.max_steps=20", "data.block_size=32", "model.config.hidden_size=128"],
        tiny=True,
    )
    assert config.train.max_steps == 20
    assert config.data.block_size == 32
    assert config.model.config["hidden_size"] == 128
    assert config.model.config["num_hidden_layers"] == 2


def test_tiny_makes_what_a_recipe_loads(tmp_path):
    path = write(
        tmp_path,
        "loads.yaml",
        {
            "model": {
                "name_or_path": "mistralai/Mistral-7B-v0.1",
                "architecture": "mistral",
                "revision": "main",
                "tokenizer": "mistralai/Mistral-7B-v0.1",
            },
            "train": {"epochs": 2},
        },
    )
    config = load_recipe(path, ["model.name_or_path=some/other"], tiny=True)
    assert (config.model.name_or_path, config.model.tokenizer) == (None, None)
    assert config.model.revision is None
    assert config.model.config["num_key_value_heads"] == 2
    assert config.model.config["sliding_window"] == 32
    assert (config.train.max_steps, config.train.epochs) == (8, None)
    assert config.data.max_train_blocks == 64


def test_tiny_leaves_small_sizes_alone():
    config = load_recipe("quickstart", ["train.max_steps=3", "train.warmup_steps=0"])
    assert tiny(config).train.max_steps == 3
    assert tiny(config).train.warmup_steps == 0
    assert tiny(tiny(config)) == tiny(config)


def test_tiny_needs_the_architecture():
    overrides = ["model.architecture=null", "model.name_or_path=gpt2", "model.vocab_size=null"]
    assert "set model.architecture" in fails("quickstart", overrides, tiny=True)


def test_a_deepspeed_config_is_found_from_where_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the recipe that names it, also through a derived one; from the current folder on the
    command line."""
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "base.yaml").write_text(
        "extends: quickstart\ntrain: {deepspeed: ../zero.json}\n"
    )
    (tmp_path / "mine.yaml").write_text("extends: bases/base.yaml\n")
    monkeypatch.chdir(tmp_path)
    found = load_recipe("mine.yaml").train.deepspeed
    assert Path(str(found)).resolve() == tmp_path / "zero.json"
    monkeypatch.chdir(tmp_path / "bases")
    found = load_recipe(tmp_path / "mine.yaml", ["train.deepspeed=own.json"]).train.deepspeed
    assert Path(str(found)).resolve() == tmp_path / "bases" / "own.json"
    for plain in ("zero2", "none", '{"bf16": {}}', str(tmp_path / "zero.json")):
        (tmp_path / "plain.yaml").write_text(
            f"extends: quickstart\ntrain: {{deepspeed: '{plain}'}}\n"
        )
        assert load_recipe(tmp_path / "plain.yaml").train.deepspeed == plain

"""Every shipped recipe trains to its end with --tiny, on the backend that it names."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from ort_train import job, run_folder
from ort_train.data.tasks import auto_class
from ort_train.recipes import list_recipes, load_recipe, state_gib

pytestmark = pytest.mark.usefixtures("shared_graphs")

RECIPES = {info.name: info for info in list_recipes()}
# Sizes of the models that recipes load, in the terms of transformers' configs.
SIZES = {
    "meta-llama/Llama-2-7b-hf": {},
    "meta-llama/Llama-2-13b-hf": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
    "microsoft/phi-2": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "vocab_size": 51200,
    },
    "mistralai/Mistral-7B-v0.1": {},
    "google/gemma-2b": {
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
    },
    "microsoft/Orca-2-7b": {"vocab_size": 32003},
    "codellama/CodeLlama-7b-hf": {"vocab_size": 32016},
    "codellama/CodeLlama-70b-hf": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32016,
    },
    "meta-llama/Meta-Llama-3-8B": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "Qwen/Qwen3-4B": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(name: str, tmp_path: Path) -> None:
    if RECIPES[name].method == "qlora":
        pytest.importorskip("bitsandbytes", reason="needs the extra qlora")
    overrides = [
        "measure.baselines=[]",
        "data.source=offline",
        "train.max_steps=3",
        "train.save_steps=null",
        "train.eval_steps=null",
        "train.ort={num_threads: 1}",
        f"output.dir={tmp_path}",
    ]
    result = job.run(load_recipe(name, overrides, tiny=True))
    assert math.isfinite(result.perplexity)
    saved = {path.name for path in (tmp_path / run_folder.MODEL_FOLDER).iterdir()}
    if RECIPES[name].method == "none":
        assert {"config.json", "model.safetensors"} <= saved
    else:
        assert {"adapter_config.json", "adapter_model.safetensors"} <= saved
        assert "model.safetensors" not in saved
    record = json.loads((tmp_path / run_folder.RECORD_FILE).read_text())
    assert record["training"]["backend"] == "ort"
    assert record["training"]["steps"] == 3


@pytest.mark.parametrize("name", [n for n in RECIPES if load_recipe(n).model.name_or_path])
def test_the_stated_number_of_parameters_is_the_models(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = load_recipe(name).model
    config = AutoConfig.for_model(model.architecture, **SIZES[model.name_or_path])
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
    assert made.num_parameters() == pytest.approx(model.num_parameters, rel=0.005)  # 3 digits


MADE = """
quickstart bench_llama_256 bench_llama_512 bench_llama_1024 bench_gpt2 bench_bert bench_t5
""".split()  # noqa: SIM905


@pytest.mark.parametrize("name", MADE)
def test_the_stated_number_of_parameters_is_the_made_models(name: str) -> None:
    import torch
    from transformers import AutoConfig

    model = load_recipe(name).model
    fields = {"vocab_size": model.vocab_size, **model.config}
    with torch.device("meta"):
        config = AutoConfig.for_model(model.architecture, **fields)
        made = auto_class(model.task).from_config(config)
    assert made.num_parameters() == pytest.approx(model.num_parameters, rel=0.005)


def test_published_settings() -> None:
    for name in ("llama2_7b", "llama2_13b_lora", "mistral_qlora", "orca2_7b_lora", "gemma_2b"):
        config = load_recipe(name)
        assert config.data.block_size == 512
        assert config.train.precision == "fp16"
        assert config.train.micro_batch_size == 1


def test_tiny_says_that_it_leaves_half_precision(caplog: pytest.LogCaptureFixture) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU computes in fp16")
    config = load_recipe("mistral_qlora", tiny=True)
    assert (config.train.precision, config.model.dtype) == ("fp32", "float32")
    assert "train.precision fp16 becomes fp32" in caplog.text
    caplog.clear()
    load_recipe("quickstart", tiny=True)
    assert not caplog.text


def test_a_users_recipe_extends_a_shipped_one_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"extends": "mistral_qlora", "adapter": {"r": 4}}
    Path("mine.yaml").write_text(yaml.safe_dump(values))
    config = load_recipe("mine.yaml")
    assert (config.adapter.r, config.adapter.method) == (4, "qlora")
    assert config.model.name_or_path == "mistralai/Mistral-7B-v0.1"


def test_memory_estimates() -> None:
    # 6.74e9 parameters: of 16 bytes, of 2, and of 4.127 bits; of these, embedding and output, 32000
    # x 4096 each, keep 2 bytes.
    assert RECIPES["llama2_7b"].state_gib == pytest.approx(100.4, abs=0.1)
    assert RECIPES["llama2_7b_lora"].state_gib == pytest.approx(12.6, abs=0.1)
    assert RECIPES["llama2_7b_qlora"].state_gib == pytest.approx(3.60, abs=0.01)
    assert all(info.state_gib for info in RECIPES.values())


def test_memory_of_unknown_sizes_is_not_guessed() -> None:
    unknown = ["model.name_or_path=somebody/something"]
    assert state_gib(load_recipe("llama2_7b_lora", unknown)) == pytest.approx(12.6, abs=0.1)
    assert state_gib(load_recipe("llama2_7b_qlora", unknown)) is None
    sizes = ["model.config={hidden_size: 4096, vocab_size: 32000, tie_word_embeddings: true}"]
    found = state_gib(load_recipe("llama2_7b_qlora", [*unknown, *sizes]))
    assert found == pytest.approx(3.60 - 32000 * 4096 * (2 - 4.127 / 8) / 2**30, abs=0.01)


def test_one_small_shape_alone_lets_threads_spin() -> None:
    """Recipes derive from each other, and larger shapes lose a third by it."""
    named = [path.stem for path in (Path(__file__).parents[1] / "recipes").glob("*.yaml")]
    spinning = [n for n in named if load_recipe(n).train.ort.get("allow_spinning")]
    assert spinning == ["bench_llama_256"]

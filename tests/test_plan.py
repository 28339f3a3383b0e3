"""Plans: sizes of the shipped models, memory that rises and falls as it must, the command."""

from __future__ import annotations

import pytest
import torch

from ort_train import cli, plan, quantization
from ort_train.config import RunConfig
from ort_train.errors import ConfigError, ModelError
from ort_train.known_models import KNOWN_MODELS
from ort_train.recipes import list_recipes, load_recipe
from ort_train.step_memory import StepPeak

GIB = plan.GIB


def _config(*overrides: str) -> RunConfig:
    return load_recipe("quickstart", ["train.backend=eager", *overrides], tiny=True)


def test_every_shipped_hub_model_is_known_with_its_size() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    configs = [load_recipe(info.path) for info in list_recipes()]
    named = {config.model.name_or_path: config for config in configs if config.model.name_or_path}
    assert named.keys() <= KNOWN_MODELS.keys()
    for config in named.values():
        architecture, fields = plan.model_fields(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **fields))
        found = sum(p.numel() for p in model.parameters())
        # num_parameters is given with three digits.
        assert found == pytest.approx(config.model.num_parameters, rel=5e-3)


def test_an_unknown_hub_model_names_the_way_out() -> None:
    config = _config()
    model = config.model.model_copy(update={"name_or_path": "nobody/nothing"})
    with pytest.raises(ModelError, match=r"set model\.name_or_path=null with model\.architecture"):
        plan.model_fields(config.model_copy(update={"model": model}))


def test_states_are_counted_as_they_are_held() -> None:
    config = _config()
    by_name = {e.strategy: e for e in plan.estimate(config, 4, 2, 16.0) if not e.recompute}
    num = plan.measure_sizes(config, recompute=False, for_deepspeed=False).num_trained
    # fp32: weights, two moments, DistributedDataParallel's buckets.
    assert by_name["ddp"].states_bytes == 16 * num
    assert by_name["zero1"].states_bytes == 4 * num + 16 * num / 8
    # A gradient's share; two buffers that hold at most all gradients.
    assert by_name["zero2"].states_bytes == 4 * num + 20 * num / 8 + 8 * num
    assert by_name["zero2_offload"].states_bytes == 4 * num + 4 * num / 8 + 8 * num
    assert by_name["zero2_offload"].host_bytes == 16 * num / 8 * 4
    assert by_name["zero2"].step_bytes <= by_name["zero1"].step_bytes


def test_adapters_and_four_bits_take_less() -> None:
    lora = ("adapter.method=lora", "adapter.target_modules=[q_proj, v_proj]")
    full, adapted, quantized = (
        plan.measure_sizes(_config(*overrides), recompute=False, for_deepspeed=False)
        for overrides in ((), lora, ("adapter.method=qlora", lora[1]))
    )
    assert adapted.num_trained < full.num_trained / 10
    assert adapted.num_trained + adapted.num_frozen > full.num_trained
    assert quantized.stored_bytes < adapted.stored_bytes
    assert quantized.num_quantized + quantized.num_frozen == adapted.num_frozen
    assert adapted.step.at(2) < full.step.at(2)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("targets", ["all-linear", "[lm_head]"])
def test_four_bits_are_counted_where_they_are(architecture: str, targets: str) -> None:
    """Embeddings, norms, biases and the output keep their type, and GPT-2's linear layers are no
    torch.nn.Linear."""
    pytest.importorskip("bitsandbytes", reason="needs the extra qlora")
    from transformers import AutoConfig, AutoModelForCausalLM

    small = "num_attention_heads: 4, num_hidden_layers: 2"
    sizes = (
        "{n_embd: 64, n_layer: 2, n_head: 4}"
        if architecture == "gpt2"
        else f"{{hidden_size: 64, intermediate_size: 128, {small}}}"
    )
    overrides = [f"model.architecture={architecture}", f"model.config={sizes}"]
    overrides += ["adapter.method=qlora"]
    config = _config(*overrides, f"adapter.target_modules={targets}")
    found = plan.measure_sizes(config, recompute=False, for_deepspeed=False)
    name, fields = plan.model_fields(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **fields))
    num_parameters = sum(p.numel() for p in model.parameters())
    quantization.quantize(model, quantization.Quantization())
    num_quantized = sum(p.quant_state.shape.numel() for p in model.parameters() if _is_4bit(p))
    assert num_quantized > 0
    assert found.num_quantized == num_quantized
    assert found.num_frozen == num_parameters - num_quantized
    plain_bytes = 4 * (found.num_trained + found.num_frozen)
    assert found.stored_bytes == plain_bytes + num_quantized * 4.5 / 8


def _is_4bit(parameter: torch.nn.Parameter) -> bool:
    return hasattr(parameter, "quant_state")


def test_recomputing_saves_and_samples_cost() -> None:
    kept, recomputed = (
        plan.measure_sizes(_config(), recompute, for_deepspeed=False).step for recompute in (0, 1)
    )
    assert recomputed.at(64) < kept.at(64)
    assert kept.at(1) < kept.at(2) < kept.at(200)


def test_the_largest_batch_is_the_last_that_fits() -> None:
    peak = StepPeak((1, 2, 64), (100.0, 100.0, 720.0))
    assert peak.at(33) == pytest.approx(410.0)
    for budget in (100.0, 250.0, 719.0, 5000.0):
        largest = peak.largest(budget)
        assert peak.at(largest) <= budget < peak.at(largest + 1)
    assert peak.largest(99.0) == 0


def test_the_command_says_whether_it_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["plan", "bench_llama_256", "--gpus", "2", "--gpu-mem-gib", "8"]) == 0
    text = capsys.readouterr().out
    assert "2 GPUs of 8 GiB" in text
    assert "It fits with torchrun" in text
    assert cli.main(["plan", "bench_llama_256", "--gpus", "2", "--gpu-mem-gib", "1.01"]) == 1
    assert "doesn't fit" in capsys.readouterr().out


def test_counts_below_one_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        plan.show(_config(), gpus=0, nodes=-1, gpu_mem_gib=8)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("gib", ["nan", "inf", "-8", "0"])
def test_memory_that_no_gpu_has_is_refused(gib: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "quickstart", "--gpu-mem-gib", gib]) == 2
    assert f"--gpu-mem-gib {float(gib)} should be above 0 and finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.config.num_attention_heads=7", "not a multiple of the number of attention heads"),
        ("model.config.num_layers=7", "fields unknown to llama: num_layers"),
        ("model.architecture=mamba", "set model.attention=eager"),
        ("model.architecture=lama", "did you mean llama"),
    ],
)
def test_a_model_that_cannot_be_made_is_refused(
    override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own_fields = ["model.config={}"] if "architecture" in override else []
    assert cli.main(["plan", "quickstart", "--gpu-mem-gib", "8", *own_fields, override]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_a_budget_beyond_any_batch_is_counted_to_its_end() -> None:
    peak = StepPeak((1, 2, 64), (100.0, 200.0, 6400.0))
    assert peak.largest(100.0 * 70_000) == 70_000

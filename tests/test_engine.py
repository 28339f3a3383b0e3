"""Training through a wrapped module: ONNX Runtime computes what eager computes.

Tolerances of this module: fp32 carries 24 bits: another order of summation moves a loss of about 6
by some 1e-6, and gradients of these sizes by some 1e-7 each; a wrong or stale graph is off by 1e-2
and more. LOSS and GRADIENT lie between.
"""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import padded_batch as batch
from trained_graphs import engines
from transformers.modeling_outputs import CausalLMOutputWithPast

from ort_train import OrtOptions, unwrap, wrap
from ort_train.errors import ConfigError, UnsupportedModelError
from ort_train.forward import taken_over

LOSS = 1e-5
GRADIENT = 2e-6

MakeModel = Callable[..., Any]


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}


def assert_same_gradients(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None or not found[name].any(), name
        else:
            assert found[name] is not None, f"{name} has no gradient"
            torch.testing.assert_close(found[name], value, atol=GRADIENT, rtol=1e-4, msg=name)


def step(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Loss and gradients of one training step."""
    module.zero_grad()
    loss = module(*args, **kwargs)
    loss = loss if isinstance(loss, torch.Tensor) else loss["loss"]
    loss.backward()
    return loss.detach(), gradients(module)


def assert_as_eager(module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    """One step of the wrapped module against the same step of a plain copy of it."""
    eager = unwrap(copy.deepcopy(module))
    expected_loss, expected = step(eager, *args, **kwargs)
    loss, found = step(module, *args, **kwargs)
    assert abs(loss - expected_loss) < LOSS
    assert_same_gradients(found, expected)


def lora(model: Any, **fields: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **fields)
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at first, which would leave lora_A's gradients zero, too
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


# --- parity ---


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_twenty_steps_as_eager(tiny_llama: MakeModel, attention: str, method: str):
    def trained(backend: str) -> tuple[list[float], dict[str, torch.Tensor]]:
        model = tiny_llama(attn_implementation=attention)
        model = lora(model) if method == "lora" else model
        wrap(model, backend=backend).train()
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-3, weight_decay=0.1)
        losses = []
        for i in range(20):
            loss, _ = step(model, **batch(rows=2 + i % 2, length=8 + i % 5, seed=i))
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            losses.append(loss.item())
        return losses, model.state_dict()

    losses, weights = trained("ort")
    expected_losses, expected_weights = trained("eager")
    assert losses == pytest.approx(expected_losses, abs=LOSS)
    for name, expected in expected_weights.items():
        # AdamW divides by the gradient's size: where that is rounding, so is the direction of an
        # update. 20 such steps of 1e-3 could differ by 4e-2; a twentieth of one step is allowed.
        torch.testing.assert_close(weights[name], expected, atol=2e-4, rtol=0, msg=name)


def test_outputs_are_the_models_own(tiny_llama: MakeModel):
    model = wrap(tiny_llama(), backend="ort")
    inputs = batch()
    found = model(**inputs, output_hidden_states=True, use_cache=False)
    model.eval()
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True, use_cache=False)
    assert type(found) is CausalLMOutputWithPast
    assert found.keys() == expected.keys()
    assert len(found.hidden_states) == 3
    # A sum of 64 products of numbers below 1 rounds to some 1e-6.
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        found.hidden_states[2], expected.hidden_states[2], atol=1e-5, rtol=1e-4
    )
    assert found.logits.requires_grad
    assert found[0] is found.loss


def test_tuples_with_return_dict_false(tiny_llama: MakeModel):
    model = wrap(tiny_llama(), backend="ort")
    found = model(**batch(), return_dict=False)
    assert type(found) is tuple
    assert abs(found[0] - model(**batch()).loss) < LOSS


def test_use_cache_of_the_config_is_no_error(tiny_llama: MakeModel):
    model = tiny_llama(use_cache=True)
    wrap(model, backend="ort")
    assert_as_eager(model, **batch())
    assert_as_eager(model, **batch(), use_cache=True)
    assert model.config.use_cache is True
    assert model(**batch()).past_key_values is None


# --- arguments ---


def test_no_attention_mask(tiny_llama: MakeModel):
    model = wrap(tiny_llama(), backend="ort")
    ids = batch()["input_ids"]
    assert_as_eager(model, input_ids=ids, labels=ids)
    assert_as_eager(model, ids, labels=ids)


def test_position_ids(tiny_llama: MakeModel):
    model = wrap(tiny_llama(), backend="ort")
    positions = torch.arange(12)[None].flip(1) + 3
    assert_as_eager(model, **batch(), position_ids=positions)


@pytest.mark.parametrize("labels", [True, False])
def test_gradients_reach_inputs_embeds(tiny_llama: MakeModel, labels: bool):
    def input_gradient(module: Any) -> torch.Tensor:
        embeds = torch.linspace(-1, 1, 2 * 6 * 64).reshape(2, 6, 64).requires_grad_()
        result = module(
            inputs_embeds=embeds,
            attention_mask=torch.ones(2, 6, dtype=torch.long),
            labels=torch.arange(12).reshape(2, 6) if labels else None,
        )
        (result.loss if labels else result.logits.square().mean()).backward()
        assert embeds.grad is not None
        return embeds.grad

    model = tiny_llama()
    expected = input_gradient(copy.deepcopy(model))
    found = input_gradient(wrap(model, backend="ort"))
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(found, expected, atol=GRADIENT, rtol=1e-4)


def test_custom_loss_on_logits_without_labels(tiny_llama: MakeModel):
    def custom(module: Any) -> dict[str, Any]:
        inputs = batch()
        labels = inputs.pop("labels")
        logits = module(**inputs).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        return gradients(module)

    model = tiny_llama()
    expected = custom(copy.deepcopy(model))
    assert_same_gradients(custom(wrap(model, backend="ort")), expected)


@pytest.mark.parametrize("keep_loss", [True, False])
def test_custom_loss_on_logits_with_labels_left_in(tiny_llama: MakeModel, keep_loss: bool):
    """The example of transformers' documentation: labels stay in, outputs.loss isn't used."""

    def custom(module: Any) -> dict[str, Any]:
        inputs = batch()
        outputs = module(**inputs)
        weight = torch.linspace(0.5, 2.0, outputs.logits.shape[-1])
        loss = torch.nn.functional.cross_entropy(
            outputs.logits.flatten(0, 1), inputs["labels"].flatten(), weight=weight
        )
        (loss + outputs.loss if keep_loss else loss).backward()
        return gradients(module)

    model = tiny_llama()
    expected = custom(copy.deepcopy(model))
    wrap(model, backend="ort")
    assert_same_gradients(custom(model), expected)
    model.zero_grad()
    assert_same_gradients(custom(model), expected)


class _Nested(torch.nn.Module):
    """Several outputs, in nests; a constant and None among them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 3)
        self.second = torch.nn.Linear(4, 2)

    def forward(self, pair: dict[str, Any], scale: float = 1.0, flag: bool = False) -> Any:
        one = self.first(pair["x"]) * scale
        two = self.second(pair["more"][0])
        return {"one": one, "rest": [two, {"sum": one.sum() + two.sum()}], "flag": flag, "no": None}


def test_nested_arguments_and_several_outputs():
    torch.manual_seed(0)
    module = _Nested()
    eager = copy.deepcopy(module)
    wrap(module, backend="ort")
    x, more = torch.randn(5, 4), torch.randn(5, 4)
    for scale in (1.0, 2.5, 1.0):
        results = []
        for each in (module, eager):
            each.zero_grad()
            out = each({"x": x, "more": [more]}, scale=scale, flag=True)
            (out["one"].square().sum() + out["rest"][0].sum() - out["rest"][1]["sum"]).backward()
            results.append((out, gradients(each)))
        (found, found_gradients), (expected, expected_gradients) = results
        assert found.keys() == expected.keys()
        assert found["flag"] is True
        assert found["no"] is None
        torch.testing.assert_close(found["rest"][1], expected["rest"][1])
        assert_same_gradients(found_gradients, expected_gradients)
    assert len(engines(module)) == 2  # one for each scale


def test_one_output_used_of_several_then_another():
    torch.manual_seed(0)
    module = _Nested()
    eager = copy.deepcopy(module)
    wrap(module, backend="ort")
    x = torch.randn(5, 4)
    for use in (lambda out: out["one"].sum(), lambda out: out["rest"][0].sum()):
        results = []
        for each in (module, eager):
            each.zero_grad()
            use(each({"x": x, "more": [x]})).backward()
            results.append(gradients(each))
        assert_same_gradients(*results)


def test_new_sizes_need_no_new_graph(tiny_llama: MakeModel):
    model = wrap(tiny_llama(), backend="ort")
    for rows, length in ((2, 12), (1, 7), (5, 30), (2, 12)):
        assert_as_eager(model, **batch(rows, length))
    assert len(engines(model)) == 1


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("first", [(1, 2), (1, 12), (3, 2)])
def test_sizes_of_the_first_batch_are_not_frozen_into_the_graph(
    tiny_llama: MakeModel, first: tuple[int, int], mask: bool
):
    """A size of one is where the tracer could take broadcasting for granted."""
    model = wrap(tiny_llama(), backend="ort")
    for rows, length in (first, (3, 7), (1, 2)):
        inputs = batch(rows, 20)
        inputs = {name: inputs[name][:, :length] for name in ("input_ids", "labels")}
        if mask:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        assert_as_eager(model, **inputs)


def test_gradient_accumulation(tiny_llama: MakeModel):
    model = tiny_llama()
    eager = copy.deepcopy(model)
    wrap(model, backend="ort")
    for each in (model, eager):
        for i in range(4):
            (each(**batch(2, 6 + i, seed=i)).loss / 4).backward()
    assert_same_gradients(gradients(model), gradients(eager))


def test_two_forwards_before_one_backward(tiny_llama: MakeModel):
    """As in contrastive training: both graphs' activations are alive at once."""
    model = tiny_llama()
    eager = copy.deepcopy(model)
    wrap(model, backend="ort")
    for each in (model, eager):
        first = each(**batch(seed=1)).loss
        second = each(**batch(seed=2)).loss
        (first + 3 * second).backward()
    assert_same_gradients(gradients(model), gradients(eager))


def test_too_many_graphs_is_an_error_that_says_what_changes():
    torch.manual_seed(0)
    module = wrap(_Nested(), backend="ort", options=OrtOptions(max_graphs=2))
    x = torch.ones(1, 4)
    for scale in (1.0, 2.0):
        module({"x": x, "more": [x]}, scale=scale)
    with pytest.raises(UnsupportedModelError, match="max_graphs=2: a constant argument changes"):
        module({"x": x, "more": [x]}, scale=3.0)
    module({"x": x, "more": [x]}, scale=2.0)  # the known ones go on


def test_argument_that_no_graph_can_take(tiny_llama: MakeModel):
    from transformers import DynamicCache

    model = wrap(tiny_llama(), backend="ort")
    with pytest.raises(
        UnsupportedModelError, match=r"past_key_values.*DynamicCache.*use_cache=False"
    ):
        model(**batch(), past_key_values=DynamicCache(config=model.config))


class _Typed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, a: Any = None, *, flag: Any = None, **more: Any) -> Any:
        x = a["b"] if isinstance(a, dict) else a
        for value in more.values():
            x = x + 10 * value
        return {"y": self.linear(x), "flag": flag}


def test_equal_constants_of_other_types_are_other_calls():
    module = wrap(_Typed(), backend="ort")
    x = torch.ones(1, 2)
    for flag in (1, True, 1.0, "1"):
        found = module(x, flag=flag)["flag"]
        assert found == flag
        assert type(found) is type(flag)


def test_arguments_whose_paths_spell_the_same():
    torch.manual_seed(0)
    module = _Typed()
    eager = copy.deepcopy(module)
    wrap(module, backend="ort")
    x, y = torch.randn(3, 2), torch.randn(3, 2)
    call = {"a": {"b": x}, "a_b": y, "a.b": x, "weird name": y, "lambda": x, "1": y}
    found, expected = module(**call)["y"], eager(**call)["y"]
    torch.testing.assert_close(found, expected)  # numbers below 100, fp32


def test_arguments_of_the_caller_are_left_alone(tiny_llama: MakeModel):
    model = wrap(tiny_llama(), backend="ort")
    inputs = batch()
    before = {name: value.clone() for name, value in inputs.items()}
    model(**inputs)
    assert inputs.keys() == before.keys()
    assert all(torch.equal(inputs[name], before[name]) for name in before)


# --- the module stays itself ---


def test_wrap_keeps_the_object_and_its_ways(tiny_llama: MakeModel, tmp_path):
    model = tiny_llama()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    assert wrap(model, backend="ort") is model
    model(**batch()).loss.backward()
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.config.hidden_size == 64
    prompt = batch()["input_ids"][:1, :4]
    generated = model.eval().generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 9)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), parameters, strict=True))
    assert unwrap(model) is model
    assert "forward" not in vars(model)


def test_generate_in_training_mode(tiny_llama: MakeModel):
    model = wrap(tiny_llama(), backend="ort").train()
    prompt = batch()["input_ids"][:1, :4]
    assert model.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 7)


def test_eval_and_no_grad_run_the_original(tiny_llama: MakeModel):
    model = tiny_llama()
    inputs = batch()
    expected = model.eval()(**inputs)
    wrap(model, backend="ort")
    assert torch.equal(model(**inputs).logits, expected.logits)  # the same kernels: equal bits
    assert model(**inputs).past_key_values is not None
    with torch.no_grad():
        assert torch.equal(model.train()(**inputs).logits, expected.logits)
    assert engines(model) == []


def test_wrapped_twice_is_refused(tiny_llama: MakeModel):
    model = wrap(tiny_llama(), backend="ort")
    with pytest.raises(UnsupportedModelError, match="it is wrapped already"):
        wrap(model, backend="eager")
    unwrap(model)
    wrap(model.model, backend="ort")
    with pytest.raises(UnsupportedModelError, match="its submodule 'model' is wrapped already"):
        wrap(model, backend="ort")


def test_part_of_a_wrapped_module_is_refused(tiny_llama: MakeModel):
    """A graph within the exported graph can't be traced: it would be left out in silence."""
    model = wrap(tiny_llama(), backend="ort")
    wrap(model.model, backend="ort")
    with pytest.raises(UnsupportedModelError, match="submodule 'model' is wrapped"):
        model(**batch())


def test_a_part_alone_may_be_wrapped(tiny_llama: MakeModel):
    model = tiny_llama()
    eager = copy.deepcopy(model)
    wrap(model.model, backend="ort")
    loss, found = step(model, **batch())
    expected_loss, expected = step(eager, **batch())
    assert abs(loss - expected_loss) < LOSS
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_train_their_own_parameters(tiny_llama: MakeModel, how: str):
    model = wrap(tiny_llama(), backend="ort")
    model(**batch()).loss.backward()
    model.zero_grad()
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert taken_over(twin) is not None
    assert taken_over(twin).module is twin
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
    assert_as_eager(twin, **batch())
    assert all(p.grad is None for p in model.parameters())
    assert_as_eager(model, **batch())


# --- changes of the module after its first step are followed ---


def test_freezing_and_unfreezing_is_followed(tiny_llama: MakeModel):
    model = wrap(tiny_llama(), backend="ort")
    assert_as_eager(model, **batch())
    model.model.embed_tokens.requires_grad_(False)
    model.zero_grad()
    assert_as_eager(model, **batch())
    assert model.model.embed_tokens.weight.grad is None
    model.model.embed_tokens.requires_grad_(True)
    assert_as_eager(model, **batch())
    assert model.model.embed_tokens.weight.grad is not None


def test_everything_frozen_but_the_head_then_all(tiny_llama: MakeModel):
    model = tiny_llama()
    model.model.requires_grad_(False)
    wrap(model, backend="ort")
    assert_as_eager(model, **batch())
    model.requires_grad_(True)
    assert_as_eager(model, **batch())


def test_load_state_dict_is_followed(tiny_llama: MakeModel):
    model = wrap(tiny_llama(), backend="ort")
    assert_as_eager(model, **batch())
    model.load_state_dict(tiny_llama(seed=5).state_dict())
    assert_as_eager(model, **batch())
    model.load_state_dict(tiny_llama(seed=6).state_dict(), assign=True)
    assert_as_eager(model, **batch())
    assert len(engines(model)) == 1


def test_replaced_parameter_is_followed(tiny_llama: MakeModel):
    model = wrap(tiny_llama(), backend="ort")
    assert_as_eager(model, **batch())
    for _ in range(3):  # a freed parameter's id may be taken by the next
        model.lm_head.weight = torch.nn.Parameter(torch.randn(300, 64) / 8)
        assert_as_eager(model, **batch())


def test_data_of_a_parameter_is_followed(tiny_llama: MakeModel):
    """As optimizers of DeepSpeed do: the object stays, its storage is another."""
    model = wrap(tiny_llama(), backend="ort")
    assert_as_eager(model, **batch())
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.7
    assert_as_eager(model, **batch())


def test_resized_embeddings_are_followed(tiny_llama: MakeModel):
    model = wrap(tiny_llama(), backend="ort")
    assert_as_eager(model, **batch())
    model.resize_token_embeddings(320)
    assert_as_eager(model, **batch(vocab=320))


def test_adapter_added_after_the_first_step_is_followed(tiny_llama: MakeModel):
    model = wrap(tiny_llama(), backend="ort")
    assert_as_eager(model, **batch())
    lora(model)  # puts its layers into the same object
    model.zero_grad()
    assert_as_eager(model, **batch())
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)


def test_other_dtype_is_followed_or_refused(tiny_llama: MakeModel):
    model = wrap(tiny_llama(), backend="ort")
    assert_as_eager(model, **batch())
    model.to(torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match="bfloat16"):
        model(**batch())
    model.to(torch.float64)
    with pytest.raises(UnsupportedModelError, match=r"float64.*module\.float\(\)"):
        model(**batch())
    model.to(torch.float32)
    assert_as_eager(model, **batch())


def test_tied_weights(tiny_llama: MakeModel):
    model = wrap(tiny_llama(tie_word_embeddings=True), backend="ort")
    assert_as_eager(model, **batch())
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    assert_as_eager(model, **batch())


class _WithDropout(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Dropout(0.5))
        self.outer = torch.nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(x)).square().mean()


def test_submodule_in_eval_mode_is_followed():
    torch.manual_seed(0)
    module = wrap(_WithDropout(), backend="ort")
    x = torch.randn(8, 6)
    dropped = {module(x).item() for _ in range(3)}
    assert len(dropped) == 3
    module.inner.eval()
    assert_as_eager(module, x)
    assert module(x).item() == module(x).item()
    assert module.inner.training is False, "tracing leaves the flags as they were"
    assert module.training is True
    module.train()
    assert len({module(x).item() for _ in range(3)}) == 3


def test_dropout_probability_changed_is_followed(tiny_llama: MakeModel):
    module = wrap(_WithDropout(), backend="ort")
    x = torch.randn(8, 6)
    module(x)
    module.inner[1].p = 0.0
    assert_as_eager(module, x)


class _Scaled(torch.nn.Module):
    """A buffer that the user sets between steps."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("hidden", torch.ones(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.linear(x) * self.scale * self.hidden).square().mean()


def test_buffers_are_followed():
    torch.manual_seed(0)
    module = wrap(_Scaled(), backend="ort")
    x = torch.randn(4, 3)
    assert_as_eager(module, x)
    with torch.no_grad():
        module.scale.mul_(3)
    assert_as_eager(module, x)
    module.hidden = torch.tensor([1.0, 2.0, 3.0])
    assert_as_eager(module, x)
    module.scale.data = torch.tensor([0.0, 2.0, 1.0])
    assert_as_eager(module, x)


def test_running_statistics_are_refused_not_left_behind():
    """Eager updates BatchNorm's statistics in every training call; a graph wouldn't."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    wrap(module, backend="ort")
    x = torch.randn(6, 4)
    with pytest.raises(UnsupportedModelError, match=r"BatchNorm1d.*'1'.*eval\(\).*backend"):
        module(x)
    assert torch.equal(module[1].running_mean, torch.zeros(4))
    module[1].eval()
    eager = unwrap(copy.deepcopy(module))
    for each in (module, eager):
        each(x).square().mean().backward()
    assert_same_gradients(gradients(module), gradients(eager))


class _Counting(torch.nn.Module):
    """A buffer that the forward itself updates."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.mul_(0.9).add_(x.detach().mean(0))
        return (self.linear(x) - self.mean).square().mean()


def test_forward_that_updates_its_buffers_is_refused():
    module = wrap(_Counting(), backend="ort")
    with pytest.raises(UnsupportedModelError, match=r"buffer.*'mean'.*backend"):
        module(torch.ones(2, 3))
    assert torch.equal(module.mean, torch.zeros(3))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_batch_norm(dimensions: int, statistics: bool, affine: bool):
    """In eval mode by its statistics, which upstream's graph ignores; without any by the batch."""
    torch.manual_seed(0)
    kind = torch.nn.BatchNorm2d if dimensions == 2 else torch.nn.BatchNorm1d
    norm = kind(4, affine=affine, track_running_stats=statistics)
    if statistics:
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
        norm.eval()
    first = torch.nn.Conv2d(3, 4, 2) if dimensions == 2 else torch.nn.Linear(3, 4)
    module = wrap(torch.nn.Sequential(first, norm), backend="ort")
    eager = unwrap(copy.deepcopy(module))
    for rows in (6, 3):
        x = torch.randn(rows, 3, 5, 5) if dimensions == 2 else torch.randn(rows, 3)
        results = []
        for each in (module, eager):
            each.zero_grad()
            (each(x) ** 3).mean().backward()
            results.append(gradients(each))
        assert_same_gradients(*results)


def test_group_norm():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GroupNorm(2, 8))
    eager = copy.deepcopy(module)
    wrap(module, backend="ort")
    x = torch.randn(6, 4)
    for each in (module, eager):
        (each(x) ** 3).sum().backward()
    assert_same_gradients(gradients(module), gradients(eager))


def test_buffer_that_changes_every_step_is_an_error_after_max_graphs():
    module = wrap(_Scaled(), backend="ort", options=OrtOptions(max_graphs=2))
    x = torch.ones(2, 3)
    module(x)
    module.hidden = module.hidden + 1
    module(x)
    module.hidden = module.hidden + 1
    with pytest.raises(UnsupportedModelError, match=r"'hidden'.*persistent=True"):
        module(x)


def test_buffer_rewritten_with_its_values_needs_no_new_graph():
    """DistributedDataParallel broadcasts buffers before every forward."""
    module = wrap(_Scaled(), backend="ort", options=OrtOptions(max_graphs=1))
    x = torch.ones(2, 3)
    for _ in range(4):
        module(x)
        module.hidden.copy_(module.hidden.clone())
    assert len(engines(module)) == 1


def test_nothing_to_train_is_as_eager(tiny_llama: MakeModel):
    model = wrap(tiny_llama().requires_grad_(False), backend="ort")
    loss = model(**batch()).loss
    assert not loss.requires_grad
    assert engines(model) == []


def test_sliding_window_that_the_first_batch_does_not_fill():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, sliding_window=6,
        )
    )  # fmt: skip
    wrap(model, backend="ort")
    for length in (5, 16, 6, 7):
        assert_as_eager(model, **batch(length=length))


# --- dropout ---


def test_dropout_follows_torchs_seed(tiny_llama: MakeModel):
    model = wrap(tiny_llama(attention_dropout=0.3, attn_implementation="eager"), backend="ort")

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return model(**batch()).loss.item()

    first = loss(1)  # the call that builds the graph, too
    assert loss(1) == first
    assert loss(2) != first
    assert loss(1) == first
    torch.manual_seed(1)
    sequence = [model(**batch()).loss.item() for _ in range(3)]
    assert sequence[0] == first
    assert len(set(sequence)) == 3


def test_dropout_has_eagers_mean():
    torch.manual_seed(0)
    module = _WithDropout()
    eager = copy.deepcopy(module)
    wrap(module, backend="ort")
    x = torch.randn(64, 6)
    found = torch.tensor([module(x).item() for _ in range(400)])
    expected = torch.tensor([eager(x).item() for _ in range(400)])
    spread = expected.std() / 400**0.5
    # Two means of 400 draws differ by 1.4 spreads; by 6 once in a billion runs.
    assert abs(found.mean() - expected.mean()) < 6 * spread
    assert found.std() == pytest.approx(expected.std().item(), rel=0.25)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_dropout_trains(tiny_llama: MakeModel, attention: str):
    """With sdpa upstream's gradient builder fails."""
    model = tiny_llama(attention_dropout=0.5, attn_implementation=attention)
    eager = copy.deepcopy(model)
    wrap(model, backend="ort")
    torch.manual_seed(0)
    inputs = batch(4, 24)
    losses = torch.tensor([model(**inputs).loss.item() for _ in range(60)])
    expected = torch.tensor([eager(**inputs).loss.item() for _ in range(60)])
    assert losses.std() > 0
    spread = expected.std() / 60**0.5
    assert abs(losses.mean() - expected.mean()) < 6 * spread  # as above
    model(**inputs).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert model.config._attn_implementation == attention


def test_no_dropout_leaves_torchs_random_stream(tiny_llama: MakeModel):
    model = wrap(tiny_llama(), backend="ort")
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for _ in range(3):
        model(**batch()).loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_draws_as_often_in_the_first_step_as_later():
    """A run resumed into a fresh process must draw the same masks as one that went on."""
    torch.manual_seed(0)
    module = _WithDropout()
    twin = copy.deepcopy(module)
    x = torch.randn(8, 6)
    wrap(module, backend="ort")
    wrap(twin, backend="ort")
    torch.manual_seed(3)
    module(x)
    state = torch.get_rng_state()
    expected = [module(x).item() for _ in range(2)]
    torch.set_rng_state(state)
    assert [twin(x).item() for _ in range(2)] == expected


# --- recomputation ---


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_trains(tiny_llama: MakeModel, reentrant: bool):
    model = tiny_llama()
    eager = copy.deepcopy(model)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    wrap(model, backend="ort")
    loss, found = step(model, **batch())
    expected_loss, expected = step(eager, **batch())
    assert abs(loss - expected_loss) < LOSS
    assert_same_gradients(found, expected)
    assert model.model.layers[0].gradient_checkpointing is True
    assert model.is_gradient_checkpointing


def test_gradient_checkpointing_enabled_later_is_followed(tiny_llama: MakeModel):
    model = wrap(tiny_llama(), backend="ort")
    assert_as_eager(model, **batch())
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert_as_eager(model, **batch())
    assert len(engines(model)) == 2


@pytest.mark.parametrize("recompute", ["layerwise", "layerwise_compromised"])
def test_recompute_has_equal_gradients(tiny_llama: MakeModel, recompute: Any):
    model = wrap(tiny_llama(), backend="ort", options=OrtOptions(recompute=recompute))
    assert_as_eager(model, **batch())
    assert_as_eager(model, **batch(3, 17))


def dropping_gpt2(rate: float = 0.3) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=32, resid_pdrop=rate,
            embd_pdrop=rate, attn_pdrop=rate, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("num_idle", [0, 1])
@pytest.mark.parametrize("recompute", ["none", "layerwise"])
def test_gradients_are_those_of_the_masks_that_were_drawn(
    recompute: Any, num_idle: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Against the slope of the loss itself, also after a forward without a backward.

    Upstream's recomputed dropout then takes other masks than the forward did. Each loss comes from
    a new copy: upstream seeds the masks of a recomputed graph when its session starts.
    """
    monkeypatch.setenv("ORT_TRAIN_GRAPH_CACHE", str(tmp_path))  # one export for the three copies
    base = dropping_gpt2()
    direction = {n: torch.randn_like(p) for n, p in base.named_parameters()}

    def loss_of(offset: float) -> tuple[Any, torch.Tensor]:
        model = copy.deepcopy(base)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(offset * direction[name])
        wrap(model, backend="ort", options=OrtOptions(recompute=recompute))
        torch.manual_seed(1)
        for _ in range(num_idle):
            model(**batch())
        return model, model(**batch()).loss

    model, loss = loss_of(0.0)
    loss.backward()
    found = sum(float((p.grad * direction[n]).sum()) for n, p in model.named_parameters())
    size = 3e-4
    expected = (loss_of(size)[1] - loss_of(-size)[1]).item() / (2 * size)
    # A difference of two losses near 6, each rounded to 5e-7, over 6e-4: good to some 2e-3.
    # Masks of another step gave another slope altogether: 1.0 for -0.1.
    assert found == pytest.approx(expected, abs=1e-2)


def test_recomputed_dropout_after_forwards_without_backward():
    options = OrtOptions(recompute="layerwise", max_graphs=2)
    module = wrap(_WithDropout(), backend="ort", options=options)
    x = torch.randn(8, 6)
    for _ in range(3):
        module(x).backward()
    (first,) = engines(module)
    module(x)
    module(x).backward()
    (second,) = engines(module)
    assert second is not first
    module(x)
    with pytest.raises(UnsupportedModelError, match="backward before the next, set dropout to 0"):
        module(x)


_PEAK = """
import re, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from ort_train import OrtOptions, wrap
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=300, hidden_size=128, intermediate_size=512, num_hidden_layers=8,
    num_attention_heads=8, max_position_embeddings=512))
wrap(model, backend="ort", options=OrtOptions(recompute=sys.argv[1], num_threads=1))
ids = torch.randint(300, (4, 256))
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
model(**{name: value[:2, :16] for name, value in inputs.items()}).loss.backward()  # builds
model.zero_grad()
def status(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = status("VmRSS")
model(**inputs).loss.backward()
print(status("VmHWM") - before)
"""


@pytest.mark.slow
def test_recompute_takes_less_memory():
    """182 MiB without, 94 MiB with it, where this was written (eager: 142 MiB)."""

    processes = {
        recompute: subprocess.Popen(
            [sys.executable, "-c", _PEAK, recompute], stdout=subprocess.PIPE, text=True
        )
        for recompute in ("layerwise", "none")
    }
    outputs = {name: process.communicate()[0] for name, process in processes.items()}
    assert [process.returncode for process in processes.values()] == [0, 0]
    peak_mib = {name: float(output) for name, output in outputs.items()}
    assert peak_mib["layerwise"] < 0.75 * peak_mib["none"]


# --- what is in the graph ---


def test_frozen_parameters_get_no_gradient_graph(tiny_llama: MakeModel):
    def gradient_outputs(model: Any) -> int:
        wrap(model, backend="ort")
        model(**batch()).loss.backward()
        (engine,) = engines(model)
        manager = engine._training_manager
        return sum("_grad" in o.name for o in manager._onnx_models.optimized_model.graph.output)

    full = tiny_llama()
    assert gradient_outputs(full) == len(list(full.parameters()))
    adapted = lora(tiny_llama())
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trainable) == 8
    assert gradient_outputs(adapted) == 8


def test_saved_onnx_graphs(tiny_llama: MakeModel, tmp_path):
    options = OrtOptions(save_onnx=True, onnx_prefix="tiny", save_onnx_path=str(tmp_path))
    model = wrap(tiny_llama(), backend="ort", options=options)
    model(**batch()).loss.backward()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert any(name.startswith("tiny") and name.endswith(".onnx") for name in files), files
    assert all(name.startswith("tiny") for name in files)


def test_autocast_is_refused(tiny_llama: MakeModel):
    model = wrap(tiny_llama(), backend="ort")
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(UnsupportedModelError, match="wrap with precision='bf16'"),
    ):
        model(**batch())


def test_options_that_the_device_cannot_honour(tiny_llama: MakeModel):
    model = tiny_llama()
    with pytest.raises(ConfigError, match=r"(?s)fusion='triton' works.*tuning=True works"):
        wrap(model, backend="ort", options=OrtOptions(fusion="triton", tuning=True))
    assert taken_over(model) is None


def test_a_forward_hook_of_a_submodule_is_traced_and_warned_of(tiny_llama: MakeModel):
    model = wrap(tiny_llama(), backend="ort")
    model.model.layers[0].mlp.register_forward_hook(lambda part, inputs, output: 2 * output)
    with pytest.warns(
        UserWarning, match=r"submodule 'model.layers.0.mlp' .* forward hook \(test_a"
    ):
        model(**batch())
    assert_as_eager(model, **batch(seed=1))


def test_a_backward_hook_of_a_submodule_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    model[0].register_full_backward_hook(lambda module, inputs, outputs: None)
    wrap(model, "ort")
    with pytest.raises(UnsupportedModelError, match="submodule '0' of Sequential has a backward"):
        model(torch.randn(2, 4))


def test_no_plans_of_recomputation_unless_asked_for(
    tiny_llama: MakeModel, monkeypatch: pytest.MonkeyPatch
):
    """Upstream makes them at every start, with a session and sympy."""
    from ort_train.ortmodule import upstream

    upstream.load()
    from onnxruntime.training.ortmodule._runtime_inspector import MemoryObserver

    plans: list[bool] = []
    find = MemoryObserver.find_memory_optimization_opportunity

    def counted(*args: Any) -> Any:
        plans.append(True)
        return find(*args)

    monkeypatch.setattr(MemoryObserver, "find_memory_optimization_opportunity", counted)
    step(wrap(tiny_llama(), backend="ort").train(), **batch())
    assert not plans
    options = OrtOptions(recompute="layerwise")
    step(wrap(tiny_llama(), backend="ort", options=options).train(), **batch())
    assert plans

"""Mixtures of experts and adapters by language: for any routing, whatever the exported batch's."""

from __future__ import annotations

import copy
import inspect
from types import SimpleNamespace
from typing import Any

import architectures
import pytest
import torch
import transformers
from torch.nn import functional as F

from ort_train import OrtOptions, wrap
from ort_train.ortmodule.export import experts

OPTIONS = OrtOptions(num_threads=1)
MAJOR, MINOR = map(int, transformers.__version__.split(".")[:2])
# Sums of some ten fp32 terms of order 1, added in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Block(torch.nn.Module):
    """A block as transformers 4.57's: a router, and a loop over the experts that are hit."""

    def __init__(self, num_experts: int = 5, width: int = 8):
        super().__init__()
        self.num_experts, self.top_k = num_experts, 2
        self.gate = torch.nn.Linear(width, num_experts)
        self.experts = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(width, 16), torch.nn.Linear(16, width))
            for _ in range(num_experts)
        )

    def forward(self, hidden_states):
        hidden_dim = hidden_states.shape[-1]
        routing_weights = F.softmax(self.gate(hidden_states), dim=1)
        routing_weights, selected_experts = torch.topk(routing_weights, self.top_k, dim=-1)
        final_hidden_states = torch.zeros_like(hidden_states)
        expert_mask = F.one_hot(selected_experts, num_classes=self.num_experts).permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit:
            expert_layer = self.experts[expert_idx]
            idx, top_x = torch.where(expert_mask[expert_idx].squeeze(0))
            # A comment, as theirs have.
            current_state = hidden_states[None, top_x].reshape(-1, hidden_dim)
            current_hidden_states = expert_layer(current_state) * routing_weights[top_x, idx, None]
            final_hidden_states.index_add_(0, top_x, current_hidden_states.to(hidden_states.dtype))
        return final_hidden_states


class Changed(Block):
    """The loop leaves out one expert."""

    def forward(self, hidden_states):
        final_hidden_states = torch.zeros_like(hidden_states)
        expert_hit = torch.arange(1, self.num_experts)
        for expert_idx in expert_hit:
            final_hidden_states = final_hidden_states + self.experts[expert_idx](hidden_states)
        return final_hidden_states


def traceable_block() -> Block:
    block = Block()
    traceable = experts._traceable(Block.forward)
    assert traceable is not None
    block.forward = traceable.__get__(block)  # type: ignore[method-assign]
    return block


def assert_same_step(expected: torch.nn.Module, found: torch.nn.Module, *inputs: Any) -> None:
    results = []
    for module in (expected, found):
        module.zero_grad()
        output = module(*inputs)
        (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum().backward()
        # In eager the experts that were not hit have no gradient.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
        results.append([output.detach(), *gradients])
    torch.testing.assert_close(results[1], results[0], **CLOSE)


def test_a_known_loop_is_replaced():
    torch.manual_seed(0)
    block = traceable_block()
    ours = wrap(copy.deepcopy(block), "ort", options=OPTIONS)
    original = Block()
    original.load_state_dict(block.state_dict())
    # One token hits two of five experts, and is what is exported.
    for num_tokens in (1, 20, 3):
        assert_same_step(original, ours, torch.randn(num_tokens, 8))


def test_an_expert_that_is_never_hit_has_no_gradient():
    """Products of matrices with no rows must not leave the memory as it was."""
    block = traceable_block()
    ours = wrap(block, "ort", options=OPTIONS)
    with torch.no_grad():
        block.gate.weight.zero_()
        block.gate.bias.copy_(torch.tensor([2.0, 1.0, 0.0, 0.0, 0.0]))
    for _ in range(2):
        ours.zero_grad()
        ours(torch.randn(7, 8)).sum().backward()
        for expert in block.experts[2:]:
            assert all(p.grad is None or not p.grad.any() for p in expert.parameters())
        assert all(p.grad.any() for expert in block.experts[:2] for p in expert.parameters())


def test_another_loop_is_left_alone():
    assert experts._traceable(Changed.forward) is None
    assert experts._traceable(len) is None


def test_a_line_of_a_replaced_forward_is_found_in_its_file():
    traceable = experts._traceable(Block.forward)
    assert traceable.__code__.co_firstlineno == Block.forward.__code__.co_firstlineno
    assert traceable.__code__.co_filename == __file__


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss", "jetmoe"])
def test_classes_are_as_before_after_an_export(model_type):
    architecture = architectures.find(model_type)
    model = architectures.make_model(architecture)
    methods = [
        (kind, name, kind.__dict__[name])
        for kind in {type(part) for part in model.modules()}
        for name in ("forward", "moe")
        if name in kind.__dict__
    ]
    wrap(model, "ort", options=OPTIONS)(**architectures.make_batch(architecture, 2, 8, seed=0))
    assert methods
    assert all(kind.__dict__[name] is method for kind, name, method in methods)


def test_a_class_derived_from_transformers_is_served():
    """What it inherits is replaced where it is defined."""
    from transformers.models.jetmoe import modeling_jetmoe

    class Own(modeling_jetmoe.JetMoeTopKGating):
        pass

    (found,) = experts.replacements(Own(8, 4, 2), (MAJOR, MINOR))
    assert (found.owner, found.name) == (modeling_jetmoe.JetMoeTopKGating, "forward")


def test_only_what_looks_at_the_routing_in_python_is_replaced():
    """transformers 5 has forms of its own for all but JetMoe."""
    dense = architectures.make_model(architectures.find("llama"))
    assert not list(experts.replacements(dense, (MAJOR, MINOR)))
    for model_type in ("mixtral", "gpt_oss", "deepseek_v3"):
        model = architectures.make_model(architectures.find(model_type))
        assert bool(list(experts.replacements(model, (MAJOR, MINOR)))) == (MAJOR < 5)
    jetmoe = architectures.make_model(architectures.find("jetmoe"))
    replaced = {
        (found.owner.__name__, found.name) for found in experts.replacements(jetmoe, (MAJOR, MINOR))
    }
    assert replaced == {("JetMoeParallelExperts", "forward"), ("JetMoeTopKGating", "forward")}
    gating = next(
        f
        for f in experts.replacements(jetmoe, (MAJOR, MINOR))
        if f.owner.__name__.endswith("Gating")
    )
    assert "tolist" in inspect.getsource(gating.owner.forward)
    part = next(p for p in jetmoe.modules() if type(p) is gating.owner)
    inputs = torch.randn(6, part.input_size)
    for expected, found in zip(part(inputs), gating.function(part, inputs), strict=True):
        torch.testing.assert_close(found, torch.as_tensor(expected))


def test_each_sample_through_the_adapter_of_its_language():
    """The exported batch has one language, later ones have another and several."""
    xmod = architectures.find("xmod")
    config = {**xmod.config, "languages": ("en", "de", "fr")}
    architecture = architectures.Architecture("xmod", "masked-lm", config, xmod.auto_class)
    eager = architectures.make_model(architecture)
    ours = wrap(copy.deepcopy(eager), "ort", options=OPTIONS)
    for languages in ([0, 0], [1, 1, 1], [2, 0, 1, 2]):
        batch = architectures.make_batch(architecture, len(languages), 9, seed=len(languages))
        batch["lang_ids"] = torch.tensor(languages)
        results = []
        for model in (eager, ours):
            model.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            gradients = [
                torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()
            ]
            results.append([loss.detach(), *gradients])
        torch.testing.assert_close(results[1], results[0], **CLOSE)


def test_esm_evaluates_at_the_length_it_was_exported_with():
    """transformers 4.57 keeps the rotary tables of the last length on the module."""
    architecture = architectures.find("esm")
    eager = architectures.make_model(architecture)
    ours = wrap(copy.deepcopy(eager), "ort", options=OPTIONS)
    for length in (12, 16, 12):
        batch = architectures.make_batch(architecture, 2, length, seed=length)
        ours.train()(**batch)
        with torch.no_grad():
            expected, found = (model.eval()(**batch).logits for model in (eager, ours))
        torch.testing.assert_close(found, expected, **CLOSE)


def test_through_selected_in_eager():
    """What the graph computes, in plain torch: any number of axes, any modules."""
    torch.manual_seed(0)
    doubled, negated = (lambda rows: 2 * rows), (lambda rows: -rows)
    inputs, selected = torch.randn(4, 3, 2), torch.tensor([[0, 1], [1, 1], [1, 0], [0, 0]])
    outputs = experts.through_selected([doubled, negated], inputs, selected)
    factors = torch.tensor([2.0, -1.0])[selected]
    torch.testing.assert_close(outputs, inputs[:, None] * factors[..., None, None])
    block = SimpleNamespace(experts=[doubled, negated])
    weights = torch.rand(4, 2)
    expected = (outputs * weights[..., None, None]).sum(1)[:, 0]
    found = experts._routed(block, inputs[:, 0], selected, weights)
    torch.testing.assert_close(found, expected)

"""Architectures of transformers: loss and gradients as eager's, for batches unlike the exported."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import architectures
import pytest
import torch
from architectures import ARCHITECTURES, KNOWN_UNSUPPORTED, Architecture, make_batch
from torch.nn.attention import SDPBackend, sdpa_kernel
from trained_graphs import engines

from ort_train import OrtOptions, wrap
from ort_train.errors import UnsupportedModelError

OPTIONS = OrtOptions(num_threads=1)
# fp32, of losses around 5: the seventh digit.
LOSS_TOLERANCE = 1e-4
# Of a gradient's norm. Sums of some thousand fp32 terms in another order differ by 1e-6; the
# differences of DiffLlama's two softmaxes cancel three digits of that.
GRADIENT_TOLERANCE = 1e-3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def flipped(architecture: Architecture, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with its padding on the left."""
    if "input_ids" not in batch:
        return batch
    names = ["input_ids", "attention_mask"] + ["labels"] * (architecture.task != "seq2seq")
    return {**batch, **{name: batch[name].flip(1) for name in names}}


def step_with_same_loss(eager: Any, ours: Any, batch: dict[str, Any], nan_ok: bool = False) -> None:
    """Forward and backward of both, for their gradients."""
    losses = []
    for model in (eager, ours):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], abs=LOSS_TOLERANCE, nan_ok=nan_ok)


def assert_as_eager(eager: Any, ours: Any, batch: dict[str, Any]) -> None:
    """One training step's loss and gradients agree."""
    step_with_same_loss(eager, ours, batch)
    largest = max(p.grad.norm().item() for p in eager.parameters() if p.grad is not None)
    for (name, parameter), twin in zip(eager.named_parameters(), ours.parameters(), strict=True):
        zero = torch.zeros_like(parameter)
        expected = zero if parameter.grad is None else parameter.grad
        found = zero if twin.grad is None else twin.grad
        # Gradients that vanish but for rounding (of a key's bias, say) are measured by the others.
        scale = max(expected.norm().item(), 1e-5 * largest)
        assert (found - expected).norm().item() <= GRADIENT_TOLERANCE * scale, name


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.model_type)
def test_as_eager(architecture):
    eager = architectures.make_model(architecture)
    ours = wrap(copy.deepcopy(eager), "ort", options=OPTIONS)
    # The first one is exported; one is longer than a sliding window and wider, one is left-padded.
    assert_as_eager(eager, ours, make_batch(architecture, 2, 12, seed=0))
    assert_as_eager(eager, ours, make_batch(architecture, 3, 16, seed=1))
    # Rows of left padding see nothing. Where the mask is added as numbers, as by most models of
    # transformers 4.57, all their scores are the lowest number, and torch's fused kernel for the
    # CPU takes the softmax in its backward from exp(score - logsumexp), which is 1 for every key:
    # its gradients are several times too large. torch's plain attention is the reference.
    with sdpa_kernel(SDPBackend.MATH):
        assert_as_eager(eager, ours, flipped(architecture, make_batch(architecture, 1, 9, seed=2)))
    assert len(engines(ours)) == 1


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "bert", "t5", "mixtral"])
def test_eager_attention(model_type):
    architecture = architectures.find(model_type)
    eager = architectures.make_model(architecture, attention="eager")
    ours = wrap(copy.deepcopy(eager), "ort", options=OPTIONS)
    assert_as_eager(eager, ours, make_batch(architecture, 2, 12, seed=0))
    assert_as_eager(eager, ours, flipped(architecture, make_batch(architecture, 3, 7, seed=1)))


@pytest.mark.parametrize("model_type", ["llama", "deberta", "mixtral", "t5"])
def test_exported_with_a_single_row(model_type):
    """A size of one broadcasts, which must not stay."""
    architecture = architectures.find(model_type)
    eager = architectures.make_model(architecture)
    ours = wrap(copy.deepcopy(eager), "ort", options=OPTIONS)
    for shape in ((1, 9), (3, 7)):
        assert_as_eager(eager, ours, make_batch(architecture, *shape, seed=shape[0]))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_for_any_routing(implementation):
    """The exported batch sends every token to two experts, a later one to the other two."""
    architecture = architectures.find("mixtral")
    eager = architectures.make_model(architecture)
    if hasattr(eager, "set_experts_implementation"):
        eager.set_experts_implementation(implementation)
    elif implementation != "eager":
        pytest.skip("transformers before 5 has one implementation")
    ours = wrap(copy.deepcopy(eager), "ort", options=OPTIONS)

    def route(experts: tuple[int, int]) -> None:
        for model in (eager, ours):
            for layer in model.model.layers:
                gate = (layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe).gate
                with torch.no_grad():
                    gate.weight.mul_(1e-3)
                    layer.post_attention_layernorm.weight.fill_(1)
                    # A direction that all tokens share decides.
                    model.model.embed_tokens.weight[:, 0] = 5
                    gate.weight[:, 0] = torch.tensor(
                        [1.0 - 0.1 * e if e in experts else -1.0 for e in range(4)]
                    )

    for seed, experts in enumerate([(0, 1), (2, 3), (1, 2)]):
        route(experts)
        assert_as_eager(eager, ours, make_batch(architecture, 2, 10 + seed, seed))
    for model in (eager, ours):
        assert getattr(model.config, "_experts_implementation", "eager") == implementation


@pytest.mark.parametrize("with_mask", [True, False])
def test_router_loss(with_mask):
    architecture = architectures.find("mixtral")
    config = {**architecture.config, "output_router_logits": True}
    eager = architectures.make_model(Architecture("mixtral", config=config))
    ours = wrap(copy.deepcopy(eager), "ort", options=OPTIONS)
    for shape in ((2, 12), (3, 16)):
        batch = make_batch(architecture, *shape, seed=shape[0])
        if not with_mask:
            del batch["attention_mask"]
        assert_as_eager(eager, ours, batch)


def test_frozen_experts():
    """As with LoRA on the attention: the experts' inputs need gradients, their weights don't."""
    architecture = architectures.find("qwen3_moe")
    eager = architectures.make_model(architecture)
    for name, parameter in eager.named_parameters():
        parameter.requires_grad_("experts" not in name)
    ours = wrap(copy.deepcopy(eager), "ort", options=OPTIONS)
    for shape in ((2, 12), (3, 16)):
        assert_as_eager(eager, ours, make_batch(architecture, *shape, seed=shape[0]))


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "t5", "bert"])
def test_attention_dropout_trains(model_type):
    """The loss falls as it does in eager, which draws other masks."""
    architecture = architectures.find(model_type)
    losses = []
    for backend in ("eager", "ort"):
        model = architectures.make_model(architecture)
        for part in model.modules():
            if hasattr(part, "attention_dropout"):
                part.attention_dropout = 0.1
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.1
        model = wrap(model, backend, options=OPTIONS)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        batch = make_batch(architecture, 4, 12, seed=0)
        torch.manual_seed(0)
        course = []
        for _ in range(12):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            course.append(loss.item())
        losses.append(course)
    eager, ours = losses
    assert ours[0] == pytest.approx(eager[0], rel=0.05)
    assert ours[-1] < 0.9 * ours[0]
    assert ours[-1] == pytest.approx(eager[-1], rel=0.1)


def test_cache_is_left_out_and_the_config_left_alone():
    architecture = architectures.find("granitemoe")  # takes use_cache through **kwargs
    model = wrap(architectures.make_model(architecture), "ort", options=OPTIONS)
    batch = make_batch(architecture, 2, 12, seed=0)
    assert model.config.use_cache
    output = model(**batch)
    assert output.past_key_values is None
    assert model.config.use_cache
    assert model.eval()(**batch).past_key_values is not None


@pytest.mark.parametrize(
    ("architecture", "reason"), KNOWN_UNSUPPORTED, ids=[a.model_type for a, _ in KNOWN_UNSUPPORTED]
)
def test_unsupported_is_refused_by_name(architecture, reason):
    """Where this fails, the architecture has been repaired: move it into the table."""
    model = wrap(architectures.make_model(architecture), "ort", options=OPTIONS)
    arguments = inspect.signature(model.forward).parameters  # FNet takes no mask in 4.57
    batch = make_batch(architecture, 2, 12, seed=0)
    batch = {name: value for name, value in batch.items() if name in arguments}
    with pytest.raises(UnsupportedModelError, match=reason):
        model(**batch).loss.backward()

"""Copies of weights in bf16: made once, and never used for a weight that has changed."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trained_graphs import operators

from ort_train import OrtOptions, ORTTrainer, ORTTrainingArguments, accumulating, unwrap, wrap
from ort_train.errors import ConfigError
from ort_train.ortmodule.kernels import memory, onednn, rounded_weights

pytestmark = pytest.mark.skipif(
    not onednn.has_bf16(), reason="this CPU doesn't multiply in bf16: products are emulated, slowly"
)
NOT_KEPT = OrtOptions(keep_rounded_weights=False)


class Adapted(torch.nn.Module):
    """A frozen layer between two trained ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(64, 48)
        self.frozen = torch.nn.Linear(48, 96).requires_grad_(False)
        self.last = torch.nn.Linear(96, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.frozen(torch.tanh(self.first(x))))).square().mean()


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what has been rounded, in order."""
    shapes: list[tuple[int, ...]] = []
    plain = rounded_weights.rounded

    def noted(tensor: torch.Tensor, *empty: Callable[..., torch.Tensor]) -> torch.Tensor:
        shapes.append(tuple(tensor.shape))
        return plain(tensor, *empty)

    monkeypatch.setattr(rounded_weights, "rounded", noted)
    return shapes


def batch(seed: int) -> torch.Tensor:
    return torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))


def gradients_of(module: torch.nn.Module, seed: int) -> list[torch.Tensor]:
    module.zero_grad()
    module(batch(seed)).backward()
    return [p.grad for p in module.parameters() if p.grad is not None]


def assert_as_anew(module: torch.nn.Module) -> None:
    """The module's gradients are, to the bit, those of a copy that has kept nothing."""
    anew = wrap(copy.deepcopy(unwrapped(module)), "ort", "bf16", NOT_KEPT)
    for seed in range(2):
        found, expected = gradients_of(module, seed), gradients_of(anew, seed)
        assert all(map(torch.equal, found, expected))


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """A plain module with the weights of a wrapped one."""
    plain = Adapted()
    plain.frozen.requires_grad_(module.frozen.weight.requires_grad)
    plain.load_state_dict(module.state_dict())
    return plain


def test_a_frozen_weight_is_rounded_once(rounded: list[tuple[int, ...]]):
    module = wrap(Adapted(), "ort", "bf16")
    for seed in range(3):
        gradients_of(module, seed)
    assert rounded.count((96, 48)) == 1
    assert rounded.count((48, 64)) == rounded.count((32, 96)) == 3  # trained: once a step
    rounded.clear()
    not_kept = wrap(Adapted(), "ort", "bf16", NOT_KEPT)
    for seed in range(3):
        gradients_of(not_kept, seed)
    assert rounded.count((96, 48)) == 3
    num_roundings = [operators(m).count("ort_train::to_bf16") for m in (module, not_kept)]
    assert num_roundings[0] == num_roundings[1] - 1
    assert_as_anew(module)


def in_place(weight: torch.nn.Parameter) -> None:
    with torch.no_grad():
        weight[3, 5] = 2.0


def merged(weight: torch.nn.Parameter) -> None:
    weight.data += 0.1  # as peft merges an adapter: the version stays


def other_storage(weight: torch.nn.Parameter) -> None:
    weight.data = weight.data * 2


def one_row(weight: torch.nn.Parameter) -> None:
    weight.data[-1] = 0.5


def not_a_number(weight: torch.nn.Parameter) -> None:
    weight.data[:, 0] = float("nan")


@pytest.mark.parametrize("change", [in_place, merged, other_storage, one_row])
def test_a_changed_weight_is_rounded_anew(change: Callable[[Any], None]):
    module = wrap(Adapted(), "ort", "bf16")
    before = [g.clone() for g in gradients_of(module, 0)]
    change(module.frozen.weight)
    assert not torch.equal(gradients_of(module, 0)[0], before[0])
    assert_as_anew(module)


def test_a_loaded_and_a_replaced_weight_are_rounded_anew():
    module = wrap(Adapted(), "ort", "bf16")
    gradients_of(module, 0)
    state = {name: value * 1.5 for name, value in module.state_dict().items()}
    module.load_state_dict(state)
    assert_as_anew(module)
    module.frozen.weight = torch.nn.Parameter(torch.randn(96, 48), requires_grad=False)
    assert_as_anew(module)


def test_a_weight_that_becomes_its_own_transposed_view_is_rounded_anew():
    weight = torch.nn.Parameter(torch.randn(48, 48), requires_grad=False)
    kept = rounded_weights.RoundedWeights()
    kept.confirm([weight])
    first = rounded_weights.of(weight)
    kept.confirm([weight])
    assert rounded_weights.of(weight) is first
    address, version = weight.data_ptr(), weight._version
    weight.data = weight.data.t()
    assert (weight.data_ptr(), weight._version) == (address, version)  # which don't tell
    kept.confirm([weight])
    assert torch.equal(rounded_weights.of(weight), weight.bfloat16())


def test_a_weight_with_nan_stays_kept(rounded: list[tuple[int, ...]]):
    module = wrap(Adapted(), "ort", "bf16")
    not_a_number(module.frozen.weight)
    for seed in range(3):
        module(batch(seed)).backward()
    assert rounded.count((96, 48)) == 1


def test_a_weight_that_becomes_trained_follows_its_optimizer():
    module = wrap(Adapted(), "ort", "bf16")
    gradients_of(module, 0)
    module.frozen.requires_grad_(True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for seed in range(2):
        gradients_of(module, seed)
        optimizer.step()
    anew = wrap(unwrapped(module), "ort", "bf16", NOT_KEPT)
    assert all(map(torch.equal, gradients_of(module, 3), gradients_of(anew, 3)))


def test_a_large_copy_takes_no_kept_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_min_kept_bytes", 96 * 48 * 2)
    monkeypatch.setattr(memory, "_max_kept_bytes", 2**30)
    monkeypatch.setattr(memory, "_blocks", [])
    module = wrap(Adapted(), "ort", "bf16")
    gradients_of(module, 0)
    kept = rounded_weights._by_address[module.frozen.weight.data_ptr()]()
    assert kept is not None
    assert kept.rounded.untyped_storage().nbytes() == 96 * 48 * 2
    addresses = [torch.frombuffer(block, dtype=torch.uint8).data_ptr() for block in memory._blocks]
    assert kept.rounded.data_ptr() not in addresses
    assert_as_anew(module)


def test_two_modules_share_a_frozen_weight():
    first, second = Adapted(), Adapted()
    second.frozen.weight = first.frozen.weight
    for module in (first, second):
        wrap(module, "ort", "bf16")
        gradients_of(module, 0)
    merged(first.frozen.weight)
    assert_as_anew(first)
    assert_as_anew(second)


class Batched(torch.nn.Module):
    """A frozen stack of matrices, as some models keep their experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(64, 48)
        self.stack = torch.nn.Parameter(torch.randn(2, 48, 32), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(self.first(x)).view(2, 8, 48) @ self.stack).square().mean()


def test_a_frozen_stack_of_matrices_is_rounded_each_step():
    kept, not_kept = (wrap(Batched(), "ort", "bf16", o) for o in (OrtOptions(), NOT_KEPT))
    for seed in range(2):
        assert all(map(torch.equal, gradients_of(kept, seed), gradients_of(not_kept, seed)))


def test_copies_go_with_their_module(rounded: list[tuple[int, ...]]):
    module = wrap(Adapted(), "ort", "bf16")
    gradients_of(module, 0)
    address = module.frozen.weight.data_ptr()
    kept = rounded_weights._by_address[address]
    assert kept() is not None
    unwrap(module)
    gc.collect()
    assert kept() is None
    assert address not in rounded_weights._by_address


@pytest.mark.parametrize("options", [OrtOptions(), NOT_KEPT], ids=["kept", "not kept"])
def test_micro_batches_share_trained_weights(rounded: list[tuple[int, ...]], options: OrtOptions):
    module = wrap(Adapted(), "ort", "bf16", options)
    other = wrap(Adapted(), "ort", "bf16", NOT_KEPT)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (module, other)]
    for step in range(2):
        rounded.clear()
        with accumulating(module):
            for micro_batch in range(3):
                module(batch(3 * step + micro_batch)).backward()
        is_kept = options.keep_rounded_weights
        assert rounded.count((48, 64)) == rounded.count((32, 96)) == (1 if is_kept else 3)
        for micro_batch in range(3):
            other(batch(3 * step + micro_batch)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert all(map(torch.equal, module.parameters(), other.parameters()))


def test_accumulating_follows_weights_that_change_all_the_same():
    module = wrap(Adapted(), "ort", "bf16")
    with accumulating(module):
        gradients_of(module, 0)
        merged(module.first.weight)
        anew = wrap(unwrapped(module), "ort", "bf16", NOT_KEPT)
        assert all(map(torch.equal, gradients_of(module, 1), gradients_of(anew, 1)))


def test_accumulating_wants_the_wrapped_module():
    with pytest.raises(ConfigError, match="Adapted isn't wrapped"), accumulating(Adapted()):
        pass
    module = wrap(Adapted(), "eager")
    with accumulating(module):  # where it makes no difference
        gradients_of(module, 0)


def test_trainer_rounds_once_a_step(
    tiny_llama: Callable[..., Any], tmp_path: Path, rounded: list[tuple[int, ...]]
):
    rows = torch.randint(300, (24, 16), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    weights, counts = [], []
    for keep in (True, False):
        rounded.clear()
        model = tiny_llama()
        arguments = ORTTrainingArguments(
            str(tmp_path / str(keep)),
            backend="ort",
            bf16=True,
            use_cpu=True,
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            ort_options={"keep_rounded_weights": keep},
            report_to="none",
            save_strategy="no",
        )
        ORTTrainer(model, arguments, train_dataset=data).train()
        weights.append(list(model.parameters()))
        counts.append(rounded.count((300, 64)))  # the head
    assert counts == [2, 6]
    assert all(map(torch.equal, *weights))

"""Memory that is kept from step to step: used again, and never while somebody holds it."""

from __future__ import annotations

import copy
import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ort_train import wrap
from ort_train.ortmodule import OrtOptions
from ort_train.ortmodule.kernels import direct, memory
from ort_train.ortmodule.passes import embeddings


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of 4 KiB have blocks of their own, and none is kept yet."""
    monkeypatch.setattr(memory, "_min_kept_bytes", 4096)
    monkeypatch.setattr(memory, "_max_kept_bytes", memory.MAX_KEPT_BYTES)
    monkeypatch.setattr(memory, "_blocks", [])
    monkeypatch.setattr(memory, "_scratch", [])


class Tied(torch.nn.Module):
    """Logits of tokens; both uses of the table have a gradient of it."""

    def __init__(self, is_tied: bool = False):
        super().__init__()
        self.table = torch.nn.Embedding(600, 32, padding_idx=3)
        self.head = torch.nn.Linear(32, 600, bias=False)
        if is_tied:
            self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.head(torch.tanh(self.table(ids)))
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def test_freed_memory_is_kept_where_the_allocator_can():
    assert isinstance(memory.keep_freed(), bool)


def test_small_tensors_are_torchs_own():
    assert memory.empty(3, 5, dtype=torch.float32).shape == (3, 5)
    assert memory.kept_bytes() == 0


def test_a_block_is_used_again_once_its_last_tensor_is_gone():
    first = memory.empty(64, 32, dtype=torch.float32)
    address = first.data_ptr()
    part = first.view(-1)[5:9]
    assert memory.empty(64, 32, dtype=torch.float32).data_ptr() != address
    del first
    assert memory.empty(64, 32, dtype=torch.float32).data_ptr() != address
    del part
    assert memory.kept_bytes() == 2 * 64 * 32 * 4
    # By any type, of about the same size.
    again = [memory.empty(n, 32, dtype=torch.bfloat16) for n in (128, 110)]
    assert address in [tensor.data_ptr() for tensor in again]
    assert [tensor.shape for tensor in again] == [(128, 32), (110, 32)]
    assert memory.kept_bytes() == 2 * 64 * 32 * 4
    del again
    memory.empty(300, 32, dtype=torch.bfloat16)  # more than twice as large
    assert memory.kept_bytes() == 2 * 64 * 32 * 4 + 300 * 32 * 2


def test_what_is_kept_is_what_the_largest_batch_needs():
    for count in (1100, 1500, 1300, 2048, 1024, 2000, 1600):
        memory.empty(count, dtype=torch.float32)
    assert memory.kept_bytes() == 2048 * 4
    # Two at a time, and one that is held, which gives way to none.
    held = memory.empty(1100, dtype=torch.float32).fill_(7)
    for count in (1100, 1500, 3000, 1600):
        memory.empty(count, dtype=torch.float32).fill_(8)
    assert memory.kept_bytes() == (2048 + 3000) * 4
    assert held.eq(7).all()


def test_no_more_is_kept_than_the_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_max_kept_bytes", 3 * 4096)
    tensors = [memory.empty(1024, dtype=torch.float32) for _ in range(5)]
    assert memory.kept_bytes() == 3 * 4096
    for index, tensor in enumerate(tensors):  # the others are good tensors nevertheless
        tensor.fill_(index)
    assert [int(tensor.unique()) for tensor in tensors] == list(range(5))
    # What is asked for now has the place of what was asked for once.
    del tensors, tensor
    addresses = {memory.empty(2048, dtype=torch.float32).data_ptr() for _ in range(3)}
    assert len(addresses) == 1
    assert memory.kept_bytes() == 4096 + 8192


def test_the_least_recently_used_block_makes_room(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_max_kept_bytes", 4096 + 12288)
    held = [memory.empty(count, dtype=torch.float32) for count in (1024, 1025, 1026)]
    del held
    memory.empty(1024, dtype=torch.float32)  # the oldest block is used again
    memory.empty(2100, dtype=torch.float32)  # more than twice as large
    assert memory.kept_bytes() == 4096 + 8400


def test_a_result_beyond_the_limit_takes_nothings_place(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_max_kept_bytes", 2 * 4096)
    memory.empty(1024, dtype=torch.float32)
    assert memory.empty(4096, dtype=torch.float32).fill_(1).sum() == 4096
    assert memory.kept_bytes() == 4096


def test_nothing_is_kept_where_it_is_turned_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_max_kept_bytes", 0)
    assert memory.empty(64, 32, dtype=torch.float32).fill_(1).sum() == 64 * 32
    assert memory.kept_bytes() == 0


def test_one_block_serves_results_that_follow_one_another():
    first = memory.scratch(64, 32, dtype=torch.float32)
    address, part = first.data_ptr(), first[3]
    assert memory.scratch(8, 8, dtype=torch.float32) is None
    del first
    assert memory.scratch(8, 8, dtype=torch.float32) is None  # its row is still held
    del part
    smaller = memory.scratch(60, 64, dtype=torch.bfloat16)
    assert (smaller.data_ptr(), smaller.shape) == (address, (60, 64))
    assert memory.kept_bytes() == 64 * 32 * 4
    # A larger one takes its place, and leaves it what it has.
    smaller.fill_(3)
    larger = memory.scratch(128, 32, dtype=torch.float32).fill_(7)
    assert smaller.eq(3).all()
    assert larger.eq(7).all()
    assert memory.kept_bytes() == 128 * 32 * 4
    memory.release()
    assert memory.kept_bytes() == 0
    assert larger.eq(7).all()


def test_no_block_is_kept_beyond_the_limit_or_where_it_is_turned_off(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(memory, "_max_kept_bytes", 2 * 4096)
    held = memory.empty(1024, dtype=torch.float32)
    assert memory.scratch(1024, dtype=torch.float32).shape == (1024,)
    assert memory.scratch(1025, dtype=torch.float32) is None
    del held
    memory.release()
    monkeypatch.setattr(memory, "_max_kept_bytes", 0)
    assert memory.scratch(1024, dtype=torch.float32) is None


def test_threads_get_blocks_of_their_own():
    def fill(value: int) -> bool:
        for _ in range(200):
            tensor = memory.empty(2048, dtype=torch.float32).fill_(value)
            if not tensor.eq(value).all():
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(fill, range(8)))


def test_a_profiled_step_takes_no_new_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """ONNX Runtime's notes would take the heap's remainders, and each result new pages."""
    options = OrtOptions(profile_prefix=str(tmp_path / "profile"), products="auto")
    layers = [torch.nn.Linear(512, 2048, bias=False), torch.nn.Linear(2048, 512, bias=False)]
    module = wrap(torch.nn.Sequential(*layers), backend="ort", options=options)
    x = torch.randn(1024, 512)

    def resident_mib() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    for _ in range(3):
        module(x).sum().backward()
    before = resident_mib()
    for _ in range(10):
        module(x).sum().backward()
    assert resident_mib() - before < 40  # a step without it takes 12


def test_what_is_released_lives_as_long_as_its_tensor():
    tensor = memory.empty(1024, dtype=torch.float32).fill_(7)
    memory.release()
    assert memory.kept_bytes() == 0
    other = memory.empty(1024, dtype=torch.float32).fill_(8)
    assert tensor.eq(7).all()
    assert other.eq(8).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_gradients_in_kept_memory_are_eagers(precision: str, is_tied: bool):
    torch.manual_seed(0)
    eager = Tied(is_tied)
    autocast = copy.deepcopy(eager)
    ours = wrap(copy.deepcopy(eager), backend="ort", precision=precision)
    for step in range(3):
        ids = torch.randint(600, (2, 9))
        if step == 2:  # both accumulate
            kept = ours.head.weight.grad
        else:
            for module in (eager, autocast, ours):
                module.zero_grad()
        eager(ids).backward()
        ours(ids).backward()
        with torch.autocast("cpu", torch.bfloat16):
            loss = autocast(ids)
        loss.backward()
        for p, q, r in zip(*(m.parameters() for m in (eager, ours, autocast)), strict=True):
            # fp32: one sum in another order; bf16: no further from it than autocast, which rounds
            # as well, by more than chance.
            limit = 1e-5 * p.grad.norm() if precision == "fp32" else 1.2 * (r.grad - p.grad).norm()
            assert (q.grad - p.grad).norm() <= limit
    assert ours.head.weight.grad is kept  # accumulated into, not replaced


def test_a_gradient_that_is_held_is_not_written_over():
    torch.manual_seed(0)
    module = wrap(Tied(), backend="ort")
    held, copies = [], []
    for _ in range(3):
        module.zero_grad()
        module(torch.randint(600, (2, 9))).backward()
        held += [p.grad for p in module.parameters()]
        copies += [p.grad.clone() for p in module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))


def test_memory_is_used_again_in_the_next_step_and_released_with_the_module():
    module = wrap(Tied(), backend="ort")
    addresses = []
    for _ in range(4):
        module.zero_grad()
        module(torch.randint(600, (2, 9))).backward()
        addresses.append(module.table.weight.grad.data_ptr())
    assert len(set(addresses[1:])) == 1
    assert memory.kept_bytes() >= module.table.weight.nbytes
    module.zero_grad()
    del module
    gc.collect()  # upstream's session and module hold each other
    assert memory.kept_bytes() == 0


@pytest.mark.parametrize("padding", [-1, 5])
@pytest.mark.parametrize("by_frequency", [False, True])
def test_embedding_gradient_as_torchs(padding: int, by_frequency: bool):
    embeddings.register()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(200, (3, 50), generator=generator)
    ids[0, :9] = 5
    grad = torch.randn(3, 50, 32, generator=generator)
    arguments = (grad, ids, 200, padding, by_frequency, False)
    function = direct.find(b"embedding_backward")
    found = function(*(torch.as_tensor(value) for value in arguments))
    # Added in the same order.
    assert torch.equal(found, torch.ops.aten.embedding_backward(*arguments))

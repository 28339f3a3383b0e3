"""What is looked at in a module before every step: every change is seen, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ort_train.ortmodule.module_state import ModuleState, StateReader


class _Part(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 4)
        self.drop = torch.nn.Dropout(0.1)
        self.attention_dropout = 0.1
        self.register_buffer("kept", torch.zeros(2))
        self.register_buffer("table", torch.zeros(3), persistent=False)


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList([_Part(), _Part()])
        self.tied = torch.nn.Linear(3, 4)
        self.tied.weight = self.parts[0].linear.weight


def _freeze(net: _Net) -> None:
    net.parts[1].linear.bias.requires_grad_(False)


def _eval_part(net: _Net) -> None:
    net.parts[1].drop.eval()


def _other_dropout(net: _Net) -> None:
    net.parts[0].drop.p = 0.3


def _other_attention_dropout(net: _Net) -> None:
    net.parts[0].attention_dropout = 0.3


def _checkpointing(net: _Net) -> None:
    net.parts[0].gradient_checkpointing = True  # an attribute that wasn't there


def _other_dtype(net: _Net) -> None:
    net.parts[0].linear.bias.data = net.parts[0].linear.bias.data.double()


def _other_shape(net: _Net) -> None:
    net.parts[0].linear.bias.data = torch.zeros(1)


def _hook(net: _Net) -> None:
    net.parts[0].linear.register_forward_hook(lambda *_: None)


def _pre_hook(net: _Net) -> None:
    net.parts[0].linear.register_forward_pre_hook(lambda *_: None)


def _more_parts(net: _Net) -> None:
    net.parts.append(_Part())


def _no_tie(net: _Net) -> None:
    net.tied.weight = torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    "change",
    [
        _freeze, _eval_part, _other_dropout, _other_attention_dropout, _checkpointing, _other_dtype,
        _other_shape, _hook, _pre_hook, _more_parts, _no_tie,
    ],
)  # fmt: skip
def test_what_a_graph_depends_on_has_another_key(change: Callable[[_Net], None]):
    net = _Net()
    read = StateReader(net)
    before = read()
    change(net)
    after = read()
    assert after.key != before.key
    assert read() is after


def _other_parameter(net: _Net) -> None:
    net.parts[0].linear.bias = torch.nn.Parameter(torch.ones(4))


def _other_buffer(net: _Net) -> None:
    net.parts[0].kept = torch.ones(2)


def _other_part(net: _Net) -> None:
    net.parts[1] = _Part()


def _moved_buffer(net: _Net) -> None:
    first, second = net.parts
    first.register_buffer("moved", second._buffers.pop("kept"))


@pytest.mark.parametrize("change", [_other_parameter, _other_buffer, _other_part, _moved_buffer])
def test_other_tensors_share_the_key_and_are_found(change: Callable[[_Net], None]):
    net = _Net()
    read = StateReader(net)
    before = read()
    change(net)
    after = read()
    assert after is not before
    assert after.key == before.key
    assert [id(p) for p in net.parameters()] == [id(p) for p in after.parameters]
    assert after.parameter_ids == tuple(map(id, after.parameters))
    found = dict(net.named_buffers())
    assert found.keys() == after.buffers.keys()
    assert all(after.buffers[name] is buffer for name, buffer in found.items())


def test_what_a_step_does_leaves_the_very_state():
    net = _Net()
    read = StateReader(net)
    before = read()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    net.parts[0].kept += 1
    assert read() is before


def test_a_change_that_is_taken_back_has_its_key_again():
    net = _Net()
    read = StateReader(net)
    before = read()
    net.parts[0].eval()
    assert read().key != before.key
    net.train()
    assert read().key == before.key


def test_hooks_of_the_whole_module_are_no_part_of_a_graph():
    net = _Net()
    read = StateReader(net)
    before = read()
    net.register_forward_hook(lambda *_: None)
    assert read().key == before.key


def test_a_scripted_part_is_read_anew():
    net = _Net()
    net.scripted = torch.jit.script(torch.nn.Linear(2, 2))
    read = StateReader(net)
    before = read()
    assert isinstance(before, ModuleState)
    net.scripted.eval()
    assert read().key != before.key


def test_whether_anything_is_trained():
    net = _Net()
    read = StateReader(net)
    assert read().is_trained
    net.requires_grad_(False)
    assert not read().is_trained

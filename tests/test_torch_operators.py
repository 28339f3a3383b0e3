"""Operators that ONNX Runtime can't differentiate, run and differentiated by torch in its graph.

Tolerance: the same kernels compute both, behind a linear layer of fp32's rounding; sums of some
hundred terms of order 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F
from trained_graphs import graph_of

from ort_train import OrtOptions, wrap
from ort_train.errors import UnsupportedModelError
from ort_train.ortmodule.kernels.aten import operator_name
from ort_train.ortmodule.kernels.torch_operators import Call, call_of, is_gradient, narrowed

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
OPTIONS = OrtOptions(num_threads=1)
WIDTH = 8

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Layers(torch.nn.Module):
    """A function of two linear layers of x."""

    def __init__(self, function: Function):
        super().__init__()
        torch.manual_seed(0)
        self.one = torch.nn.Linear(WIDTH, WIDTH)
        self.other = torch.nn.Linear(WIDTH, WIDTH)
        self.function = function

    def forward(self, x_BTH: torch.Tensor) -> torch.Tensor:
        return self.function(self.one(x_BTH), self.other(x_BTH))


def batch(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(sum(sizes)))


def gradients(module: torch.nn.Module, x_BTH: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradient of each trained parameter, or zeros."""
    module.zero_grad()
    output = module(x_BTH)
    weights = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    (output * weights).sum().backward()
    trained = [p for p in module.parameters() if p.requires_grad]
    return [output.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in trained)]


def assert_as_eager(module: torch.nn.Module, *shapes: tuple[int, ...]) -> None:
    ours = wrap(copy.deepcopy(module), "ort", options=OPTIONS)
    for shape in shapes:
        expected = gradients(module, batch(*shape))
        torch.testing.assert_close(gradients(ours, batch(*shape)), expected, **CLOSE)


FUNCTIONS: dict[str, Function] = {
    # Activations
    "elu": lambda x, y: F.elu(x) + F.celu(y, 1.3) + F.selu(x),
    "hardswish": lambda x, y: F.hardswish(x) + F.hardsigmoid(y),
    "mish": lambda x, y: F.mish(x) + F.logsigmoid(y),
    "prelu": lambda x, y: F.prelu(x, y[0, 0, :1]),
    "shrink": lambda x, y: F.softshrink(x, 0.1) + F.threshold(y, 0.1, 0.2),
    # Elementwise
    "angles": lambda x, y: torch.atan2(x, y) + torch.atan(x) + torch.tan(y) + torch.sinh(x),
    "two of one": lambda x, y: torch.logaddexp(x, x) + torch.hypot(x, y),
    "special": lambda x, y: torch.lgamma(x.exp() + 1) + torch.erfinv(y.tanh() * 0.9),
    "interpolated": lambda x, y: torch.lerp(x, y, 0.3) + torch.copysign(x, y.detach()),
    # Along an axis
    "cumulative": lambda x, y: x.cumsum(1) + y.cumprod(1) + x.logcumsumexp(-1),
    "cummax": lambda x, y: x.cummax(1).values * y,
    "extreme": lambda x, y: x.amax(-1) + y.amin(-1) + x.prod(-1),
    "median": lambda x, y: x.median(-1).values + y.kthvalue(2, -1).values,
    "logsumexp": lambda x, y: torch.logsumexp(x, -1) + torch.logsumexp(y, (1, 2), True)[..., 0],
    "norms": lambda x, y: x / x.norm(dim=-1, keepdim=True) + y / y.norm(1, -1, True),
    "normalized": lambda x, y: F.normalize(x, dim=-1) * F.normalize(y, dim=1),
    "quantile": lambda x, y: torch.quantile(x, 0.3, dim=-1) * y[..., 0],
    # Shapes
    "flip": lambda x, y: x.flip(1, 2) * y.flip(1),
    "rolled and tiled": lambda x, y: x.roll(1, 1).tile(1, 2, 1) * y.repeat(1, 2, 1),
    "written": lambda x, y: x.index_fill(1, torch.tensor([0]), 0.5).slice_scatter(
        y[:, :2], 1, 0, 2
    ),
    "reduced by index": lambda x, y: x.scatter_reduce(
        1, torch.zeros(x.shape, dtype=torch.int64), y, "amax"
    ),
    "taken": lambda x, y: torch.take_along_dim(x, y.argsort(-1), -1),
    "windows": lambda x, y: F.unfold(x[:, None], (2, 2)) * F.unfold(y[:, None], (2, 2)),
    "padded": lambda x, y: F.pad(x, (1, 1), mode="reflect") * F.pad(y, (1, 1), mode="replicate"),
    # Norms, images, pooling
    "group_norm": lambda x, y: F.group_norm(x.mT, 2, y[0, 0], y[0, 1]).mT,
    "instance_norm": lambda x, y: F.instance_norm(x.mT).mT * y,
    "resized": lambda x, y: F.interpolate(x[:, None], size=(4, 4), mode="bilinear"),
    "nearest": lambda x, y: (
        F.interpolate(x.mT, scale_factor=2) + F.interpolate(y.mT, scale_factor=2)
    ),
    "sampled": lambda x, y: F.grid_sample(
        x[:, None], y[:, None, :2, :2].tanh(), align_corners=False
    ),
    "pixel_shuffle": lambda x, y: F.pixel_shuffle(x[:, None].repeat(1, 4, 1, 1), 2),
    "adaptive pools": lambda x, y: F.adaptive_avg_pool1d(x, 2) + F.adaptive_max_pool1d(y, 2),
    "max_pool3d": lambda x, y: F.max_pool3d(x[:, None, None], (1, 2, 2)),
    # Products and solutions
    "tensordot": lambda x, y: torch.tensordot(x, y[0, :3], dims=([2], [1])),
    "outer": lambda x, y: torch.outer(x[0, 0], y[0, 1]),
    "dot and mv": lambda x, y: torch.mv(x[0], y[0, 0]) * torch.dot(x[0, 0], y[0, 1]),
    "solved": lambda x, y: torch.linalg.solve(y.mT @ y + 3 * torch.eye(WIDTH), x.mT),
    "determinant": lambda x, y: torch.linalg.det(x.mT @ x + 3 * torch.eye(WIDTH)) / 1e4,
    "cross": lambda x, y: torch.linalg.cross(x[..., :3], y[..., :3]),
    # Losses
    "huber": lambda x, y: F.huber_loss(x, y.detach()) + F.smooth_l1_loss(y, x.detach()),
    "smoothed": lambda x, y: F.cross_entropy(x.mT, y.argmax(-1), label_smoothing=0.1),
    "soft targets": lambda x, y: F.cross_entropy(
        x.flatten(0, 1), y.detach().softmax(-1).flatten(0, 1)
    ),
    "nll": lambda x, y: F.nll_loss(x.log_softmax(-1).mT, y.argmax(-1)),
    "triplet": lambda x, y: F.triplet_margin_loss(x[:, 0], y[:, 0], x.detach()[:, 1]),
    "not differentiable in one": lambda x, y: F.soft_margin_loss(x, y.detach().sign()),
    "masks": lambda x, y: x.masked_scatter(y > 0, y) * torch.bitwise_xor(x > 0, y > 0.1),
    "step": lambda x, y: x * torch.signbit(y) + y.sgn(),
    # A number of the batch as an argument, lists of tensors, integers
    "topk of a size": lambda x, y: x.topk(x.shape[1] // 2, -1).values.sum(-1) * y[..., 0],
    "stacked": lambda x, y: torch.block_diag(x[0], y[0]),
    "counted": lambda x, y: x * torch.count_nonzero(y > 0),
    "searched": lambda x, y: x * torch.searchsorted(torch.tensor([-1.0, 0.0, 1.0]), y.detach()),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_as_eager(function: Function):
    """Of another number of rows and another length, and of one row."""
    assert_as_eager(Layers(function), (2, 6, WIDTH), (3, 7, WIDTH), (1, 4, WIDTH))


@pytest.mark.parametrize("frozen", ["one", "other"])
def test_only_wanted_gradients_are_computed(frozen: str):
    module = Layers(lambda x, y: torch.hypot(x, y))
    module.get_submodule(frozen).requires_grad_(False)
    assert_as_eager(module, (2, 6, WIDTH))
    ours = wrap(module, "ort", options=OPTIONS)
    ours(batch(2, 6, WIDTH)).sum().backward()
    names = [operator_name(node) for node in graph_of(ours).node]
    (backward,) = [name for name in names if is_gradient(name)]
    assert f'"trained":[{1 if frozen == "one" else 0}]' in backward


def test_twenty_steps_have_eagers_losses():
    def losses(backend: str) -> list[float]:
        module = wrap(Layers(lambda x, y: F.elu(x.cumsum(1)) - F.huber_loss(x, y)), backend)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        found = []
        for step in range(20):
            loss = module(batch(2, 5 + step % 3, WIDTH)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    expected = losses("eager")
    assert expected[-1] < 0.9 * expected[0]
    # fp32's rounding of each step, in losses of order 1.
    assert losses("ort") == pytest.approx(expected, rel=1e-4)


def test_an_encoder_layer_of_torchs():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
    assert_as_eager(layer, (2, 6, WIDTH), (3, 7, WIDTH))


def test_random_operators_are_no_such_nodes():
    """Run again in the backward pass, they would draw other numbers."""
    module = wrap(Layers(lambda x, y: torch.poisson(y.exp()) * x), "ort", options=OPTIONS)
    with pytest.raises(UnsupportedModelError, match="aten::poisson"):
        module(batch(2, 6, WIDTH))


def test_a_name_holds_the_call():
    call = Call(
        "aten::lerp.Tensor",
        [{"input": 0}, {"input": 1}, {"input": 2}],
        [],
        [],
        [0, 1],
        0,
        [(1, [None])],
    )
    read = call_of(call.forward_name)
    assert read is not None
    assert read.forward_name == call.forward_name
    assert '"trained":[1]' in narrowed(call.backward_name, [1])
    assert call_of("ort_train::pack_rows") is None

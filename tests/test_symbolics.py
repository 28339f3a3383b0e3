"""Single operators: gradients as eager's, for sizes other than the exported ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ort_train import OrtOptions, wrap
from ort_train.errors import UnsupportedModelError

OPTIONS = OrtOptions(num_threads=1)
UNREGISTERED = torch.ones(8, requires_grad=True)
# Sums of some hundred fp32 terms of order 1, added in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Lambda(torch.nn.Module):
    """A function of x after a linear layer, so that there is a gradient to compare."""

    def __init__(self, function: Callable[..., torch.Tensor], width: int = 8):
        super().__init__()
        self.linear = torch.nn.Linear(width, width)
        self.function = function

    def forward(self, x: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        return self.function(self.linear(x), *more)


def assert_as_eager(module: torch.nn.Module, *calls: tuple[torch.Tensor, ...]) -> None:
    """Outputs and gradients of wrapped and eager module agree; the first call is exported."""
    ours = wrap(copy.deepcopy(module), "ort", options=OPTIONS)
    for inputs in calls:
        results = []
        for trained in (module, ours):
            trained.zero_grad()
            output = trained(*inputs)
            weights = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
            (output * weights).sum().backward()
            results.append([output.detach(), *(p.grad for p in trained.parameters())])
        expected, found = results
        torch.testing.assert_close(found, expected, **CLOSE)


def batches(*shapes: tuple[int, ...]) -> list[tuple[torch.Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(shape),) for shape in shapes]


def written(write: Callable[..., Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function of x that writes to a copy of it."""

    def function(x: torch.Tensor) -> torch.Tensor:
        copied = x * 1
        write(copied, x)
        return copied * x

    return function


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(
            written(lambda y, x: y.__setitem__((slice(None), 0), x[0, 1])), id="broadcast entries"
        ),
        pytest.param(written(lambda y, x: y[:, 1:].mul_(2)), id="slice"),
        pytest.param(written(lambda y, x: y.mul_(x).add_(1)), id="twice"),
    ],
)
def test_writes_in_place(function):
    assert_as_eager(Lambda(function), *batches((2, 5, 8), (3, 7, 8)))


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: F.layer_norm(x, (8,)), id="layer_norm without weight and bias"),
        pytest.param(lambda x: F.rms_norm(x, (8,)), id="rms_norm"),
        pytest.param(lambda x: F.softplus(x) + F.softplus(x, beta=2), id="softplus"),
        pytest.param(lambda x: F.softplus(x, beta=3, threshold=1), id="softplus with a threshold"),
        pytest.param(lambda x: torch.expm1(x * 1e-3) * 1e3, id="expm1 near 0"),
        pytest.param(lambda x: x.repeat_interleave(3, dim=1), id="repeat_interleave of rows"),
        pytest.param(lambda x: x.repeat_interleave(2, dim=-1), id="repeat_interleave of columns"),
        pytest.param(lambda x: x.repeat_interleave(2), id="repeat_interleave flattened"),
        pytest.param(lambda x: x.diff(dim=1), id="diff"),
        pytest.param(lambda x: x / 3 + x.sin() / 3, id="sum of equal quotients"),
        pytest.param(lambda x: x / 3 + x.sin() / 7 + x.cos() / 9, id="sum of quotients"),
        pytest.param(
            lambda x: torch.einsum("...ld,...md->...lm", x, x), id="einsum with an ellipsis"
        ),
        pytest.param(lambda x: x * (x > 0).cumsum(1), id="cumsum of booleans"),
        pytest.param(
            lambda x: torch.cat([part * part.shape[1] for part in x.chunk(3, dim=-1)], -1),
            id="chunk of unequal parts",
        ),
        pytest.param(
            lambda x: torch.where(x.detach()[:, :1] > 0, x.mean(0, keepdim=True), x),
            id="where that broadcasts",
        ),
        pytest.param(lambda x: x[:, 1:2] * x, id="one entry that broadcasts"),
        pytest.param(lambda x: x[:, 1:4:3] * x, id="one entry in a stride that broadcasts"),
        pytest.param(lambda x: x[:, 2:3].expand(-1, 4, -1) * 2, id="one entry that is expanded"),
        pytest.param(lambda x: x[:, ::100] * x, id="one entry of this batch, which broadcasts"),
        pytest.param(lambda x: x[:, 4:] * x[:, :1], id="one entry of the first batch"),
        pytest.param(lambda x: x[..., :3] * x[..., 3:6], id="parts of the width"),
        pytest.param(lambda x: x.unflatten(-1, (2, -1)).sum(-2), id="unflatten"),
        pytest.param(lambda x: x @ x[0, 0], id="a matrix times a vector"),
        pytest.param(lambda x: x[0, 0] @ x.mT, id="a vector times a matrix"),
        pytest.param(lambda x: (x[0, 0] @ x[0, 1]) * x, id="a vector times a vector"),
        pytest.param(lambda x: x * (x * 4).round(), id="round"),
        pytest.param(lambda x: x * torch.trunc(x * 4), id="trunc"),
        pytest.param(lambda x: x * torch.round(x, decimals=1), id="round to decimals"),
        pytest.param(lambda x: x % 0.3 + torch.fmod(x, x.detach().abs() + 0.2), id="remainders"),
        pytest.param(lambda x: torch.remainder(x, x.mean(1, keepdim=True)), id="both are trained"),
        pytest.param(lambda x: F.pad(x, (1, 2), mode="reflect"), id="reflecting padding"),
        pytest.param(
            lambda x: x * (torch.full((x.shape[1], 1), 5) // 2), id="full of a whole number"
        ),
        pytest.param(
            lambda x: F.ctc_loss(
                x.transpose(0, 1).log_softmax(-1),
                torch.ones(x.shape[0], 2, dtype=torch.int64),
                torch.full((x.shape[0],), 4),
                torch.full((x.shape[0],), 2),
            ),
            id="ctc_loss",
        ),
    ],
)
def test_operator(function):
    assert_as_eager(Lambda(function), *batches((2, 5, 8), (3, 7, 8), (1, 4, 8)))


def by_halves(function: Callable[..., torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: function(*x.chunk(2, dim=-1))


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: x.split(1, -1)[2] * x, id="one of many, which broadcasts"),
        pytest.param(lambda x: x.split(4, -1)[1].sum() + x.sum(), id="beside the whole"),
        pytest.param(lambda x: x.split([3, 3, 2], -1)[1] * 2, id="of unequal ones"),
        pytest.param(lambda x: x.unbind(-1)[3] * 2, id="unbind"),
        pytest.param(lambda x: x.chunk(2, dim=1)[0] * 2, id="of an axis that changes"),
        pytest.param(lambda x: x.sum((0, 1)).split(4)[1] * 2, id="of a vector"),
        pytest.param(by_halves(lambda a, b: a.detach() * b), id="beside a detached one"),
        pytest.param(by_halves(lambda a, b: (a > 0).float() * b), id="beside a mask"),
        pytest.param(by_halves(lambda a, b: a * b), id="both"),
        pytest.param(lambda x: x[..., :4].detach() * x[..., 4:], id="slice beside a detached one"),
        pytest.param(lambda x: (x[..., :4] > 0).float() * x[..., 4:], id="slice beside a mask"),
        pytest.param(
            lambda x: (lambda y: y[..., 0].detach() * y[..., 1])(x.view(*x.shape[:2], 4, 2)),
            id="entry beside a detached one",
        ),
    ],
)
def test_parts_of_which_some_are_trained(function):
    """Upstream's gradient of Split leaves out the parts that have none."""
    assert_as_eager(Lambda(function), *batches((2, 5, 8), (3, 7, 8), (1, 4, 8)))


def test_sizes_of_chunks_are_not_frozen():
    """Upstream's chunks kept the exported batch's shape as their type."""

    def mean_over_rows(x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, dim=-1)
        return left * right / left.shape[1]

    assert_as_eager(Lambda(mean_over_rows), *batches((2, 5, 8), (3, 7, 8)))


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x, i: x.new_zeros(4, 8).index_add(0, i, x), id="index_add"),
        pytest.param(lambda x, i: x[:4].index_add(0, i, x, alpha=0.5), id="index_add with alpha"),
        pytest.param(
            lambda x, i: x[:, :4].contiguous().index_add(1, i[:8], x), id="index_add of columns"
        ),
        pytest.param(
            lambda x, i: x.new_zeros(4, 8).index_put((i,), x, accumulate=True), id="index_put"
        ),
        pytest.param(
            lambda x, i: x.new_zeros(4, 8).scatter_add(0, i[:, None].expand(-1, 8), x),
            id="scatter_add",
        ),
    ],
)
def test_values_of_one_index_are_added(function):
    """torch's own index_add and index_put keep one of them."""
    torch.manual_seed(0)
    calls = [(torch.randn(rows, 8), torch.randint(0, 4, (rows,))) for rows in (8, 12)]
    assert_as_eager(Lambda(function), *calls)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x, i: x * torch.bitwise_and(i > 2, i < 5)[:, None], id="booleans"),
        pytest.param(lambda x, i: x * ((i > 2) & (i < 5))[:, None], id="operator on booleans"),
        pytest.param(lambda x, i: x * torch.bitwise_and(i, i + 3)[:, None], id="integers"),
        pytest.param(lambda x, i: x * (i & 1)[:, None], id="operator on integers"),
    ],
)
def test_bitwise_and(function):
    calls = [(torch.randn(rows, 8), torch.arange(rows)) for rows in (8, 12)]
    assert_as_eager(Lambda(function), *calls)


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(torch.nn.Conv1d(4, 6, 3, stride=2, padding=1), id="1d"),
        pytest.param(torch.nn.Conv1d(4, 8, 3, groups=4), id="1d depthwise"),
        pytest.param(torch.nn.Conv2d(4, 6, 3, dilation=2, groups=2, bias=False), id="2d grouped"),
        pytest.param(torch.nn.Conv1d(4, 8, 3, groups=2, padding="same"), id="1d grouped, same"),
        pytest.param(torch.nn.Conv1d(4, 8, 3, groups=2, padding="valid"), id="1d grouped, valid"),
        pytest.param(torch.nn.Conv1d(4, 8, 4, padding="same", dilation=3), id="1d dilated, same"),
        pytest.param(torch.nn.Conv2d(4, 6, (4, 3), padding="same"), id="2d of even size, same"),
        pytest.param(
            torch.nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), id="transposed"
        ),
    ],
)
@pytest.mark.parametrize("trained", ["both", "weight", "input"])
def test_convolution(layer, trained):
    """Where input or weight needs no gradient, ONNX Runtime leaves out an output of a node."""
    num_axes = layer.weight.dim()
    before = torch.nn.Parameter(torch.randn(1, 4, *[1] * (num_axes - 2)))

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = copy.deepcopy(layer)
            self.before = copy.deepcopy(before)

        def forward(self, x):
            return self.layer(x * self.before)

    module = Scaled()
    module.before.requires_grad_(trained != "weight")
    module.layer.weight.requires_grad_(trained != "input")
    assert_as_eager(module, *batches((2, 4, *[9] * (num_axes - 2)), (3, 4, *[12] * (num_axes - 2))))


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: F.max_pool1d(x, 2), id="maxima"),
        pytest.param(lambda x: F.max_pool1d(x, 3, stride=2, padding=1), id="overlapping maxima"),
        pytest.param(lambda x: F.avg_pool1d(x, 3, padding=1), id="means"),
    ],
)
def test_pooling(function):
    """ONNX Runtime's own gradient of the maximum ends the process."""
    assert_as_eager(Lambda(function), *batches((2, 5, 8), (3, 7, 8)))


# --- Attention


def masks(kind: str, batch: int, length: int) -> torch.Tensor | None:
    visible = torch.ones(length, length, dtype=torch.bool).tril().repeat(batch, 1, 1, 1)
    visible[0, :, :3] = False  # queries that see nothing, as under left padding
    if kind == "bool":
        return visible
    if kind == "-inf":
        return torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    return torch.randn(visible.shape)


def attention(heads: int = 4, key_heads: int = 4, **settings: Any) -> torch.nn.Module:
    def attend(x: torch.Tensor, *mask: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        query = x.view(batch, length, heads, -1).transpose(1, 2)
        shared = query[:, :key_heads]
        return F.scaled_dot_product_attention(
            query, shared.sin(), shared.cos(), *mask, **settings
        ).transpose(1, 2)

    return Lambda(attend, width=16)


@pytest.mark.parametrize("kind", ["bool", "float", "-inf"])
def test_attention_with_a_mask(kind):
    torch.manual_seed(0)
    calls = [(torch.randn(b, n, 16), masks(kind, b, n)) for b, n in ((2, 5), (3, 7), (1, 6))]
    assert_as_eager(attention(), *calls)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"enable_gqa": True, "key_heads": 2},
        {"is_causal": True, "enable_gqa": True, "key_heads": 1},
    ],
    ids=str,
)
def test_attention_without_a_mask(settings):
    assert_as_eager(attention(**settings), *batches((2, 5, 16), (3, 7, 16), (1, 1, 16)))


def test_attention_with_a_learned_bias():
    class Biased(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.randn(1, 2, 6, 6))

        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x, self.bias)

    assert_as_eager(Biased(), *batches((2, 2, 6, 4), (3, 2, 6, 4)))


def test_attention_dropout_drops_and_keeps_the_mean():
    rate, keys = 0.25, 64

    class Weights(torch.nn.Module):
        """Dropped attention weights: the values are the unit matrix."""

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            unit = torch.eye(keys).expand(x.shape[0], 1, keys, keys)
            return F.scaled_dot_product_attention(x * self.scale, x, unit, dropout_p=rate)

    module = wrap(Weights(), "ort", options=OPTIONS)
    x = torch.randn(8, 1, keys, 4)
    torch.manual_seed(0)
    weights, again = (module(x).detach() * keys for _ in range(2))  # all equal before dropout
    dropped = weights == 0
    # 32768 draws: four standard deviations of the share of zeros are 0.01.
    assert dropped.float().mean().item() == pytest.approx(rate, abs=0.01)
    torch.testing.assert_close(weights[~dropped], torch.full_like(weights[~dropped], 4 / 3))
    assert weights.mean().item() == pytest.approx(1, abs=0.02)
    # The variance of a Bernoulli variable scaled to mean 1 is rate / (1 - rate).
    assert weights.var().item() == pytest.approx(rate / (1 - rate), rel=0.05)
    assert not torch.equal(weights, again)
    torch.manual_seed(0)
    torch.testing.assert_close(module(x).detach() * keys, weights)


def test_attention_dropout_has_the_gradient_of_what_it_kept():
    """With the values' gradient: the same mask has to serve both passes."""

    class Values(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.values = torch.nn.Parameter(torch.randn(1, 1, 16, 4))

        def forward(self, x):
            values = self.values.expand(x.shape[0], 1, 16, 4)
            return F.scaled_dot_product_attention(x, x, values, dropout_p=0.5)

    module = wrap(Values(), "ort", options=OPTIONS)
    output = module(torch.randn(2, 1, 16, 4))
    output.sum().backward()
    # The output is linear in the values, so it is the gradient's product with them.
    product = (module.values * module.values.grad).sum()
    torch.testing.assert_close(product, output.sum(), rtol=1e-4, atol=1e-4)


# --- What must be refused


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: x * 2 if x.sum() > 0 else x, id="branch"),
        pytest.param(lambda x: x * x.max().item(), id="item"),
        pytest.param(lambda x: x * len((x > 0).nonzero()), id="count"),
        pytest.param(lambda x: x[:, : int(x.argmax())], id="slice"),
        pytest.param(lambda x: x * x.sum(0).argmax().tolist(), id="tolist"),
        pytest.param(lambda x: x * torch.from_numpy(x.detach().numpy()), id="numpy"),
        pytest.param(lambda x: x * torch.as_tensor(np.asarray(x.detach())), id="array"),
        pytest.param(lambda x: x * copy.deepcopy(x), id="deepcopy"),
        pytest.param(lambda x: x * torch.equal(x, x.abs()), id="equal"),
        pytest.param(lambda x: x * x.allclose(x.abs()), id="allclose"),
    ],
)
def test_numbers_of_the_batch_are_refused(function):
    module = wrap(Lambda(function), "ort", options=OPTIONS)
    with pytest.raises(UnsupportedModelError, match=r"test_symbolics\.py:\d+ .*Python number"):
        module(torch.randn(3, 8))
    assert torch.tensor(2.0).item() == 2.0  # the guard is taken back


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: x * 2 if x.shape[0] > 1 else x * 2.0, id="comparison of sizes"),
        pytest.param(lambda x: x[x > 0], id="selection"),
        pytest.param(lambda x: x.view(x.shape[0] * 2, -1), id="view"),
    ],
)
def test_sizes_and_selections_are_not_refused(function):
    assert_as_eager(Lambda(function), *batches((2, 8), (3, 8)))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        pytest.param(
            lambda x: x * torch.bitwise_and(x > 0, torch.arange(8)),
            "operands of torch.bool and torch.int64",
            id="bitwise_and of two types",
        ),
        pytest.param(
            lambda x: x.index_put((torch.arange(8), torch.arange(8)), x[0], accumulate=True),
            "other than one index of the first axis",
            id="index_put with two indices",
        ),
        pytest.param(
            lambda x: x * UNREGISTERED,
            "neither a parameter nor an argument",
            id="a trained tensor that is no parameter",
        ),
        pytest.param(
            lambda x: torch.fft.rfft(x).abs(), "a result of type torch.complex64", id="complex"
        ),
        pytest.param(
            written(lambda y, x: y.view(-1)[0].fill_(0)),
            r"fill_ at \S*test_symbolics\.py\(\d+\).* through another view",
            id="a write to a reshaped view",
        ),
        pytest.param(
            written(lambda y, x: y.T.add_(x)), "through another view", id="a transposed view"
        ),
        pytest.param(
            written(lambda y, x: y.diagonal().fill_(0)), "through another view", id="a diagonal"
        ),
        pytest.param(
            lambda x: (lambda y: (y[:1], y.mul_(2)))(x * 1)[0],
            "through another view",
            id="a slice made before the write",
        ),
    ],
)
def test_uses_that_would_be_wrong_are_refused(function, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        wrap(Lambda(function), "ort", options=OPTIONS)(torch.randn(8, 8))


@pytest.mark.parametrize(
    "parts",
    [lambda x: x.unbind(0), lambda x: x.split(1), lambda x: x.split(2), lambda x: x.split(2, -1)],
    ids=["unbind", "split", "split with a rest", "split of the width"],
)
def test_other_numbers_of_parts(parts):
    """A graph's Split has as many as it had when it was built."""
    module = Lambda(lambda x: sum(part.sum(0) * i for i, part in enumerate(parts(x))))
    assert_as_eager(module, *batches((3, 8), (5, 8), (3, 8), (4, 8)))


def test_loops_over_other_numbers_of_rows():
    module = Lambda(lambda x: sum(row.sum(0, keepdim=True) * i for i, row in enumerate(x)))
    assert_as_eager(module, *batches((3, 8), (5, 8), (3, 8)))


def test_missing_operator_is_named_with_the_way_out():
    module = wrap(Lambda(lambda x: torch.polar(x, x).abs()), "ort", options=OPTIONS)
    with pytest.raises(UnsupportedModelError) as raised:
        module(torch.randn(3, 8))
    message = str(raised.value)
    assert message.startswith("backend 'ort' can't train Lambda: operator aten::polar: ")
    assert "backend='compile'" in message
    assert "symbolics.py" in message
    assert "\n" not in message
    assert raised.value.__cause__ is not None


def test_missing_gradient_is_named():
    module = wrap(Lambda(lambda x: torch.aminmax(x, dim=0).max), "ort", options=OPTIONS)
    with pytest.raises(UnsupportedModelError, match=r"operator \w+: .*[Gg]radient"):
        module(torch.randn(3, 8)).sum().backward()

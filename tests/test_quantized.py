"""4-bit linear layers through ONNX Runtime, against eager bitsandbytes."""

from __future__ import annotations

import copy
import gc
from typing import Any

import numpy as np
import pytest
import torch

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra qlora")

from trained_graphs import graph_of  # noqa: E402

from ort_train import wrap  # noqa: E402
from ort_train.errors import UnsupportedModelError  # noqa: E402
from ort_train.ortmodule import OrtOptions  # noqa: E402
from ort_train.ortmodule.export import layers_4bit  # noqa: E402
from ort_train.ortmodule.kernels import memory  # noqa: E402
from ort_train.ortmodule.kernels.aten import operator_name  # noqa: E402
from ort_train.ortmodule.passes import products, quantized  # noqa: E402

OPTIONS = OrtOptions(num_threads=1)
# Relative; the sums of a product run in another order than eager's, which gives 2e-7 here.
GRADIENT_TOLERANCE = 1e-5


def quantize(linear: torch.nn.Linear, quant_type: str, double_quant: bool, **options: Any) -> Any:
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=options.pop("compute_dtype", torch.float32),
        quant_type=quant_type,
        compress_statistics=double_quant,
        **options,
    )
    layer.load_state_dict(linear.state_dict())
    layer.requires_grad_(False)
    return layer.to("cpu")


class Model(torch.nn.Module):
    """A trainable layer before and after a quantized one."""

    def __init__(
        self,
        quant_type: str = "nf4",
        double_quant: bool = False,
        bias: bool = True,
        in_features: int = 128,
        **options: Any,
    ):
        super().__init__()
        torch.manual_seed(0)
        self.before = torch.nn.Linear(in_features, in_features)
        linear = torch.nn.Linear(in_features, 96, bias=bias)
        self.base = quantize(linear, quant_type, double_quant, **options)
        self.after = torch.nn.Linear(96, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(torch.tanh(self.base(torch.tanh(self.before(x)))))


def step(model: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = model(x)
    output.square().mean().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.detach(), gradients


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def assert_equal_steps(model: torch.nn.Module, eager: torch.nn.Module, x: torch.Tensor) -> None:
    (output, gradients), (expected, expected_gradients) = step(model, x), step(eager, x)
    assert relative(output, expected) < GRADIENT_TOLERANCE
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert relative(gradient, expected_gradients[name]) < GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_forward_and_gradients_are_eagers(quant_type: str, double_quant: bool) -> None:
    eager = Model(quant_type, double_quant, bias=quant_type == "nf4")
    model = wrap(copy.deepcopy(eager), "ort", options=OPTIONS)
    for shape in ((2, 5, 128), (3, 4, 128)):
        assert_equal_steps(model, eager, torch.randn(shape))
    assert model.base.weight.dtype == torch.uint8
    assert model.base.weight.grad is None
    graph = graph_of(model)
    assert not any(node.op_type == "MatMulBnb4" for node in graph.node)
    # The packed weight and its scales are inputs, not copies in the graph.
    assert all(np.prod(tensor.dims) < 96 for tensor in graph.initializer)


def test_torch_multiplies_by_decoded_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """By oneDNN or not. They are no inputs of the graph, which says their sizes all the same."""
    monkeypatch.setattr(products, "_MIN_ENTRIES", 96 * 128)
    eager = Model(bias=False)
    model = wrap(copy.deepcopy(eager), "ort", options=OPTIONS)
    assert_equal_steps(model, eager, torch.randn(2, 5, 128))
    graph = graph_of(model)
    decoded = {
        node.output[0]: [reader.name for reader in graph.node if node.output[0] in reader.input]
        for node in graph.node
        if any(a.s == b"ort_train::dequantize_4bit" for a in node.attribute)
    }
    readers = [name.rpartition("/")[2] for names in decoded.values() for name in names]
    assert sorted(readers) == ["product_nn", "product_nt"]  # backward, forward


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bf16_decodes_to_bf16_at_once(quant_type: str, double_quant: bool) -> None:
    eager = Model(quant_type, double_quant)
    autocast = copy.deepcopy(eager)
    model = wrap(copy.deepcopy(eager), "ort", precision="bf16", options=OPTIONS)
    x = torch.randn(2, 5, 128)
    output, gradients = step(model, x)
    expected, expected_gradients = step(eager, x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, rounded_gradients = step(autocast, x)
    # No further from fp32 than autocast, which rounds the same factors, by more than chance.
    assert relative(output, expected) <= 1.2 * relative(rounded, expected)
    found, reference, exact = (
        torch.cat([gradient.flatten() for gradient in each.values()])
        for each in (gradients, rounded_gradients, expected_gradients)
    )
    assert relative(found, exact) <= 1.2 * relative(reference, exact)
    graph = graph_of(model)
    weights = {n.output[0] for n in graph.node if operator_name(n) == quantized.DECODE}
    readers = [operator_name(n) for n in graph.node if weights & set(n.input)]
    assert sorted(readers) == ["ort_train::product_nn", "ort_train::product_nt"]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_weight_decoded_to_bf16_is_the_decoded_weight_rounded(quant_type: str) -> None:
    layer = Model(quant_type, in_features=192).base
    state = layer.weight.quant_state
    settings = (state.blocksize, ("fp4", "nf4").index(quant_type), *state.shape)
    exact, rounded = (
        quantized._decoded(torch.empty(0, dtype=dtype), layer.weight, state.absmax, *settings)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert torch.equal(rounded, exact.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_weight_is_decoded_as_by_bitsandbytes(
    quant_type: str, double_quant: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Model(quant_type, double_quant, in_features=192).base
    state = layer.weight.quant_state
    settings = [state.blocksize, ("fp4", "nf4").index(quant_type), *state.shape]
    if double_quant:
        nested = state.state2
        settings += [nested.absmax, nested.code, state.offset, nested.blocksize]
    monkeypatch.setattr(memory, "_max_kept_bytes", 2**20)
    monkeypatch.setattr(memory, "_scratch", [])
    like = torch.empty(0, dtype=dtype)
    assert quantized._kernel(settings[1], dtype) is not None  # of the version in constraints.txt
    with monkeypatch.context() as context:
        context.setattr(quantized, "_kernel", lambda quant_type, dtype: None)
        expected = quantized._decoded(like, layer.weight, state.absmax, *settings)
    assert not memory._scratch
    found = quantized._decoded(like, layer.weight, state.absmax, *settings)
    assert found.nbytes == len(memory._scratch[0])
    assert torch.equal(found, expected)
    # The first is held, so another has memory of its own.
    other = quantized._decoded(like, layer.weight, state.absmax, *settings)
    assert other.data_ptr() != found.data_ptr()
    assert torch.equal(other, expected)


def test_other_versions_of_bitsandbytes_decode_by_their_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantized, "_KNOWN_VERSIONS", ("0.1.",))
    assert quantized._kernel.__wrapped__(1, torch.float32) is None
    assert quantized._kernel.__wrapped__(1, torch.float64) is None


def test_all_decoded_weights_of_a_step_lie_in_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()  # an engine that goes meanwhile gives the block back
    monkeypatch.setattr(memory, "_max_kept_bytes", 2**20)
    monkeypatch.setattr(memory, "_scratch", [])
    eager = torch.nn.Sequential(*(Model() for _ in range(2)))
    eager[0].after = torch.nn.Linear(96, 128)
    model = wrap(copy.deepcopy(eager), "ort", options=OPTIONS)
    addresses = []
    scratch = memory.scratch

    def noted(*shape: int, dtype: torch.dtype) -> torch.Tensor | None:
        result = scratch(*shape, dtype=dtype)
        addresses.append(result.data_ptr() if result is not None else None)
        return result

    monkeypatch.setattr(memory, "scratch", noted)
    for _ in range(2):
        assert_equal_steps(model, eager, torch.randn(5, 128))
    assert len(addresses) >= 2 * 4  # two layers, forward and backward
    assert len(set(addresses)) == 1
    assert None not in addresses


def test_columns_below_one_block() -> None:
    eager = Model(in_features=40)
    assert_equal_steps(
        wrap(copy.deepcopy(eager), "ort", options=OPTIONS), eager, torch.randn(2, 40)
    )


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_trajectory_is_eagers(quant_type: str) -> None:
    eager = Model(quant_type, double_quant=True)
    model = wrap(copy.deepcopy(eager), "ort", options=OPTIONS)
    batches = torch.randn(20, 4, 6, 128, generator=torch.Generator().manual_seed(1))
    losses = []
    for module in (eager, model):
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        for x in batches:
            optimizer.zero_grad()
            loss = (module(x) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    # AdamW divides by the gradient's size, which makes rounding errors of small entries visible.
    assert losses[20:] == pytest.approx(losses[:20], abs=1e-5)
    for expected, found in zip(eager.parameters(), model.parameters(), strict=True):
        assert (expected.float() - found.float()).abs().max() < 2e-4


def test_evaluation_between_steps_leaves_the_weights_packed() -> None:
    """bitsandbytes repacks them for inference, in place, on CPUs with AVX-512 BF16."""
    eager = Model()
    model = wrap(copy.deepcopy(eager), "ort", options=OPTIONS)
    x = torch.randn(2, 5, 128)
    step(model, x)
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()
    assert_equal_steps(model, eager, x)


def test_exchanged_weights_are_followed() -> None:
    model = wrap(Model(), "ort", options=OPTIONS)
    x = torch.randn(2, 5, 128)
    step(model, x)
    torch.manual_seed(7)
    model.base = quantize(torch.nn.Linear(128, 96), "nf4", False)
    eager = Model()
    eager.load_state_dict(copy.deepcopy(model.state_dict()), strict=False)
    eager.base = copy.deepcopy(model.base)
    assert_equal_steps(model, eager, x)


def test_bitsandbytes_is_untouched_after_the_export() -> None:
    before = bitsandbytes.matmul_4bit
    step(wrap(Model(), "ort", options=OPTIONS), torch.randn(2, 5, 128))
    assert bitsandbytes.matmul_4bit is before


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"compute_dtype": torch.bfloat16}, "computes in torch.bfloat16.*compute_dtype=float32"),
        ({"quant_storage": torch.float32}, "is stored as torch.float32"),
    ],
)
def test_what_no_graph_computes_is_refused(options: dict[str, Any], rule: str) -> None:
    model = wrap(Model(**options), "ort", options=OPTIONS)
    with pytest.raises(UnsupportedModelError, match=rule):
        model(torch.randn(2, 5, 128))


def test_unquantized_and_repacked_weights_are_refused() -> None:
    model = Model()
    model.base = bitsandbytes.nn.Linear4bit(128, 96)
    with pytest.raises(UnsupportedModelError, match="not quantized yet"):
        wrap(model, "ort", options=OPTIONS)(torch.randn(2, 128))
    model = Model()
    model.base.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UnsupportedModelError, match="repacked for inference"):
        wrap(model, "ort", options=OPTIONS)(torch.randn(2, 128))


def test_pins_bitsandbytes_misreading_rows_that_begin_within_a_block() -> None:
    """When this fails, bitsandbytes is mended: `layers_4bit.is_misread` can go."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("the faulty kernel is for AVX-512")
    model = Model(in_features=96)
    assert layers_4bit.is_misread(model.base)
    with pytest.raises(UnsupportedModelError, match="96 columns, no multiple of the block size 64"):
        wrap(model, "ort", options=OPTIONS)(torch.randn(2, 96))


def test_direct_use_of_matmul_4bit_is_refused() -> None:
    """Upstream's handler makes it a MatMulBnb4, whose gradient is wrong on CPUs."""

    class Direct(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.base.weight
            function = bitsandbytes.autograd._functions.MatMul4Bit
            return function.apply(self.before(x), weight, None, None, weight.quant_state)

    with pytest.raises(UnsupportedModelError, match="MatMul4Bit"):
        wrap(Direct(), "ort", options=OPTIONS)(torch.randn(2, 128))


def test_matmul_bnb4_is_refused_in_any_graph() -> None:
    from onnx import helper

    node = helper.make_node("MatMulBnb4", ["a", "b", "c"], ["y"], domain="com.microsoft")
    with pytest.raises(UnsupportedModelError, match="gradient is wrong"):
        quantized.decode_beside_products(helper.make_graph([node], "graph", [], []))


def test_pins_upstreams_transposed_matmul_bnb4() -> None:
    """ONNX Runtime's own gradient of MatMulBnb4 needs `transB=0`, which the CPU kernel ignores.

    When this fails, upstream is mended, and MatMulBnb4 needs no refusal in quantized.py.
    """
    import onnxruntime
    from onnx import TensorProto, helper

    size = 64  # square, so that both readings of the weight fit
    weight = torch.randn(size, size)
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=False
    )
    decoded = bitsandbytes.functional.dequantize_4bit(packed, state).numpy()
    attributes = {"K": size, "N": size, "block_size": 64, "quant_type": 1, "transB": 0}
    node = helper.make_node(
        "MatMulBnb4", ["a", "b", "absmax"], ["y"], domain="com.microsoft", **attributes
    )
    inputs = [
        helper.make_tensor_value_info("a", TensorProto.FLOAT, [3, size]),
        helper.make_tensor_value_info("b", TensorProto.UINT8, [size * size // 2]),
        helper.make_tensor_value_info("absmax", TensorProto.FLOAT, [size]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, size])]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "graph", inputs, outputs), opset_imports=opsets, ir_version=8
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    a = np.random.default_rng(0).standard_normal((3, size), dtype=np.float32)
    feeds = {"a": a, "b": packed.flatten().numpy(), "absmax": state.absmax.numpy()}
    (found,) = session.run(None, feeds)
    np.testing.assert_allclose(found, a @ decoded.T, rtol=1e-4, atol=1e-5)  # as if transB were 1
    assert not np.allclose(found, a @ decoded, rtol=1e-2)

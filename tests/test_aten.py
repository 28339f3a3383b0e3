"""The ATen executor: torch operators inside ONNX Runtime's graphs, without a compiler."""

from __future__ import annotations

import ctypes
import traceback
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from ort_train import wrap
from ort_train.ortmodule.explain import explained
from ort_train.ortmodule.kernels import aten, direct

_DOMAIN = "org.pytorch.aten"
_DTYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}


class _Absent:
    """An argument that the node leaves out."""


def run_node(name: str, overload: str, arguments: list[Any], outputs: list[torch.dtype]) -> Any:
    """One ATen node in a session of its own: tensors are fed, everything else is an initializer."""
    import onnxruntime

    names, feeds, inputs, initializers = [], {}, [], []
    for i, argument in enumerate(arguments):
        if argument is _Absent:
            names.append("")
            continue
        names.append(f"x{i}")
        if isinstance(argument, torch.Tensor):
            feeds[f"x{i}"] = argument.numpy()
            inputs.append(
                helper.make_tensor_value_info(f"x{i}", _DTYPES[argument.dtype], argument.shape)
            )
        else:
            array = np.array(argument)
            array = array.astype(np.float32) if array.dtype == np.float64 else array
            initializers.append(numpy_helper.from_array(array, f"x{i}"))
    results = [f"y{i}" for i in range(len(outputs))]
    node = helper.make_node(
        "ATen", names, results, domain=_DOMAIN, operator=name, overload_name=overload
    )
    values = [
        helper.make_tensor_value_info(y, _DTYPES[dtype], None)
        for y, dtype in zip(results, outputs, strict=True)
    ]
    graph = helper.make_graph([node], "one_node", inputs, values, initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(_DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [torch.from_numpy(result) for result in session.run(None, feeds)]


@pytest.fixture(scope="module", autouse=True)
def _registered():
    """ORTModule hands the executor to ONNX Runtime when it is first constructed."""
    wrap(torch.nn.Linear(1, 1), backend="ort")(torch.ones(1, 1)).sum().backward()


@pytest.fixture(autouse=True)
def _nothing_pending():
    """An error of one test must not show in the next."""
    yield
    aten._pending.clear()


X = torch.arange(12, dtype=torch.float32).reshape(3, 4) / 7 - 0.5
IDS = torch.tensor([[2, 0], [1, 1]])
IMAGE = torch.linspace(-1, 1, 2 * 3 * 5 * 5).reshape(2, 3, 5, 5)
KERNEL = torch.linspace(-1, 1, 4 * 3 * 3 * 3).reshape(4, 3, 3, 3)
BIAS = torch.tensor([0.5, -0.5, 1.0, 2.0])


@pytest.mark.parametrize(
    ("name", "overload", "arguments", "expected"),
    [
        pytest.param("aten::relu", "", [X], torch.relu(X), id="tensor"),
        pytest.param("relu", "", [X], torch.relu(X), id="name without namespace"),
        pytest.param(
            "aten::embedding",
            "",
            [X, IDS, -1, False, False],
            torch.nn.functional.embedding(IDS, X),
            id="int and bool",
        ),
        pytest.param(
            "aten::embedding",
            "",
            [X, IDS, _Absent, _Absent, _Absent],
            torch.nn.functional.embedding(IDS, X),
            id="defaults",
        ),
        pytest.param(
            "aten::leaky_relu", "", [X, 0.25], torch.nn.functional.leaky_relu(X, 0.25), id="number"
        ),
        pytest.param("aten::add", "Tensor", [X, X, 3.0], 4 * X, id="number, float"),
        pytest.param("aten::add", "Tensor", [IDS, IDS, 3], 4 * IDS, id="number, int"),
        pytest.param("aten::clamp", "", [X, _Absent, 0.5], X.clamp(max=0.5), id="optional number"),
        pytest.param(
            "aten::convolution",
            "",
            [IMAGE, KERNEL, BIAS, [2, 1], [1, 0], [1, 1], False, [0, 0], 1],
            torch.nn.functional.conv2d(IMAGE, KERNEL, BIAS, (2, 1), (1, 0)),
            id="lists of ints",
        ),
        pytest.param(
            "aten::convolution",
            "",
            [IMAGE, KERNEL, _Absent, [1, 1], [0, 0], [1, 1], False, [0, 0], 1],
            torch.nn.functional.conv2d(IMAGE, KERNEL),
            id="absent optional tensor",
        ),
        pytest.param(
            "aten::upsample_nearest2d",
            "vec",
            [IMAGE, _Absent, [2.0, 2.0]],
            torch.nn.functional.interpolate(IMAGE, scale_factor=2.0),
            id="list of floats, absent list",
        ),
        pytest.param(
            "aten::sum", "dim_IntList", [X, [0], True, _Absent], X.sum(0, True), id="dims, keepdim"
        ),
        pytest.param(
            "aten::sum", "dim_IntList", [IDS, [1], False, 6], IDS.sum(1).float(), id="dtype"
        ),
        pytest.param("aten::logical_not", "", [X > 0], ~(X > 0), id="bool tensors"),
        pytest.param(
            "aten::masked_fill", "Scalar", [X, X > 0, 2], X.masked_fill(X > 0, 2), id="mask"
        ),
        pytest.param("aten::t", "", [X], X.t(), id="a view is made contiguous"),
        pytest.param("aten::gather", "", [X, 1, IDS], X.gather(1, IDS), id="int in the middle"),
        pytest.param("aten::mean", "", [X], X.mean(), id="result without dimensions"),
        pytest.param("aten::relu", "", [X[:0]], X[:0], id="empty tensor"),
    ],
)  # fmt: skip
def test_arguments_of_all_kinds(name: str, overload: str, arguments: list[Any], expected: Any):
    (result,) = run_node(name, overload, arguments, [expected.dtype])
    aten.raise_pending()
    # The very same torch kernel runs, so the result is the same to the bit.
    assert torch.equal(result, expected)


def test_several_results():
    values, indices = run_node("aten::max", "dim", [X, 1, True], [torch.float32, torch.int64])
    expected = X.max(1, keepdim=True)
    assert torch.equal(values, expected.values)
    assert torch.equal(indices, expected.indices)


@pytest.mark.parametrize(
    ("name", "overload", "arguments", "error", "match"),
    [
        ("aten::mm", "", [X, X], RuntimeError, "shapes cannot be multiplied"),
        ("aten::embedding", "", [X, IDS + 9, -1, False, False], IndexError, "out of range"),
        ("aten::no_such_operator", "", [X], AttributeError, "no_such_operator"),
        ("aten::relu", "no_such_overload", [X], AttributeError, "no_such_overload"),
        ("aten::gelu", "", [X, 3], TypeError, "StringType"),
        ("aten::cat", "", [X, 0], TypeError, "list of tensors"),
        ("aten::relu", "", [X, X], TypeError, "takes 1 argument.* node passes 2"),
        ("aten::item", "", [X], RuntimeError, "Scalar"),
    ],
)  # fmt: skip
def test_error_in_an_operator_reaches_the_user_and_ends_nothing(
    name: str, overload: str, arguments: list[Any], error: type[Exception], match: str
):
    with pytest.raises(Exception):  # noqa: B017, PT011 - ONNX Runtime's own words, whatever they are
        run_node(name, overload, arguments, [torch.float32])
    with pytest.raises(error, match=match) as caught:
        aten.raise_pending()
    aten.raise_pending()  # nothing is left of it
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "_execute" in frames or "_is_tensor_argument" in frames, "the callback's own frames"
    assert torch.equal(run_node("aten::relu", "", [X], [torch.float32])[0], torch.relu(X))


def test_an_interrupt_inside_an_operator_is_not_swallowed(monkeypatch):
    operator = aten._operator

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(
        aten, "_operator", lambda *args: operator(*args)._replace(overload=interrupted)
    )
    with pytest.raises(Exception):  # noqa: B017, PT011 - ONNX Runtime's report of its effect
        run_node("aten::relu", "", [X], [torch.float32])
    with pytest.raises(KeyboardInterrupt):
        aten.raise_pending()


def test_first_of_several_errors_is_raised():
    first, second = ValueError("first"), ValueError("second")
    aten.keep_error(first)
    aten.keep_error(second)
    with pytest.raises(ValueError, match="first"):
        aten.raise_pending()
    aten.raise_pending()


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 8)
        self.head = torch.nn.Linear(8, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids)).square().mean()


def _failing(monkeypatch: pytest.MonkeyPatch, operator_name: bytes) -> None:
    operator = aten._operator

    def bad_kernel(*args: Any) -> Any:
        raise ZeroDivisionError("kernel gave up")

    if operator_name in direct._direct:
        monkeypatch.setitem(direct._direct, operator_name, bad_kernel)

    def looked_up(name: bytes, overload: bytes) -> Any:
        found = operator(name, overload)
        return found._replace(overload=bad_kernel) if name == operator_name else found

    monkeypatch.setattr(aten, "_operator", looked_up)


@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_error_inside_a_training_step_keeps_its_traceback_and_the_module_usable(
    stage: str, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    net = _Net()
    ids = torch.randint(11, (2, 5))
    wrap(net, backend="ort")
    net(ids).backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()

    operator = b"embedding" if stage == "forward" else b"embedding_backward"
    with monkeypatch.context() as patch:
        _failing(patch, operator)
        if stage == "forward":
            with pytest.raises(ZeroDivisionError, match="kernel gave up") as caught:
                net(ids)
        else:
            loss = net(ids)
            with pytest.raises(ZeroDivisionError, match="kernel gave up") as caught:
                loss.backward()
        frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert frames[-1] == "bad_kernel"

    net.zero_grad()
    for _ in range(2):
        net.zero_grad()
        net(ids).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), expected, strict=True))


def test_ids_outside_the_embedding_are_torchs_index_error_after_the_first_step():
    net = wrap(_Net(), backend="ort")
    net(torch.tensor([[1, 2]])).backward()
    with pytest.raises(IndexError, match="out of range"):
        net(torch.tensor([[1, 99]]))
    net(torch.tensor([[1, 2]])).backward()


def test_memory_of_results_is_released():
    """A result that ONNX Runtime took over is freed with its last reader."""
    torch.manual_seed(0)
    net = wrap(_Net(), backend="ort")
    ids = torch.randint(11, (64, 512))  # an embedding result of 1 MiB

    def resident_mib() -> float:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096 / 2**20

    for _ in range(5):
        net(ids).backward()
    before = resident_mib()
    for _ in range(60):
        net(ids).backward()
    # 60 steps that leaked one result each would hold 60 MiB; the allocators may move by a few.
    assert resident_mib() - before < 20


@pytest.mark.parametrize(
    ("name", "num_inputs"),
    [
        (b"aten::relu", 1),
        (b"aten::relu", 3),  # two more than it takes
        (b"aten::cat", 2),  # takes a list
        (b"aten::no_such_operator", 2),
        (b"ort_train::to_bf16", 1),
    ],
)  # fmt: skip
def test_inputs_of_a_node_are_freed_even_where_it_fails(name: str, num_inputs: int):
    arrays = [np.ones(3, dtype=np.float32) for _ in range(num_inputs)]
    owners = [weakref.ref(array) for array in arrays]
    inputs = (ctypes.c_void_p * num_inputs)(
        *(aten._to_dlpack_pointer(torch.from_numpy(array)) for array in arrays)
    )
    output = ctypes.c_void_p()
    arrays.clear()
    assert all(owner() is not None for owner in owners), "the inputs hold them"
    addresses = ctypes.addressof(inputs), ctypes.addressof(output)
    aten._execute(name, b"", num_inputs, addresses[0], 1, addresses[1])
    aten._pending.clear()  # an exception holds the frames that it went through
    assert all(owner() is None for owner in owners)
    assert output.value, "a result, or what ONNX Runtime refuses"


def test_a_function_that_returns_too_little_is_an_error(monkeypatch):
    monkeypatch.setitem(direct._direct, b"one_of_two", lambda tensor: tensor + 1)
    with pytest.raises(Exception):  # noqa: B017, PT011 - ONNX Runtime's report of its effect
        run_node("one_of_two", "", [X], [torch.float32, torch.float32])
    with pytest.raises(IndexError):
        aten.raise_pending()


def test_poison_is_a_type_that_onnx_runtime_refuses():
    pointer = aten._poisoned_pointer()
    head = ctypes.cast(pointer, ctypes.POINTER(aten._DLTensor)).contents
    assert head.dtype_code == aten._POISON_DTYPE_CODE
    assert head.dtype_bits == 32


@pytest.mark.parametrize(
    ("operator", "on_the_cpu"),
    [
        ("ort_train::pack_rows", {2}),
        ("ort_train::unpack_rows", {2}),
        ("ort_train::dequantize_4bit", {3, 4, 5, 6, 10}),
        ("embedding_backward", {2, 3, 4, 5}),
        ("ort_train::unsliced_rows", {1, 2, 3}),  # torch's dispatcher knows it by its schema
    ],
)
def test_a_graph_on_a_gpu_has_numbers_on_the_cpu(operator: str, on_the_cpu: set[int]) -> None:
    """ONNX Runtime asks for each input, and puts there what isn't a tensor. Read from the GPU, each
    number would wait for all of its work."""
    is_tensor = aten.executor.is_tensor_argument_address()
    ask = aten._IsTensorArgument(is_tensor)
    count = 11 if operator.endswith("4bit") else 4 if "unsliced" in operator else 6
    if operator.endswith("pack_rows"):
        count = 3
    answers = [ask(operator.encode(), b"", index, True) for index in range(count)]
    assert {index for index, answer in enumerate(answers) if not answer} == on_the_cpu
    assert ask(operator.encode(), b"", 0, False)
    aten.raise_pending()


def test_an_error_of_torchs_is_told_without_onnx_runtimes():
    try:
        try:
            raise RuntimeError("Non-zero status code returned while running ATen node")
        except RuntimeError:
            raise TypeError("lengths must be integral") from None
    except TypeError as error:
        told = str(explained(error, "backend 'ort' can't train Layers"))
    assert told.startswith("backend 'ort' can't train Layers: lengths must be integral. Train it")

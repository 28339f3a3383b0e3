"""4-bit linear layers of bitsandbytes (layers_4bit.py) in an exported graph.

A layer is exported as one node, so that ONNX Runtime keeps nothing of it between forward and
backward. When the gradient graph stands, every such node and its gradient become two each: one in
which bitsandbytes' own kernel decodes the packed weight, and a product by ONNX Runtime. No decoded
weight outlives its product, and the packed ones are inputs of the graph: the module's parameters.

Not taken: `com.microsoft::MatMulBnb4`, which upstream's handler of `MatMul4Bit` emits. It decodes
twenty times as slowly on a CPU with AVX-512, and its gradient there is wrong: a MatMulBnb4 with
`transB=0`, an attribute that the CPU kernel ignores (`matmul_bnb4.cc` of 1.19.2).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ort_train.errors import UnsupportedModelError
from ort_train.ortmodule.export import layers_4bit
from ort_train.ortmodule.export.nodes import aten, constant, sizes_of, typed
from ort_train.ortmodule.graph import GraphIndex, attribute
from ort_train.ortmodule.kernels import memory
from ort_train.ortmodule.kernels.aten import aten_node, operator_name
from ort_train.ortmodule.kernels.direct import direct

FORWARD = "ort_train::linear_4bit"
#: Marks in the gradient graph where the gradient of a layer's input is wanted.
MARKER = "ort_train::linear_4bit_input_grad"
#: An ATen node that decodes a weight, in the type of its first input.
DECODE = "ort_train::dequantize_4bit"
#: Where num_rows and num_columns stand among a node's inputs.
_SIZES = slice(5, 7)
#: Of bitsandbytes, whose function behind the operator was tried.
_KNOWN_VERSIONS = ("0.50.",)
#: Beyond it bitsandbytes itself leaves that function aside.
_MAX_BLOCK_SIZE = 1024
# As numbers, for an ATen node takes no text.
_QUANT_TYPES = ("fp4", "nf4")


# --- Operators


def _decoded(
    like: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    block_size: int,
    quant_type: int,
    num_rows: int,
    num_columns: int,
    scale: torch.Tensor | None = None,
    code: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    scale_block_size: int = 0,
) -> torch.Tensor:
    """A packed weight, decoded.

    Args:
        like: what the weight will be multiplied with: gives the type, and the node its place in
            the order of execution, right before the product.
        packed: uint8, two weights each, row by row.
        absmax: scale of each block of weights; with double quantization, uint8 entries of `code`.
        block_size: weights per block.
        quant_type: index of its codebook in ("fp4", "nf4").
        num_rows: output features.
        num_columns: input features.
        scale: of each block of `absmax`; this and the following: double quantization only.
        code: the codebook of `absmax`.
        offset: added to the decoded `absmax`.
        scale_block_size: entries of `absmax` per block.

    Returns:
        (num_rows, num_columns)
    """
    kernels = torch.ops.bitsandbytes
    if scale is not None:
        absmax = kernels.dequantize_blockwise(absmax, scale, code, scale_block_size, torch.float32)
        absmax = absmax + offset
    decode = None if like.device.type != "cpu" else _kernel(quant_type, like.dtype)
    is_usual = num_columns % block_size == 0 and block_size <= _MAX_BLOCK_SIZE
    if decode is not None and is_usual and absmax.dtype == torch.float32:
        weight = memory.scratch(num_rows, num_columns, dtype=like.dtype)
        if weight is None:
            weight = memory.empty(num_rows, num_columns, dtype=like.dtype)
        addresses = (packed.data_ptr(), absmax.data_ptr(), weight.data_ptr())
        decode(*addresses, block_size, num_rows, num_columns)
        return weight
    decoded: torch.Tensor = kernels.dequantize_4bit(
        packed.reshape(-1, 1),
        absmax,
        block_size,
        _QUANT_TYPES[quant_type],
        [num_rows, num_columns],
        like.dtype,
    )
    return decoded


@functools.cache
def _kernel(quant_type: int, dtype: torch.dtype) -> Callable[..., None] | None:
    """The function behind bitsandbytes' operator on CPUs, which itself takes no memory to write
    to (0.50), or None where it isn't known, or hasn't the operator's results.

    It takes the addresses of packed weights, scales and result, the block size, rows and columns.
    """
    names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    version = importlib.metadata.version("bitsandbytes")
    if dtype not in names or not version.startswith(_KNOWN_VERSIONS):
        return None
    library = importlib.import_module("bitsandbytes.cextension").lib
    name = f"cdequantize_blockwise_cpu_{_QUANT_TYPES[quant_type]}_{names[dtype]}"
    function: Any = getattr(library, name, None)
    if not hasattr(function, "argtypes"):  # a library that wasn't built for this CPU
        return None
    kinds = [ctypes.c_void_p] * 3 + [ctypes.c_longlong] * 3
    decode = ctypes.CFUNCTYPE(None, *kinds)(ctypes.cast(function, ctypes.c_void_p).value or 0)
    packed = torch.arange(256, dtype=torch.uint8)
    absmax, found = torch.linspace(0.5, 2, 8), torch.zeros(4, 128, dtype=dtype)
    decode(packed.data_ptr(), absmax.data_ptr(), found.data_ptr(), 64, 4, 128)
    expected = torch.ops.bitsandbytes.dequantize_4bit(
        packed.view(-1, 1), absmax, 64, _QUANT_TYPES[quant_type], [4, 128], dtype
    )
    return decode if torch.equal(found, expected) else None


@direct(DECODE, numbers=[3, 4, 5, 6, 10])
def _decode(
    like: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    block_size: torch.Tensor,
    quant_type: torch.Tensor,
    num_rows: torch.Tensor,
    num_columns: torch.Tensor,
    scale: torch.Tensor | None = None,
    code: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    scale_block_size: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`_decoded` by an ATen node, whose numbers are tensors."""
    return _decoded(
        like,
        packed,
        absmax,
        int(block_size),
        int(quant_type),
        int(num_rows),
        int(num_columns),
        scale,
        code,
        offset,
        0 if scale_block_size is None else int(scale_block_size),
    )


@torch.library.custom_op("ort_train::linear_4bit", mutates_args=())
def linear_4bit(
    input: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    block_size: int,
    quant_type: int,
    num_rows: int,
    num_columns: int,
    scale: torch.Tensor | None = None,
    code: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    scale_block_size: int = 0,
) -> torch.Tensor:
    """(..., num_columns) -> (..., num_rows), by the weight that :func:`_decoded` decodes."""
    weight = _decoded(
        input,
        packed,
        absmax,
        block_size,
        quant_type,
        num_rows,
        num_columns,
        scale,
        code,
        offset,
        scale_block_size,
    )
    return torch.nn.functional.linear(input, weight)


def _symbolic(g: Any, input: Any, *settings: Any) -> Any:
    is_double = sizes_of(settings[6]) is not None
    output = aten(g, FORWARD, input, *(settings if is_double else settings[:6]))
    sizes = sizes_of(input)
    num_rows = constant(settings[4], "i", "num_rows")
    return typed(output, input, None if sizes is None else [*sizes[:-1], num_rows])


# --- The gradient graph


def decode_beside_products(graph: Any) -> None:
    """Each layer, and each gradient of one, as decoding and product.

    Args:
        graph: onnx.GraphProto of forward and backward, changed in place.

    Raises:
        UnsupportedModelError: for a MatMulBnb4, whatever brought it there.
    """
    from onnx import TensorProto, helper

    if any(node.op_type == "MatMulBnb4" for node in graph.node):
        raise UnsupportedModelError(
            "the graph holds a MatMulBnb4, whose gradient is wrong on CPUs: call "
            "bitsandbytes.matmul_4bit, or a Linear4bit, in place of MatMul4Bit.apply"
        )
    forward = {node.input[1]: node for node in graph.node if operator_name(node) == FORWARD}
    if not forward:
        return
    index = GraphIndex(graph)
    constants = _integers(index)
    nodes = []
    for node in graph.node:
        operator = operator_name(node)
        if operator not in (FORWARD, MARKER):
            nodes.append(node)
            continue
        factor, packed = node.input[:2]
        (result,) = node.output
        weight = f"{result}/weight"
        layer = forward[packed]
        # What an ATen node returns, ONNX Runtime can't infer; products.py asks for the sizes.
        dtype = index.types.get(layer.output[0], TensorProto.FLOAT)
        sizes = [constants.get(name) for name in layer.input[_SIZES]]
        graph.value_info.append(helper.make_tensor_value_info(weight, dtype, sizes))
        nodes.append(aten_node(DECODE, [factor, *layer.input[1:]], [weight], f"{result}/decode"))
        nodes.append(
            helper.make_node(
                "FusedMatMul",
                [factor, weight],
                [result],
                name=f"{result}/product",
                domain="com.microsoft",
                transB=int(operator == FORWARD),
            )
        )
    del graph.node[:]
    graph.node.extend(nodes)


def _integers(index: GraphIndex) -> dict[str, int]:
    """The integers of a graph that are constant, by their names."""
    from onnx import numpy_helper

    tensors = dict(index.initializers)
    for node in index.graph.node:
        if node.op_type == "Constant" and (tensor := attribute(node, "value")) is not None:
            tensors[node.output[0]] = tensor
    int64 = 7  # onnx.TensorProto.INT64
    return {
        name: int(numpy_helper.to_array(tensor))
        for name, tensor in tensors.items()
        if tensor.data_type == int64 and not tensor.dims
    }


# --- The export


def _matmul_4bit(
    A: torch.Tensor,  # bitsandbytes' names
    B: torch.Tensor,
    quant_state: Any,
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """In place of `bitsandbytes.matmul_4bit`, which traces to an operator that ONNX lacks."""
    if A.dtype != torch.float32 and A.device.type == "cpu":
        raise UnsupportedModelError(
            f"a Linear4bit computes in {A.dtype}, and ONNX Runtime's CPU kernels in fp32 only: "
            "quantize with bnb_4bit_compute_dtype=torch.float32 (adapter.compute_dtype=float32), "
            "or train with backend='eager'"
        )
    settings = (quant_state.blocksize, _QUANT_TYPES.index(quant_state.quant_type))
    double: tuple[Any, ...] = ()
    if quant_state.nested:
        nested = quant_state.state2
        double = (nested.absmax, nested.code, quant_state.offset, nested.blocksize)
    absmax, shape = quant_state.absmax, quant_state.shape
    output = torch.ops.ort_train.linear_4bit(A, B, absmax, *settings, *shape, *double)
    return output if bias is None else output + bias


@contextlib.contextmanager
def export_scope(module: torch.nn.Module, opset: int) -> Iterator[None]:
    """What the export of 4-bit layers needs; bitsandbytes itself is as before at the end."""
    if not layers_4bit.layers(module):
        yield
        return
    bitsandbytes: Any = sys.modules["bitsandbytes"]
    torch.onnx.register_custom_op_symbolic(FORWARD, _symbolic, opset)
    original: Callable[..., torch.Tensor] = bitsandbytes.matmul_4bit
    bitsandbytes.matmul_4bit = _matmul_4bit
    try:
        yield
    finally:
        bitsandbytes.matmul_4bit = original

"""Matrix products of a finished training graph, given to torch in place of ONNX Runtime's kernels.

ONNX Runtime's CPU kernels compute in fp32 only, and slower than oneDNN does (onednn.py). When the
gradient graph stands, products, forward and backward, become nodes that torch runs (aten.py): in
fp32 those with a large matrix, in bf16 all of them, as autocast would choose.

In bf16 a factor is rounded by a node of its own, so that what several products share (a weight and
an activation in forward and backward, a gradient of both) is rounded once a step. A frozen weight
is rounded once and for all (rounded_weights.py), and a 4-bit one (quantized.py) decoded to bf16 at
once. Products are summed in fp32 by oneDNN, rounded to
bf16 as autocast's are, and handed on in fp32, or as they are where only products read them
(bf16_values.py).
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from ort_train.errors import BackendUnavailableError
from ort_train.ortmodule.export.graph_module import MODULE_PREFIX
from ort_train.ortmodule.graph import Dim, GraphIndex, Shape, attribute, declare, inputs_of
from ort_train.ortmodule.kernels import attention_kernels, onednn, packed_attention, product_kernels
from ort_train.ortmodule.kernels.aten import aten_node, operator_name
from ort_train.ortmodule.passes import activations, bf16_values, embeddings, losses
from ort_train.ortmodule.passes.quantized import DECODE

logger = logging.getLogger(__name__)

#: Below this many entries, ONNX Runtime multiplies by an fp32 matrix as fast: a call of torch costs
#: some 100 us. What it saves grows with the rows, so in long batches it is less.
_MIN_ENTRIES = 512 * 512
_MIN_ENTRIES_IF_LONG = 256 * 256
#: A batch of so many tokens is long.
_LONG = 1024
#: In bf16, a matrix with a side below this makes a product that costs less than its rounding.
_MIN_SIDE = 32
#: Taken for a side whose size isn't known.
_UNKNOWN = 512
#: Activations of input and bias, and their gradients -> what they are without a bias.
_WITH_BIAS = {
    "BiasGelu": "Gelu",
    "FastGelu": "FastGelu",
    activations.GELU_GRAD: "ATen",
    activations.GELU_TANH_GRAD: "ATen",
}
#: Attention as one node, and its gradient -> how many of its inputs, the first, are factors.
_NUM_FACTORS = {
    **dict.fromkeys([*attention_kernels.OPERATORS.values(), packed_attention.OPERATOR], 3),
    **dict.fromkeys([*attention_kernels.GRADIENTS.values(), packed_attention.GRADIENT], 4),
}
_PRODUCTS, _BATCHED_PRODUCTS = product_kernels.PRODUCTS, product_kernels.BATCHED_PRODUCTS
#: Operators of whose names another hands on bf16, with BF16_SUFFIX.
_HAND_ON = frozenset(
    {*_PRODUCTS.values(), *_BATCHED_PRODUCTS.values(), *losses.GRADIENTS.values(), *_NUM_FACTORS}
)
#: The gradient of MatMul names the factors so that it has flattened to matrices
#: (`gradient_builder.cc`, GetMatMulGradient).
_FLATTENED = "_reshape_2d"


class _Product(NamedTuple):
    """a · b + bias, each factor transposed first where its flag says so."""

    is_batched: bool
    a: str
    b: str
    bias: str
    a_t: bool
    b_t: bool
    output: str

    def transposed(self, output: str) -> _Product:
        """The same product of matrices with its result transposed; it has no bias."""
        return self._replace(a=self.b, b=self.a, a_t=not self.b_t, b_t=not self.a_t, output=output)


def _is_matrix_transpose(node: Any) -> bool:
    return node.op_type == "Transpose" and [list(a.ints) for a in node.attribute] == [[1, 0]]


def _untransposed(graph: GraphIndex, name: str) -> tuple[str, bool]:
    """Of what matrix this is the transpose, and whether it is one."""
    node = graph.producers.get(name)
    if node is None or not _is_matrix_transpose(node):
        return name, False
    return node.input[0], True


def _unflattened(graph: GraphIndex, name: str) -> str:
    """What was flattened to this matrix by the gradient of MatMul."""
    node = graph.producers.get(name)
    if node is None or node.op_type != "Reshape" or not name.endswith(_FLATTENED):
        return name
    return str(node.input[0])


def _decoding(graph: GraphIndex, name: str) -> Any:
    """The node that decodes this weight for a single product, in the type of its other factor, or
    None."""
    is_single = _is_decoded(graph, name) and graph.num_reads(name) == 1
    return graph.producers[name] if is_single else None


def _is_decoded(graph: GraphIndex, name: str) -> bool:
    node = graph.producers.get(name)
    return node is not None and operator_name(node) == DECODE


def _is_bias(graph: GraphIndex, name: str, columns: Dim) -> bool:
    """Whether it is a parameter with an entry for each column."""
    return name not in graph.producers and graph.shapes.get(name) == [columns]


class Wanted(NamedTuple):
    """Which products torch is asked for, and how it computes them.

    Attributes:
        is_bf16: in bf16; else in fp32.
        is_long: for batches of many tokens.
        keep_rounded: in bf16, leave frozen weights to be rounded once and for all.
        only_decoded: only products with weights that torch decodes, of whatever size. Its threads
            spin for some milliseconds behind that, on cores that ONNX Runtime's would multiply on.
    """

    is_bf16: bool
    is_long: bool = False
    keep_rounded: bool = False
    only_decoded: bool = False

    def with_matrix(self, shape: Shape | None) -> bool:
        """Whether it is asked for products with a matrix of these sizes."""
        if shape is None or len(shape) != 2:
            return False
        rows, columns = (size if size and isinstance(size, int) else _UNKNOWN for size in shape)
        if self.is_bf16:
            return min(rows, columns) >= _MIN_SIDE
        if self.only_decoded:
            return True
        return rows * columns >= (_MIN_ENTRIES_IF_LONG if self.is_long else _MIN_ENTRIES)


def _product_of(graph: GraphIndex, node: Any, wanted: Wanted) -> _Product | None:
    """What a node computes, or None where torch isn't asked for it."""
    if node.op_type not in ("MatMul", "FusedMatMul", "Gemm"):
        return None
    bias = node.input[2] if len(node.input) > 2 else ""
    if attribute(node, "alpha", 1.0) != 1.0 or (bias and attribute(node, "beta", 1.0) != 1.0):
        return None
    if attribute(node, "transBatchA") or attribute(node, "transBatchB"):
        return None
    a_t, b_t = bool(attribute(node, "transA")), bool(attribute(node, "transB"))
    a, b = node.input[:2]
    product = _Product(False, a, b, bias, a_t, b_t, node.output[0])
    if node.op_type == "Gemm":
        return None if wanted.only_decoded else _gemm(graph, product, wanted)
    b, is_transpose = _untransposed(graph, product.b)
    if wanted.only_decoded and not _is_decoded(graph, b):
        return None
    if len(graph.shapes.get(b, ())) == 2:
        if a_t or not wanted.with_matrix(graph.shapes[b]):
            return None
        return _with_bias(graph, product._replace(b=b, b_t=b_t ^ is_transpose))
    is_float = graph.types.get(product.output) == 1  # onnx.TensorProto.FLOAT
    return product._replace(is_batched=True) if wanted.is_bf16 and is_float else None


def _with_bias(graph: GraphIndex, product: _Product) -> _Product:
    """With what is added to it, where nothing reads it without."""
    readers = graph.consumers(product.output)
    if not readers or product.output in graph.outputs:
        return product
    columns = graph.shapes[product.b][0 if product.b_t else 1]
    first, *others = readers
    if first.op_type == "Add" and not others:
        bias = next((name for name in first.input if name != product.output), "")
        if _is_bias(graph, bias, columns):
            return product._replace(bias=bias, output=first.output[0])
        return product
    # An activation that has taken over the bias, and its gradient, would add it twice a step.
    if all(operator_name(n) in _WITH_BIAS and n.input[-2:-1] == [product.output] for n in readers):
        biases = {node.input[-1] for node in readers}
        if len(biases) == 1 and _is_bias(graph, first.input[-1], columns):
            for node in readers:
                del node.input[-1]
                node.op_type = _WITH_BIAS[operator_name(node)]
            return product._replace(bias=biases.pop())
    return product


def _gemm(graph: GraphIndex, product: _Product, wanted: Wanted) -> _Product | None:
    a, is_a_transpose = _untransposed(graph, product.a)
    b, is_b_transpose = _untransposed(graph, product.b)
    product = product._replace(
        a=a, b=b, a_t=product.a_t ^ is_a_transpose, b_t=product.b_t ^ is_b_transpose
    )
    if not product.a_t:
        return product if wanted.with_matrix(graph.shapes.get(b)) else None
    if product.bias:
        return None
    # A weight's gradient, which the transposed weight's often is made of.
    consumers = graph.consumers(product.output)
    is_output = product.output in graph.outputs
    if len(consumers) == 1 and _is_matrix_transpose(consumers[0]) and not is_output:
        product = product.transposed(consumers[0].output[0])
    if not wanted.with_matrix(graph.shapes.get(product.output)):
        return None
    if product.a_t and not product.b_t:
        a, b = _unflattened(graph, product.a), _unflattened(graph, product.b)
        product = product._replace(a=a, b=b)
    return product


def _frozen(graph: GraphIndex) -> set[str]:
    """The module's matrices that get no gradient."""
    inputs = (info.name for info in graph.graph.input)
    matrices = (name for name in inputs if len(graph.shapes.get(name, ())) == 2)
    return {
        name
        for name in matrices
        if name.startswith(MODULE_PREFIX) and f"{name}_grad" not in graph.outputs
    }


def replace(proto: Any, wanted: Wanted) -> int:
    """Give the graph's products to torch.

    Args:
        proto: onnx.GraphProto of forward and backward, changed in place.
        wanted: which of them.

    Returns:
        how many were replaced
    """
    from onnx import TensorProto

    is_bf16 = wanted.is_bf16

    def node_of(operator: str, inputs: list[str], output: str) -> Any:
        name = f"{output}/{operator.rpartition(':')[2]}"
        return aten_node(operator, inputs, [output], name)

    graph = GraphIndex(proto)
    nodes: list[Any] = []
    rounded: set[str] = set()
    kept = _frozen(graph) if wanted.keep_rounded else set()
    replaced: set[str] = set()

    def round_once(names: Iterable[str]) -> list[str]:
        for name in dict.fromkeys(names):
            if name not in rounded:
                rounded.add(name)
                nodes.append(node_of(product_kernels.ROUND, [name], f"{name}/bf16"))
        return [f"{name}/bf16" for name in names]

    for node in proto.node:
        if node.output[0] in replaced:  # a transpose, or the sum with a bias
            continue
        if is_bf16 and operator_name(node) in _NUM_FACTORS:
            num_factors = _NUM_FACTORS[operator_name(node)]
            node.input[:num_factors] = round_once(node.input[:num_factors])
            nodes.append(node)
            continue
        product = _product_of(graph, node, wanted)
        if product is None:
            nodes.append(node)
            continue
        factors = [product.a, product.b]
        decoding = _decoding(graph, product.b) if is_bf16 else None
        if decoding is not None:
            nodes.remove(decoding)
            factors = [product.a]
        if is_bf16:
            num_rounded = 1 if product.b in kept else len(factors)
            factors[:num_rounded] = round_once(factors[:num_rounded])
        if decoding is not None:
            decoding.input[0] = factors[0]
            nodes.append(decoding)
            graph.infos[product.b].type.tensor_type.elem_type = TensorProto.BFLOAT16
            factors.append(product.b)
        replaced.add(product.output)
        operators = _BATCHED_PRODUCTS if product.is_batched else _PRODUCTS
        operator = operators[product.a_t, product.b_t]
        bias = [product.bias] if product.bias else []
        nodes.append(node_of(operator, factors + bias, product.output))
    declare(proto, sorted(f"{name}/bf16" for name in rounded), TensorProto.BFLOAT16)
    declare(proto, sorted(replaced))
    del proto.node[:]
    proto.node.extend(_without_unused(nodes, graph.outputs))
    embeddings.add_to_products(proto, _is_product)
    if is_bf16:
        bf16_values.keep(proto, _is_rounding, _can_hand_on)
    return len(replaced)


def _is_product(node: Any) -> bool:
    return operator_name(node) in _PRODUCTS.values()


def _is_rounding(node: Any) -> bool:
    return operator_name(node) == product_kernels.ROUND


def _can_hand_on(node: Any) -> bool:
    """Whether an operator of the same name with BF16_SUFFIX hands on bf16."""
    return operator_name(node) in _HAND_ON


def _without_unused(nodes: list[Any], outputs: set[str]) -> list[Any]:
    """Without the transposes and reshapes that nothing reads any more."""
    used = {name for node in nodes for name in inputs_of(node)} | outputs
    return [
        node
        for node in nodes
        if node.op_type not in ("Transpose", "Reshape") or node.output[0] in used
    ]


# --- The export

_wanted: contextvars.ContextVar[Wanted | None] = contextvars.ContextVar("wanted", default=None)


def replace_where_wanted(proto: Any) -> None:
    """:func:`replace`, where the graph is built within an :func:`export_scope` that asks for it."""
    wanted = _wanted.get()
    if wanted is not None and (num_products := replace(proto, wanted)):
        precision = "bf16" if wanted.is_bf16 else "fp32"
        logger.info("%d matrix products by torch in %s", num_products, precision)


@contextlib.contextmanager
def export_scope(
    library: str, precision: str, keep_rounded: bool, tensors: Iterable[torch.Tensor]
) -> Iterator[None]:
    """Graphs that are built within for a CPU leave their matrix products to a library.

    Args:
        library: "onednn", "onnxruntime", or "auto" for oneDNN where it can; elsewhere torch's own
            choice for decoded weights alone.
        precision: "fp32" or "bf16".
        keep_rounded: in bf16, leave frozen weights to be rounded once and for all.
        tensors: of the first batch.

    Raises:
        BackendUnavailableError: where oneDNN is asked for and can't.
    """
    num_tokens = max((t.numel() for t in tensors if not t.is_floating_point()), default=0)
    is_bf16 = precision == "bf16"
    wanted: Wanted | None = Wanted(is_bf16, num_tokens >= _LONG, keep_rounded)
    if not is_bf16 and library == "onnxruntime":
        wanted = None
    elif not is_bf16 and (reason := onednn.unavailable_reason()) is not None:
        if library == "onednn":
            raise BackendUnavailableError(
                f"products='onednn' can't be had: {reason}; leave it at 'auto', or set "
                "'onnxruntime'"
            )
        wanted = Wanted(is_bf16=False, only_decoded=True)
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)

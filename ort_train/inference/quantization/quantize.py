"""Exported models with narrower weights, written tensor by tensor and checked against the original.

A model is read from its external data one weight at a time, and the result written the same way,
so that memory holds a few copies of its largest weight, not the model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm import tqdm

from ort_train.errors import ConfigError, ModelError
from ort_train.inference import onnx_files
from ort_train.inference.folder import (
    ExportedModel,
    copy_companions,
    load_folder,
    load_graph,
    staged,
    write_info,
)
from ort_train.inference.graph import MICROSOFT, DataWriter
from ort_train.inference.quantization import blockwise
from ort_train.inference.quantization.half import write_half
from ort_train.inference.quantization.products import (
    LayerReport,
    Product,
    WeightError,
    select_products,
)

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

    from ort_train.inference.quantization.evaluate import Comparison

REPORT_FILE = "quantize.json"
BITS = ("int4", "int8", "fp16")
BLOCK_SIZES = (16, 32, 64, 128, 256)
ACCURACY_LEVELS = (0, 1, 2, 3, 4)
#: Largest mean KL(fp32 || quantized), in nats a token: what raises a perplexity by 3%.
MAX_KL = 0.03
_EXACT_BLOCK_SIZE = 32


@dataclass(frozen=True)
class Scheme:
    """How weights are stored, and products computed.

    Args:
        bits: int4: blocks of 4-bit numbers; int8: 8-bit columns, inputs quantized to 8 bits as they
            come; fp16: everything in half precision, inputs and outputs of the model as they were.
        block_size: of int4, along the inputs. Smaller ones are more exact, and slower: each block's
            sum takes a step that isn't 8-bit arithmetic.
        symmetric: of int4: whether blocks have no zero point of their own.
        accuracy_level: of int4, what MatMulNBits multiplies in: 0 as its inputs (fp32), 1 fp32,
            2 fp16, 3 bf16, 4 int8. On CPUs 0 to 3 are fp32; 4 is fastest, rounds the inputs to
            8 bits, too, and can change which token is likeliest (onnxruntime #29849).

    Raises:
        ConfigError: with every value that is outside its range.
    """

    bits: Literal["int4", "int8", "fp16"] = "int4"
    block_size: int = 128
    symmetric: bool = False
    accuracy_level: int = 4

    def __post_init__(self) -> None:
        problems = [
            f"{name} {value!r} should be one of {', '.join(map(str, options))}"
            for name, value, options in (
                ("scheme", self.bits, BITS),
                ("block_size", self.block_size, BLOCK_SIZES),
                ("accuracy_level", self.accuracy_level, ACCURACY_LEVELS),
            )
            if value not in options
        ]
        if problems:
            raise ConfigError(problems)

    def __str__(self) -> str:
        if self.bits != "int4":
            return self.bits
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"int4 {kind}, block {self.block_size}, accuracy level {self.accuracy_level}"


@dataclass(frozen=True)
class QuantizationReport:
    """What was written, and how it compares.

    Attributes:
        left_out: products that stayed as they were, by name.
        comparison: None where none was asked for.
    """

    scheme: Scheme
    layers: list[LayerReport]
    left_out: list[str]
    bytes_before: int
    bytes_after: int
    comparison: Comparison | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def quantize_folder(
    source_dir: str | Path,
    out_dir: str | Path,
    scheme: Scheme,
    exclude: Sequence[str] = (),
    ids_BT: np.ndarray | None = None,
    max_kl: float = MAX_KL,
    num_threads: int | None = None,
) -> QuantizationReport:
    """Write an exported model with its matrix products' weights quantized.

    Products of two activations, embeddings, norms and biases stay as they are (but in fp16). An
    output embedding that shares its weight with the input one gets a copy of its own.

    Args:
        source_dir: an exported folder in fp32.
        out_dir: a new or empty folder; it is whole or not there.
        scheme: how.
        exclude: patterns (fnmatch) of node names that stay as they are: /lm_head/*, */layers.0/*.
        ids_BT: tokens to compare the two models on before `out_dir` gets its name; None: no check.
        max_kl: mean KL divergence to the original, in nats a token, from which on it is refused.
        num_threads: of the comparison; None: one a core.

    Returns:
        What REPORT_FILE in `out_dir` holds, too.

    Raises:
        ExportError: `source_dir` is no exported model, or `out_dir` holds something.
        ModelError: nothing to quantize, a weight whose inputs don't fit the blocks, a source that
            is quantized already, or a result that differs by more than `max_kl`.
    """
    source = load_source(source_dir)
    model = load_graph(source.path)
    with staged(out_dir, source.num_bytes) as folder:
        if scheme.bits == "fp16":
            layers, left_out = write_half(model, source.path, folder, exclude)
        else:
            layers, left_out = _write_quantized(model, source.path, folder, scheme, exclude)
        copy_companions(source, folder)
        info = source.info.model_copy(update={"precision": scheme.bits, "parity": None})
        write_info(folder, info)
        made = load_folder(folder)
        comparison = None
        if ids_BT is not None:
            from ort_train.inference.quantization.evaluate import compare

            comparison = compare(source, made, ids_BT, num_threads)
            _check(comparison, scheme, max_kl)
        report = QuantizationReport(
            scheme, layers, left_out, source.num_bytes, made.num_bytes, comparison
        )
        text = json.dumps(report.to_json(), indent=1) + "\n"
        (folder / REPORT_FILE).write_text(text, encoding="utf-8")
    return report


def load_source(source_dir: str | Path) -> ExportedModel:
    """An exported folder that can be quantized.

    Raises:
        ExportError: it is no exported model.
        ModelError: it is quantized already.
    """
    source = load_folder(source_dir)
    if source.info.precision != "fp32":
        raise ModelError(
            f"{str(source.path)!r} is {source.info.precision} already: quantize the fp32 export"
        )
    return source


def _check(comparison: Comparison, scheme: Scheme, max_kl: float) -> None:
    # Not `>`: NaN is over every limit.
    if not comparison.mean_kl <= max_kl:
        ways = ["leave the worst layers out with --exclude", "raise --max-kl"]
        if scheme.bits == "int4":
            if scheme.accuracy_level == 4:
                ways.insert(0, "compute in fp32 with --accuracy-level 0")
            if scheme.block_size > _EXACT_BLOCK_SIZE:
                ways.insert(0, f"use --block-size {_EXACT_BLOCK_SIZE}")
            ways.insert(0, "use --scheme int8")
        raise ModelError(
            f"{scheme}: the mean KL divergence to fp32 is {comparison.mean_kl:.4f} nats a token, "
            f"above {max_kl:g}; the likeliest token is the same for {comparison.agreement:.1%}. "
            f"Nothing was written: {', or '.join(ways)}"
        )


def _write_quantized(
    model: ModelProto, source: Path, folder: Path, scheme: Scheme, exclude: Sequence[str]
) -> tuple[list[LayerReport], list[str]]:
    from onnx import helper

    graph = model.graph
    chosen, left_out = select_products(graph, exclude)
    products = {product.node.name: product for product in chosen}
    if not products:
        raise ModelError(
            "there is no product with a weight to quantize"
            + (f": all {len(left_out)} are left out by --exclude" if left_out else "")
        )
    quantize = _int4_nodes if scheme.bits == "int4" else _int8_nodes
    layers, nodes = [], []
    # In the order of their use, before what stays: which weights still are used, nodes tell.
    with DataWriter(folder / onnx_files.DATA_FILE) as writer:
        tensors: list[TensorProto] = []
        total = sum(onnx_files.tensor_bytes(p.weight) for p in products.values())
        with tqdm(
            total=total, desc="Quantizing", unit="B", unit_scale=True, delay=1, leave=False
        ) as bar:
            for node in graph.node:
                product = products.get(node.name)
                if product is None:
                    nodes.append(node)
                    continue
                array = onnx_files.read_array(product.weight, source)
                made, report = quantize(product, array, scheme, writer, tensors)
                nodes += made
                layers.append(report)
                bar.update(onnx_files.tensor_bytes(product.weight))
        used = {name for node in nodes for name in node.input}
        nodes = [one for one in nodes if one.op_type != "Transpose" or one.output[0] in used]
        used = {name for node in nodes for name in node.input}
        for tensor in graph.initializer:
            if tensor.name in used:
                array = onnx_files.read_array(tensor, source)
                tensors.append(writer.tensor(tensor.name, array))
    del graph.node[:]
    graph.node.extend(nodes)
    onnx_files.replace_initializers(model, tensors)
    if not any(entry.domain == MICROSOFT for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    onnx_files.save_graph(model, folder / onnx_files.MODEL_FILE)
    return layers, [product.node.name for product in left_out]


def _int4_nodes(
    product: Product,
    array: np.ndarray,
    scheme: Scheme,
    writer: DataWriter,
    tensors: list[TensorProto],
) -> tuple[list[NodeProto], LayerReport]:
    from onnx import helper

    block, inputs, outputs = scheme.block_size, product.num_inputs, product.num_outputs
    num_blocks = -(-inputs // block)
    packed = np.empty((outputs, num_blocks, block // 2), np.uint8)
    scales = np.empty((outputs, num_blocks), np.float32)
    zeros = None if scheme.symmetric else np.empty((outputs, -(-num_blocks // 2)), np.uint8)
    error = WeightError()
    for part, rows in product.chunks(array):
        quantized = blockwise.quantize_int4(rows, block, scheme.symmetric)
        packed[part], scales[part] = quantized.packed_NGB, quantized.scales_NG
        if zeros is not None:
            assert quantized.zero_points_N is not None
            zeros[part] = quantized.zero_points_N
        error.add(rows, blockwise.dequantize_int4(quantized, inputs))
    name, node = product.node.name, product.node
    names = [f"{name}.q4", f"{name}.scales"]
    tensors += [writer.tensor(names[0], packed), writer.tensor(names[1], scales.reshape(-1))]
    if zeros is not None:
        names.append(f"{name}.zero_points")
        tensors.append(writer.tensor(names[2], zeros.reshape(-1)))
    result = f"{node.output[0]}.product" if product.bias else node.output[0]
    made = [
        helper.make_node(
            "MatMulNBits",
            [node.input[0], *names],
            [result],
            f"{name}.q4",
            domain=MICROSOFT,
            K=inputs,
            N=outputs,
            bits=4,
            block_size=block,
            accuracy_level=scheme.accuracy_level,
        )
    ]
    if product.bias:
        made.append(
            helper.make_node("Add", [result, product.bias], [node.output[0]], f"{name}.bias")
        )
    return made, error.report(name, (inputs, outputs))


def _int8_nodes(
    product: Product,
    array: np.ndarray,
    scheme: Scheme,
    writer: DataWriter,
    tensors: list[TensorProto],
) -> tuple[list[NodeProto], LayerReport]:
    from onnx import helper, numpy_helper

    inputs, outputs = product.num_inputs, product.num_outputs
    numbers = np.empty((inputs, outputs), np.uint8)
    scales = np.empty(outputs, np.float32)
    error = WeightError()
    for part, rows in product.chunks(array):
        quantized, scales[part] = blockwise.quantize_int8(rows)
        numbers[:, part] = quantized.T
        error.add(rows, blockwise.dequantize_int8(quantized, scales[part]))
    name, node = product.node.name, product.node
    names = [f"{name}.q8", f"{name}.scales", f"{name}.zero_point"]
    tensors += [
        writer.tensor(names[0], numbers),
        writer.tensor(names[1], scales),
        numpy_helper.from_array(np.full(outputs, blockwise.ZERO_8, np.uint8), names[2]),
    ]
    made = helper.make_node(
        "DynamicQuantizeMatMul",
        [node.input[0], *names, *([product.bias] if product.bias else [])],
        [node.output[0]],
        f"{name}.q8",
        domain=MICROSOFT,
    )
    return [made], error.report(name, (inputs, outputs))

"""Exported models in half precision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from ort_train.errors import ModelError
from ort_train.inference import onnx_files
from ort_train.inference.graph import DataWriter
from ort_train.inference.quantization.products import (
    LayerReport,
    Product,
    WeightError,
    select_products,
)

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TensorProto


def write_half(
    model: ModelProto, source: Path, folder: Path, exclude: Sequence[str]
) -> tuple[list[LayerReport], list[str]]:
    """Write a model with half precision inside; its inputs and outputs stay as they are.

    onnxruntime's converter sees large weights as inputs.

    Args:
        model: a graph in fp32, which is changed.
        source: the folder of its weights.
        folder: of the files to be written.
        exclude: patterns (fnmatch) of nodes that stay in fp32.

    Returns:
        What rounding did to the products' weights; the products that were left out.

    Raises:
        ModelError: a weight has no place in fp16; or see `select_products`.
    """
    from onnx import TensorProto, helper
    from onnxruntime.transformers.float16 import convert_float_to_float16

    graph = model.graph
    products, left_out = select_products(graph, exclude)
    names = [product.node.name for product in left_out]
    by_weight = {product.weight.name: product for product in products}
    whole = _keep_whole(graph, left_out)
    interface = [value.name for value in (*graph.input, *graph.output)]
    outer = {}
    inner = []
    for tensor in graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            outer[tensor.name] = tensor
            value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            graph.input.append(value)
        else:
            inner.append(tensor)
    onnx_files.replace_initializers(model, inner)
    half = convert_float_to_float16(
        model,
        keep_io_types=interface,
        disable_shape_infer=True,
        node_block_list=names or None,
    )
    graph = half.graph
    used = {name for node in graph.node for name in node.input}
    types = {v.name: v.type.tensor_type.elem_type for v in graph.input if v.name in outer}
    inputs = [value for value in graph.input if value.name not in outer]
    del graph.input[:]
    graph.input.extend(inputs)
    layers = []
    tensors = list(graph.initializer)
    with DataWriter(folder / onnx_files.DATA_FILE) as writer:
        for name, (tensor, is_transposed) in whole.items():
            array = onnx_files.read_array(tensor, source)
            tensors.append(writer.tensor(name, array.T if is_transposed else array))
        for name, tensor in tqdm(outer.items(), desc="Halving", delay=1, leave=False):
            if name not in used:
                continue
            array = onnx_files.read_array(tensor, source)
            if types[name] != TensorProto.FLOAT16:
                tensors.append(writer.tensor(name, array))
                continue
            narrow = array.astype(np.float16)
            if not np.isfinite(narrow).all():
                raise ModelError(
                    f"weight {name} exceeds fp16's largest number 65504: use int8 or int4"
                )
            tensors.append(writer.tensor(name, narrow))
            if (product := by_weight.get(name)) is not None:
                error = WeightError()
                error.add(array, narrow.astype(np.float32))
                shape = (product.num_inputs, product.num_outputs)
                layers.append(error.report(product.node.name, shape))
    onnx_files.replace_initializers(half, tensors)
    onnx_files.save_graph(half, folder / onnx_files.MODEL_FILE)
    return layers, names


def _keep_whole(
    graph: GraphProto, left_out: Sequence[Product]
) -> dict[str, tuple[TensorProto, bool]]:
    """Give products that are left out weights of their own, and tell the converter their types.

    It narrows every weight that it knows of, and converts values around a node that stays in fp32
    only where it knows their types.

    Returns:
        By the names of the new weights: those that they are copies of, and whether transposed.
    """
    from onnx import TensorProto, helper

    weights = {tensor.name: tensor for tensor in graph.initializer}
    known = {value.name for value in (*graph.input, *graph.output, *graph.value_info)}
    whole = {}
    for product in left_out:
        node = product.node
        originals = {1: product.weight}
        if product.bias in weights:
            originals[2] = weights[product.bias]
        for index, tensor in originals.items():
            own = f"{node.name}.whole.{index}"
            whole[own] = (tensor, index == 1 and node.input[1] != tensor.name)
            node.input[index] = own
        for name in {node.input[0], node.output[0]} - known:
            graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
            known.add(name)
    return whole

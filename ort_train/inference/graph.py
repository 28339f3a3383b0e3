"""Writing an ONNX graph node by node; its weights go straight to the external-data file.

A graph with its weights inside would have to fit into protobuf's 2 GB and would be held in memory
a second time beside the model that the weights come from. Here at most one weight is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

MICROSOFT = "com.microsoft"
#: Opset 17 is the newest that onnxruntime-training 1.19's own operators are declared against.
OPSET = 17
IR_VERSION = 8
ALIGNMENT = 4096  # of a weight in the file: a page, so that it can be mapped into memory
_INLINE_BYTES = 1024  # smaller constants stay in the graph, where tools look for them


class DataWriter:
    """Appends weights to one external-data file.

    Args:
        on_write: called with the bytes of each weight, for a progress bar.
    """

    def __init__(self, file: Path, on_write: Callable[[int], Any] | None = None):
        self._file = file
        self._stream = file.open("wb")
        self._on_write = on_write

    def __enter__(self) -> DataWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()

    def tensor(self, name: str, array: np.ndarray) -> onnx.TensorProto:
        """An initializer of the array; large ones are written and only referred to."""
        # Contiguous; np.ascontiguousarray makes one dimension where there is none.
        array = np.asarray(array, order="C")
        if array.nbytes < _INLINE_BYTES:
            return numpy_helper.from_array(array, name)
        offset = -(-self._stream.tell() // ALIGNMENT) * ALIGNMENT
        self._stream.seek(offset)
        array.tofile(self._stream)
        if self._on_write is not None:
            self._on_write(array.nbytes)
        tensor = onnx.TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        for key, value in (
            ("location", self._file.name),
            ("offset", offset),
            ("length", array.nbytes),
        ):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


class GraphWriter:
    """Nodes and weights of one graph, in the order in which they are computed."""

    def __init__(self, data: DataWriter):
        self._data = data
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, onnx.TensorProto] = {}

    def weight(self, name: str, array: np.ndarray) -> str:
        """An initializer; returns its name."""
        assert name not in self._weights, name
        self._weights[name] = self._data.tensor(name, array)
        return name

    def constant(self, value: Any, dtype: type) -> str:
        """A small initializer, made once for each value."""
        array: np.ndarray = np.array(value, dtype)
        name = f"constants/{array.dtype}/{array.tolist()}"
        if name not in self._weights:
            self.weight(name, array)
        return name

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        name: str,
        outputs: Sequence[str] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """A node; returns its first output, which is `name`/output_0 unless named."""
        outputs = outputs or [f"{name}/output_0"]
        self._nodes.append(
            helper.make_node(operator, inputs, outputs, name=name, domain=domain, **attributes)
        )
        return outputs[0]

    def save(
        self,
        file: Path,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
    ) -> None:
        """Write the graph beside its data file."""
        graph = helper.make_graph(
            self._nodes, "decoder", inputs, outputs, list(self._weights.values())
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="ort_train"
        )
        onnx.save_model(model, str(file))


def value_info(name: str, dtype: type, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    """A graph's input or output; named dimensions are dynamic."""
    return helper.make_tensor_value_info(
        name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape
    )

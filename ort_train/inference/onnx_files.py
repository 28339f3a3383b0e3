"""ONNX models on disk: read without their weights, written tensor by tensor, whole or not."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ort_train.errors import ModelError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TensorProto

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
#: protobuf refuses messages of 2 GiB; a pass adds to the graph, hence the margin.
MAX_INLINE_BYTES = int(1.9 * 2**30)
#: Smaller tensors stay in the graph's own file, where shape inference and passes read them.
MIN_EXTERNAL_BYTES = 1024


def model_file(path: str | Path) -> Path:
    """The .onnx file that a path means: itself, or the one in an exported folder.

    Raises:
        ModelError: there is none.
    """
    path = Path(path).expanduser()
    file = path / MODEL_FILE if path.is_dir() else path
    if not file.is_file():
        raise ModelError(
            f"{str(file)!r} doesn't exist: name an .onnx file, or a folder with a {MODEL_FILE}"
        )
    return file


def read_graph(file: Path) -> ModelProto:
    """A model whose external tensors stay on the disk.

    Raises:
        ModelError: the file is no ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(file), load_external_data=False)
    except (DecodeError, OSError) as error:
        raise ModelError(f"can't read {str(file)!r} as an ONNX model: {error}") from error
    if not model.graph.node:
        raise ModelError(f"{str(file)!r} holds no graph: is it an ONNX model?")
    for tensor in _tensors_in_nodes(model.graph):
        if onnx.external_data_helper.uses_external_data(tensor):
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(file.parent))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    return model


def _tensors_in_nodes(graph: GraphProto) -> Iterator[TensorProto]:
    """Constants, and the initializers of the graphs inside If and Loop."""
    for node in graph.node:
        for attribute in node.attribute:
            yield from [attribute.t] if attribute.HasField("t") else []
            yield from attribute.tensors
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from inner.initializer
                yield from _tensors_in_nodes(inner)


def tensor_bytes(tensor: TensorProto) -> int:
    """Size of a tensor's data, from its shape and type."""
    from onnx import TensorProto, helper

    count = int(np.prod(tensor.dims, dtype=np.int64))
    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
        return (count + 1) // 2
    return count * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def read_array(tensor: TensorProto, folder: Path) -> np.ndarray:
    """A tensor's values; external ones are mapped, so that only what is touched is read.

    Args:
        folder: of the model's file.

    Raises:
        ModelError: the data file is missing or too short.
    """
    from onnx import TensorProto, helper, numpy_helper

    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    where = {entry.key: entry.value for entry in tensor.external_data}
    file = folder / where["location"]
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    offset, shape = int(where.get("offset", 0)), tuple(tensor.dims)
    if not file.is_file() or file.stat().st_size < offset + tensor_bytes(tensor):
        raise ModelError(
            f"{str(file)!r} doesn't hold the weight {tensor.name}: the model isn't whole, copy it "
            "again with its data file"
        )
    if 0 in shape:
        return np.zeros(shape, dtype)
    return np.memmap(file, dtype, "r", offset, shape)


def write_model(model: ModelProto, file: Path, folder: Path) -> None:
    """Write a model whose external tensors are in the data files of another folder.

    Args:
        file: to be written, with file.data for the tensors.
        folder: where the tensors are now.
    """
    from ort_train.inference.graph import DataWriter

    data = file.with_name(f"{file.name}.data")
    with DataWriter(data) as writer:
        tensors = [writer.tensor(t.name, read_array(t, folder)) for t in model.graph.initializer]
    if data.stat().st_size == 0:
        data.unlink()
    replace_initializers(model, tensors)
    save_graph(model, file)


def replace_initializers(model: ModelProto, tensors: Iterable[TensorProto]) -> None:
    """Give a graph other initializers."""
    tensors = list(tensors)
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)


def save_graph(model: ModelProto, file: Path) -> None:
    """Write a model's own file, without its data files."""
    with file.open("wb") as stream:
        stream.write(model.SerializeToString())


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder on the same disk as `parent`'s files, which is gone after the block."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ort_train-", dir=parent) as folder:
        yield Path(folder)

"""Tracing a module into an ONNX graph; its weights go straight from the module to a file."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import torch

from ort_train.inference.diffusion.parts import TRACED, Part
from ort_train.inference.graph import IR_VERSION, MICROSOFT, OPSET, DataWriter


def write_graph(part: Part, file: Path, data_file: Path, on_write: Callable[[int], Any]) -> None:
    """Trace a part and write its graph beside its weights.

    torch.onnx would hold the weights a second time, as protobuf's bytes: it is told to leave them
    out, as inputs of the graph, which are then made initializers one by one.

    Args:
        on_write: called with the bytes of each weight.
    """
    example = part.example(TRACED)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder, _scope(part.module):
        traced = Path(folder) / file.name
        torch.onnx.export(
            part.module,
            example,
            str(traced),
            export_params=False,
            do_constant_folding=False,  # it would put folded weights in their places
            dynamo=False,
            opset_version=OPSET,
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            dynamic_axes={**part.inputs, **part.outputs},
        )
        model = onnx.load(str(traced))
    with DataWriter(data_file, on_write) as data:
        _fill(model.graph, part, data)
    model.ir_version = IR_VERSION
    if not any(opset.domain == MICROSOFT for opset in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))
    onnx.save_model(model, str(file))


def _fill(graph: onnx.GraphProto, part: Part, data: DataWriter) -> None:
    """Make the inputs that are weights initializers."""
    tensors = {**dict(part.module.named_parameters()), **dict(part.module.named_buffers())}
    weights = {value.name for value in graph.input} - set(part.inputs)
    assert weights <= set(tensors), weights - set(tensors)
    kept = [value for value in graph.input if value.name in part.inputs]
    del graph.input[:]
    graph.input.extend(kept)
    transposed = _transposed_weights(graph, weights)
    nodes = [node for node in graph.node if node.output[0] not in transposed]
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    for name in sorted(weights & used):
        graph.initializer.append(data.tensor(name, tensors[name].detach().numpy()))
    for output, name in transposed.items():
        graph.initializer.append(data.tensor(output, tensors[name].detach().numpy().T))


def _transposed_weights(graph: onnx.GraphProto, weights: set[str]) -> dict[str, str]:
    """The weights that the graph transposes, by the transposed one's name.

    A Linear's are. ONNX Runtime would do it whenever it loads the graph, beside the original.
    """
    return {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Transpose"
        and node.input[0] in weights
        and list(node.attribute[0].ints) == [1, 0]
    }


@contextlib.contextmanager
def _scope(module: torch.nn.Module) -> Iterator[None]:
    """Everything that a trace needs of torch and transformers, taken back at the end."""
    from ort_train.ortmodule.transformers_compat import export_scope

    own = torch.nn.functional.scaled_dot_product_attention

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **others: Any,
    ) -> torch.Tensor:
        if attn_mask is not None or is_causal or dropout_p or others.get("enable_gqa"):
            return own(query, key, value, attn_mask, dropout_p, is_causal, **others)
        scale = others.get("scale") or float(int(query.shape[-1]) ** -0.5)
        return _Attention.apply(query, key, value, int(query.shape[1]), scale)

    with warnings.catch_warnings(), torch.no_grad(), export_scope(module):
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch.onnx")
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.onnx")
        torch.nn.functional.scaled_dot_product_attention = attention
        try:
            yield
        finally:
            torch.nn.functional.scaled_dot_product_attention = own


class _Attention(torch.autograd.Function):
    """Unmasked attention as one node, ONNX Runtime's MultiHeadAttention.

    Plain nodes hold all products of queries and keys at once: 64 MiB a head at 64 x 64 latents. The
    one node goes through them block by block, and takes about three quarters of the time there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        num_heads: int,
        scale: float,
    ) -> torch.Tensor:
        return torch.nn.functional.softmax(query @ key.mT * scale, -1) @ value

    @staticmethod
    def symbolic(g: Any, query: Any, key: Any, value: Any, num_heads: int, scale: float) -> Any:
        # The node wants (B, T, heads x size). The transposes undo those around it, and ONNX Runtime
        # cancels both.
        flat = g.op("Constant", value_t=torch.tensor([0, 0, -1]))
        split = g.op("Constant", value_t=torch.tensor([0, 0, num_heads, -1]))
        inputs = [
            g.op("Reshape", g.op("Transpose", x, perm_i=[0, 2, 1, 3]), flat)
            for x in (query, key, value)
        ]
        output = g.op(
            f"{MICROSOFT}::MultiHeadAttention", *inputs, num_heads_i=num_heads, scale_f=scale
        )
        return g.op("Transpose", g.op("Reshape", output, split), perm_i=[0, 2, 1, 3])

"""Tracing a part of a pipeline, its attention as single nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ort_train.inference.decoder.trace import write_traced_graph
from ort_train.inference.diffusion.parts import TRACED, Part
from ort_train.inference.graph import MICROSOFT


def write_graph(part: Part, file: Path, data_file: Path, on_write: Callable[[int], Any]) -> None:
    """Trace a part and write its graph beside its weights.

    Args:
        on_write: called with the bytes of each weight.
    """
    example = part.example(TRACED)
    with _one_node_attention():
        write_traced_graph(
            part.module, example, part.inputs, part.outputs, file, data_file, on_write
        )


@contextlib.contextmanager
def _one_node_attention() -> Iterator[None]:
    """Attention without a mask is traced as one node."""
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

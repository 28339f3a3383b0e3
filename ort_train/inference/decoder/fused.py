"""The fused decoder graph, built from a model's own parameters.

Nodes are those that ONNX Runtime has fast kernels for: GroupQueryAttention with the rotary
embedding and the cache inside, norms that add the residual, one product for queries, keys and
values. Only each row's last token goes through what follows the last attention, so a prompt's
logits cost one token. Node names follow onnxruntime-genai's model builder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ort_train.inference.decoder.architectures import DecoderPlan, plan
from ort_train.inference.folder import DATA_FILE, MODEL_FILE, cache_names
from ort_train.inference.graph import MICROSOFT, DataWriter, GraphWriter, value_info

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_fused(
    model: PreTrainedModel,
    folder: Path,
    dtype: type[np.floating] = np.float32,
    on_write: Callable[[int], Any] | None = None,
) -> DecoderPlan:
    """Write `model.onnx` and `model.onnx.data`.

    Args:
        model: of an architecture and config in which `fused_obstacle` finds none; fp32.
        dtype: float32 or float16, of weights, computation and cache. Logits are float32.
        on_write: called with the bytes of each weight written.
    """
    with DataWriter(folder / DATA_FILE, on_write) as data:
        builder = _Builder(model, plan(model.config), GraphWriter(data), dtype)
        builder.build(folder / MODEL_FILE)
    return builder.plan


class _Builder:
    """One graph under construction."""

    def __init__(
        self,
        model: PreTrainedModel,
        plan: DecoderPlan,
        graph: GraphWriter,
        dtype: type[np.floating],
    ):
        self.plan = plan
        self._model: Any = model
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._graph = graph
        self._dtype = dtype

    def build(self, file: Path) -> None:
        plan, graph, shape = self.plan, self._graph, self.plan.architecture
        self._write_lengths()
        self._write_rotary_tables()
        embeddings = self._weight("model.embed_tokens.weight")
        residual = graph.node("Gather", [embeddings, "input_ids"], "/model/embed_tokens/Gather")
        if plan.embedding_scale != 1.0:
            scale = graph.weight("embedding_scale", np.array(plan.embedding_scale, self._dtype))
            residual = graph.node("Mul", [residual, scale], "/model/embed_tokens/Mul")
        normed = self._norm(residual, "model.layers.0.input_layernorm", "/model/layers.0")
        for layer in range(plan.num_layers):
            path, name = f"model.layers.{layer}", f"/model/layers.{layer}"
            is_last = layer == plan.num_layers - 1
            attention = self._attention(normed, layer)
            if is_last:
                attention, residual = self._last(attention, name), self._last(residual, f"{name}/x")
            attention = self._linear(
                attention, [f"{path}.{shape.attention_out}"], f"{name}/attn/o_proj"
            )
            if shape.is_parallel:
                normed = self._last(normed, f"{name}/mlp") if is_last else normed
                mlp = self._mlp(normed, layer)
                update = graph.node("Add", [attention, mlp], f"{name}/parallel/Add")
            else:
                post_norm = f"{path}.{shape.post_norm}"
                normed, residual = self._skip_norm(residual, attention, post_norm, f"{name}/post")
                update = self._mlp(normed, layer)
            following = f"model.{shape.final_norm}" if is_last else _input_norm(layer + 1)
            normed, residual = self._skip_norm(residual, update, following, f"{name}/next")
        self._write_logits(normed)
        inputs, outputs = self._values()
        graph.save(file, inputs, outputs)

    def _values(self) -> tuple[list[Any], list[Any]]:
        """The graph's inputs and outputs."""
        plan = self.plan
        inputs = [
            value_info("input_ids", np.int64, ["batch_size", "sequence_length"]),
            value_info("attention_mask", np.int64, ["batch_size", "total_sequence_length"]),
        ]
        outputs = [value_info("logits", np.float32, ["batch_size", 1, plan.vocab_size])]
        for values, prefix, length in (
            (inputs, "past_key_values", "past_sequence_length"),
            (outputs, "present", "present_sequence_length"),
        ):
            shape: list[int | str] = ["batch_size", plan.num_kv_heads, length, plan.head_dim]
            names = cache_names(prefix, plan.num_layers)
            values += [value_info(name, self._dtype, shape) for name in names]
        return inputs, outputs

    def _write_lengths(self) -> None:
        """What the attention wants to know of the mask: `seqlens_k`, `total`; and `last_index`."""
        graph, one = self._graph, self._graph.constant(1, np.int64)
        axis = graph.constant([1], np.int64)
        length = graph.node("ReduceSum", ["attention_mask", axis], "/mask/ReduceSum", keepdims=0)
        last = graph.node("Sub", [length, one], "/mask/Sub")
        graph.node("Cast", [last], "/mask/Cast", ["seqlens_k"], to=_onnx_type(np.int32))
        total = graph.node("Shape", ["attention_mask"], "/mask/Shape", start=1, end=2)
        scalar = graph.constant(np.zeros(0), np.int64)
        total = graph.node("Reshape", [total, scalar], "/mask/Reshape")
        graph.node("Cast", [total], "/mask/total/Cast", ["total"], to=_onnx_type(np.int32))
        # Of a prompt, each row's last real token; of one new token, that.
        tokens = graph.node("Shape", ["input_ids"], "/tokens/Shape", start=1, end=2)
        end = graph.node("Sub", [tokens, axis], "/tokens/Sub")
        index = graph.node("Min", [last, end], "/tokens/Min")
        axes = graph.constant([1, 2], np.int64)
        graph.node("Unsqueeze", [index, axes], "/tokens/Unsqueeze", ["last_index"])

    def _write_rotary_tables(self) -> None:
        """`cos_cache` and `sin_cache` (positions, rotated dimensions / 2), by the model's code."""
        positions = torch.arange(self.plan.max_positions)[None]
        with torch.no_grad():
            tables = self._model.model.rotary_emb(torch.zeros(1), positions)
        for name, table in zip(("cos_cache", "sin_cache"), tables, strict=True):
            # Both halves of the last axis are the same angles.
            half = table[0, :, : table.shape[-1] // 2]
            self._graph.weight(name, half.numpy().astype(self._dtype))

    def _attention(self, normed: str, layer: int) -> str:
        """GroupQueryAttention (batch, sequence, heads x head size), before the output product."""
        plan, graph = self.plan, self._graph
        path, name = f"model.layers.{layer}.self_attn", f"/model/layers.{layer}/attn"
        projections = [f"{path}.{part}_proj" for part in "qkv"]
        # Scores are scaled in the weights that queries come from. With 1 as the attention's own
        # scale, ONNX Runtime multiplies a single query by the keys where they lie; with another it
        # packs all keys into a buffer first (MlasSgemmOperation, sgemm.cpp: M == 1, alpha == 1).
        scale = plan.head_dim**-0.5
        if plan.architecture.has_qk_norms:
            query, key, value = (
                self._linear(normed, [projection], f"{name}/{part}_proj")
                for part, projection in zip("qkv", projections, strict=True)
            )
            query = self._head_norm(query, f"{path}.q_norm", f"{name}/q_norm", scale)
            key = self._head_norm(key, f"{path}.k_norm", f"{name}/k_norm")
        else:
            query = self._linear(normed, projections, f"{name}/qkv_proj", scale)
            key = value = ""
        cache = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        window = plan.windows[layer]
        return graph.node(
            "GroupQueryAttention",
            [query, key, value, *cache, "seqlens_k", "total", "cos_cache", "sin_cache"],
            f"{name}/GroupQueryAttention",
            [f"{name}/output_0", f"present.{layer}.key", f"present.{layer}.value"],
            MICROSOFT,
            num_heads=plan.num_heads,
            kv_num_heads=plan.num_kv_heads,
            scale=1.0,
            do_rotary=1,
            rotary_interleaved=0,
            # The kernel of 1.19 counts the keys before the query's own; see also `genai.py`.
            local_window_size=-1 if window is None else window - 1,
        )

    def _mlp(self, hidden: str, layer: int) -> str:
        shape, graph = self.plan.architecture, self._graph
        path, name = f"model.layers.{layer}", f"/model/layers.{layer}/mlp"
        up = self._linear(hidden, [f"{path}.{shape.up}"], f"{name}/up_proj")
        if shape.gate is None:
            inner = self._activation(up, f"{name}/act")
        else:
            gate = self._linear(hidden, [f"{path}.{shape.gate}"], f"{name}/gate_proj")
            gate = self._activation(gate, f"{name}/act")
            inner = graph.node("Mul", [gate, up], f"{name}/Mul")
        return self._linear(inner, [f"{path}.{shape.down}"], f"{name}/down_proj")

    def _activation(self, value: str, name: str) -> str:
        graph = self._graph
        if self.plan.activation == "silu":
            sigmoid = graph.node("Sigmoid", [value], f"{name}/Sigmoid")
            return graph.node("Mul", [value, sigmoid], f"{name}/Mul")
        operator = {"gelu": "Gelu", "gelu_tanh": "FastGelu", "relu": "Relu"}[self.plan.activation]
        domain = "" if operator == "Relu" else MICROSOFT
        return graph.node(operator, [value], f"{name}/{operator}", domain=domain)

    def _write_logits(self, normed: str) -> None:
        """`logits` (batch, 1, vocabulary), in float32."""
        graph, head = self._graph, "lm_head"
        is_half = self._dtype is not np.float32
        outputs = None if is_half else ["logits"]
        bias = self._parameters.get(f"{head}.bias")
        product = f"/{head}/MatMul"
        result = None if bias is not None else outputs
        if self._parameters[f"{head}.weight"] is self._parameters["model.embed_tokens.weight"]:
            # The embedding's own weight, in the file once.
            logits = graph.node(
                "FusedMatMul",
                [normed, "model.embed_tokens.weight"],
                product,
                result,
                MICROSOFT,
                transB=1,
            )
        else:
            weight = self._joined(
                f"{head}.MatMul.weight", [self._parameters[f"{head}.weight"].detach().T]
            )
            logits = graph.node("MatMul", [normed, weight], product, result)
        if bias is not None:
            logits = graph.node(
                "Add", [logits, self._weight(f"{head}.bias")], f"/{head}/Add", outputs
            )
        if is_half:
            graph.node("Cast", [logits], f"/{head}/Cast", ["logits"], to=_onnx_type(np.float32))

    def _last(self, value: str, name: str) -> str:
        """Each row's last token of (batch, sequence, size), as (batch, 1, size)."""
        inputs = [value, "last_index"]
        return self._graph.node("GatherND", inputs, f"{name}/last/GatherND", batch_dims=1)

    def _linear(self, value: str, modules: list[str], name: str, first_scale: float = 1.0) -> str:
        """One product with the weights of one or several linear modules side by side.

        Args:
            first_scale: a factor of the first module's outputs.
        """
        graph, own = self._graph, name.strip("/").replace("/", ".")
        weights = [self._parameters[f"{module}.weight"].detach().T for module in modules]
        weight = self._joined(f"{own}.MatMul.weight", weights, first_scale)
        product = graph.node("MatMul", [value, weight], f"{name}/MatMul")
        biases = [self._parameters.get(f"{module}.bias") for module in modules]
        if biases[0] is None:
            return product
        found = [bias.detach() for bias in biases if bias is not None]
        bias = self._joined(f"{own}.Add.bias", found, first_scale)
        return graph.node("Add", [product, bias], f"{name}/Add")

    def _joined(self, name: str, tensors: list[torch.Tensor], first_scale: float = 1.0) -> str:
        """An initializer of tensors side by side along their outputs, the last axis."""
        if first_scale != 1.0:
            tensors = [tensors[0] * first_scale, *tensors[1:]]
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=-1)
        return self._graph.weight(name, self._array(joined))

    def _norm(self, value: str, module: str, name: str) -> str:
        """The first norm, which has no residual to add."""
        inputs = [value, *self._norm_weights(module)]
        settings: dict[str, Any] = {"epsilon": self.plan.eps, "axis": -1, "stash_type": 1}
        if self.plan.architecture.norm == "layer":
            return self._graph.node(
                "LayerNormalization", inputs, f"{name}/LayerNormalization", **settings
            )
        operator = "SimplifiedLayerNormalization"
        return self._graph.node(operator, inputs, f"{name}/{operator}", **settings)

    def _skip_norm(self, residual: str, update: str, module: str, name: str) -> tuple[str, str]:
        """The norm of residual and update, and their sum."""
        is_layer = self.plan.architecture.norm == "layer"
        operator = "SkipLayerNormalization" if is_layer else "SkipSimplifiedLayerNormalization"
        outputs = [f"{name}/output_0", "", "", f"{name}/output_3"]
        self._graph.node(
            operator,
            [residual, update, *self._norm_weights(module)],
            f"{name}/{operator}",
            outputs,
            MICROSOFT,
            epsilon=self.plan.eps,
        )
        return outputs[0], outputs[3]

    def _norm_weights(self, module: str) -> list[str]:
        weight = self._parameters[f"{module}.weight"] + self.plan.architecture.norm_offset
        names = [self._graph.weight(f"{module}.weight", self._array(weight))]
        if self.plan.architecture.norm == "layer":
            names.append(self._weight(f"{module}.bias"))
        return names

    def _head_norm(self, value: str, module: str, name: str, scale: float = 1.0) -> str:
        """The norm of each head of (batch, sequence, heads x head size), times a scale."""
        graph = self._graph
        weight = self._joined(
            f"{module}.weight", [self._parameters[f"{module}.weight"].detach()], scale
        )
        by_head = graph.constant([0, 0, -1, self.plan.head_dim], np.int64)
        heads = graph.node("Reshape", [value, by_head], f"{name}/Reshape_1")
        operator = "SimplifiedLayerNormalization"
        normed = graph.node(
            operator, [heads, weight], f"{name}/{operator}",
            epsilon=self.plan.eps, axis=-1, stash_type=1,
        )  # fmt: skip
        together = graph.constant([0, 0, -1], np.int64)
        return graph.node("Reshape", [normed, together], f"{name}/Reshape_2")

    def _weight(self, parameter: str) -> str:
        return self._graph.weight(parameter, self._array(self._parameters[parameter]))

    def _array(self, tensor: torch.Tensor) -> np.ndarray:
        return tensor.detach().cpu().numpy().astype(self._dtype, copy=False)


def _input_norm(layer: int) -> str:
    return f"model.layers.{layer}.input_layernorm"


def _onnx_type(dtype: type) -> int:
    from onnx import helper

    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

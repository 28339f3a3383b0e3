"""The decoder graph of a model without a fused one: its own forward, traced by torch.onnx.

The cache goes in and comes out as tensors; keys and values of new tokens are appended to it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ort_train.errors import ExportError, OrtTrainError, UnsupportedModelError
from ort_train.inference.decoder.architectures import max_positions, windows
from ort_train.inference.decoder.trace import write_traced_graph
from ort_train.inference.folder import DATA_FILE, MODEL_FILE, cache_names
from ort_train.inference.graph import OPSET

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What is traced: rows, cached tokens, new tokens. None of them is 1, which broadcasts.
_BATCH, _PAST, _NEW = 2, 5, 3


def write_traced(
    model: PreTrainedModel, folder: Path, on_write: Callable[[int], Any] | None = None
) -> dict[str, Any]:
    """Write `model.onnx` and `model.onnx.data`.

    Args:
        model: fp32, with plain ("eager") attention.
        on_write: called with the bytes of each weight written.

    Returns:
        The fields of `ExportInfo` that the graph decides.

    Raises:
        ExportError: a model that can't be traced, or whose cache isn't keys and values.
    """
    from ort_train.ortmodule.export.tracing import values_kept_out

    config = model.config.get_text_config()
    keys = _example_cache(model)
    num_layers = len(keys) // 2
    decoder = _Decoder(model, num_layers)
    past, present = (cache_names(prefix, num_layers) for prefix in ("past_key_values", "present"))
    batch = {0: "batch_size"}
    inputs = {
        "input_ids": {**batch, 1: "sequence_length"},
        "attention_mask": {**batch, 1: "total_sequence_length"},
    }
    example = [
        torch.randint(0, config.vocab_size, (_BATCH, _NEW)),
        torch.ones(_BATCH, _PAST + _NEW, dtype=torch.int64),
    ]
    if decoder.takes_positions:
        inputs["position_ids"] = {**batch, 1: "sequence_length"}
        example.append(torch.arange(_PAST, _PAST + _NEW).expand(_BATCH, -1))
    inputs |= {name: {**batch, 2: "past_sequence_length"} for name in past}
    outputs = {"logits": batch} | {name: {**batch, 2: "total_sequence_length"} for name in present}
    try:
        with values_kept_out(), _symbolics():
            write_traced_graph(
                decoder, (*example, *keys), inputs, outputs,
                folder / MODEL_FILE, folder / DATA_FILE, on_write,
            )  # fmt: skip
    except UnsupportedModelError as error:
        # What it advises to do is about training.
        raise ExportError(
            f"{_name(model)} can't be traced: {str(error).split(': write')[0]}"
        ) from error
    except OrtTrainError:
        raise
    except Exception as error:  # the tracer and the exporter raise anything
        raise ExportError(f"{_name(model)} can't be traced: {error}") from error
    return {
        "num_layers": num_layers,
        "num_kv_heads": keys[0].shape[1],
        "head_dim": keys[0].shape[3],
        "vocab_size": config.vocab_size,
        "max_positions": max_positions(config),
        "sliding_windows": windows(config),
    }


@contextlib.contextmanager
def _symbolics() -> Iterator[None]:
    """Operators that the exporter lacks or gets wrong at this opset."""
    from ort_train.ortmodule import upstream
    from ort_train.ortmodule.export import exporter, symbolics

    upstream.load()  # some of them go on to ORTModule's own
    with exporter.restored_symbolics():
        symbolics.register(OPSET, is_trained=False)
        yield


class _Decoder(torch.nn.Module):
    """A model's forward from tensors to tensors: logits of the last tokens, then the cache."""

    def __init__(self, model: PreTrainedModel, num_layers: int):
        super().__init__()
        self.model = model
        self._num_layers = num_layers
        parameters = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self._limit = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        from transformers import DynamicCache

        num_others = len(tensors) - 2 * self._num_layers
        names = ("input_ids", "attention_mask", "position_ids")
        arguments = dict(zip(names, tensors[:num_others], strict=False))
        cache = DynamicCache()
        for layer in range(self._num_layers):
            start = num_others + 2 * layer
            cache.update(tensors[start], tensors[start + 1], layer)
        output: Any = self.model(
            **arguments, past_key_values=cache, use_cache=True, return_dict=True, **self._limit
        )
        presents = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        return (output.logits[:, -1:].float(), *presents)


def _example_cache(model: PreTrainedModel) -> list[torch.Tensor]:
    """Keys and values of each layer (batch, kv heads, tokens, head size), after some tokens.

    Raises:
        ExportError: the model's cache is of another kind.
    """
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (_BATCH, _PAST))
    try:
        with torch.no_grad():
            output: Any = model(input_ids=ids, use_cache=True)
    except Exception as error:  # a model's own
        raise ExportError(f"{_name(model)} doesn't run on token ids alone: {error}") from error
    layers = getattr(getattr(output, "past_key_values", None), "layers", None)
    parts: list[Any] = [
        _unforgotten(getattr(layer, name, None), layer)
        for layer in layers or ()
        for name in ("keys", "values")
    ]
    shapes = {tuple(part.shape) if isinstance(part, torch.Tensor) else None for part in parts}
    if len(shapes) != 1 or None in shapes or len(next(iter(shapes)) or ()) != 4:
        raise ExportError(
            f"{_name(model)} has a cache that isn't keys and values of one shape in each layer, "
            "and neither a fused graph nor torch.onnx can export it here"
        )
    if parts[0].shape[2] != _PAST:
        raise ExportError(f"{_name(model)} doesn't cache each token, so it can't be exported")
    return parts


def _unforgotten(part: Any, layer: Any) -> Any:
    """A layer's keys or values as long as the graph's, which keeps what lies beyond a window."""
    if not isinstance(part, torch.Tensor) or not getattr(layer, "is_sliding", False):
        return part
    return torch.nn.functional.pad(part, (0, 0, _PAST - part.shape[-2], 0))


def _name(model: PreTrainedModel) -> str:
    return f"this {model.config.model_type}"

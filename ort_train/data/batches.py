"""Checks of a batch before a model sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ort_train.errors import DataError

#: Labels of this value count nowhere (torch's cross entropy, transformers' collators).
IGNORED_LABEL = -100


def check_ids(model: Any, batch: Mapping[str, Any]) -> None:
    """Refuse token ids and labels that the model has no row for.

    A kernel that reads such an id raises something raw, or reads another memory. On a GPU, where a
    look at a value waits for the device, nothing is checked: its kernels assert.

    Args:
        model: a transformers or peft model; others aren't checked.
        batch: the model's keyword arguments.

    Raises:
        DataError: naming the value, its row and the vocabulary.
    """
    num_tokens = getattr(_embeddings(model, "get_input_embeddings"), "num_embeddings", None)
    for name in ("input_ids", "decoder_input_ids"):
        if num_tokens is not None:
            _check(name, batch.get(name), num_tokens, "the model's vocabulary of", None)
    if isinstance(batch.get("labels"), torch.Tensor):
        limit, what = _label_limit(model)
        if limit is not None:
            _check("labels", batch["labels"], limit, what, IGNORED_LABEL)


def _embeddings(model: Any, getter: str) -> Any:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None


def _label_limit(model: Any) -> tuple[int | None, str]:
    num_tokens = getattr(_embeddings(model, "get_output_embeddings"), "out_features", None)
    if num_tokens is not None:
        return num_tokens, "the model's vocabulary of"
    config = getattr(model, "config", None)
    if "Classification" in "".join(
        getattr(config, "architectures", None) or [type(model).__name__]
    ):
        num_labels = getattr(config, "num_labels", None)
        if num_labels is not None and num_labels > 1:
            return num_labels, "the model's classes, config.num_labels"
    return None, ""


def _check(name: str, ids: Any, limit: int, what: str, ignored: int | None) -> None:
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.device.type != "cpu":
        return
    if not ids.numel():
        return
    if int(ids.max()) < limit and int(ids.min()) >= 0:  # the common case, without a mask
        return
    outside = (ids >= limit) | (ids < 0)
    if ignored is not None:
        outside &= ids != ignored
    if not outside.any():
        return
    position = tuple(outside.nonzero()[0].tolist())
    place = f"row {position[0]}" + (f", position {position[1]}" if len(position) > 1 else "")
    exception = f", or {ignored} to be ignored" if ignored is not None else ""
    raise DataError(
        f"{name} hold {int(ids[position])} at {place} of a batch, outside of {what} {limit}: it "
        f"must be 0 to {limit - 1}{exception}. Tokenize with the model's own tokenizer, or make "
        "room with model.resize_token_embeddings"
    )

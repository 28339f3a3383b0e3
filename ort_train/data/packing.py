"""Packing: several samples of instructions in one row, none of which sees another.

Shape suffixes: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

import bisect
import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ort_train.data.batches import IGNORED_LABEL
from ort_train.errors import ModelError

if TYPE_CHECKING:
    import datasets
    import torch

    from ort_train.config import DataConfig

# Of a packed row's logits to those of its samples alone, in shares of the largest. Sums in another
# order differ by some units in the last place, at most 4e-7 in 60 architectures; a convolution with
# untrained weights that reaches into the sample before, by 6e-5.
_PROBE_TOLERANCE = {"float32": 3e-5, "float16": 1e-2, "bfloat16": 5e-2}
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


def plan_rows(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Which samples go into which row: best fit, the longest first.

    Args:
        lengths: tokens of each sample, `capacity` at most.
        capacity: T, tokens of a row.
        seed: of the order of rows, and of samples of one length.

    Returns:
        Indices of each row's samples; every sample is in one row.
    """
    draw = random.Random(seed)
    order = list(range(len(lengths)))
    draw.shuffle(order)
    order.sort(key=lambda index: -lengths[index])
    rows: list[list[int]] = []
    rooms: list[int] = []  # what is free in some row, ascending, each number once
    rows_with: dict[int, list[int]] = {}
    for index in order:
        place = bisect.bisect_left(rooms, lengths[index])
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rooms[place]
        rows[row].append(index)
        room -= lengths[index]
        if not rows_with.setdefault(room, []):
            bisect.insort(rooms, room)
        rows_with[room].append(row)
    draw.shuffle(rows)  # else the longest samples come first
    return rows


def pack(samples: datasets.Dataset, block_size: int, pad_id: int, seed: int) -> datasets.Dataset:
    """Rows of samples, one behind the other, and padding behind the last.

    Args:
        samples: `input_ids`, `attention_mask` and `labels` of each, `block_size` tokens at most.
        block_size: T, tokens of a row.
        pad_id: token that pads; it takes positions of its own, like one more sample.
        seed: see `plan_rows`.

    Returns:
        Rows of `input_ids`, `attention_mask` (0 on padding), `labels`, of which the first of each
        sample is ignored, as the token before it is another sample's, and `position_ids`, which
        start at 0 with each sample.
    """
    from datasets import Dataset, Features, List, Value

    columns = {name: samples[name] for name in ("input_ids", "attention_mask", "labels")}
    lengths = [len(ids) for ids in columns["input_ids"]]
    fillers = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORED_LABEL}
    rows: dict[str, list[list[int]]] = {name: [] for name in (*fillers, "position_ids")}
    for members in plan_rows(lengths, block_size, seed):
        num_padding = block_size - sum(lengths[index] for index in members)
        for name, filler in fillers.items():
            row: list[int] = []
            for index in members:
                values = columns[name][index]
                row += [filler, *values[1:]] if name == "labels" else values
            rows[name].append(row + [filler] * num_padding)
        counts = [*(lengths[index] for index in members), num_padding]
        rows["position_ids"].append([i for count in counts for i in range(count)])
    features = Features(dict.fromkeys(rows, List(Value("int64"))))
    return Dataset.from_dict(rows, features=features)


def packed_batch(
    rows: Sequence[Mapping[str, Any]], attention: str, dtype: str = "float32"
) -> dict[str, torch.Tensor]:
    """Stacks packed rows.

    The mask is explicit, as all of a model's layers take such a one: what transformers reads off
    `position_ids` without a mask (`find_packed_sequence_indices`) isn't read by every model, nor
    with a cache.

    Args:
        rows: see `pack`.
        attention: the model's, sdpa or eager.
        dtype: of the model's weights, which says what hides a token from eager attention.

    Returns:
        `input_ids`, `labels` and `position_ids`, (B, T) int64 each, and `attention_mask`
        (B, 1, T, T), in which each token sees itself and those of its sample before it, and padding
        sees nothing: booleans for sdpa, 0 or a very low number for eager attention, which adds it.
    """
    import torch

    columns = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    is_real_BT = columns.pop("attention_mask").bool()
    sample_BT = (columns["position_ids"] == 0).cumsum(1)
    sees_BTT = (sample_BT[:, :, None] == sample_BT[:, None, :]) & is_real_BT[:, :, None]
    mask = sees_BTT.tril().unsqueeze(1)
    if attention == "eager":
        kind = getattr(torch, dtype)
        mask = torch.zeros(mask.shape, dtype=kind).masked_fill(~mask, torch.finfo(kind).min)
    return {**columns, "attention_mask": mask}


def check_models(
    data: DataConfig, collate: Callable[[Any], dict[str, torch.Tensor]], *models: Any
) -> None:
    """:func:`check_model` for all models of a run, where its samples are packed.

    Args:
        models: None stands for a teacher that there isn't.

    Raises:
        ModelError: likewise.
    """
    if data.packing:
        for model in models:
            if model is not None:
                check_model(model, collate, data.block_size)


def check_model(
    model: Any, collate: Callable[[Any], dict[str, torch.Tensor]], block_size: int
) -> None:
    """Refuse models whose samples would not be what they are alone, before training.

    Two short samples are run, packed and each by itself.

    Args:
        model: a transformers or peft model.
        collate: makes a batch of packed rows.
        block_size: T, tokens of a row.

    Raises:
        ModelError: naming the reason.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = base.config.model_type
    reason = _static_reason(base, block_size) or _probe(model, collate)
    if reason:
        raise ModelError(
            f"data.packing can't be used with architecture {name}: {reason}; set "
            "data.packing=false, and train.ort={padding_sparsity: true} to leave out padding"
        )


def _static_reason(model: Any, block_size: int) -> str | None:
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        return "an encoder-decoder has two sequences for each sample"
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return "it takes no position_ids, which have to start anew with each sample"
    if getattr(config, "output_router_logits", False):
        return "the loss of its router (output_router_logits) counts over whole rows"
    others = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if others:
        return f"in its layers of {', '.join(sorted(others))} samples of a row would meet"
    uses_window = getattr(config, "use_sliding_window", True)
    for field in ("sliding_window", "attention_chunk_size"):
        window = getattr(config, field, None)
        if uses_window and isinstance(window, int) and window < block_size:
            return (
                f"the mask of packed rows has no place for its {field} {window}, which is below "
                f"data.block_size {block_size}: set data.block_size={window} or less"
            )
    return None


def _probe(model: Any, collate: Callable[[Any], dict[str, torch.Tensor]]) -> str | None:
    import torch

    device = next(model.parameters()).device
    num_tokens = model.get_input_embeddings().weight.shape[0]
    samples = [[(7 * i + 3) % num_tokens for i in range(n)] for n in (5, 4)]
    ids = [token for sample in samples for token in sample]
    row = {
        "input_ids": [*ids, 0],
        "attention_mask": [*[1] * len(ids), 0],
        "labels": [IGNORED_LABEL] * (len(ids) + 1),
        "position_ids": [*(i for sample in samples for i in range(len(sample))), 0],
    }
    batch = {name: value.to(device) for name, value in collate([row]).items() if name != "labels"}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = [
                model(input_ids=torch.tensor([sample], device=device), use_cache=False).logits[0]
                for sample in samples
            ]
            packed = model(**batch, use_cache=False).logits[0, : len(ids)]
    except Exception as error:  # of any model's own code
        return f"it can't be called with packed rows ({type(error).__name__}: {error})"
    finally:
        model.train(was_training)
    expected = torch.cat(alone).float()
    distance = float((packed.float() - expected).abs().max() / expected.abs().max())
    dtype = str(packed.dtype).removeprefix("torch.")
    if not distance <= _PROBE_TOLERANCE[dtype]:
        return (
            "its logits for a packed sample aren't those for the sample alone (they differ by "
            f"{distance:.1e} of the largest)"
        )
    return None

"""Magnitude pruning: the smallest weights of the linear layers become 0, and may be kept so."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils import prune
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from ort_train.errors import ConfigError, ModelError

#: Of each 4 weights in a row along the inputs, 2 stay: what NVIDIA's sparse tensor cores take.
#: Mishra et al.: Accelerating Sparse Deep Neural Networks, 2021.
PATTERN_2_4 = "2:4"
_GROUP, _KEPT = 4, 2


@dataclass(frozen=True)
class LayerReport:
    """A pruned layer.

    Attributes:
        num_weights: of its matrix.
        num_zeros: among them, afterwards.
        kept_norm: Frobenius norm of what stays, over that before.
    """

    name: str
    num_weights: int
    num_zeros: int
    kept_norm: float


def prune_model(
    model: torch.nn.Module,
    pattern: str | None = None,
    sparsity: float | None = None,
    exclude: Sequence[str] = (),
) -> list[LayerReport]:
    """Zero the smallest weights of every linear layer, in place.

    The output embedding, embeddings, norms and biases stay as they are.

    Args:
        pattern: "2:4": in each 4 weights in a row along the inputs, the 2 of smallest magnitude.
        sparsity: or instead the share of each layer's weights, between 0 and 1.
        exclude: patterns of layer names (fnmatch: model.layers.0.*) that stay as they are.

    Returns:
        One report a pruned layer.

    Raises:
        ConfigError: not one of pattern and sparsity, a value that can't be, or an excluded name
            that no layer has.
        ModelError: a layer whose inputs don't divide by 4, or no layer at all.
    """
    check_target(pattern, sparsity)
    everything = dict(linear_layers(model))
    for unwanted in exclude:
        if everything and not fnmatch.filter(everything, unwanted):
            raise ConfigError(
                f"--exclude {unwanted!r} matches none of the {len(everything)} linear layers, such "
                f"as {next(iter(everything))}: patterns are of whole names, * stands for any part"
            )
    layers = [
        (name, layer)
        for name, layer in everything.items()
        if not any(fnmatch.fnmatchcase(name, unwanted) for unwanted in exclude)
    ]
    if not layers:
        raise ModelError("there is no linear layer to prune: look at exclude")
    if pattern is not None:
        odd = [name for name, layer in layers if _by_inputs(layer).shape[1] % _GROUP]
        if odd:
            raise ModelError(
                f"pattern {pattern} needs inputs in fours, and {odd[0]} has "
                f"{_by_inputs(dict(layers)[odd[0]]).shape[1]}: leave it out with --exclude, or use "
                "--sparsity"
            )
    reports = []
    for name, layer in layers:
        weight = layer.weight.data
        mask = mask_2_4(_by_inputs(layer)) if sparsity is None else mask_smallest(weight, sparsity)
        if sparsity is None and isinstance(layer, Conv1D):
            mask = mask.T
        before = weight.norm()
        weight.mul_(mask)
        kept = (weight.norm() / before).item() if before > 0 else 1.0
        num_zeros = int((weight == 0).sum())
        reports.append(LayerReport(name, weight.numel(), num_zeros, kept))
    return reports


def check_target(pattern: str | None, sparsity: float | None) -> None:
    """Refuse what `prune_model` can't aim at.

    Raises:
        ConfigError: not one of pattern and sparsity, or a value that can't be.
    """
    if (pattern is None) == (sparsity is None):
        raise ConfigError("give one of pattern and sparsity")
    if pattern not in (None, PATTERN_2_4):
        raise ConfigError(f"pattern {pattern!r} is unknown: there is {PATTERN_2_4}")
    if sparsity is not None and not 0 < sparsity < 1:
        raise ConfigError(f"sparsity {sparsity} must be between 0 and 1")


def mask_2_4(weight: torch.Tensor) -> torch.Tensor:
    """Where a matrix (outputs, inputs) keeps its weights: 2 of each 4 along the inputs.

    Returns:
        Boolean, of the matrix's shape; of equal magnitudes the first stay.
    """
    groups = weight.abs().reshape(-1, _GROUP)
    order = groups.argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    return mask.scatter_(1, order[:, :_KEPT], True).reshape(weight.shape)


def mask_smallest(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Where a tensor keeps its weights: all but round(sparsity x size) of smallest magnitude."""
    default = torch.ones_like(weight)
    return prune.L1Unstructured(sparsity).compute_mask(weight, default).bool()


def linear_layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Linear layers by name, GPT-2's Conv1D among them, without the output embedding."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear | Conv1D) and layer is not head:
            yield name, layer


def _by_inputs(layer: Any) -> torch.Tensor:
    """The layer's matrix as (outputs, inputs), which Conv1D has the other way round."""
    return layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data


class KeepZeros(TrainerCallback):
    """Keeps what is 0 in the linear layers at 0, through a training.

    After each step of the optimizer they are zeroed again, so that every forward sees them as 0;
    what the optimizer remembers of them has no effect on the others.

    Raises:
        ModelError: the model's linear layers have no zeros.
    """

    def __init__(self, model: torch.nn.Module):
        self._zeros = [
            (layer.weight, zeros)
            for _, layer in linear_layers(model)
            if (zeros := layer.weight.detach() == 0).any()
        ]
        if not self._zeros:
            raise ModelError(
                "train.keep_zeros: the model has no zeros to keep; prune it first with "
                "`ort-train prune`, or set train.keep_zeros=false"
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The trainer may have moved the model since.
        self._zeros = [(weight, zeros.to(weight.device)) for weight, zeros in self._zeros]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for weight, zeros in self._zeros:
                weight.masked_fill_(zeros, 0.0)

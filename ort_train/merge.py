"""Merging: a run's adapter into its base, saved as a plain transformers model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ort_train import checkpoints, fingerprint, quantization
from ort_train.config import RunConfig
from ort_train.errors import CheckpointError, ModelError
from ort_train.files import expanded, new_folder, new_folder_obstacle
from ort_train.recipes import load_recipe
from ort_train.run_folder import CONFIG_FILE, MODEL_FOLDER

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASES = ("dequantized", "original")


def merge(run: str | Path, out: str | Path, base: str | None = None) -> str:
    """Merges the adapter that a run has saved into its base model.

    The base is loaded, or made, as the run did it, and never written to.

    Args:
        run: the run's folder.
        out: a new or empty folder; it is whole or not there.
        base: of a QLoRA run: ``dequantized``, the default: the weights that the adapter was trained
            beside; ``original``: those before quantization, which are closer to the model that was
            published, and not what the run's evaluation measured.

    Returns:
        What was merged onto what, one line.

    Raises:
        CheckpointError: `run` has no adapter, or one of another base or that isn't whole, or `out`
            holds something or can't be made.
        ModelError: the adapter is of another architecture.
    """
    run, out = expanded(run), expanded(out).resolve()
    config, adapter = _read(run)
    if base is not None and config.adapter.method != "qlora":
        raise CheckpointError(
            f"{str(run)!r} is no QLoRA run: its base is the original one, leave out base {base}"
        )
    if (obstacle := new_folder_obstacle(out)) is not None:
        raise CheckpointError(f"{str(out)!r} {obstacle}")
    tokenizer = _load_tokenizer(adapter)
    base = base or ("dequantized" if config.adapter.method == "qlora" else "original")
    model = _load_base(config, tokenizer, dequantized=base == "dequantized")
    checkpoints.check_room(out, checkpoints.required_bytes(model, with_optimizer=False))
    adapted = _attach(model, adapter)
    untie_adapted_head(adapted)
    merged: Any = adapted.merge_and_unload(safe_merge=True)
    with new_folder(out) as staged:
        merged.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
    name = config.model.name_or_path or f"{config.model.architecture} of the run's seed"
    return f"merged the adapter of {run} into the {base} weights of {name}: {out}"


def _read(run: Path) -> tuple[RunConfig, Path]:
    """A run's config, and the folder of its adapter."""
    if not (run / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{str(run)!r} has no {CONFIG_FILE}, so it is no run of ort_train: name the folder "
            "that a run wrote (its output.dir)"
        )
    config = load_recipe(run / CONFIG_FILE)
    folder = run / MODEL_FOLDER
    if config.adapter.method == "none":
        raise CheckpointError(
            f"{str(run)!r} trained the whole model: {str(folder)!r} is a plain transformers model "
            "already"
        )
    if not (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{str(folder)!r} holds no adapter: let the run end first, with output.resume=auto"
        )
    return config, folder


def _load_base(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, dequantized: bool
) -> PreTrainedModel:
    import torch

    from ort_train.models import load_model

    quantized = quantization.of_run(config) if dequantized else None
    model = load_model(
        config.model, tokenizer, config.train.seed, config.data.block_size, quantized
    )
    if quantized is not None:
        quantization.dequantize(model, getattr(torch, config.model.dtype))
    return model


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(_not_whole(folder, "its tokenizer can't be loaded", error)) from error


def _not_whole(folder: Path, what: str, error: Exception) -> str:
    return (
        f"{str(folder)!r} isn't whole, {what} ({str(error).splitlines()[0]}): copy or train the "
        "run anew"
    )


def _attach(model: PreTrainedModel, folder: Path) -> PeftModel:
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        saved = {name: tensor.shape for name, tensor in load_file(_weights(folder)).items()}
        json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(_not_whole(folder, "its adapter can't be read", error)) from error
    message = f"the adapter in {str(folder)!r} is of another base than the run's config describes"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # found below
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # see adapters.py
        try:
            adapted = PeftModel.from_pretrained(model, str(folder))
        except (RuntimeError, ValueError, KeyError) as error:
            raise ModelError(f"{message}: {error}") from error
    own = {name: t.shape for name, t in get_peft_model_state_dict(adapted).items()}
    if own != saved:
        differing = sorted(set(own.items()) ^ set(saved.items()))
        raise ModelError(f"{message}: they differ in {differing[0][0]}")
    fingerprint.check(adapted, folder)
    return adapted


def untie_adapted_head(adapted: PeftModel) -> None:
    """Give an output embedding that has an adapter a weight of its own.

    peft (0.21) adds the update to the weight where it lies, and the input embedding that shares it
    would change, too.
    """
    import torch

    model: Any = adapted.get_base_model()
    head = getattr(model.get_output_embeddings(), "base_layer", None)
    if head is not None and head.weight is model.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False


def _weights(folder: Path) -> Path:
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise CheckpointError(f"{str(folder)!r} has no {file.name}: the run's model isn't whole")
    return file

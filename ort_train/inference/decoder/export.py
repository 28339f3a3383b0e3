"""Export: a trained run or a transformers folder becomes an ONNX decoder, checked against it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ort_train.errors import ExportError
from ort_train.files import expanded
from ort_train.inference.decoder import parity
from ort_train.inference.decoder.architectures import fused_obstacle, traced_obstacle, windows
from ort_train.inference.folder import (
    INFO_FILE,
    ExportedModel,
    ExportInfo,
    check_out,
    load_folder,
    load_graph,
    read_generation_config,
    read_tokenizer,
    scratch,
    staged,
    write_info,
)
from ort_train.reports import provenance
from ort_train.run_folder import CONFIG_FILE, MODEL_FOLDER

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

GRAPHS = ("auto", "fused", "traced")
PRECISIONS = ("fp32", "fp16", "int8", "int4")
_QUANTIZED = ("int8", "int4")
_BYTES = {"fp32": 4, "fp16": 2}


def export_model(
    source: str | Path,
    out: str | Path,
    precision: str = "fp32",
    graph: str = "auto",
    say: Callable[[str], Any] = print,
    show_progress: bool = False,
) -> ExportedModel:
    """Write a model as an ONNX decoder with KV cache, after comparing its logits with PyTorch's.

    Args:
        source: the folder of a run of `ort-train train` (an adapter is merged first), or of a
            transformers model.
        out: a new or empty folder; it is whole or not there.
        precision: fp32; fp16, of weights, computation and cache; int8 or int4: the fp32 export's
            weights, quantized by the defaults of `ort-train quantize` and compared as it does.
        graph: ``fused``: GroupQueryAttention and its kin; ``traced``: through torch.onnx; ``auto``:
            fused where the architecture has such a graph, otherwise traced, which is said.
        say: is handed what the user should know, a line at a time.
        show_progress: a bar on stderr while weights are written.

    Returns:
        The exported model.

    Raises:
        ExportError: no model, one without a graph as asked for, or logits that differ.
        CheckpointError: a run that isn't complete, or too little room.
    """
    if precision not in PRECISIONS:
        raise ExportError(f"precision {precision!r} should be one of {', '.join(PRECISIONS)}")
    if graph not in GRAPHS:
        raise ExportError(f"graph {graph!r} should be one of {', '.join(GRAPHS)}")
    out = check_out(out)
    if precision in _QUANTIZED:
        return _export_quantized(source, out, precision, graph, say, show_progress)
    with _transformers_folder(expanded(source), out, say) as folder:
        config = load_decoder_config(folder)
        read_generation_config(folder)  # a damaged one is told before the work
        kind = _choose(config, graph, precision, say)
        num_bytes = _weight_bytes(folder, config, precision)
        with staged(out, num_bytes) as staging:
            _write(folder, staging, kind, precision, str(source), say, show_progress)
    return load_folder(out)


def _export_quantized(
    source: str | Path,
    out: Path,
    precision: str,
    graph: str,
    say: Callable[[str], Any],
    show_progress: bool,
) -> ExportedModel:
    """Export in fp32 beside `out`, then quantize."""
    from ort_train.inference.quantization.quantize import Scheme, quantize_folder
    from ort_train.inference.text import make_rows

    scheme = Scheme("int8" if precision == "int8" else "int4")
    with scratch(out, "fp32") as temporary:
        whole = export_model(source, temporary / "model", "fp32", graph, say, show_progress)
        rows = make_rows(whole)
        report = quantize_folder(whole.path, out, scheme, ids_BT=rows.ids_BT)
    assert report.comparison is not None  # there are rows
    say(
        f"quantized to {report.scheme}: mean KL divergence to fp32 "
        f"{report.comparison.mean_kl:.2g} nats a token, on {rows.source or 'random tokens'}"
    )
    return load_folder(out)


def describe(exported: ExportedModel) -> str:
    """What was written and how close it is, a line each."""
    info = exported.info
    line = (
        f"{exported.path}: {info.kind} {info.precision} graph of {info.architecture}, "
        f"{exported.num_bytes / 2**20:,.1f} MiB"
    )
    if info.parity is None:  # quantized: compared with fp32, which was compared with PyTorch
        return line
    lengths = ", ".join(map(str, info.parity.prompt_lengths))
    return (
        f"{line}\nlogits within {info.parity.logits_max_abs:.1g} of PyTorch's "
        f"({info.parity.tolerance:.1g} allowed): prompts of {lengths} tokens in one batch, and "
        f"{info.parity.decode_steps} decode steps"
    )


def _write(
    folder: Path,
    staging: Path,
    kind: Literal["fused", "traced"],
    precision: str,
    source: str,
    say: Callable[[str], Any],
    show_progress: bool,
) -> None:
    """Everything that an exported folder holds, parity checked."""
    from ort_train.inference.decoder.genai import FILE as GENAI_FILE
    from ort_train.inference.decoder.genai import genai_obstacle, write_genai_config

    model: Any = _load_model(folder)
    config, generation = model.config, model.generation_config
    with _progress(model, precision, show_progress) as on_write:
        if kind == "fused":
            details = _fused(model, staging, precision, on_write)
        else:
            from ort_train.inference.decoder.traced import write_traced

            details = write_traced(model, staging, on_write)
    expected = parity.reference(model, details["max_positions"], details["sliding_windows"])
    del model
    _release_memory()
    graph = load_graph(staging).graph
    info = ExportInfo(
        kind=kind,
        precision=precision,
        architecture=config.model_type,
        source=os.path.basename(os.path.abspath(source)),
        versions=provenance.versions(),
        inputs=[value.name for value in graph.input],
        outputs=[value.name for value in graph.output],
        **details,
    )
    _copy_companions(folder, staging, config, generation, say)
    write_info(staging, info)
    if (obstacle := genai_obstacle(info)) is None:
        write_genai_config(staging, info, config, generation)
    else:
        say(f"no {GENAI_FILE}: {obstacle}")
    exported = load_folder(staging)
    info.parity = parity.check(exported, expected)
    write_info(staging, info)


@contextlib.contextmanager
def _transformers_folder(source: Path, out: Path, say: Callable[[str], Any]) -> Iterator[Path]:
    """The folder of a plain transformers model; of a run with an adapter, a merged one for now."""
    if not source.is_dir():
        raise ExportError(
            f"{str(source)!r} is no folder: name a run's folder, or that of a transformers model"
        )
    if (source / CONFIG_FILE).is_file():
        model = source / MODEL_FOLDER
        if (model / "config.json").is_file():
            yield model
            return
        from ort_train.merge import merge

        with scratch(out, "merged") as temporary:
            merge(source, temporary / "model")
            say(f"merged the adapter of {source} into its base")
            yield temporary / "model"
        return
    if (source / "adapter_config.json").is_file():
        raise ExportError(
            f"{str(source)!r} is an adapter without its base: name the run's folder, or merge it "
            "with peft's merge_and_unload and save the result"
        )
    if not (source / "config.json").is_file():
        raise ExportError(
            f"{str(source)!r} is no model: it has neither a {CONFIG_FILE}, as a run of `ort-train "
            "train` leaves, nor transformers' config.json"
        )
    yield source


def load_decoder_config(folder: Path) -> PretrainedConfig:
    """The config of a transformers folder that can be exported, as far as it tells.

    Raises:
        ExportError: there is none, or it is of no plain decoder.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if (folder / INFO_FILE).is_file():
        raise ExportError(
            f"{str(folder)!r} is exported already: name the run, or the transformers folder, that "
            "it was made of"
        )
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # configs raise types of their own
        raise ExportError(f"can't read the config of {str(folder)!r}: {error}") from error
    name = f"{str(folder)!r} is a {config.model_type}"
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or getattr(
        config, "is_encoder_decoder", False
    ):
        raise ExportError(f"{name}, which is no causal language model: nothing to generate with")
    is_encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if is_encoder and not getattr(config, "is_decoder", False):
        raise ExportError(
            f"{name} that reads both ways (its config has no is_decoder): nothing to generate with"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ExportError(
            f"{name} with quantized weights, which a graph doesn't take: export the model it was "
            "made of, or a QLoRA run by its folder"
        )
    return config


def _choose(
    config: PretrainedConfig, graph: str, precision: str, say: Callable[[str], Any]
) -> Literal["fused", "traced"]:
    obstacle = fused_obstacle(config)
    if graph == "traced" or obstacle is not None:
        if graph == "fused":
            raise ExportError(
                f"this {config.model_type} has no fused graph: {obstacle}. --graph traced exports "
                "it through torch.onnx, which runs slower"
            )
        if precision != "fp32":
            why = obstacle or "--graph traced asks for it"
            raise ExportError(
                f"a graph traced by torch.onnx is fp32 only, and this {config.model_type} would "
                f"get one, as {why}: leave out --precision {precision}"
            )
        if (untraceable := traced_obstacle(config)) is not None:
            way = f"and there is no fused graph: {obstacle}" if obstacle else "use --graph fused"
            raise ExportError(
                f"torch.onnx can't trace this {config.model_type}, as {untraceable}; {way}"
            )
        if obstacle is not None and graph == "auto":
            say(f"no fused graph: {obstacle}; it is exported through torch.onnx and runs slower")
        return "traced"
    return "fused"


def _load_model(folder: Path) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    from ort_train.models import LOAD_ERRORS

    try:
        # transformers' plain attention: all architectures have it, and it can be traced.
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    except LOAD_ERRORS as error:
        raise ExportError(f"can't load the model in {str(folder)!r}: {error}") from error
    if missing := sorted(loading["missing_keys"]):
        raise ExportError(
            f"{str(folder)!r} lacks {len(missing)} of the model's weights ({missing[0]}, ...): is "
            "it whole, and of a causal language model?"
        )
    return model.eval()


def _fused(
    model: PreTrainedModel, staging: Path, precision: str, on_write: Callable[[int], Any]
) -> dict[str, Any]:
    import numpy as np

    from ort_train.inference.decoder.fused import write_fused

    dtype = np.float16 if precision == "fp16" else np.float32
    plan = write_fused(model, staging, dtype, on_write)
    return {
        "num_layers": plan.num_layers,
        "num_kv_heads": plan.num_kv_heads,
        "head_dim": plan.head_dim,
        "vocab_size": plan.vocab_size,
        "max_positions": plan.max_positions,
        "sliding_windows": windows(model.config),
        "cache_dtype": np.dtype(dtype).name,
    }


def _copy_companions(
    folder: Path, staging: Path, config: Any, generation: Any, say: Callable[[str], Any]
) -> None:
    """Config, generation config and tokenizer."""
    config.save_pretrained(staging)
    own = folder / "generation_config.json"
    if own.is_file():
        shutil.copyfile(own, staging / own.name)
    else:
        generation.save_pretrained(staging)
    try:
        tokenizer = read_tokenizer(folder)
    except Exception as error:  # tokenizers raises bare Exception
        say(f"no tokenizer is exported, as {str(folder)!r} has none to load: {_first_line(error)}")
        return
    tokenizer.save_pretrained(staging)


def _weight_bytes(folder: Path, config: PretrainedConfig, precision: str) -> int:
    """An estimate, from the sizes of the model's files and the type that the config tells of."""
    import torch

    files = [*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]
    dtype = getattr(config, "dtype", None)
    itemsize = dtype.itemsize if isinstance(dtype, torch.dtype) else 4
    return sum(file.stat().st_size for file in files) * _BYTES[precision] // itemsize


@contextlib.contextmanager
def _progress(
    model: PreTrainedModel, precision: str, is_shown: bool
) -> Iterator[Callable[[int], Any]]:
    from tqdm import tqdm

    total = sum(parameter.numel() for parameter in model.parameters()) * _BYTES[precision]
    with tqdm(
        total=total, desc="writing weights", unit="B", unit_scale=True, unit_divisor=1024,
        disable=not is_shown, file=sys.stderr,
    ) as bar:  # fmt: skip
        yield bar.update


def _release_memory() -> None:
    """Give back what PyTorch's model has freed, before ONNX Runtime takes as much."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

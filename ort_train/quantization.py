"""4-bit weights by bitsandbytes: of a model that is loaded, or in place of a made one's.

Their codebooks, and double quantization: QLoRA, https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ort_train.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from ort_train.config import RunConfig

# One model serves all that auto tries.
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "auto": "float32"}


@dataclass(frozen=True)
class Quantization:
    """How weights become 4-bit.

    Attributes:
        quant_type: codebook, "nf4" or "fp4".
        double_quant: whether the scales are quantized, too.
        compute_dtype: name of the torch dtype that weights are decoded to and multiplied in.
    """

    quant_type: str = "nf4"
    double_quant: bool = False
    compute_dtype: str = "float32"

    @property
    def bits_per_weight(self) -> float:
        """4 and the share of a scale: 32 bits for 64 weights, or 8 and 32 bits for 256 of those."""
        return 4 + (8 / 64 + 32 / (64 * 256) if self.double_quant else 32 / 64)


def of_run(config: RunConfig) -> Quantization | None:
    """The quantization that a recipe asks for, or None."""
    adapter = config.adapter
    if adapter.method != "qlora":
        return None
    return Quantization(
        adapter.quant_type or "nf4",
        bool(adapter.double_quant),
        adapter.compute_dtype or _DTYPES[config.train.precision],
    )


def of_run_here(config: RunConfig) -> Quantization | None:
    """:func:`of_run`, as this machine's backend takes it.

    On a CPU, ONNX Runtime decodes to fp32; its products are in train.precision all the same.
    """
    import torch

    quantization = of_run(config)
    is_ort_on_cpu = config.train.backend == "ort" and not torch.cuda.is_available()
    if quantization is None or not is_ort_on_cpu or config.adapter.compute_dtype is not None:
        return quantization
    return replace(quantization, compute_dtype="float32")


def unavailable_reason() -> str | None:
    """Why nothing can be quantized here, with the way out, or None."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "4-bit weights need bitsandbytes, which is missing: pip install 'ort_train[qlora]'"
    return None


def loading_options(quantization: Quantization, config: PretrainedConfig) -> dict[str, Any]:
    """Arguments of from_pretrained that quantize while loading.

    Args:
        config: of the model to load, whose weights may be 4-bit already.

    Raises:
        ModelError: bitsandbytes is missing, or the weights are quantized in another way.
    """
    _require_bitsandbytes()
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        values = stored if isinstance(stored, dict) else stored.to_dict()
        if not (values.get("quant_method") == "bitsandbytes" and values.get("load_in_4bit")):
            raise ModelError(
                f"the weights of model.name_or_path are quantized already, by "
                f"{values.get('quant_method')}: give a model that isn't, or is by bitsandbytes to "
                "4 bits"
            )
        wanted = (quantization.quant_type, quantization.double_quant)
        found = (values["bnb_4bit_quant_type"], values["bnb_4bit_use_double_quant"])
        if wanted != found:
            raise ModelError(
                f"the weights of model.name_or_path are 4-bit already: set adapter.quant_type="
                f"{found[0]} and adapter.double_quant={str(found[1]).lower()}"
            )
    import torch

    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"device_map": {"": device}}
    if stored is None:
        options["quantization_config"] = _bnb_config(quantization)
    return options


def refuse_full_fine_tune(config: PretrainedConfig) -> None:
    """Refuse stored weights that are quantized, where no QLoRA was asked for.

    Raises:
        ModelError: with the way out.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            "the weights of model.name_or_path are quantized and can't be trained themselves: set "
            "adapter.method=qlora, or load the model's unquantized weights"
        )


def quantize(model: PreTrainedModel, quantization: Quantization) -> None:
    """Replace a made model's linear layers but the output by 4-bit ones, in place.

    It is then as transformers leaves one whose weights it quantizes in loading.

    Raises:
        ModelError: bitsandbytes is missing, or the model has no linear layer.
    """
    _require_bitsandbytes()
    from transformers.quantizers import AutoHfQuantizer

    found = list(quantizable(model))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no linear layer to quantize: set adapter.method=lora or "
            "none"
        )
    for name, linear in found:
        model.set_submodule(name, _quantized(linear, quantization))
    # peft and transformers' Trainer look at these.
    config = _bnb_config(quantization)
    quantizer = AutoHfQuantizer.from_config(config)
    attributes = {"hf_quantizer": quantizer, "is_quantized": True, "is_loaded_in_4bit": True}
    for name, value in attributes.items():
        setattr(model, name, value)
    model.quantization_method = config.quant_method
    model.config.quantization_config = config


def quantizable(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Names and modules of a model's linear layers but its output; of those of adapters none."""
    import torch
    from transformers.pytorch_utils import Conv1D

    output: Any = model.get_output_embeddings()
    output = getattr(output, "base_layer", output)  # within an adapter
    for name, part in model.named_modules():
        is_linear = type(part) is torch.nn.Linear or isinstance(part, Conv1D)
        if is_linear and part is not output and "lora_" not in name:
            yield name, part


def prepare(model: torch.nn.Module, quantization: Quantization) -> None:
    """Make a model's 4-bit layers fit to be trained through.

    Args:
        quantization: gives their compute type, also of layers that were stored with another.

    Raises:
        ModelError: naming the layers that bitsandbytes decodes wrongly on this machine.
    """
    import torch

    from ort_train.ortmodule.export import layers_4bit

    misread = []
    for layer in layers_4bit.layers(model):
        layer.compute_dtype = getattr(torch, quantization.compute_dtype)
        layers_4bit.keep_format(layer)
        if layers_4bit.is_misread(layer):
            misread.append(layer.in_features)
    if misread:
        raise ModelError(
            f"{len(misread)} linear layers have {sorted(set(misread))} columns, no multiple of the "
            "block size 64: bitsandbytes decodes such 4-bit weights wrongly on this CPU. Train on "
            "a GPU, or set adapter.method=lora"
        )


def dequantize(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace 4-bit layers by plain ones that hold what they decode to, in place.

    The model is then one that was never quantized.
    """
    import bitsandbytes
    import torch

    for name, part in list(model.named_modules()):
        if not isinstance(part, bitsandbytes.nn.Linear4bit):
            continue
        state = part.weight.quant_state
        weight = bitsandbytes.functional.dequantize_4bit(part.weight.data, state).to(dtype)
        linear = torch.nn.Linear(*weight.shape[::-1], bias=part.bias is not None, device="meta")
        linear.weight = torch.nn.Parameter(weight)
        if part.bias is not None:
            linear.bias = torch.nn.Parameter(part.bias.data.to(dtype))
        model.set_submodule(name, linear)
    for name in ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "quantization_method"):
        if name in model.__dict__:
            delattr(model, name)
    del model.config.quantization_config
    # Left on a model that was quantized in loading; transformers 4.57 can't write it to a file.
    model.config.__dict__.pop("_pre_quantization_dtype", None)


def _require_bitsandbytes() -> None:
    if (reason := unavailable_reason()) is not None:
        raise ModelError(reason)
    hush_kernel_notice()
    importlib.import_module("bitsandbytes")


def hush_kernel_notice() -> None:
    """Leave out one line of bitsandbytes 0.50: its import says that kernels for inference in bf16
    can be downloaded.

    peft imports bitsandbytes wherever it is installed, so programs of ours call this first. All
    else that bitsandbytes logs is shown.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_kernel_notice)


def _is_no_kernel_notice(line: logging.LogRecord) -> bool:
    return not str(line.msg).startswith("Failed to load CPU gemm_4bit_forward")


def _bnb_config(quantization: Quantization) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, quantization.compute_dtype),
    )


def _quantized(linear: Any, quantization: Quantization) -> torch.nn.Module:
    import bitsandbytes
    import torch

    # A Conv1D's weight is stored transposed.
    weight = linear.weight if isinstance(linear, torch.nn.Linear) else linear.weight.T
    layer = bitsandbytes.nn.Linear4bit(
        weight.shape[1],
        weight.shape[0],
        bias=linear.bias is not None,
        compute_dtype=getattr(torch, quantization.compute_dtype),
        compress_statistics=quantization.double_quant,
        quant_type=quantization.quant_type,
        device="meta",
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        weight.data.contiguous(),
        requires_grad=False,
        compress_statistics=quantization.double_quant,
        quant_type=quantization.quant_type,
        module=layer,
    )
    layer.bias = linear.bias
    return layer.to(weight.device).requires_grad_(False)

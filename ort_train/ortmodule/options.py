"""ORTModule's switches as typed options, set only while a graph is built.

Upstream reads its switches from environment variables. Here each is a field with its own type and
check; :meth:`OrtOptions.environment` puts them into the process's environment for the moment in
which ORTModule is constructed and exports, and takes them out again.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ort_train.errors import ConfigError
from ort_train.near import did_you_mean
from ort_train.ortmodule.triton.config import config_problems

LogLevelName = Literal["verbose", "info", "warning", "error", "fatal"]
_LOG_LEVELS = ("verbose", "info", "warning", "error", "fatal")
_RECOMPUTE_LEVELS = {"none": 0, "layerwise": 1, "layerwise_compromised": 2}
_PATHS = (
    "recompute_config", "triton_config", "tuning_results_path", "save_onnx_path", "profile_prefix",
)  # fmt: skip
_CONV_SEARCHES = ("heuristic", "exhaustive")
_PRODUCTS = ("auto", "onednn", "onnxruntime")
_ATTENTIONS = ("auto", "onnxruntime", "torch")
_FUSIONS = ("none", "triton")
#: Options that leave tokens out, and the input that says which.
SPARSITY = {"label_sparsity": "labels", "padding_sparsity": "attention_mask"}


@dataclass(frozen=True)
class OrtOptions:
    """How ONNX Runtime builds and runs the training graph.

    Upstream's own `ORTMODULE_*` variables are not read: one that is set is named in a warning.
    Source: `onnxruntime/training/ortmodule/options.py` and
    `docs/ORTModule_Training_Guidelines.md` of onnxruntime 1.19.2.

    Raises:
        ConfigError: with all problems at once; switches that are dead upstream are refused.
    """

    #: Threads of ONNX Runtime's pool; None shares this machine's cores among its ranks.
    num_threads: int | None = None
    #: Whether idle threads of the pool spin. On a CPU torch's then don't, in all of the process, as
    #: long as training goes on (openmp.py): steps of some 50 ms, whose products are ONNX Runtime's,
    #: gain a tenth; others, and what runs in eager between them, lose more.
    allow_spinning: bool = False
    #: Whose kernels multiply fp32 matrices on a CPU: oneDNN's (torch's), ONNX Runtime's, or "auto":
    #: oneDNN's where they serve (AVX-512 without AMX); elsewhere torch's own choice, for decoded
    #: 4-bit weights alone.
    products: Literal["auto", "onednn", "onnxruntime"] = "auto"
    #: Who computes attention on a CPU: ONNX Runtime by products and a softmax, torch by its fused
    #: kernel, which keeps no softmax, or "auto": torch where the first batch is long
    #: (attention_kernels.py) or padding is left out, each sample then by itself
    #: (packed_attention.py), and where attention has no dropout and no bias.
    attention: Literal["auto", "onnxruntime", "torch"] = "auto"
    #: Keep memory from step to step (memory.py): of large gradients, up to 1 GiB, and what is freed
    #: where the allocator is glibc's.
    keep_freed_memory: bool = True
    #: In bf16 on a CPU, round frozen weights once and keep the copies, half their size, from step
    #: to step, and those of trained weights within `accumulating`. Before each step a weight's
    #: address, its version and an entry of each row are compared (rounded_weights.py): what a loop
    #: writes to single entries through `.data`, which torch doesn't count, can be missed.
    keep_rounded_weights: bool = True
    #: Graph-level reduction of FLOPs (shrinking operators are moved up).
    compute_optimizer: bool = True
    #: Tokens whose label is ignored (-100) cost nothing in head and loss, in any batch
    #: (sparsity.py). A training call's logits are then computed only if they are read. None: off,
    #: unless backend "auto" finds that it is faster, where nothing but the loss is read.
    label_sparsity: bool | None = None
    #: Tokens that attention_mask hides cost nothing, in any batch, but in attention that
    #: ONNX Runtime computes (`attention`); what a training call returns for them is 0. None: as
    #: label_sparsity.
    padding_sparsity: bool | None = None
    #: Recompute activations in backward instead of keeping them.
    recompute: Literal["none", "layerwise", "layerwise_compromised"] = "none"
    #: JSON of chosen recompute subgraphs, instead of `recompute`.
    recompute_config: str | None = None
    #: Free gradients during backward; needs `compiled_extensions`.
    mem_efficient_grad_management: bool = False
    #: torch.autograd.Function inside the graph (PythonOp): builds ORTModule's C++ extensions.
    compiled_extensions: bool = False
    #: Export torch's checkpointed functions as they are; needs `compiled_extensions`.
    allow_autograd_checkpoint: bool = False
    #: Copy the module before export; only for modules whose forward changes its own parameters.
    deepcopy_before_export: bool = False
    onnx_opset_version: int = 17
    conv_algo_search: Literal["heuristic", "exhaustive"] = "heuristic"
    #: Who fuses connected elementwise operators into one kernel: Triton (CUDA only), or nobody.
    fusion: Literal["none", "triton"] = "none"
    #: What may be fused: a file that `triton_config.FusionConfig` writes.
    triton_config: str | None = None
    triton_debug: bool = False
    #: Measure GPU kernels' variants online (CUDA/ROCm only), for at most this long.
    tuning: bool = False
    max_tuning_duration_ms: int | None = None
    tuning_results_path: str | None = None
    #: Log CUDA's memory at each stage of a step.
    print_memory_stats: bool = False
    #: Save the graphs of each stage as ONNX files under `save_onnx_path`, named by `onnx_prefix`.
    save_onnx: bool = False
    onnx_prefix: str = "model"
    save_onnx_path: str | None = None
    #: Write how long each kernel took to a file that begins with this, one for each graph
    #: (profiling.py reads them); it costs some microseconds a kernel.
    profile_prefix: str | None = None
    log_level: LogLevelName = "error"
    #: Keep built graphs on disk, so that a second start of the same run skips export and gradient
    #: graph (export_cache.py).
    export_cache: bool = True
    #: Different input schemas that may be exported before the module's use is called a mistake.
    max_graphs: int = 16

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ConfigError(problems)

    def _problems(self) -> Iterator[str]:
        for name, minimum in (("num_threads", 1), ("max_tuning_duration_ms", 1), ("max_graphs", 1)):
            value = getattr(self, name)
            is_number = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and (not is_number or value < minimum):
                yield f"{name}={value!r} must be an integer of at least {minimum}"
        for name, choices in (
            ("recompute", tuple(_RECOMPUTE_LEVELS)),
            ("conv_algo_search", _CONV_SEARCHES),
            ("log_level", _LOG_LEVELS),
            ("products", _PRODUCTS),
            ("attention", _ATTENTIONS),
            ("fusion", _FUSIONS),
        ):
            if getattr(self, name) not in choices:
                yield f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}"
        for field in fields(self):
            value = getattr(self, field.name)
            is_switch = isinstance(field.default, bool) or field.name.endswith("_sparsity")
            if is_switch and value is not field.default and not isinstance(value, bool):
                yield f"{field.name}={value!r} must be true or false"
        paths = {name: getattr(self, name) for name in _PATHS}
        for name, path in (*paths.items(), ("onnx_prefix", self.onnx_prefix)):
            if path is not None and not isinstance(path, str | os.PathLike):
                yield f"{name}={path!r} must be a string"
                paths.pop(name, None)
        if self.onnx_opset_version != 17:
            yield (
                f"onnx_opset_version={self.onnx_opset_version!r}: ORTModule 1.19.2 builds "
                "gradients for opset 17, the only one tested here; leave it at 17"
            )
        for name in ("recompute_config", "triton_config"):
            path = paths.get(name)
            if path is not None and not Path(path).is_file():
                yield f"{name}={path!r} is not a file"
            elif path is not None and name == "triton_config":
                yield from config_problems(path)
        for name, off in (("recompute", "none"), ("recompute_config", None)):
            if self.attention == "torch" and getattr(self, name) != off:
                yield (
                    f"attention='torch' and {name} exclude each other: it has to find attention's "
                    "products in the graph; leave attention at 'auto'"
                )
        if self.recompute_config is not None and self.recompute != "none":
            yield "recompute and recompute_config exclude each other: give one of them"
        for name in (
            "mem_efficient_grad_management",
            "allow_autograd_checkpoint",
        ):
            if getattr(self, name) is True and not self.compiled_extensions:
                yield (
                    f"{name} inserts a torch.autograd.Function into the graph, which needs "
                    "ORTModule's compiled extensions: set compiled_extensions=true as well"
                )
        if self.save_onnx:
            folder = Path(paths.get("save_onnx_path") or ".")
            if not folder.is_dir() or not os.access(folder, os.W_OK):
                yield f"save_onnx_path={str(folder)!r} is not a writable folder"
            if not self.onnx_prefix:
                yield "onnx_prefix is empty: save_onnx needs a name for its files"
        if (prefix := paths.get("profile_prefix")) is not None and not Path(prefix).parent.is_dir():
            yield f"profile_prefix={prefix!r}: {str(Path(prefix).parent)!r} is not a folder"
        for name in ("triton_config", "triton_debug"):
            if getattr(self, name) and self.fusion != "triton":
                yield f"{name} is given but fusion is {self.fusion!r}: it would be ignored"
        for name, parent in (
            ("max_tuning_duration_ms", "tuning"),
            ("tuning_results_path", "tuning"),
            ("save_onnx_path", "save_onnx"),
        ):
            if getattr(self, name) and not getattr(self, parent):
                yield f"{name} is given but {parent} is off: it would be ignored"

    def device_problems(self, device_type: str) -> list[str]:
        """Options that the device at hand can't honour, one line each."""
        if device_type == "cuda":
            return [
                f"{name}={value!r} is for CPUs, and the module is on {device_type}"
                for name, value in (("products", "onednn"), ("attention", "torch"))
                if getattr(self, name) == value
            ]
        return [
            f"{name}={getattr(self, name)!r} works on CUDA devices only, and the module is on "
            f"{device_type}"
            for name, off in (
                ("fusion", "none"),
                ("tuning", False),
                ("print_memory_stats", False),
                ("conv_algo_search", "heuristic"),
            )
            if getattr(self, name) != off
        ]

    def _variables(self) -> dict[str, str]:
        def flag(value: bool) -> str:
            return str(int(value))

        values: dict[str, Any] = {
            # Never plain PyTorch in silence: an error is raised instead.
            "ORTMODULE_FALLBACK_POLICY": "FALLBACK_DISABLE",
            # One ORTModule serves one schema (see forward.py), so its own checks would only cost.
            "ORTMODULE_SKIPCHECK_POLICY": (
                "SKIP_CHECK_DEVICE|SKIP_CHECK_BUILD_GRADIENT|SKIP_CHECK_EXECUTION_AGENT"
            ),
            "ORTMODULE_LOG_LEVEL": self.log_level.upper(),
            "ORTMODULE_ENABLE_COMPUTE_OPTIMIZER": flag(self.compute_optimizer),
            # They look at one batch only; sparsity.py does both.
            "ORTMODULE_ENABLE_LABEL_SPARSE_OPTIMIZER": "0",
            "ORTMODULE_ENABLE_EMBEDDING_SPARSE_OPTIMIZER": "0",
            "ORTMODULE_MEMORY_OPT_LEVEL": str(_RECOMPUTE_LEVELS[self.recompute]),
            "ORTMODULE_MEMORY_OPT_CONFIG": self.recompute_config or "",
            "ORTMODULE_ENABLE_MEM_EFFICIENT_GRAD_MGMT": flag(self.mem_efficient_grad_management),
            "ORTMODULE_ENABLE_CUSTOM_AUTOGRAD": flag(self.compiled_extensions),
            "ORTMODULE_ALLOW_AUTOGRAD_CHECKPOINT": flag(self.allow_autograd_checkpoint),
            "ORTMODULE_DEEPCOPY_BEFORE_MODEL_EXPORT": flag(self.deepcopy_before_export),
            "ORTMODULE_ONNX_OPSET_VERSION": str(self.onnx_opset_version),
            "ORTMODULE_CONV_ALGO_SEARCH": self.conv_algo_search.upper(),
            "ORTMODULE_USE_TRITON": flag(self.fusion == "triton"),
            "ORTMODULE_TRITON_CONFIG_FILE": self.triton_config,
            "ORTMODULE_TRITON_DEBUG": flag(self.triton_debug),
            "ORTMODULE_ENABLE_TUNING": flag(self.tuning),
            "ORTMODULE_MAX_TUNING_DURATION_MS": self.max_tuning_duration_ms,
            "ORTMODULE_TUNING_RESULTS_PATH": self.tuning_results_path,
            "ORTMODULE_PRINT_MEMORY_STATS": flag(self.print_memory_stats),
            "ORTMODULE_SAVE_ONNX_PATH": self.save_onnx_path,
            # Upstream's cache key ignores dtype, requires_grad and opset: a stale graph would be
            # trained. Always off.
            "ORTMODULE_CACHE_DIR": None,
        }
        return {name: str(value) for name, value in values.items() if value is not None}

    @contextlib.contextmanager
    def environment(self) -> Iterator[None]:
        """Put the options where upstream reads them; the process's variables come back after."""
        saved = {name: value for name, value in os.environ.items() if "ORTMODULE_" in name}
        _warn_of_unused(saved)
        for name in saved:
            del os.environ[name]
        os.environ.update(self._variables())
        try:
            yield
        finally:
            for name in [name for name in os.environ if "ORTMODULE_" in name]:
                del os.environ[name]
            os.environ.update(saved)


_warned_of: set[str] = set()


def _warn_of_unused(names: Iterable[str]) -> None:
    """Name upstream's variables that the user set, once each: they have no effect here."""
    new = sorted(set(names) - _warned_of)
    if new:
        _warned_of.update(new)
        warnings.warn(
            f"{', '.join(new)} set in the environment: ort_train doesn't use upstream's variables; "
            "give OrtOptions (train.ort in a recipe, ort_options of ORTTrainingArguments) instead",
            UserWarning,
            stacklevel=3,
        )


def parse_options(values: dict[str, Any]) -> OrtOptions:
    """Options from a mapping, as a recipe or a command line gives them.

    Raises:
        ConfigError: with unknown names (and near ones) and bad values, all at once.
    """
    known = {field.name for field in fields(OrtOptions)}
    problems = []
    for name in values:
        if name not in known:
            hint = did_you_mean(name, known)
            problems.append(
                f"unknown option {name!r} of backend ort" + (f"; {hint}" if hint else "")
            )
    try:
        options = OrtOptions(**{name: value for name, value in values.items() if name in known})
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    if problems:
        raise ConfigError(problems)
    return options

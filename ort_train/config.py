"""RunConfig: everything one run needs to know, checked as a whole before anything is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from ort_train.contradictions import contradictions
from ort_train.data.tasks import Task
from ort_train.errors import ConfigError
from ort_train.files import expanded
from ort_train.near import near_matches

MIN_VOCAB_SIZE = 259
"""Of a byte-level BPE: 256 bytes and the special tokens bos, eos and pad."""

# transformers' OptimizerNames, which costs seconds to import, and ORTModule's own fused AdamW.
OPTIMIZERS = """
adamw_torch adamw_torch_fused adamw_torch_xla adamw_torch_npu_fused adamw_torch_4bit
adamw_torch_8bit adamw_anyprecision adamw_bnb_8bit adamw_8bit adafactor ademamix ademamix_8bit
adagrad sgd lion_8bit lion_32bit paged_adamw_32bit paged_adamw_8bit paged_ademamix_32bit
paged_ademamix_8bit paged_lion_32bit paged_lion_8bit rmsprop rmsprop_bnb rmsprop_bnb_8bit
rmsprop_bnb_32bit galore_adamw galore_adamw_8bit galore_adafactor galore_adamw_layerwise
galore_adamw_8bit_layerwise galore_adafactor_layerwise lomo adalomo grokadamw schedule_free_radam
schedule_free_adamw schedule_free_sgd apollo_adamw apollo_adamw_layerwise stable_adamw
adamw_ort_fused
""".split()  # noqa: SIM905

# transformers' SchedulerType.
LR_SCHEDULERS = """
linear cosine cosine_with_restarts polynomial constant constant_with_warmup inverse_sqrt
reduce_lr_on_plateau cosine_with_min_lr cosine_warmup_with_min_lr warmup_stable_decay greedy
""".split()  # noqa: SIM905


def _one_of(options: list[str]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in options:
            raise ValueError(f"is unknown: {near_matches(name, options)}")
        return name

    return AfterValidator(check)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """The model: loaded (`name_or_path`) or made with seeded random weights (`architecture`)."""

    name_or_path: str | None = None
    """Hub id or local transformers folder whose weights are loaded."""
    architecture: str | None = None
    """transformers model_type ("llama"). Beside `name_or_path` it only says what --tiny makes."""
    task: Task = "causal-lm"
    """What it learns: the next token; tokens that are masked; or, as an encoder and a decoder, a
    block's second half from its first."""
    config: dict[str, Any] = {}
    """transformers config fields; with `name_or_path` they override the loaded ones."""
    tokenizer: str | None = None
    """Hub id or folder. None: the loaded model's own, or one trained on the corpus."""
    vocab_size: Annotated[int, Field(ge=MIN_VOCAB_SIZE)] | None = None
    """Entries of the byte-level BPE that is trained for a made model."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    revision: str | None = None
    """Branch, tag or commit of `name_or_path`."""
    trust_remote_code: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights; what they are computed in is `train.precision`."""
    num_parameters: PositiveFloat | None = None
    """About; read only by what estimates memory before there is a model."""


class DataConfig(_Section):
    """The corpus, and how it is cut into samples."""

    source: Literal["auto", "hub", "folder", "offline"] = "auto"
    """auto: a named `folder`, else the first there is of hub, usual folders, offline text."""
    dataset: str = "Salesforce/wikitext"
    subset: str | None = "wikitext-2-raw-v1"
    text_column: str = "text"
    format: Literal["blocks", "instructions"] = "blocks"
    """blocks: text packed back to back; instructions: a prompt and its response per sample."""
    prompt_column: str | None = None
    """Of the dataset's or JSONL records, instructions only; None: prompt."""
    response_column: str | None = None
    """Likewise; None: response."""
    padding: Literal["block", "longest"] | None = None
    """Of instructions, on the right: to `block_size`, which is the default, or to the longest
    sample of each batch."""
    packing: bool = False
    """Of instructions: as many samples as fit share a row of `block_size` tokens, which is then
    what `train.micro_batch_size` counts; none sees another."""
    folder: str | None = None
    """Of wiki.*.tokens or *.txt files. None: $ORT_TRAIN_DATA, data/wikitext-2 and the like."""
    block_size: PositiveInt = 128
    """Tokens per sample."""
    max_train_blocks: PositiveInt | None = None
    """Samples kept of the training text; None: all."""
    max_eval_blocks: PositiveInt | None = None
    """Samples kept of the evaluation text; None: all."""
    hub_timeout_s: PositiveFloat = 3.0
    """Seconds to wait for the hub's first answer."""


class AdapterConfig(_Section):
    """What is trained: the whole model, or low-rank adapters beside its frozen weights."""

    method: Literal["none", "lora", "qlora"] = "none"
    """qlora: LoRA beside weights that are quantized to 4 bits."""
    r: PositiveInt = 8
    """Rank."""
    alpha: PositiveFloat = 16.0
    """The adapter's output is scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Last parts of module names, such as q_proj."""
    quant_type: Literal["nf4", "fp4"] | None = None
    """Codebook of the 4-bit weights, qlora only; None: nf4."""
    double_quant: bool | None = None
    """Whether their scales are quantized, too (0.4 bits a weight less); None: no."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What they are decoded to and multiplied in; None: as `train.precision`."""


class DistillConfig(_Section):
    """A teacher whose predictions the model learns beside the text."""

    teacher: ModelConfig | None = None
    """As the section `model`; frozen. Its tokenizer is the model's. None: no distillation."""
    temperature: PositiveFloat | None = None
    """Of both predictions; None: 2."""
    alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """The text's share of the loss, the teacher having the rest; None: 0.5."""


class TrainConfig(_Section):
    """The training loop."""

    backend: Literal["ort", "eager", "compile", "auto"] = "ort"
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """auto, with backend auto: fp32, or bf16 where the hardware has it and it is faster."""
    micro_batch_size: PositiveInt = 8
    """Samples per data-parallel rank per forward."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro batches per optimizer step."""
    global_batch_size: PositiveInt | None = None
    """Samples per optimizer step over all ranks; accumulation, if 1, follows from it."""
    deepspeed: str | dict[str, Any] | None = None
    """zero1, zero2, zero2_offload, none, the path of a DeepSpeed JSON, or its content. None: zero2
    under DeepSpeed's launcher, DistributedDataParallel under others."""
    ddp_timeout_s: PositiveInt = 1800
    """Seconds that a rank waits for another one, before it takes it for lost."""
    max_steps: PositiveInt | None = None
    """Optimizer steps."""
    epochs: PositiveFloat | None = None
    """Passes over the training samples; one of `max_steps` and `epochs` is given."""
    learning_rate: PositiveFloat = 5e-4
    """Its peak."""
    weight_decay: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the learning rate rises from 0."""
    lr_scheduler: Annotated[str, _one_of(LR_SCHEDULERS)] = "linear"
    """One of transformers' SchedulerType."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are scaled down to this norm; 0: they are left as they are."""
    optimizer: Annotated[str, _one_of(OPTIMIZERS)] = "adamw_torch_fused"
    """One of transformers' OptimizerNames, or adamw_ort_fused."""
    keep_zeros: bool = False
    """Whether weights of a pruned model that are 0 stay so."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Of weights, data order and dropout."""
    logging_steps: PositiveInt = 10
    """Optimizer steps between log lines."""
    eval_steps: PositiveInt | None = None
    """Optimizer steps between evaluations; None: only at the end."""
    save_steps: PositiveInt | None = None
    """Optimizer steps between checkpoints; None: only the final model is saved."""
    save_total_limit: PositiveInt | None = None
    """Checkpoints kept; None: all."""
    report_to: list[str] = []
    """transformers' trackers: tensorboard, wandb, mlflow, ..."""
    ort: dict[str, Any] = {}
    """Fields of ort_train.ortmodule.OrtOptions, which checks them."""


class MeasureConfig(_Section):
    """What is timed beside the run's own backend, on the same batches, before training."""

    baselines: list[Literal["eager", "compile"]] = ["eager", "compile"]
    steps: PositiveInt = 10
    """Timed steps per backend and round."""
    rounds: PositiveInt = 3
    """Backends take turns this many times."""
    warmup_steps: NonNegativeInt = 3
    """Untimed steps per backend before its first round."""


class OutputConfig(_Section):
    """Where the run's results go."""

    dir: str | None = None
    """None: runs/NAME."""
    overwrite: bool = False
    """Whether another run's results in `dir` may be replaced."""
    resume: str = "none"
    """none, auto (the newest checkpoint in `dir`), or a checkpoint's path."""


class RunConfig(_Section):
    """One run: the resolved form of a recipe."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")] = "run"
    """Of the recipe; names the default output folder."""
    description: str = ""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    adapter: AdapterConfig = AdapterConfig()
    distill: DistillConfig = DistillConfig()
    train: TrainConfig = TrainConfig()
    measure: MeasureConfig = MeasureConfig()
    output: OutputConfig = OutputConfig()

    @property
    def output_dir(self) -> Path:
        """The folder that the run writes to."""
        return expanded(self.output.dir or f"runs/{self.name}")


def keys() -> list[str]:
    """Every key a recipe may hold, dotted: ``model.architecture``."""
    return _keys(RunConfig)


def _keys(section: type[BaseModel]) -> list[str]:
    names = []
    for name, field in section.model_fields.items():
        below = next(
            (
                kind
                for kind in (field.annotation, *get_args(field.annotation))
                if isinstance(kind, type) and issubclass(kind, _Section)
            ),
            None,
        )
        names += [name] if below is None else [f"{name}.{key}" for key in _keys(below)]
    return names


def parse(values: Mapping[str, Any]) -> RunConfig:
    """Checks a recipe's values.

    Args:
        values: nested mapping, as read from YAML.

    Raises:
        ConfigError: with every problem found: unknown keys, wrong types, values out of range, and
            values that contradict each other.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"a config is a mapping of sections, not {values!r}")
    problems: list[str] = []
    suspect: set[str] = set()
    try:
        config = RunConfig.model_validate(dict(values))
    except ValidationError as error:
        found = _problems_by_key(error, values)
        for path, rules in found.items():
            key = _dotted(path)
            if rules is None:
                problems.append(f"unknown key {key}: {_near_key(path)}")
                # A misspelt key leaves the intended one unset: no second complaint about that.
                suspect.update(difflib.get_close_matches(key, keys(), n=3))
            else:
                problems.append(f"{key}: {_get(values, path)!r} {' or '.join(rules)}")
                suspect.add(key)
        # What remains without the faulty values is still checked against itself.
        config = RunConfig.model_validate(_without(values, found))
    problems += [
        problem
        for reads, problem in contradictions(config)
        if not any(key == bad or key.startswith(f"{bad}.") for key in reads for bad in suspect)
    ]
    if problems:
        raise ConfigError(problems)
    return config


def to_yaml(config: RunConfig) -> str:
    """The config as a recipe that `parse` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True, width=100)


_Path = tuple[Any, ...]


def _problems_by_key(
    error: ValidationError, values: Mapping[str, Any]
) -> dict[_Path, list[str] | None]:
    """The broken rules by the key that breaks them; None for a key that doesn't exist."""
    found: dict[_Path, list[str] | None] = {}
    for detail in error.errors(include_url=False):
        # Of the location only what the user wrote: no list indices, no union branches.
        path: list[Any] = []
        node: Any = values
        for part in detail["loc"]:
            if not isinstance(node, Mapping):
                break
            # pydantic names a key that is no text (YAML's ~, on) by what it prints as.
            keys_named_so = [key for key in node if key == part or str(key) == part]
            if not keys_named_so:
                break
            path.append(keys_named_so[0])
            node = node[path[-1]]
        if detail["type"] in ("extra_forbidden", "invalid_key"):
            found[tuple(path)] = None
            continue
        rule = detail["msg"].removeprefix("Value error, ").replace("Input should", "should", 1)
        if detail["type"] == "model_type":
            rule = "should be a section, a mapping of keys"
        if (rules := found.setdefault(tuple(path), [])) is not None and rule not in rules:
            rules.append(rule)
    return found


def _dotted(path: _Path) -> str:
    return ".".join(map(str, path))


def _near_key(path: _Path) -> str:
    """The key meant: one of the same section first, then the same name in another section."""
    name, section = str(path[-1]), _dotted(path[:-1])
    known = keys()
    siblings = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == section]
    if not section:
        siblings += dict.fromkeys(key.partition(".")[0] for key in known if "." in key)
    near = difflib.get_close_matches(name, siblings, n=1) or [
        key for key in siblings if key.startswith(name)
    ]
    if near:
        return f"did you mean {_dotted((*path[:-1], near[0]))}?"
    # The nearest to the top of those with one name: model.config before distill.teacher.config.
    leaves = {key.rpartition(".")[2]: key for key in sorted(known, key=lambda k: -k.count("."))}
    if elsewhere := difflib.get_close_matches(name, leaves, n=1, cutoff=0.8):
        return f"did you mean {leaves[elsewhere[0]]}?"
    return f"{f'section {section} has' if section else 'there are'} {', '.join(siblings)}"


def _get(values: Mapping[str, Any], path: _Path) -> Any:
    node: Any = values
    for part in path:
        node = node[part]
    return node


def _without(values: Mapping[str, Any], paths: Iterable[_Path]) -> dict[str, Any]:
    pruned = deepcopy(dict(values))
    for path in paths:
        del _get(pruned, path[:-1])[path[-1]]
    return pruned

"""Recipes: YAML files that become RunConfigs, each one derived from a base by what it changes."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ort_train.config import ModelConfig, RunConfig, parse
from ort_train.errors import ConfigError
from ort_train.files import expanded
from ort_train.known_models import KNOWN_MODELS
from ort_train.near import near_matches
from ort_train.quantization import of_run

logger = logging.getLogger(__name__)

# What --tiny does to everything but the model's own sizes: a ceiling for each number.
_TINY_CEILINGS = {
    "data": {"block_size": 64, "max_train_blocks": 64, "max_eval_blocks": 8},
    "train": {
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "warmup_steps": 2,
        "logging_steps": 2,
        "eval_steps": 4,
        "save_steps": 4,
    },
    "measure": {"steps": 3, "rounds": 2, "warmup_steps": 1},
}
_TINY_VOCAB_SIZE = 512
# None means "all" here, so that a ceiling applies to it; elsewhere None means "never".
_NONE_IS_ALL = {"max_train_blocks", "max_eval_blocks", "max_steps"}
_MODELS = ("model", "distill.teacher")
# Of a model's section: what would bring a download back.
_DROPPED_BY_TINY = ("name_or_path", "revision", "tokenizer")


@dataclass(frozen=True)
class RecipeInfo:
    """A line of the list of recipes.

    Attributes:
        architecture: the made model's type, or the name of the loaded one.
        method: the adapter's; ``none`` where the whole model is trained.
        state_gib: of weights, gradients and optimizer, before any sharding; None if unknown.
    """

    name: str
    path: Path
    description: str
    architecture: str
    method: str
    state_gib: float | None


def load_recipe(
    name_or_path: str | Path, overrides: Sequence[str] = (), tiny: bool = False
) -> RunConfig:
    """Reads a recipe, its bases and the overrides into one checked config.

    Args:
        name_or_path: a shipped recipe's name, or the path of a YAML file.
        overrides: ``section.key=value``; the value is read as YAML and replaces what stands there.
        tiny: shrink the sizes, except those that an override names; see `tiny`.

    Raises:
        ConfigError: with all problems of the overrides, or all of the config.
    """
    settings = _parse_overrides(overrides)
    settings += _unset_rivals(settings)
    settings = [
        (key, _absolute(value, Path.cwd()) if key == "train.deepspeed" else value)
        for key, value in settings
    ]
    values = _read(_find(name_or_path))
    config = parse(_override(values, settings))
    if not tiny:
        return config
    dropped = {f"{model}.{key}" for model in _MODELS for key in _DROPPED_BY_TINY}
    kept = [(key, value) for key, value in settings if key not in dropped]
    return parse(_override(_shrink(config), kept))


def make_config(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """A config of values that aren't a file's, and overrides; see `load_recipe`."""
    settings = _parse_overrides(overrides)
    return parse(_override(values, settings + _unset_rivals(settings)))


def list_recipes() -> list[RecipeInfo]:
    """The shipped recipes, by name."""
    infos = []
    for name, path in sorted(_shipped().items()):
        config = load_recipe(path)
        model = config.model
        infos.append(
            RecipeInfo(
                name=name,
                path=path,
                description=config.description,
                architecture=model.name_or_path or model.architecture or "",
                method=config.adapter.method,
                state_gib=state_gib(config),
            )
        )
    return infos


def state_gib(config: RunConfig) -> float | None:
    """GiB of weights, gradients and AdamW's moments: parameters times bytes, activations left out.

    An adapter's own share, thousandths of the whole, is left out, too, and so are the norms beside
    4-bit weights.

    Returns:
        None where the sizes that it takes aren't known.
    """
    num_parameters = config.model.num_parameters
    if num_parameters is None:
        return None
    weight_bytes = 4.0 if config.model.dtype == "float32" else 2.0
    if (quantization := of_run(config)) is not None:
        num_plain = _num_embedded(config.model)
        if num_plain is None:
            return None
        num_bits = (num_parameters - num_plain) * quantization.bits_per_weight
        return (num_bits / 8 + num_plain * weight_bytes) / 2**30
    # A gradient and two moments, in the weights' type.
    copies = 4 if config.adapter.method == "none" else 1
    return num_parameters * weight_bytes * copies / 2**30


def _num_embedded(model: ModelConfig) -> int | None:
    """Weights of the embedding and of the output, which stay as they are beside 4-bit ones."""
    _, known = KNOWN_MODELS.get(model.name_or_path or "", (None, {}))
    fields = {**known, **model.config}
    hidden, vocab = fields.get("hidden_size"), fields.get("vocab_size") or model.vocab_size
    if hidden is None or vocab is None:
        return None
    return hidden * vocab * (1 if fields.get("tie_word_embeddings") else 2)


def tiny(config: RunConfig) -> RunConfig:
    """The same run at sizes that two CPU cores finish in seconds, with no download.

    Kept: the architecture, adapters, data path, optimizer and backend. Shrunk: the model (weights
    are made, never loaded), its vocabulary, the samples, batches and steps.

    Raises:
        ConfigError: `model.name_or_path` stands alone, so that the architecture isn't known.
    """
    return parse(_shrink(config))


def _shrink(config: RunConfig) -> dict[str, Any]:
    values = config.model_dump()
    model, teacher = values["model"], values["distill"]["teacher"]
    _shrink_model(model, "model")
    model["vocab_size"] = _TINY_VOCAB_SIZE
    if teacher:
        _shrink_model(teacher, "distill.teacher")
    for section, ceilings in _TINY_CEILINGS.items():
        for key, ceiling in ceilings.items():
            value = values[section][key]
            if value is not None:
                values[section][key] = min(value, ceiling)
            elif key in _NONE_IS_ALL:
                values[section][key] = ceiling
    values["train"]["epochs"] = None
    values["train"]["global_batch_size"] = None  # of the full-sized batches
    _use_fp32_where_needed(values)
    return values


def _shrink_model(model: dict[str, Any], section: str) -> None:
    if not model["architecture"]:
        raise ConfigError(
            f"--tiny makes a model instead of loading {model['name_or_path']} and needs to know "
            f"its type: set {section}.architecture, for example {section}.architecture=llama"
        )
    # Only here: which sizes an architecture has, transformers knows.
    from ort_train.models import tiny_config

    for key in _DROPPED_BY_TINY:
        model[key] = None
    model["config"] = tiny_config(model["architecture"], model["config"])
    model["num_parameters"] = None


def _use_fp32_where_needed(values: dict[str, Any]) -> None:
    """Full precision where this machine's backend can't compute in the recipe's."""
    import torch

    from ort_train.backends import available

    train, model, adapter = (values[section] for section in ("train", "model", "adapter"))
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    can_run, _ = available(train["backend"], train["precision"], device_type)
    if can_run and train["backend"] == "ort" and device_type == "cpu":
        # Its bf16 is of the products of fp32 weights only.
        can_run = model["dtype"] == "float32" and adapter["compute_dtype"] in (None, "float32")
    if can_run:
        return
    if not available(train["backend"], "fp32", device_type)[0]:
        return  # that is to be said, not mended
    logger.warning(
        "--tiny: train.precision %s becomes fp32, for backend %s can't compute in it here",
        train["precision"],
        train["backend"],
    )
    train["precision"], model["dtype"] = "fp32", "float32"
    if adapter["compute_dtype"]:
        adapter["compute_dtype"] = "float32"


def _shipped() -> dict[str, Path]:
    """The recipes that come with the package, in a wheel or in a checkout."""
    package = Path(__file__).parent
    folder = package / "shipped_recipes"
    if not folder.is_dir() and (package.parent / "pyproject.toml").is_file():
        folder = package.parent / "recipes"
    return {path.stem: path for path in folder.glob("*.yaml")}


def _find(name_or_path: str | Path) -> Path:
    path = expanded(name_or_path)
    shipped = _shipped()
    is_path = path.suffix in (".yaml", ".yml") or len(path.parts) > 1
    if not is_path and path.name in shipped:
        return shipped[path.name]
    if path.is_dir():
        of_run = path / "config.yaml"
        file = str(of_run) if of_run.is_file() else "a .yaml file"
        raise ConfigError(f"recipe {str(name_or_path)!r} is a folder: name {file}, or a recipe")
    if not is_path:
        hint = near_matches(path.name, shipped)
        raise ConfigError(
            f"unknown recipe {str(name_or_path)!r}: {hint} (or give a path to a .yaml file)"
        )
    if path.is_file():
        return path
    # A recipe's name with an ending is likely meant to be the shipped one.
    hint = near_matches(path.stem, shipped)
    raise ConfigError(f"no recipe file {path}; of the shipped recipes' names, {hint}")


def _read(path: Path, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a recipe file, laid over those of its base."""
    path = path.resolve()
    chain = (*chain, path)
    values = _load_yaml(path)
    train = values.get("train")
    if isinstance(train, dict) and "deepspeed" in train:
        train["deepspeed"] = _absolute(train["deepspeed"], path.parent)
    values.setdefault("name", re.sub(r"^[.-]|[^A-Za-z0-9_.-]", "_", path.stem))
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends: {base!r} should be a recipe's name or path")
    if Path(base).suffix in (".yaml", ".yml"):
        base_path = (path.parent / expanded(base)).resolve()
    else:
        base_path = _find(base).resolve()
    if base_path in chain:
        names = " -> ".join(str(step) for step in (*chain, base_path))
        raise ConfigError(f"recipes extend each other in a circle: {names}")
    inherited = _read(base_path, chain)
    inherited.pop("description", None)
    return _merge(inherited, values)


def _absolute(deepspeed: Any, folder: Path) -> Any:
    """A DeepSpeed config's path, seen from the folder; of anything else, what it is."""
    if not isinstance(deepspeed, str) or deepspeed.lstrip().startswith("{"):
        return deepspeed
    path = expanded(deepspeed)
    is_path = path.suffix == ".json" or len(path.parts) > 1
    return str(folder / path) if is_path else deepspeed


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = _merge(dict(below), value)
        else:
            merged[key] = value
    return merged


def _parse_overrides(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    settings, problems = [], []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            problems.append(f"override {override!r} should be section.key=value")
            continue
        try:
            settings.append((key, yaml.load(text, Loader=_Loader)))
        except yaml.YAMLError as error:
            problems.append(f"override {override!r}: {_first_line(error)}")
    if problems:
        raise ConfigError(problems)
    return settings


def _unset_rivals(settings: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """An override of one of the two lengths of training takes the place of the other."""
    given = dict(settings)
    rivals = {"train.max_steps": "train.epochs", "train.epochs": "train.max_steps"}
    return [
        (rival, None)
        for key, rival in rivals.items()
        if given.get(key) is not None and rival not in given
    ]


def _override(values: Mapping[str, Any], settings: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Sets the dotted keys; an override's value replaces even a mapping."""
    result = deepcopy(dict(values))
    for key, value in settings:
        *sections, leaf = key.split(".")
        node = result
        for section in sections:
            below = node.get(section)
            if below is None:
                below = node[section] = {}
            if not isinstance(below, dict):
                raise ConfigError(f"override {key}: {section} holds {below!r} and has no keys")
            node = below
        node[leaf] = value
    return result


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read recipe {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not YAML: {_first_line(error)}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {path} should be a mapping of sections, not {values!r:.80}")
    return values


def _first_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return f"{getattr(error, 'problem', None) or error}{where}"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats (PyYAML reads 1e-3 as text), and no key twice in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    problem="a key is no plain word (text in braces needs quotes)",
                    problem_mark=key_node.start_mark,
                )
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key_node.value} stands twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)

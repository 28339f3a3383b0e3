"""The command `ort-train prune`: a transformers model pruned, tuned again, evaluated and saved."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ort_train.config import RunConfig
from ort_train.errors import ConfigError
from ort_train.files import expanded
from ort_train.overrides import add_overrides
from ort_train.recipes import make_config
from ort_train.reports.provenance import versions

if TYPE_CHECKING:
    from ort_train.data.samples import Samples
    from ort_train.perplexity import Reading

REPORT_FILE = "prune.json"
_NUM_READINGS = 3
#: Of fine-tuning; every key can be changed by an override.
_DATA = {"block_size": 128, "max_eval_blocks": 64}
_TRAIN = {"backend": "ort", "learning_rate": 2e-4, "warmup_steps": 5}
#: Keys that the command sets itself, and by what.
_TOLD_ELSEWHERE = {
    "model.name_or_path": "MODEL",
    "output": "--out",
    "train.max_steps": "--steps",
    "train.epochs": "--steps",
}


def prune_folder(
    source: str | Path,
    out: str | Path,
    pattern: str | None = None,
    sparsity: float | None = None,
    exclude: Sequence[str] = (),
    steps: int = 0,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Prune a transformers model, evaluate it before and after, and save it.

    Args:
        source: a folder that transformers loads, such as a run's model/.
        out: a new or empty folder; it is whole or not there.
        pattern: see `pruning.prune_model`; likewise sparsity and exclude.
        steps: of training afterwards, in which the zeros stay zeros.
        overrides: `section.key=value` of the run that reads and trains: data.*, train.*.

    Returns:
        What REPORT_FILE in `out` holds: `layers`, and `stages` (dense, pruned, tuned), each with
        zeros (share of the pruned layers), loss, perplexity and tokens_per_s.

    Raises:
        ConfigError: wrong settings.
        ModelError: the model can't be loaded or pruned.
        ExportError: the model is no plain decoder, or `out` holds something.
    """
    from ort_train.data.packing import check_models
    from ort_train.data.samples import make_samples
    from ort_train.inference.decoder.export import load_decoder_config
    from ort_train.inference.folder import staged as staged_folder
    from ort_train.models import load_model
    from ort_train.pruning import check_target, prune_model

    source, out = expanded(source), expanded(out)
    if not (source / "config.json").is_file():
        raise ConfigError(
            f"{str(source)!r} has no config.json: name a folder that transformers loads, such as "
            "the model/ of a run"
        )
    if steps < 0:
        raise ConfigError(f"--steps {steps} must be 0 or more")
    check_target(pattern, sparsity)  # before the text and the model are read
    if problems := [
        f"{key} is what {option} says: leave {key} out"
        for key in (override.partition("=")[0] for override in overrides)
        for own, option in _TOLD_ELSEWHERE.items()
        if key == own or key.startswith(f"{own}.")
    ]:
        raise ConfigError(problems)
    config = _config(source, steps, overrides)
    if config.model.task != "causal-lm":
        raise ConfigError(
            f"model.task {config.model.task}: prune reads a text with causal language models only, "
            "leave it at causal-lm"
        )
    load_decoder_config(source)  # an encoder sees what it predicts
    with staged_folder(out) as staged:
        block_size, seed = config.data.block_size, config.train.seed
        samples = make_samples(config.data, config.model, seed=seed)
        dense = load_model(config.model, samples.tokenizer, seed, block_size)
        check_models(config.data, samples.collate, dense)
        model = load_model(config.model, samples.tokenizer, seed, block_size)
        layers = prune_model(model, pattern, sparsity, exclude)
        model.save_pretrained(staged)
        samples.tokenizer.save_pretrained(staged)
        models = {"dense": dense, "pruned": model}
        if steps:
            models["tuned"] = _tune(staged, steps, overrides)
            models["tuned"].save_pretrained(staged)
        readings = _read_in_turns(list(models.values()), samples)
        report = {
            "source": source.name,
            "pattern": pattern,
            "sparsity": sparsity,
            "exclude": list(exclude),
            "steps": steps,
            "data": samples.source,
            "versions": versions(),
            "stages": [
                {
                    "stage": stage,
                    "zeros": _share_of_zeros(made, {layer.name for layer in layers}),
                    "loss": reading.loss,
                    "perplexity": reading.perplexity,
                    "tokens_per_s": reading.tokens_per_s,
                }
                for (stage, made), reading in zip(models.items(), readings, strict=True)
            ],
            "layers": [asdict(layer) for layer in layers],
        }
        (staged / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def _config(
    source: Path, steps: int, overrides: Sequence[str], out: str | None = None
) -> RunConfig:
    values = {
        "name": "prune",
        "model": {"name_or_path": str(source)},
        "data": _DATA,
        "train": {**_TRAIN, "max_steps": max(steps, 1), "keep_zeros": True},
        "measure": {"baselines": []},
        "output": {"dir": out},
    }
    return make_config(values, overrides)


def _tune(folder: Path, steps: int, overrides: Sequence[str]) -> Any:
    """The pruned model after training in which its zeros stay."""
    from transformers import AutoModelForCausalLM

    from ort_train import job, run_folder

    with tempfile.TemporaryDirectory(prefix="ort_train-prune-") as run:
        config = _config(folder, steps, overrides, out=str(Path(run) / "run"))
        result = job.run(config)
        return AutoModelForCausalLM.from_pretrained(
            result.output_dir / run_folder.MODEL_FOLDER, dtype=config.model.dtype
        )


def _read_in_turns(models: Sequence[Any], samples: Samples) -> list[Reading]:
    """Readings of the evaluation text, whose speeds were measured in turns, the best of each."""
    from ort_train.perplexity import read

    best: list[Any] = [None] * len(models)
    for _ in range(_NUM_READINGS):
        for index, model in enumerate(models):
            reading = read(model, _batches(samples))
            if best[index] is None or reading.tokens_per_s > best[index].tokens_per_s:
                best[index] = reading
    return best


def _batches(samples: Samples, size: int = 8) -> Iterable[dict[str, Any]]:
    rows = samples.evaluation
    assert rows is not None
    for start in range(0, len(rows), size):
        stop = min(start + size, len(rows))
        yield samples.collate([rows[index] for index in range(start, stop)])


def _share_of_zeros(model: Any, names: set[str]) -> float:
    weights = [layer.weight for name, layer in model.named_modules() if name in names]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ort-train prune`."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder that transformers loads, such as a run's model/")
    add_overrides(parser, "settings of reading and fine-tuning: data.*, train.*")
    add("--out", required=True, metavar="DIR", help="a new or empty folder")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--pattern", choices=["2:4"], help="2 of each 4 weights become 0")
    how.add_argument(
        "--sparsity", type=float, metavar="SHARE", help="of each layer's weights, from 0 to 1"
    )
    add(
        "--exclude",
        default="",
        metavar="NAMES",
        help="comma-separated patterns of layers that stay as they are: 'model.layers.0.*'",
    )
    add("--steps", type=int, default=0, metavar="N", help="training steps that keep the zeros")


def main(args: argparse.Namespace) -> int:
    """Run `ort-train prune`. Returns 0."""
    from rich.console import Console
    from rich.table import Table

    from ort_train.quiet import quiet_transformers

    quiet_transformers()

    exclude = [name.strip() for name in args.exclude.split(",") if name.strip()]
    report = prune_folder(
        args.model, args.out, args.pattern, args.sparsity, exclude, args.steps, args.overrides
    )
    table = Table(
        title=f"{report['source']}, read on the CPU" if not _has_gpu() else report["source"]
    )
    for head in ("model", "zeros", "loss\nnats/token", "perplexity", "tokens/s\nread"):
        table.add_column(head, justify="left" if head == "model" else "right")
    for stage in report["stages"]:
        table.add_row(
            stage["stage"],
            f"{stage['zeros']:.1%}",
            f"{stage['loss']:.4f}",
            f"{stage['perplexity']:.2f}",
            f"{stage['tokens_per_s']:,.0f}",
        )
    Console().print(table)
    print(f"data: {report['data']}")
    print("Zeros are multiplied as any other number: a gain needs hardware that skips them.")
    print(f"wrote {args.out}")
    return 0


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()

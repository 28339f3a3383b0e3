"""The command `ort-train passes-bench`: what graph passes bring, against noise and PyTorch.

Eager PyTorch, torch.compile and ONNX Runtime have a process each and take turns. Inside ONNX
Runtime's process the original graph, each pass's, and all passes' take turns run by run, each with
ONNX Runtime's own optimizations off and on. The original stands there twice: how far it is from
itself is the noise, below which a difference means nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ort_train.bench.options import numbers, output_problems, words
from ort_train.bench.process import Worker
from ort_train.bench.turns import spread, take_turns
from ort_train.errors import ConfigError, OrtTrainError
from ort_train.files import replacing
from ort_train.inference.optimization import models as passes_models
from ort_train.inference.optimization import passes
from ort_train.inference.optimization import report as passes_report
from ort_train.inference.optimization.run import COMMAND, Run, Size, result
from ort_train.reports import provenance

SCHEMA = 1
#: Of a student report on a 2-layer Llama, which saw 21 to 22% in them.
DEFAULT_PASSES = "eliminate_identity,fuse_transpose_into_gemm,fuse_matmul_add_bias_into_gemm"
_ROUNDS = 10
_COLD_PROCESSES = 3
# None of these models has weights that a pass would compute with.
_MAX_INLINE_BYTES = 2**20


def run_benchmark(
    sizes: Sequence[Size],
    names: Sequence[str],
    *,
    repeats: int = 100,
    warmup: int = 5,
    batch_size: int = 1,
    seq_len: int = 64,
    threads: int | None = None,
    with_compile: bool = True,
    with_cold: bool = True,
    progress: bool = True,
    tell: Callable[[str], None] = lambda line: None,
    timeout_s: float = 900.0,
    before: Mapping[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Measure models before and after passes.

    Args:
        sizes: of the models.
        names: of the passes; each is measured alone, and all together.
        repeats: timed runs of every variant.
        warmup: untimed runs before, beside the first.
        batch_size, seq_len: of the input.
        threads: of every library; None: their own choice.
        with_compile: whether torch.compile is measured.
        with_cold: whether to show what a benchmark without warm-up and turns would have seen.
        before: a record of the same settings and versions, whose sizes aren't measured again.
        save: called with the record after each size.

    Returns:
        The record, as `passes_report` reads it.

    Raises:
        ConfigError: with everything that is wrong with sizes, passes and counts.
    """
    _check(sizes, names, repeats, warmup, batch_size, seq_len, threads)
    started_at, machine = provenance.now(), provenance.machine(threads)
    rounds = min(_ROUNDS, repeats)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        **provenance.envelope(started_at, machine),
        "protocol": {
            "warmup": warmup,
            "batch_size": batch_size,
            "seq_len": seq_len,
            "num_layers": passes_models.NUM_LAYERS,
            "vocab_size": passes_models.VOCAB_SIZE,
            "passes": list(names),
        },
        "results": [],
    }
    if before is not None:
        _check_same(record, before)
        record["results"] = list(before["results"])
    measured = {(r["model"], r["hidden"], r["heads"]) for r in record["results"]}
    missing = [size for size in sizes if (size.model, size.hidden, size.heads) not in measured]
    per_size = (2 + with_compile) * (1 + rounds)
    with tqdm(
        total=len(missing) * per_size, disable=None if progress else True, unit="turn"
    ) as bar:
        for size in missing:
            with tempfile.TemporaryDirectory(prefix="ort_train-passes-") as folder:
                shape = (batch_size, seq_len)
                graphs, changes = _graphs(size, names, shape, Path(folder))
                told = {"values": str(Path(folder) / "input.npy")}
                sizes_told = {"name": size.model, "hidden": size.hidden, "heads": size.heads}
                runs = [Run(f"{size} eager", {**told, "runner": "eager", "sizes": sizes_told})]
                if with_compile:
                    config = {**told, "runner": "compile", "sizes": sizes_told}
                    runs.append(Run(f"{size} compile", config))
                runs.append(Run(f"{size} ort", {**told, "runner": "ort", "graphs": graphs}))
                take_turns(
                    runs,
                    rounds,
                    prepare={"warmup": warmup, "threads": threads},
                    turn={"repeats": -(-repeats // rounds)},
                    prepared_line=lambda run: "ready",
                    turn_line=lambda run: f"{len(run.rounds[-1])} variants",
                    timeout_s=timeout_s,
                    bar=bar,
                    tell=tell,
                )
                cold = None
                if with_cold and runs[-1].status == "ok":
                    bar.set_description(f"{size}: without warm-up")
                    cold = _cold(graphs, told, names[0], repeats, threads, Path(folder), timeout_s)
                counts = {"repeats": -(-repeats // rounds) * rounds, "rounds": rounds}
                record["results"].append({**result(size, runs, changes, cold), **counts})
                save(record)
    return record


def _check_same(record: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Sizes of one record are measured the same way, in the same place."""
    differing = [
        name
        for section in ("protocol", "versions")
        for name, value in record[section].items()
        if before[section].get(name) != value
    ]
    if before["machine"]["cpu"] != record["machine"]["cpu"]:
        differing.append("cpu")
    if differing:
        raise ConfigError(
            f"the record to go on with differs in {', '.join(differing)}: use the same settings, "
            "or name another --json"
        )


def _check(
    sizes: Sequence[Size],
    names: Sequence[str],
    repeats: int,
    warmup: int,
    batch_size: int,
    seq_len: int,
    threads: int | None,
) -> None:
    problems = [
        f"{name} {value} must be at least {least}"
        for name, value, least in (
            ("repeats", repeats, 1),
            ("warmup", warmup, 0),
            ("batch_size", batch_size, 1),
            ("seq_len", seq_len, 2),
            ("threads", threads, 1),
        )
        if value is not None and value < least
    ]
    for size in sizes:
        problems += passes_models.check_sizes(size.model, size.hidden, size.heads)
    try:
        passes_models.check_known([size.model for size in sizes])
        passes.check_names(names)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def _graphs(
    size: Size, names: Sequence[str], shape: tuple[int, int], folder: Path
) -> tuple[dict[str, tuple[str, bool]], dict[str, Any]]:
    """The variants' files, and what each pass changed."""
    values = passes_models.make_input(size.model, size.hidden, *shape)
    np.save(folder / "input.npy", values)
    original = folder / "original.onnx"
    passes_models.export(size.model, size.hidden, size.heads, values, original)
    files, changes = {"original": original}, {}
    combinations = [[name] for name in names] + ([list(names)] if len(names) > 1 else [])
    for combination in combinations:
        optimized = passes.optimize(original, combination, max_inline_bytes=_MAX_INLINE_BYTES)
        label = combination[0] if len(combination) == 1 else "all"
        report = optimized.together
        changes[label] = {
            "nodes": [report.before.total(), report.after.total()],
            "changed": report.changed,
        }
        files[label] = folder / label / "model.onnx"
        files[label].parent.mkdir()
        passes.save(optimized, original, files[label])
    files["original again"] = original
    graphs = {
        f"{label}, {level}": (str(file), level == "on")
        for label, file in files.items()
        for level in ("off", "on")
    }
    return graphs, changes


def _cold(
    graphs: Mapping[str, tuple[str, bool]],
    told: Mapping[str, str],
    name: str,
    repeats: int,
    threads: int | None,
    folder: Path,
    timeout_s: float,
) -> dict[str, Any]:
    """What the second of two graphs seems to gain where each is timed at once, in both orders."""
    gains: dict[str, list[float]] = {}
    pair = ("original, on", f"{name}, on")
    for attempt in range(_COLD_PROCESSES):
        for order in (pair, pair[::-1]):
            scratch = folder / f"cold-{attempt}-{order[0].split(',')[0]}"
            scratch.mkdir()
            worker = Worker(scratch, timeout_s, COMMAND)
            try:
                reply = worker.request(
                    "prepare",
                    **told,
                    runner="cold",
                    graphs={variant: graphs[variant] for variant in order},
                    repeats=repeats,
                    threads=threads,
                )
            finally:
                worker.kill()
            mean_ms = reply["mean_ms"]
            first = order[0].removesuffix(", on")
            gains.setdefault(f"{first} first", []).append(1 - mean_ms[pair[1]] / mean_ms[pair[0]])
    return {
        "pass": name,
        "repeats": repeats,
        "apparent_gain_of_pass": {order: spread(np.array(g)) for order, g in gains.items()},
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ort-train passes-bench`."""
    add = parser.add_argument
    models = "; ".join(f"{name}: {what}" for name, what in passes_models.MODELS.items())
    add(
        "--models",
        default="llama",
        metavar="NAMES",
        help=f"comma-separated (default: %(default)s). {models}",
    )
    add(
        "--hidden",
        default="512,1024,2048",
        metavar="NUMBERS",
        help="comma-separated hidden sizes",
    )
    add("--heads", default="4,8,16", metavar="NUMBERS", help="attention heads of each size")
    add("--grid", action="store_true", help="every size with every number of heads")
    add("--passes", default=DEFAULT_PASSES, metavar="NAMES", help="comma-separated")
    add("--repeats", type=int, default=100, metavar="N", help="timed runs of each")
    add("--warmup", type=int, default=5, metavar="N", help="untimed runs before")
    add("--batch-size", type=int, default=1, metavar="N", help="rows")
    add("--seq-len", type=int, default=64, metavar="N", help="tokens of each row")
    add("--threads", type=int, metavar="N", help="of every library (default: their own choice)")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--no-cold", action="store_true", help="leave the timing without warm-up out")
    add("--json", type=Path, metavar="FILE", help="write the record, after each size")
    add("--resume", action="store_true", help="keep the sizes that --json holds already")
    add("--plot", type=Path, metavar="FILE", help="write the charts, .png or .svg")


def main(args: argparse.Namespace) -> int:
    """Run `ort-train passes-bench`.

    Returns:
        0; 1 where a runner failed or computed other numbers.
    """
    problems = output_problems(args)
    hidden = numbers("--hidden", args.hidden, problems)
    heads = numbers("--heads", args.heads, problems)
    models = words("--models", args.models, list(passes_models.MODELS), problems)
    if not problems and not args.grid and len(hidden) != len(heads):
        problems.append(
            f"--heads {args.heads} should have one number for each of --hidden {args.hidden}: add "
            "--grid to measure every size with every number"
        )
    if args.resume and (args.json is None or not args.json.is_file()):
        problems.append(f"--resume needs a record to go on with: --json {args.json} is none")
    if problems:
        raise ConfigError(problems)
    pairs = (
        [(h, n) for h in hidden for n in heads]
        if args.grid
        else list(zip(hidden, heads, strict=True))
    )
    record = run_benchmark(
        [Size(model, *pair) for model in models for pair in pairs],
        [name.strip() for name in args.passes.split(",") if name.strip()],
        repeats=args.repeats,
        warmup=args.warmup,
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        threads=args.threads,
        with_compile=not args.no_compile,
        with_cold=not args.no_cold,
        tell=lambda line: tqdm.write(line, file=sys.stderr),
        before=load(args.json) if args.resume else None,
        save=lambda made: write(made, args.json) if args.json is not None else None,
    )
    passes_report.show(record)
    if args.json is not None:
        print(f"wrote {args.json}")
    if args.plot is not None:
        passes_report.plot(record, args.plot)
        print(f"wrote {args.plot}")
    statuses = [v["status"] for result in record["results"] for v in result["variants"].values()]
    return int(any(status in ("failed", "mismatch") for status in statuses))


def write(record: Mapping[str, Any], path: Path) -> None:
    """Write a record as JSON, whole or not at all."""
    with replacing(path) as temporary:
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
        temporary.write_text(text, encoding="utf-8")


def load(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        OrtTrainError: it isn't one of this schema.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OrtTrainError(f"{path} is damaged ({error}): remove it, and begin anew") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA or "results" not in record:
        raise OrtTrainError(f"{path} is no record of `ort-train passes-bench`")
    return record

"""The command `ort-train quantize`."""

from __future__ import annotations

import argparse

import numpy as np

from ort_train.bench.serve import peak_resident_gib
from ort_train.config import DataConfig
from ort_train.errors import ConfigError
from ort_train.inference.quantization.quantize import (
    ACCURACY_LEVELS,
    BITS,
    BLOCK_SIZES,
    MAX_KL,
    REPORT_FILE,
    QuantizationReport,
    Scheme,
    load_source,
    quantize_folder,
)
from ort_train.overrides import add_overrides

_NUM_WORST = 5
#: Keys of `data` that choose the text (`make_rows`), and those that options stand for.
_READ = ("source", "dataset", "subset", "text_column", "folder", "hub_timeout_s")
_OPTIONS = {"block_size": "--length", "max_eval_blocks": "--rows"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ort-train quantize`."""
    add = parser.add_argument
    add("folder", metavar="DIR", help="an exported model in fp32")
    add_overrides(parser, "settings of the text that is read", "data.key=value")
    add("--out", required=True, metavar="DIR", help="a new or empty folder")
    add("--scheme", choices=BITS, default="int4", help="of the weights")
    add(
        "--block-size",
        type=int,
        choices=BLOCK_SIZES,
        help="of int4: weights that share a scale (default: 128)",
    )
    add("--symmetric", action="store_true", help="int4 without zero points: smaller, less exact")
    add(
        "--accuracy-level",
        type=int,
        choices=ACCURACY_LEVELS,
        help="of int4: 4 rounds the inputs to 8 bits, too (default); 0 computes in fp32",
    )
    add(
        "--exclude",
        default="",
        metavar="NAMES",
        help="comma-separated patterns of layers that stay as they are: '/lm_head/*,*layers.0*'",
    )
    add(
        "--max-kl",
        type=float,
        default=MAX_KL,
        metavar="X",
        help="KL divergence from the original's predictions, nats a token",
    )
    add("--rows", type=int, default=16, metavar="N", help="of text to compare on")
    add(
        "--length",
        type=int,
        default=128,
        metavar="N",
        help="tokens of a row, at most as many as the model has positions",
    )
    add("--threads", type=int, metavar="N", help="of ONNX Runtime (default: one a core)")


def main(args: argparse.Namespace) -> int:
    """Run `ort-train quantize`. Returns 0."""
    from ort_train.inference.folder import check_out, load_folder
    from ort_train.inference.quantization.evaluate import decoding_speed
    from ort_train.inference.text import make_rows

    scheme = _scheme(args)
    problems = [
        f"{option} {value} must be at least {least}"
        for option, value, least in (
            ("--rows", args.rows, 1),
            ("--length", args.length, 3),
            ("--threads", args.threads, 1),
        )
        if value is not None and value < least
    ]
    if not args.max_kl >= 0:  # nor NaN
        problems.append(f"--max-kl {args.max_kl} must be 0 or more")
    if other := [word for word in args.overrides if not word.startswith("data.")]:
        problems.append(f"{other[0]!r} isn't read here: only data.key=value is")
    keys = [word.removeprefix("data.").partition("=")[0] for word in args.overrides]
    for key in sorted(set(keys) & set(DataConfig.model_fields) - set(_READ)):
        says = f"{_OPTIONS[key]} says it" if key in _OPTIONS else f"{', '.join(_READ)} are"
        problems.append(f"data.{key} isn't read here: {says}")
    if problems:
        raise ConfigError(problems)
    source = load_source(args.folder)
    check_out(args.out)  # reading and tokenizing the text takes a while
    rows = make_rows(source, args.overrides, args.rows, args.length)
    exclude = [name.strip() for name in args.exclude.split(",") if name.strip()]
    report = quantize_folder(
        args.folder, args.out, scheme, exclude, rows.ids_BT, args.max_kl, args.threads
    )
    speeds = decoding_speed([source, load_folder(args.out)], args.threads)
    _show(report, rows.source, speeds)
    print(f"peak memory: {peak_resident_gib():.2f} GiB, both models loaded for the comparison")
    print(f"wrote {args.out}; errors of all {len(report.layers)} layers: {REPORT_FILE}")
    return 0


def _scheme(args: argparse.Namespace) -> Scheme:
    given = {
        "--block-size": args.block_size,
        "--accuracy-level": args.accuracy_level,
        "--symmetric": args.symmetric or None,
    }
    if args.scheme != "int4":
        if ignored := [option for option, value in given.items() if value is not None]:
            raise ConfigError(f"{ignored[0]} is of --scheme int4, not of {args.scheme}: remove it")
        return Scheme(args.scheme)
    level = 4 if args.accuracy_level is None else args.accuracy_level
    return Scheme("int4", args.block_size or Scheme.block_size, args.symmetric, level)


def _show(report: QuantizationReport, source: str | None, speeds: list[list[float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    comparison = report.comparison
    assert comparison is not None
    table = Table(title=f"fp32 and {report.scheme}")
    for head in ("", "MiB", "perplexity", "tokens/s\none row", "x fp32\nmedian (p20..p80)"):
        table.add_column(head, justify="left" if not head else "right")
    ratios = np.array(speeds[1]) / np.array(speeds[0])
    low, middle, high = np.percentile(ratios, [20, 50, 80])
    for name, size, reading, speed, ratio in (
        ("fp32", report.bytes_before, comparison.reference, speeds[0], "1"),
        (
            report.scheme.bits,
            report.bytes_after,
            comparison.reading,
            speeds[1],
            f"{middle:.2f} ({low:.2f}..{high:.2f})",
        ),
    ):
        perplexity = f"{reading.perplexity:.2f}" if source else "-"
        table.add_row(
            name, f"{size / 2**20:.1f}", perplexity, f"{float(np.median(speed)):.1f}", ratio
        )
    Console().print(table)
    if source:
        print(f"perplexity {comparison.perplexity_increase:+.2%}, ", end="")
    print(
        f"KL to fp32 {comparison.mean_kl:.5f} nats a token, the likeliest token is the same for "
        f"{comparison.agreement:.1%} of {comparison.reading.num_tokens:,}"
    )
    print(f"text: {source or 'none, the folder has no tokenizer: random tokens'}")
    worst = sorted(report.layers, key=lambda layer: -layer.rel_error)[:_NUM_WORST]
    print("largest relative errors of weights:")
    for layer in worst:
        print(f"  {layer.rel_error:.4f}  {layer.name} {layer.shape[0]} x {layer.shape[1]}")
    if report.left_out:
        print(f"left out: {', '.join(report.left_out)}")

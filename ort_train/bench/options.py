"""Options that the benchmarks' commands share, and what they do with a finished record."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ort_train.files import parent_obstacle
from ort_train.near import near_matches
from ort_train.reports import record as records
from ort_train.reports import report


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add `--json`, `--plot` and `--html`."""
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write the record")
    add("--plot", type=Path, metavar="FILE", help="write a chart, .png or .svg")
    add("--html", type=Path, metavar="FILE", help="write a self-contained page")


def output_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with those options, as far as a command has them."""
    outputs = {f"--{name}": getattr(args, name, None) for name in ("json", "plot", "html")}
    given = {option: path for option, path in outputs.items() if path is not None}
    problems = []
    for option, path in given.items():
        if path.is_dir():
            problems.append(f"{option} {path} is a directory: give the name of a file in it")
        elif (obstacle := parent_obstacle(path)) is not None:
            problems.append(f"{option} {path} {obstacle}")
    if len({path.absolute() for path in given.values()}) < len(given):
        problems.append(f"{' and '.join(given)} name one file: give each its own")
    if args.plot is not None and args.plot.suffix not in report.PLOT_SUFFIXES:
        problems.append(f"--plot {args.plot} must end in {' or '.join(report.PLOT_SUFFIXES)}")
    return problems


def show_and_save(record: Mapping[str, Any], args: argparse.Namespace) -> int:
    """Print the record's table and write what was asked for.

    Returns:
        The command's exit code: 1 where a case failed or computed other numbers, 130 where the
        record is of an interrupted benchmark.
    """
    report.show(record)
    for path, save in (
        (args.json, records.write),
        (args.plot, report.plot),
        (args.html, report.html),
    ):
        if path is not None:
            save(record, path)
            print(f"wrote {path}")
    if record.get("interrupted"):
        return 130
    return int(any(result["status"] in ("failed", "mismatch") for result in record["results"]))


def words(option: str, text: str | None, known: Sequence[str], problems: list[str]) -> list[Any]:
    """A comma-separated option's values; [None], the recipe's own, where it isn't given."""
    if text is None:
        return [None]
    found = [word.strip() for word in text.split(",") if word.strip()]
    for word in found:
        if word not in known:
            problems.append(f"{option} {word!r} is unknown: {near_matches(word, known)}")
    if not found:
        problems.append(f"{option} is empty: {near_matches('', known)}")
    return found


def numbers(option: str, text: str | None, problems: list[str]) -> list[Any]:
    """A comma-separated option's whole numbers; [None] where it isn't given, or is wrong."""
    if text is None:
        return [None]
    found = [word.strip() for word in text.split(",")]
    wrong = [word for word in found if not word.isascii() or not word.isdigit() or int(word) < 1]
    if wrong:
        problems.append(f"{option} {text!r} must be whole numbers of at least 1, like 1,2,4")
        return [None]
    return [int(word) for word in found]

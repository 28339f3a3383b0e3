"""What is installed, what can run, what is wrong, and the command that mends it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ort_train import checks
from ort_train.checks import Check


def _guarded(name: str, check: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """A check's findings; one that raises is a finding itself."""
    try:
        yield from check()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        detail = f"the check failed with {type(error).__name__}: {error}"
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        remedy = f"pip install {missing.partition('.')[0]}" if missing else ""
        yield Check(name, "problem", detail, remedy)


def run_checks() -> list[Check]:
    """Every finding, in the order that things depend on each other."""
    pool = ThreadPoolExecutor(max_workers=1)
    hub = pool.submit(checks.hub_problem)  # waits for the network while the others work
    pool.shutdown(wait=False)
    named: dict[str, Callable[[], Iterator[Check]]] = {
        "Python": checks.check_python,
        "packages": checks.check_packages,
        "onnxruntime": checks.check_onnxruntime,
        "C++ compiler": checks.check_compiler,
        "GPU": checks.check_gpu,
        "ORTModule": checks.check_ortmodule,
        "backends": checks.check_backends,
        "compiled extensions": checks.check_extensions,
        "machine": checks.check_machine,
        "disk": checks.check_disk,
        "Hugging Face hub": lambda: checks.check_hub(hub),
        "optional packages": checks.check_optional,
    }
    return [found for name, check in named.items() for found in _guarded(name, check)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ort-train doctor`."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def main(args: argparse.Namespace) -> int:
    """Run `ort-train doctor`: a table with what to do below it, or a JSON array.

    Returns:
        1 where there is a problem, else 0.
    """
    with contextlib.redirect_stdout(sys.stderr):  # imports of others may print
        findings = run_checks()
    if args.json:
        print(json.dumps([dataclasses.asdict(check) for check in findings], indent=2))
    else:
        try:
            _print_table(findings)
        except ImportError:  # without rich
            _print_plain(findings)
    return int(any(check.status == "problem" for check in findings))


def _summary(findings: list[Check]) -> str:
    counts = [
        f"{count} {status}{'s' if count > 1 else ''}"
        for status in ("problem", "warning")
        if (count := sum(check.status == status for check in findings))
    ]
    return ", ".join(counts) or "all well"


_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


def _print_table(findings: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console: Any = Console(highlight=False)
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in findings:
        colour = _COLOURS[check.status]
        table.add_row(Text(check.status, colour), Text(check.name, "bold"), Text(check.detail))
    if not console.is_terminal:  # in a file or a pipe nothing has to be folded
        wide = console.options.update(width=1000)
        console.width = max(console.width, console.measure(table, options=wide).maximum)
    console.print(table)
    console.print()
    for check in findings:
        if check.remedy:
            line = Text.assemble((check.name, f"bold {_COLOURS[check.status]}"), ": ", check.remedy)
            console.print(line, soft_wrap=True)  # a command is copied whole
    console.print(Text(_summary(findings), "bold"))


def _print_plain(findings: list[Check]) -> None:
    for check in findings:
        print(f"{check.status:<8} {check.name}: {check.detail}")
        if check.remedy:
            print(f"         -> {check.remedy}")
    print(_summary(findings))

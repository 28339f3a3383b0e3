"""Test the architectures on several versions of torch and transformers, an environment each.

    python benchmarks/compat_matrix.py [--only NAME]

Writes compat_matrix.json and compat_matrix.md beside this file, and the table into README.md. A row
of an earlier run stays until its set is run again. Environments (3 to 8 GB each) are kept, so a
second run installs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ort_train import cache
from ort_train.files import replacing
from ort_train.reports import provenance

ROOT = Path(__file__).resolve().parents[1]
TESTS = "tests/test_architectures.py"
MARKS = ("<!-- compat_matrix.py writes this table -->", "<!-- its end -->")
SHOWN = ("torch", "transformers", "peft", "accelerate", "onnx", "numpy", "onnxruntime-training")


@dataclass(frozen=True)
class VersionSet:
    """Versions that are tested together."""

    torch: str
    transformers: str

    @property
    def name(self) -> str:
        return f"torch-{self.torch}-transformers-{self.transformers}"


SETS = (
    VersionSet("2.8.0", "4.57.6"),
    VersionSet("2.13.0", "4.57.6"),
    VersionSet("2.13.0", "5.23.0"),
    VersionSet("2.14.1", "5.23.0"),
)


def default_folder() -> Path:
    """Where environments are kept."""
    return cache.root() / "compat"


def make_environment(versions: VersionSet, folder: Path) -> Path:
    """An environment with this checkout and these versions; returns its Python.

    Everything else is what pip takes for them, and is recorded.
    """
    home = folder / versions.name
    python = home / "bin" / "python"
    done = home / ".installed"
    wanted = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if done.is_file() and done.read_text(encoding="utf-8") == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    pins = [f"torch=={versions.torch}", f"transformers=={versions.transformers}"]
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *pins, "pytest", "-e", str(ROOT)], check=True)
    done.write_text(wanted, encoding="utf-8")
    return python


def installed_versions(python: Path) -> dict[str, str]:
    """Versions of the packages that matter, in an environment."""
    code = (
        "import importlib.metadata as m, json, sys; "
        "print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))"
    )
    output = subprocess.run(
        [str(python), "-c", code, *SHOWN], check=True, capture_output=True, text=True
    )
    return json.loads(output.stdout)


def run_tests(python: Path, report: Path, arguments: list[str]) -> dict[str, Any]:
    """Run the tests in an environment.

    Returns:
        `num_passed`, `num_skipped`, `failed` (ids and first lines of the failures), `seconds`.
    """
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", TESTS, "-q", "--no-header", "-p", "no:cacheprovider"]
    subprocess.run(
        [*command, f"--junitxml={report}", *arguments],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    suite = next(ElementTree.parse(report).iter("testsuite"))
    failed, num_skipped = {}, 0
    for case in suite.iter("testcase"):
        problem = case.find("failure")
        if problem is None:
            problem = case.find("error")
        if problem is not None:
            message = provenance.scrub((problem.get("message") or "").split("\n")[0])
            failed[case.get("name", "")] = message[:300]
        num_skipped += case.find("skipped") is not None
    return {
        "num_passed": int(suite.get("tests", 0)) - len(failed) - num_skipped,
        "num_skipped": num_skipped,
        "failed": failed,
        "seconds": round(float(suite.get("time", 0)), 1),
    }


def kind(message: str) -> str:
    """How a test failed: refused by an error that says why, or anything else, which is a fault."""
    return "refused" if "UnsupportedModelError" in message else "fault"


def table(results: list[dict[str, Any]]) -> str:
    """A row for each set: what passed, and how the rest didn't."""
    lines = [
        "| torch | transformers | peft | onnx | Python | passed | refused | faults | absent |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        versions = row["versions"]
        kinds = [kind(message) for message in row["failed"].values()]
        cells = [versions[name] for name in ("torch", "transformers", "peft", "onnx")]
        cells += [row["python"], row["num_passed"]]
        cells += [kinds.count("refused"), kinds.count("fault"), row["num_skipped"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def to_markdown(results: list[dict[str, Any]]) -> str:
    """The table, and what failed."""
    lines = [
        table(results),
        "Counted in tests. Absent: skipped, of what that version of transformers hasn't yet.",
    ]
    for row in results:
        for name in ("refused", "fault"):
            tests = [(t, m) for t, m in row["failed"].items() if kind(m) == name]
            if tests:
                lines += ["", f"{row['name']}, {name}:", ""]
                lines += [f"- `{test}`: {message[:160]}" for test, message in tests]
    return "\n".join(lines) + "\n"


def with_table(readme: str, results: list[dict[str, Any]]) -> str:
    """The README's text with this table in the place of its former one."""
    before, rest = readme.split(MARKS[0], 1)
    return f"{before}{MARKS[0]}\n{table(results)}{MARKS[1]}{rest.split(MARKS[1], 1)[1]}"


def main() -> int:
    names = [versions.name for versions in SETS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", choices=names, help="run this set alone")
    parser.add_argument("--folder", type=Path, default=default_folder(), help="of environments")
    parser.add_argument(
        "--install-only", action="store_true", help="make environments, run nothing"
    )
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    args = parser.parse_args()

    path = Path(__file__).with_suffix(".json")
    rows: dict[str, dict[str, Any]] = {}
    if path.is_file():
        rows = {row["name"]: row for row in json.loads(path.read_text())["results"]}
    sha, dirty = provenance.git_state()  # before the results are written
    for versions in SETS:
        if args.only and versions.name not in args.only:
            continue
        print(f"{versions.name}: installing", flush=True)
        started = time.perf_counter()
        python = make_environment(versions, args.folder)
        print(f"{versions.name}: installed in {time.perf_counter() - started:.0f} s", flush=True)
        if args.install_only:
            continue
        rows[versions.name] = {
            "name": versions.name,
            "python": ".".join(map(str, sys.version_info[:3])),
            "versions": installed_versions(python),
            "git_sha": sha,
            "git_dirty": dirty,
            **run_tests(python, args.folder / f"{versions.name}.xml", args.pytest),
        }
        results = [rows[name] for name in names if name in rows]
        contents = {
            "schema": 1,
            "command": provenance.command(),
            "machine": provenance.machine(),
            "tests": TESTS,
            "results": results,
        }
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
        with replacing(path.with_suffix(".md")) as temporary:
            temporary.write_text(to_markdown(results), encoding="utf-8")
        readme = ROOT / "README.md"
        text = with_table(readme.read_text(encoding="utf-8"), results)
        with replacing(readme) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if rows:
        print(to_markdown([rows[name] for name in names if name in rows]))
    return int(any(row["failed"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())

"""The command `ort-train optimize`: passes applied to a model on disk, with a report."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ort_train.errors import ConfigError, ModelError
from ort_train.files import expanded, new_folder_obstacle, parent_obstacle, replacing
from ort_train.inference import onnx_files
from ort_train.inference.optimization import drawing, passes
from ort_train.reports.pages import render

PAGE_FILE = "optimize.html"
#: Weights, which an optimized folder has of its own.
_MODEL_FILES = (onnx_files.MODEL_FILE, onnx_files.DATA_FILE, PAGE_FILE)


def optimize_path(
    source: str | Path,
    out: str | Path,
    names: Sequence[str],
    block: str | None = None,
    sizes: Mapping[str, int] | None = None,
) -> tuple[passes.Optimized, Path]:
    """Write a model after some passes, and a page about what they did.

    Args:
        source: an .onnx file, or an exported folder.
        out: a new .onnx file or, for a folder, a new folder: it gets the other files, too.
        names: of the passes.
        block: which part is drawn; see `drawing.choose_block`.
        sizes: see `passes.optimize`.

    Returns:
        What was done, and the page's path.

    Raises:
        ConfigError: see `passes.optimize`.
        ModelError: see `passes.optimize`; or `out` is there already.
    """
    source, out = expanded(source), expanded(out)
    file = onnx_files.model_file(source)
    check_out(source, out)
    optimized = passes.optimize(source, names, sizes)
    page = _page(optimized, source.name, block)
    if source.is_dir():
        from ort_train.inference.folder import staged as staged_folder

        with staged_folder(out) as staged:
            for path in sorted(source.iterdir()):
                if path.is_file() and path.name not in _MODEL_FILES:
                    shutil.copy2(path, staged / path.name)
            passes.save(optimized, file, staged / onnx_files.MODEL_FILE)
            (staged / PAGE_FILE).write_text(page, encoding="utf-8")
        return optimized, out / PAGE_FILE
    try:
        # The data file's name is in the model's, so both are written in a folder of their own.
        with onnx_files.scratch_folder(out.parent) as staged:
            passes.save(optimized, file, staged / out.name)
            for path in staged.iterdir():
                path.replace(out.parent / path.name)
        page_file = out.with_suffix(".html")
        with replacing(page_file) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ModelError(f"{str(out)!r} can't be written: {error}") from error
    return optimized, page_file


def check_out(source: Path, out: Path) -> None:
    if source.is_dir():
        if out.suffix == ".onnx":
            raise ModelError(f"{str(source)!r} is a folder, so --out {out} must name one too")
        if (obstacle := new_folder_obstacle(out.resolve())) is not None:
            raise ModelError(f"{str(out)!r} {obstacle}")
        return
    if out.suffix != ".onnx":
        raise ModelError(f"--out {out} must end in .onnx, as {source.name} does")
    written = (out, out.with_name(f"{out.name}.data"), out.with_suffix(".html"))
    if taken := [path for path in written if path.exists()]:
        raise ModelError(f"{str(taken[0])!r} is there already: name another --out")
    if (obstacle := parent_obstacle(out)) is not None:
        raise ModelError(f"{str(out)!r} {obstacle}")


def _page(optimized: passes.Optimized, name: str, block: str | None) -> str:
    before, after = optimized.before.graph, optimized.after.graph
    try:
        drawn = drawing.choose_block(before, after, block)
    except LookupError:
        names = sorted({node.name.rpartition("/")[0] for node in before.node if "/" in node.name})
        hint = f"; there are, for example, {', '.join(names[:6])}" if names else ""
        raise ConfigError(f"--block {block!r} is part of no node's name{hint}") from None
    pictures = []
    if drawn:
        pictures = [
            ("before", drawing.draw(before, after, drawn, added=False)),
            ("after", drawing.draw(after, before, drawn, added=True)),
        ]
    together = optimized.together
    several = len(optimized.singly) > 1
    head = f"The block {block}" if block else "Around the first change"
    return render(
        "optimize.html",
        title=f"{name} after {' + '.join(together.names)}",
        reports=[*optimized.singly, *([together] if several else [])],
        together=together,
        operators=sorted(set(together.before) | set(together.after)),
        block=head if drawn else "No picture: nothing changed",
        pictures=pictures,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ort-train optimize`."""
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="an .onnx file, or an exported folder")
    add("--passes", metavar="NAMES", help="comma-separated, in their order")
    add("--out", type=Path, metavar="PATH", help="a new .onnx file, or a new folder for a folder")
    add("--list", action="store_true", help="list the passes")
    add("--block", metavar="TEXT", help="draw the nodes whose names hold this (layers.0/mlp)")
    add(
        "--dim",
        action="append",
        default=[],
        metavar="NAME=SIZE",
        help="size of a symbolic input dimension in the comparison on random inputs",
    )


def main(args: argparse.Namespace) -> int:
    """Run `ort-train optimize`. Returns 0."""
    if args.list:
        _list()
        return 0
    missing = [
        option
        for option, value in (("MODEL", args.model), ("--passes", args.passes), ("--out", args.out))
        if value is None
    ]
    if missing:
        raise ConfigError(f"give {', '.join(missing)} (or --list for the names of the passes)")
    names = [name.strip() for name in args.passes.split(",") if name.strip()]
    optimized, page = optimize_path(args.model, args.out, names, args.block, _sizes(args.dim))
    for report in optimized.singly:
        print(*report.lines(), sep="\n")
    if len(optimized.singly) > 1:
        print(*optimized.together.lines(), sep="\n")
    print(f"wrote {args.out} and {page}")
    return 0


def _sizes(words: Sequence[str]) -> dict[str, int]:
    sizes = {}
    for word in words:
        name, equals, size = word.partition("=")
        if not (name and equals and size.isascii() and size.isdigit()):
            raise ConfigError(f"--dim {word!r} should be NAME=SIZE, like sequence_length=16")
        sizes[name] = int(size)
    return sizes


def _list() -> None:
    for name in passes.available():
        refused = f"  (refused: {passes.REFUSED[name]})" if name in passes.REFUSED else ""
        print(f"{name}{refused}")

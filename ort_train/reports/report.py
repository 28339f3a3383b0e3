"""A benchmark record for people: terminal table, chart (PNG or SVG), self-contained HTML page."""

from __future__ import annotations

import io
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ort_train.files import replacing
from ort_train.reports.pages import render
from ort_train.reports.record import RecordError
from ort_train.reports.views import (
    ALPHAS,
    COLORS,
    OTHER,
    TIMES,
    Chart,
    Record,
    Result,
    results,
    view,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT_SUFFIXES = (".png", ".svg")
STATUS_STYLES = {
    "ok": "green",
    "mismatch": "bold red",
    "failed": "bold red",
    "unavailable": "yellow",
}
MAX_REASON_CHARS = 800
# More bars than this leave no room for the numbers above them.
MAX_LABELLED_BARS = 30


def table(record: Record, upright: bool = False) -> Table:
    """The asked-for results of a record.

    Args:
        record: a valid record.
        upright: a column for each result instead of a row, for narrow terminals.
    """
    shown = Table(title=title(record), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    columns = view(record).columns
    rows = [[cell(result) for cell in columns.values()] for result in results(record)]
    if upright:
        heads = [head.replace("\n", ", ") for head in columns]
        shown.add_column(heads[0])
        for row in rows:
            shown.add_column(row[0], justify="right")
        for head, *cells in list(zip(heads, *rows, strict=True))[1:]:
            shown.add_row(head, *(_styled(cell) for cell in cells))
    else:
        for head in columns:
            words = head in view(record).words
            shown.add_column(head, justify="left" if words else "right")
        for row in rows:
            shown.add_row(*(_styled(cell) for cell in row))
    return shown


def show(record: Record, console: Console | None = None) -> None:
    """Print the table, as the width allows, and what has to be said below it."""
    console = console or Console()
    shown = table(record)
    needed = console.measure(shown, options=console.options.update(width=1000)).maximum
    if not console.is_terminal:
        console.width = max(console.width, needed)  # in a file nothing has to be folded
    if console.width < needed and len(results(record)) <= 3:
        shown = table(record, upright=True)
    console.print(shown)
    for line in summary_lines(record):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def title(record: Record) -> str:
    """What was measured, in one line."""
    return view(record).title(record)


def summary_lines(record: Record) -> list[str]:
    """The outcome, why some cases have none, and where it was measured."""
    shown = view(record)
    lines = shown.outcome(record)
    lines += [
        f"{shown.case(result)} {_verb(result['status'])}: {_shortened(result['reason'])}"
        for result in record["results"]
        if result["status"] != "ok"
    ]
    lines += shown.protocol(record)
    return [*lines, f"machine: {machine_line(record)}", f"versions: {versions_line(record)}"]


def machine_line(record: Record) -> str:
    """Processor, threads, memory, GPU."""
    machine = record["machine"]
    threads = _threads(machine)
    parts = [
        f"{machine['gpu']}, " if machine["gpu"] else "",
        f"{machine['cpu']}, {machine['cores']} cores{threads}, {machine['memory_gib']:g} GiB",
        f", {' '.join(machine['instruction_sets'])}" if machine["instruction_sets"] else "",
    ]
    return "".join(parts)


def versions_line(record: Record) -> str:
    """Every known version; the commit, marked where files differed from it."""
    parts = [f"{name} {version}" for name, version in record["versions"].items() if version]
    if record["git_sha"]:
        dirty = " (with uncommitted changes)" if record["git_dirty"] else ""
        parts.append(f"commit {record['git_sha'][:10]}{dirty}")
    return ", ".join(parts)


def plot(record: Record, path: str | Path) -> None:
    """Write the chart: speed-up over eager by shape, or speed where there is no eager to compare.

    Raises:
        RecordError: the path's suffix is neither .png nor .svg.
    """
    path = Path(path)
    if path.suffix not in PLOT_SUFFIXES:
        raise RecordError(f"{path} must end in {' or '.join(PLOT_SUFFIXES)}: charts are PNG or SVG")
    with replacing(path) as temporary:
        _figure(record).savefig(temporary, dpi=160)


def html(record: Record, path: str | Path) -> None:
    """Write one page that needs nothing beside it: table, chart, machine, versions, command."""
    columns = view(record).columns
    buffer = io.StringIO()
    # Without its metadata, which HTML has no place for; nor has it one for an XML prologue.
    unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    _figure(record).savefig(buffer, format="svg", metadata=unsaid)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    page = render(
        "benchmark.html",
        title=title(record),
        record=record,
        heads=[head.replace("\n", ", ") for head in columns],
        rows=[[cell(result) for cell in columns.values()] for result in results(record)],
        lines=summary_lines(record)[:-2],  # machine and versions have places of their own
        svg=svg.replace("<svg", f'<svg role="img" aria-label="{escape(_spoken(record))}"', 1),
        machine=machine_line(record),
        versions=versions_line(record),
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _spoken(record: Record) -> str:
    """What the chart shows, for those who can't see it."""
    shown = view(record)
    outcome = shown.outcome(record) or ["no speed-ups"]
    return f"Bars of {', '.join(map(shown.case, results(record)))}: {'; '.join(outcome)}"


def _figure(record: Record) -> Figure:
    """Bars for each engine and precision, grouped by shape where there are several."""
    # Not pyplot: it keeps figures alive, and picks a window system.
    from matplotlib.figure import Figure

    charts = view(record).charts
    shown = results(record)
    num_shapes = len({view(record).shape(result) for result in shown})
    num_series = len({view(record).series(result) for result in shown})
    inches = min(16.0, max(6.4, 1.6 + 0.75 * num_shapes * num_series))
    figure = Figure(figsize=(inches, 1.4 + 3.0 * len(charts)), layout="constrained")
    panels = figure.subplots(len(charts), squeeze=False)[:, 0]
    for index, (axes, chart) in enumerate(zip(panels, charts, strict=True)):
        _panel(axes, record, chart, with_legend=index == 0)
    figure.suptitle(title(record), x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(_caption(record), fontsize=8, color="#606060", x=0.01, ha="left")
    return figure


def _panel(axes: Axes, record: Record, chart: Chart, with_legend: bool) -> None:
    kind, shown = view(record), results(record)
    shapes = sorted({kind.shape(result) for result in shown})
    series = list(dict.fromkeys(kind.series(result) for result in shown))
    relative = any(chart.ratio(result) is not None for result in shown)
    one_precision = len({precision for _, precision in series}) == 1
    names = [kind.series_name(entry, one_precision) for entry in series]
    width = 0.8 / len(series)
    for result in shown:
        place = shapes.index(kind.shape(result))
        index = series.index(kind.series(result))
        x = place + (index - (len(series) - 1) / 2) * width
        is_labelled = len(shown) <= MAX_LABELLED_BARS
        _bar(axes, x, width, result, series[index], chart, relative, is_labelled)
    if relative:
        axes.axhline(1, color="#404040", linewidth=0.8, zorder=0)
    axes.set_xlim(-0.5, len(shapes) - 0.5)
    axes.margins(y=0.15)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel(chart.relative if relative else chart.absolute)
    labels = [kind.shape_label(shape) for shape in shapes]
    if len(shapes) == 1:
        ticks = [(index - (len(series) - 1) / 2) * width for index in range(len(series))]
        axes.set_xticks(ticks, [name.replace(" ", "\n") for name in names])
        axes.set_xlabel(kind.shape_title(labels[0]))
        return
    if with_legend:
        for (engine, precision), name in zip(series, names, strict=True):
            axes.bar(0, 0, color=_color(engine), alpha=_alpha(precision), label=name)
        axes.legend(ncols=6, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0))
    axes.set_xticks(range(len(shapes)), labels, rotation=90 if len(shapes) > 12 else 0)
    axes.set_xlabel(kind.shape_title(None))


def _color(engine: str) -> str:
    return COLORS.get(engine, OTHER)


def _alpha(precision: str) -> float:
    return ALPHAS.get(precision, 1.0)


def _threads(machine: Mapping[str, Any]) -> str:
    count = machine["threads"]
    return "" if count is None else f", {count} thread{'' if count == 1 else 's'}"


def _caption(record: Record) -> str:
    machine, versions = record["machine"], record["versions"]
    named = [
        f"{name} {versions[name]}"
        for name in ("torch", "onnxruntime", "transformers")
        if versions.get(name)
    ]
    threads = _threads(machine)
    return (
        f"{machine['gpu'] or machine['cpu']}{threads}; {', '.join(named)}\n"
        f"median of {record['protocol']['rounds']} rounds, whiskers p20 to p80"
    )


def _bar(
    axes: Axes,
    x: float,
    width: float,
    result: Result,
    series: tuple[str, str],
    chart: Chart,
    relative: bool,
    is_labelled: bool,
) -> None:
    """One result: a bar with its value and spread, or the word for why there is none."""
    (engine, precision), rate = series, chart.rate(result)
    color = _color(engine)
    values = chart.ratio(result) if relative else rate
    if values is None or result["status"] != "ok":
        why = result["status"] if result["status"] != "ok" else "no baseline"
        axes.text(x, 0, f" {why}", rotation=90, ha="center", va="bottom", fontsize=9, color=color)
        return
    height, low, high = values["median"], values["p20"], values["p80"]
    axes.bar(x, height, width * 0.92, color=color, alpha=_alpha(precision))
    if low < high:  # the baseline against itself has no spread
        whiskers = [[max(0.0, height - low)], [max(0.0, high - height)]]
        axes.errorbar(x, height, whiskers, color="#202020", linewidth=1, capsize=2.5)
    if not is_labelled:
        return
    text = f"{height:.3g}"
    if relative and rate is not None:
        text = f"{height:.2f} {TIMES}\n{rate['median']:.3g} {chart.unit}"
    axes.annotate(
        text, (x, high), (0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=8
    )


def _styled(cell: str) -> Text:
    return Text(cell, STATUS_STYLES.get(cell, ""))


def _verb(status: str) -> str:
    return {
        "mismatch": "computes other numbers, so it has no speed-up",
        "unavailable": "can't run here",
        "failed": "failed",
    }[status]


def _shortened(reason: str) -> str:
    """A reason for the foot of the table: some hold a compiler's whole command line."""
    if len(reason) <= MAX_REASON_CHARS:
        return reason
    return f"{reason[:MAX_REASON_CHARS]}... (the record has all of it)"

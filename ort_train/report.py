"""A benchmark record for people: terminal table, chart (PNG or SVG), self-contained HTML page."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ort_train.record import RecordError, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT_SUFFIXES = (".png", ".svg")
# Okabe and Ito's palette, told apart by colour-blind readers too. https://jfly.uni-koeln.de/color
COLORS = {"eager": "#8c8c8c", "compile": "#0072b2", "ort": "#d55e00"}
OTHER = "#009e73"
ALPHAS = {"fp32": 1.0, "bf16": 0.7, "fp16": 0.45}
STATUS_STYLES = {
    "ok": "green",
    "mismatch": "bold red",
    "failed": "bold red",
    "unavailable": "yellow",
}
TIMES = "\N{MULTIPLICATION SIGN}"  # charts only: not every terminal can show it
MAX_REASON_CHARS = 800
NONE = "-"

Record = Mapping[str, Any]
Result = Mapping[str, Any]

# Head with its unit, and how a result fills the cell.
COLUMNS: dict[str, Callable[[Result], str]] = {
    "backend": lambda r: r["backend"],
    "precision": lambda r: r["precision"],
    "batch\nsamples": lambda r: str(r["micro_batch_size"]),
    "seq\ntokens": lambda r: str(r["block_size"]),
    "it/s\nmedian (p20..p80)": lambda r: _spread(r["it_per_s"]),
    "tokens/s": lambda r: _number(r["tokens_per_s"], "{:,.0f}"),
    "step\nms": lambda r: _number(r["step_ms"] and r["step_ms"]["median"], "{:.1f}"),
    "first step\ns": lambda r: _number(r["first_step_s"], "{:.2f}"),
    "peak\nGiB": lambda r: _number(r["peak_gib"], "{:.2f}"),
    "loss\nmax diff": lambda r: _number(_parity(r, "loss_max_abs"), "{:.1e}"),
    "gradient\nmax rel diff": lambda r: _number(_parity(r, "grad_max_rel"), "{:.1e}"),
    "x eager\nmedian (p20..p80)": lambda r: _speedup(r, "eager"),
    "x compile": lambda r: _number(r["speedup_vs_compile"], "{:.2f}"),
    "status": lambda r: r["status"],
}


def table(record: Record, upright: bool = False) -> Table:
    """The asked-for results of a record.

    Args:
        record: a valid record.
        upright: a column for each result instead of a row, for narrow terminals.
    """
    shown = Table(title=title(record), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    rows = [[cell(result) for cell in COLUMNS.values()] for result in results(record)]
    if upright:
        heads = [head.replace("\n", ", ") for head in COLUMNS]
        shown.add_column(heads[0])
        for row in rows:
            shown.add_column(row[0], justify="right")
        for head, *cells in list(zip(heads, *rows, strict=True))[1:]:
            shown.add_row(head, *(_styled(cell) for cell in cells))
    else:
        for head in COLUMNS:
            words = head in ("backend", "precision", "status")
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
    model = record["model"]
    if model is None:
        return record["recipe"]
    size = _count(model["num_parameters"])
    name = model["name"] or model["architecture"]
    trained = ""
    if model["num_trainable"] < model["num_parameters"]:
        trained = f", {_count(model['num_trainable'])} of them trained ({model['adapter']})"
    return f"{record['recipe']}: {name}, {size} parameters{trained}"


def summary_lines(record: Record) -> list[str]:
    """The outcome, why some cases have none, and where it was measured."""
    lines = []
    for result in results(record):
        gains = [
            f"{result[f'speedup_vs_{baseline}']:.2f} x {baseline}"
            for baseline in ("eager", "compile")
            if baseline != result["backend"] and result[f"speedup_vs_{baseline}"] is not None
        ]
        if result["backend"] == "ort" and gains:
            lines.append(f"{case(result)}: {', '.join(gains)}")
    lines += [
        f"{case(result)} {_verb(result['status'])}: {_shortened(result['reason'])}"
        for result in record["results"]
        if result["status"] != "ok"
    ]
    protocol = record["protocol"]
    lines.append(
        f"{protocol['rounds']} interleaved rounds of {protocol['steps']} training steps "
        f"(forward, backward, fused AdamW) after {protocol['warmup_steps']} of warm-up, "
        "without dropout; differences are to eager fp32"
    )
    if record["data"]:
        lines.append(f"data: {record['data']}")
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


def results(record: Record) -> list[Result]:
    """The results that were asked for: without a reference that was only compared with."""
    return [result for result in record["results"] if not result["reference_only"]]


def case(result: Result) -> str:
    """A result's name."""
    shape = f"{result['micro_batch_size']}x{result['block_size']}"
    return f"{result['backend']} {result['precision']} {shape}"


def plot(record: Record, path: str | Path) -> None:
    """Write the chart: speed-up over eager by shape, or it/s where there is no eager to compare.

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
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ort_train"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    buffer = io.StringIO()
    _figure(record).savefig(buffer, format="svg")
    svg = buffer.getvalue()
    page = environment.get_template(
        "benchmark.html"
    ).render(
        title=title(record),
        record=record,
        heads=[head.replace("\n", ", ") for head in COLUMNS],
        rows=[[cell(result) for cell in COLUMNS.values()] for result in results(record)],
        lines=summary_lines(record)[:-2],  # machine and versions have places of their own
        svg=svg[svg.index("<svg") :],  # an XML prologue has no place inside a page
        machine=machine_line(record),
        versions=versions_line(record),
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _figure(record: Record) -> Figure:
    """Bars for each backend and precision, grouped by shape where there are several."""
    # Not pyplot: it keeps figures alive, and picks a window system.
    from matplotlib.figure import Figure

    shown = results(record)
    shapes = sorted({(r["block_size"], r["micro_batch_size"]) for r in shown})
    series = list(dict.fromkeys((r["backend"], r["precision"]) for r in shown))
    relative = any(r["speedup_vs_eager"] is not None for r in shown)
    one_precision = len({precision for _, precision in series}) == 1
    names = [b if one_precision else f"{b} {p}" for b, p in series]
    width = 0.8 / len(series)
    inches = min(16.0, max(6.4, 1.6 + 0.75 * len(shapes) * len(series)))
    figure = Figure(figsize=(inches, 4.4), layout="constrained")
    axes = figure.subplots()
    for result in shown:
        place = shapes.index((result["block_size"], result["micro_batch_size"]))
        index = series.index((result["backend"], result["precision"]))
        x = place + (index - (len(series) - 1) / 2) * width
        _bar(axes, x, width, result, relative)
    if relative:
        axes.axhline(1, color="#404040", linewidth=0.8, zorder=0)
    axes.set_xlim(-0.5, len(shapes) - 0.5)
    axes.margins(y=0.15)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel(f"training speed, {TIMES} eager" if relative else "training iterations/s")
    labels = [f"{batch} {TIMES} {block}" for block, batch in shapes]
    if len(shapes) == 1:
        ticks = [(index - (len(series) - 1) / 2) * width for index in range(len(series))]
        axes.set_xticks(ticks, [name.replace(" ", "\n") for name in names])
        axes.set_xlabel(f"batch of {labels[0]} tokens")
    else:
        for (backend, precision), name in zip(series, names, strict=True):
            axes.bar(0, 0, color=COLORS.get(backend, OTHER), alpha=ALPHAS[precision], label=name)
        axes.legend(ncols=6, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0))
        axes.set_xticks(range(len(shapes)), labels)
        axes.set_xlabel(f"batch: samples {TIMES} tokens")
    figure.suptitle(title(record), x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(_caption(record), fontsize=8, color="#606060", x=0.01, ha="left")
    return figure


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


def _bar(axes: Axes, x: float, width: float, result: Result, relative: bool) -> None:
    """One result: a bar with its value and spread, or the word for why there is none."""
    color, rate = COLORS.get(result["backend"], OTHER), result["it_per_s"]
    spread: tuple[float, float, float] | None = None
    if relative and result["speedup_vs_eager"] is not None:
        spread = (result["speedup_vs_eager"], *result["speedup_vs_eager_range"])
    elif not relative and rate is not None:
        spread = (rate["median"], rate["p20"], rate["p80"])
    if spread is None or result["status"] != "ok":
        why = result["status"] if result["status"] != "ok" else "no baseline"
        axes.text(x, 0, f" {why}", rotation=90, ha="center", va="bottom", fontsize=9, color=color)
        return
    height, low, high = spread
    axes.bar(x, height, width * 0.92, color=color, alpha=ALPHAS[result["precision"]])
    if low < high:  # the baseline against itself has no spread
        whiskers = [[max(0.0, height - low)], [max(0.0, high - height)]]
        axes.errorbar(x, height, whiskers, color="#202020", linewidth=1, capsize=2.5)
    text = f"{height:.2f} {TIMES}\n{rate['median']:.3g} it/s" if relative else f"{height:.3g}"
    axes.annotate(
        text, (x, high), (0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=8
    )


def _styled(cell: str) -> Text:
    return Text(cell, STATUS_STYLES.get(cell, ""))


def _spread(spread: Mapping[str, float] | None) -> str:
    if spread is None:
        return NONE
    return f"{_rate(spread['median'])} ({_rate(spread['p20'])}..{_rate(spread['p80'])})"


def _speedup(result: Result, baseline: str) -> str:
    value = result[f"speedup_vs_{baseline}"]
    if value is None:
        return NONE
    low, high = result[f"speedup_vs_{baseline}_range"]
    return f"{value:.2f}" if low == high else f"{value:.2f} ({low:.2f}..{high:.2f})"


def _rate(value: float) -> str:
    """Three digits that can be told apart at any speed."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else form.format(value)


def _parity(result: Result, name: str) -> float | None:
    return result["parity"][name] if result["parity"] else None


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


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)

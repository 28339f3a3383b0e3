"""A record of `ort-train passes-bench` for people: tables, and charts of time against size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ort_train.files import replacing
from ort_train.reports.report import COLORS, machine_line, versions_line
from ort_train.reports.views import NONE

Record = Mapping[str, Any]
Result = Mapping[str, Any]
LEVELS = ("off", "on")


def noise(result: Result, level: str) -> tuple[float, float]:
    """How many times faster than itself the original was: 20th and 80th percentile."""
    ratio = result["variants"][f"original again, {level}"]["speedup_vs_original"]
    return ratio["p20"], ratio["p80"]


def verdict(result: Result, label: str, level: str) -> str:
    """What a pass brought, in words."""
    variant = result["variants"][f"{label}, {level}"]
    low, high = noise(result, level)
    # Both sides of the noise: which of two equal graphs came first is chance.
    floor = max(abs(low - 1), abs(high - 1))
    ratio = variant["speedup_vs_original"]
    change = result["changes"][label]
    what = "graph identical" if not change["changed"] else "{} -> {} nodes".format(*change["nodes"])
    # The whole spread must lie outside, not just the median: rounds of a busy machine stray.
    if ratio["p20"] <= 1 + floor and ratio["p80"] >= 1 - floor:
        return f"{what}; within the noise of {floor:.1%}"
    gain = ratio["median"] - 1
    return f"{what}; {abs(gain):.1%} {'faster' if gain > 0 else 'slower'}, noise {floor:.1%}"


def rows(result: Result) -> list[list[str]]:
    """One a variant: name, ms, x eager, x original, verdict."""
    made = []
    for name, variant in result["variants"].items():
        if variant["status"] != "ok":
            made.append([name, variant["status"], NONE, NONE, str(variant["reason"])[:200]])
            continue
        label, _, level = name.rpartition(", ")
        original = variant.get("speedup_vs_original")
        told = ""
        if label in result["changes"]:
            told = verdict(result, label, level)
        elif label == "original again":
            told = "the noise: the same graph twice"
        made.append(
            [
                f"ORT {level}: {label}" if label else name,
                _spread(variant["ms"]),
                _ratio(variant.get("speedup_vs_eager")),
                _ratio(original),
                told,
            ]
        )
    return made


def show(record: Record) -> None:
    """Print a table for each model and size, and what stands below them."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for result in record["results"]:
        table = Table(title=title(record, result), title_justify="left", box=box.SIMPLE_HEAD)
        for head in ("", "ms\nmedian (p20..p80)", "x eager", "x original", ""):
            table.add_column(head, justify="left" if not head else "right")
        for row in rows(result):
            table.add_row(*row)
        if not console.is_terminal:
            console.width = 200
        console.print(table)
        for line in cold_lines(result):
            console.print(line, soft_wrap=True, highlight=False)
    for line in (machine_line(record), versions_line(record)):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def title(record: Record, result: Result) -> str:
    """What was measured, in one line."""
    protocol = record["protocol"]
    return (
        f"{result['model']}, {protocol['num_layers']} layers, hidden {result['hidden']}, "
        f"{result['heads']} heads, {protocol['batch_size']} x {protocol['seq_len']} tokens, "
        f"{result['repeats']} runs"
    )


def cold_lines(result: Result) -> list[str]:
    """What a benchmark without warm-up and turns would have seen."""
    if not result["cold"]:
        return []
    cold = result["cold"]
    gains = "; ".join(
        f"{order}, {gain['median']:+.1%} ({gain['p20']:+.1%}..{gain['p80']:+.1%})"
        for order, gain in cold["apparent_gain_of_pass"].items()
    )
    return [
        f"without warm-up, one graph after the other, {cold['repeats']} runs each, "
        f"{cold['pass']} seems to gain: {gains}"
    ]


def plot(record: Record, path: str | Path) -> None:
    """Write the charts: time against hidden size, and the passes' ratio to the original."""
    from matplotlib.figure import Figure

    path = Path(path)
    by_model: dict[str, list[Result]] = {}
    for result in record["results"]:
        by_model.setdefault(result["model"], []).append(result)
    figure = Figure(figsize=(10.5, 3.6 * len(by_model) + 0.4), layout="constrained")
    panels = figure.subplots(len(by_model), 2, squeeze=False)
    for (times, ratios), (model, results) in zip(panels, by_model.items(), strict=True):
        results = sorted(results, key=lambda result: (result["hidden"], result["heads"]))
        places = range(len(results))
        names = [f"{result['hidden']}\n{result['heads']} heads" for result in results]
        _plot_times(times, results, places)
        _plot_ratios(ratios, results, places)
        for axes in (times, ratios):
            axes.set_xticks(list(places), names)
            axes.set_xlabel("hidden size")
            axes.set_title(model, fontsize=10, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
            axes.margins(x=0.15)
            axes.legend(fontsize=7, frameon=False)
    protocol, machine = record["protocol"], record["machine"]
    runs = " to ".join(map(str, sorted({result["repeats"] for result in record["results"]})))
    figure.supxlabel(
        f"{machine['cpu']}, {machine['threads'] or machine['cores']} threads; "
        f"{protocol['batch_size']} x {protocol['seq_len']} tokens; medians of "
        f"{runs} runs, whiskers p20 to p80 of their rounds",
        fontsize=8, color="#606060", x=0.01, ha="left",
    )  # fmt: skip
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=160)


def _plot_times(axes: Any, results: list[Result], places: range) -> None:
    lines = {
        "eager": ("eager", COLORS["eager"], "-"),
        "compile": ("compile", COLORS["compile"], "-"),
        "original, off": ("ORT, optimizations off", COLORS["ort"], ":"),
        "original, on": ("ORT, optimizations on", COLORS["ort"], "-"),
        "all, on": ("the same, all passes", "#009e73", "--"),
    }
    for variant, (label, color, style) in lines.items():
        points = [
            (place, result["variants"][variant]["ms"]["median"])
            for place, result in zip(places, results, strict=True)
            if result["variants"].get(variant, {}).get("status") == "ok"
        ]
        if points:
            axes.plot(*zip(*points, strict=True), style, marker="o", color=color, label=label)
    axes.set_yscale("log")
    axes.set_ylabel("ms a forward")


def _plot_ratios(axes: Any, results: list[Result], places: range) -> None:
    labels = list(results[0]["changes"])
    series = [(label, level) for label in labels for level in LEVELS]
    for number, (label, level) in enumerate(series):
        xs, ys, low, high = [], [], [], []
        for place, result in zip(places, results, strict=True):
            variant = result["variants"].get(f"{label}, {level}")
            if not variant or "speedup_vs_original" not in variant:
                continue
            ratio = variant["speedup_vs_original"]
            xs.append(place + (number - (len(series) - 1) / 2) * 0.08)
            ys.append(ratio["median"])
            low.append(ratio["median"] - ratio["p20"])
            high.append(ratio["p80"] - ratio["median"])
        marker = "o" if level == "on" else "s"
        color = f"C{labels.index(label)}"
        axes.errorbar(
            xs, ys, [low, high], fmt=marker, color=color, capsize=2, markersize=4,
            markerfacecolor=color if level == "on" else "white", label=f"{label}, {level}",
        )  # fmt: skip
    for place, result in zip(places, results, strict=True):
        if "original again, on" in result["variants"]:
            bounds = [noise(result, level) for level in LEVELS]
            low_bound, high_bound = min(b[0] for b in bounds), max(b[1] for b in bounds)
            axes.fill_between(
                [place - 0.4, place + 0.4], low_bound, high_bound, color="#d0d0d0", alpha=0.6,
                zorder=0, linewidth=0, label="original against itself" if not place else None,
            )  # fmt: skip
    axes.axhline(1, color="#404040", linewidth=0.8, zorder=1)
    axes.set_ylabel("speed, x original graph")


def _spread(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['p20']:.2f}..{spread['p80']:.2f})"


def _ratio(spread: Mapping[str, float] | None) -> str:
    if spread is None:
        return NONE
    return f"{spread['median']:.2f} ({spread['p20']:.2f}..{spread['p80']:.2f})"

"""What a report shows of each kind of record: columns, lines, bars. `report.py` lays it out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Okabe and Ito's palette, told apart by colour-blind readers too. https://jfly.uni-koeln.de/color
COLORS = {
    "eager": "#8c8c8c", "compile": "#0072b2", "ort": "#d55e00", "ort-dense": "#e69f00",
    "llamacpp": "#cc79a7",
}  # fmt: skip
OTHER = "#009e73"
ALPHAS = {
    "fp32": 1.0, "f32": 1.0, "bf16": 0.7, "fp16": 0.45, "f16": 0.7, "int8": 0.6, "int4": 0.4,
    "q4_0": 0.4,
}  # fmt: skip
TIMES = "\N{MULTIPLICATION SIGN}"  # charts only: not every terminal can show it
NONE = "-"

Record = Mapping[str, Any]
Result = Mapping[str, Any]
Spread = Mapping[str, float]


@dataclass(frozen=True)
class Chart:
    """One row of bars.

    Attributes:
        relative: label of the axis where there is an eager to compare with.
        absolute: label of it where there is none.
        rate: a result's own speed.
        ratio: its speed over eager's.
        unit: of the rate, beside a bar.
    """

    relative: str
    absolute: str
    rate: Callable[[Result], Spread | None]
    ratio: Callable[[Result], Spread | None]
    unit: str


@dataclass(frozen=True)
class View:
    """How one kind of record is shown.

    Attributes:
        columns: head with its unit, and how a result fills the cell.
        words: the heads whose cells are words.
        title: what was measured, in one line.
        case: a result's name.
        outcome: the speed-ups, in lines.
        protocol: how it was measured, in lines.
        series: a result's engine and precision: bars of one colour.
        series_name: what the legend calls it; the second argument tells whether all series have
            one precision.
        shape: what bars are grouped by.
        shape_label: of a group.
        shape_title: of the axis; takes the label where there is one group only.
        charts: from top to bottom.
    """

    columns: dict[str, Callable[[Result], str]]
    words: frozenset[str]
    title: Callable[[Record], str]
    case: Callable[[Result], str]
    outcome: Callable[[Record], list[str]]
    protocol: Callable[[Record], list[str]]
    series: Callable[[Result], tuple[str, str]]
    series_name: Callable[[tuple[str, str], bool], str]
    shape: Callable[[Result], tuple[int, int]]
    shape_label: Callable[[tuple[int, int]], str]
    shape_title: Callable[[str | None], str]
    charts: tuple[Chart, ...]


def results(record: Record) -> list[Result]:
    """The results that were asked for: without a reference that was only compared with."""
    return [result for result in record["results"] if not result["reference_only"]]


def view(record: Record) -> View:
    """How a record is shown."""
    return VIEWS[record.get("kind", "training")]


def spread(values: Spread | None) -> str:
    """Median and range."""
    if values is None:
        return NONE
    low, high = values["p20"], values["p80"]
    if low == high:
        return rate(values["median"])
    return f"{rate(values['median'])} ({rate(low)}..{rate(high)})"


def ratio(values: Spread | None) -> str:
    """A speed-up, with its range."""
    if values is None:
        return NONE
    low, high = values["p20"], values["p80"]
    shown = f"{values['median']:.2f}"
    return shown if low == high else f"{shown} ({low:.2f}..{high:.2f})"


def rate(value: float) -> str:
    """Three digits that can be told apart at any speed."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def number(value: float | None, form: str) -> str:
    return NONE if value is None else form.format(value)


def count(amount: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if amount >= size:
            return f"{amount / size:.3g}{unit}"
    return str(amount)


# Training steps.


def _training_title(record: Record) -> str:
    model = record["model"]
    if model is None:
        return record["recipe"]
    size = count(model["num_parameters"])
    name = model["name"] or model["architecture"]
    trained = ""
    if model["num_trainable"] < model["num_parameters"]:
        trained = f", {count(model['num_trainable'])} of them trained ({model['adapter']})"
    return f"{record['recipe']}: {name}, {size} parameters{trained}"


def _training_case(result: Result) -> str:
    shape = f"{result['micro_batch_size']}x{result['block_size']}"
    return f"{result['backend']} {result['precision']} {shape}"


def _training_outcome(record: Record) -> list[str]:
    lines = []
    for result in results(record):
        gains = [
            f"{ratio['median']:.2f} x {baseline}"
            for baseline in ("eager", "compile", "ort-dense")
            if baseline != result["backend"] and (ratio := _training_ratio(result, baseline))
        ]
        if result["backend"] == "ort" and gains:
            lines.append(f"{_training_case(result)}: {', '.join(gains)}")
    return [*lines, *map(_profile_line, filter(lambda r: r["profile"], results(record)))]


def _profile_line(result: Result) -> str:
    shares = sorted(result["profile"]["shares"].items(), key=lambda item: -item[1])
    shown = ", ".join(f"{kind.replace('_', ' ')} {share:.0%}" for kind, share in shares
                      if share >= 0.005)  # fmt: skip
    return f"{_training_case(result)}, forward and backward: {shown}{_of_peak(result['profile'])}"


def _of_peak(profile: Mapping[str, Any]) -> str:
    if profile["products_share_of_peak"] is None:
        return ""
    return (
        f"; matrix products at {profile['products_gflops']:.0f} GFLOPS, "
        f"{profile['products_share_of_peak']:.0%} of the machine's measured "
        f"{profile['peak_gflops']:.0f}"
    )


def _training_protocol(record: Record) -> list[str]:
    protocol = record["protocol"]
    lines = [
        f"{protocol['rounds']} interleaved rounds of {protocol['steps']} training steps "
        f"(forward, backward, fused AdamW) after {protocol['warmup_steps']} of warm-up, "
        "without dropout; differences are to eager fp32"
    ]
    if protocol["caches"] == "empty":
        lines.append("first steps begin with empty caches, of kernels and of graphs")
    return [*lines, f"data: {record['data']}"] if record["data"] else lines


def _training_ratio(result: Result, baseline: str) -> Spread | None:
    key = f"speedup_vs_{baseline.replace('-', '_')}"
    median = result[key]
    if median is None:
        return None
    low, high = result[f"{key}_range"]
    return {"median": median, "p20": low, "p80": high}


def _parity(result: Result, name: str) -> float | None:
    return result["parity"][name] if result["parity"] else None


TRAINING = View(
    columns={
        "backend": lambda r: r["backend"],
        "precision": lambda r: r["precision"],
        "batch\nsamples": lambda r: str(r["micro_batch_size"]),
        "seq\ntokens": lambda r: str(r["block_size"]),
        "it/s\nmedian (p20..p80)": lambda r: spread(r["it_per_s"]),
        "tokens/s": lambda r: number(r["tokens_per_s"], "{:,.0f}"),
        "step\nms": lambda r: number(r["step_ms"] and r["step_ms"]["median"], "{:.1f}"),
        "first step\ns": lambda r: number(r["first_step_s"], "{:.2f}"),
        "peak\nGiB": lambda r: number(r["peak_gib"], "{:.2f}"),
        "loss\nmax diff": lambda r: number(_parity(r, "loss_max_abs"), "{:.1e}"),
        "gradient\nmax rel diff": lambda r: number(_parity(r, "grad_max_rel"), "{:.1e}"),
        "x eager\nmedian (p20..p80)": lambda r: ratio(_training_ratio(r, "eager")),
        "x compile": lambda r: number(r["speedup_vs_compile"], "{:.2f}"),
        "status": lambda r: r["status"],
    },
    words=frozenset({"backend", "precision", "status"}),
    title=_training_title,
    case=_training_case,
    outcome=_training_outcome,
    protocol=_training_protocol,
    series=lambda r: (r["backend"], r["precision"]),
    series_name=lambda series, one_precision: series[0] if one_precision else " ".join(series),
    shape=lambda r: (r["block_size"], r["micro_batch_size"]),
    shape_label=lambda shape: f"{shape[1]} {TIMES} {shape[0]}",
    shape_title=lambda label: (
        f"batch of {label} tokens" if label else f"batch: samples {TIMES} tokens"
    ),
    charts=(
        Chart(
            relative=f"training speed, {TIMES} eager",
            absolute="training iterations/s",
            rate=lambda r: r["it_per_s"],
            ratio=lambda r: _training_ratio(r, "eager"),
            unit="it/s",
        ),
    ),
)


# Engines that generate or draw.


def _engine_title(record: Record) -> str:
    model = record["model"]
    if model is None:
        return f"{record['kind']}, no engine ran"
    name = model["name"] or model.get("architecture") or model["pipeline"]
    kind = model.get("architecture") or model["pipeline"]
    return f"{name}: {kind}, {count(model['num_parameters'])} parameters"


def _speedup(result: Result, baseline: str, what: str) -> Spread | None:
    return result["speedups"].get(baseline, {}).get(what)


def _other_speedup(result: Result, what: str) -> str:
    """Over the engines of the same precision but eager."""
    others = {b: r[what] for b, r in result["speedups"].items() if b != "eager"}
    return ", ".join(f"{r['median']:.2f} x {b}" for b, r in others.items()) or NONE


def _engine_series(result: Result) -> tuple[str, str]:
    engine, _, precision = result["engine"].partition("-")
    return engine, precision or "fp32"


def _engine_outcome(record: Record, whats: tuple[str, ...]) -> list[str]:
    case = view(record).case
    lines = []
    for result in results(record):
        gains = [
            f"{what} {values[what]['median']:.2f} x {baseline}"
            for baseline, values in result["speedups"].items()
            for what in whats
            if baseline != result["engine"]
        ]
        if result["engine"].startswith("ort") and gains:
            lines.append(f"{case(result)}: {', '.join(gains)}")
    return lines


def _median(values: Spread | None, form: str) -> str:
    return NONE if values is None else form.format(values["median"])


def _generation_protocol(record: Record) -> list[str]:
    protocol = record["protocol"]
    return [
        f"{protocol['rounds']} interleaved rounds of a prompt and {protocol['new_tokens']} tokens "
        f"generated greedily, after {protocol['warmup']}; generation is the mean over those "
        "tokens; differences are to eager fp32, of four bits to eager fp32 on the same rounded "
        "weights, and rounding is what these change"
    ]


GENERATION = View(
    columns={
        "engine": lambda r: r["engine"],
        "batch\nrows": lambda r: str(r["batch_size"]),
        "prompt\ntokens": lambda r: str(r["prompt_len"]),
        "prompt, tokens/s\nmedian (p20..p80)": lambda r: spread(r["prompt_tokens_per_s"]),
        "prompt\nx eager": lambda r: ratio(_speedup(r, "eager", "prompt")),
        "prompt\nx others": lambda r: _other_speedup(r, "prompt"),
        "generation, tokens/s\nmedian (p20..p80)": lambda r: spread(r["generate_tokens_per_s"]),
        "generation\nx eager": lambda r: ratio(_speedup(r, "eager", "generation")),
        "generation\nx others": lambda r: _other_speedup(r, "generation"),
        "a token\nms": lambda r: _median(r["token_ms"], "{:.2f}"),
        "load\ns": lambda r: number(r["load_s"], "{:.1f}"),
        "peak\nGiB": lambda r: number(r["peak_gib"], "{:.2f}"),
        "logits\nrel diff": lambda r: number(_parity(r, "logits_rel"), "{:.1e}"),
        "rounding\nrel diff": lambda r: number(_parity(r, "rounding_rel"), "{:.1e}"),
        "tokens\nequal": lambda r: str(min(r["parity"]["equal_tokens"])) if r["parity"] else NONE,
        "status": lambda r: r["status"],
    },
    words=frozenset({"engine", "status"}),
    title=_engine_title,
    case=lambda r: f"{r['engine']} {r['batch_size']}x{r['prompt_len']}",
    outcome=lambda record: _engine_outcome(record, ("prompt", "generation")),
    protocol=_generation_protocol,
    series=_engine_series,
    series_name=lambda series, _: " ".join(series),
    shape=lambda r: (r["prompt_len"], r["batch_size"]),
    shape_label=lambda shape: f"{shape[1]} {TIMES} {shape[0]}",
    shape_title=lambda label: (
        f"batch of {label} prompt tokens" if label else f"batch: rows {TIMES} prompt tokens"
    ),
    charts=(
        Chart(
            relative=f"prompt speed, {TIMES} eager",
            absolute="prompt tokens/s",
            rate=lambda r: r["prompt_tokens_per_s"],
            ratio=lambda r: _speedup(r, "eager", "prompt"),
            unit="/s",
        ),
        Chart(
            relative=f"generation speed, {TIMES} eager",
            absolute="generated tokens/s",
            rate=lambda r: r["generate_tokens_per_s"],
            ratio=lambda r: _speedup(r, "eager", "generation"),
            unit="/s",
        ),
    ),
)


def _image_protocol(record: Record) -> list[str]:
    protocol = record["protocol"]
    return [
        f"{protocol['rounds']} interleaved rounds of a batch of {protocol['height']} x "
        f"{protocol['width']} pixels, prompt to pixels, after one of warm-up; guidance scale "
        f"{protocol['guidance_scale']:g}; differences are to eager's pixels, from 0 to 1"
    ]


IMAGES = View(
    columns={
        "engine": lambda r: r["engine"],
        "batch\nimages": lambda r: str(r["batch_size"]),
        "steps": lambda r: str(r["steps"]),
        "images/s\nmedian (p20..p80)": lambda r: spread(r["images_per_s"]),
        "a batch\ns": lambda r: _median(r["batch_s"], "{:.3g}"),
        "load\ns": lambda r: number(r["load_s"], "{:.1f}"),
        "peak\nGiB": lambda r: number(r["peak_gib"], "{:.2f}"),
        "pixels\nmax diff": lambda r: number(_parity(r, "image_max_abs"), "{:.1e}"),
        "x eager\nmedian (p20..p80)": lambda r: ratio(_speedup(r, "eager", "images")),
        "x others": lambda r: _other_speedup(r, "images"),
        "status": lambda r: r["status"],
    },
    words=frozenset({"engine", "status"}),
    title=_engine_title,
    case=lambda r: f"{r['engine']} {r['batch_size']}x{r['steps']}",
    outcome=lambda record: _engine_outcome(record, ("images",)),
    protocol=_image_protocol,
    series=_engine_series,
    series_name=lambda series, _: series[0],
    shape=lambda r: (r["steps"], r["batch_size"]),
    shape_label=lambda shape: f"{shape[1]} {TIMES} {shape[0]}",
    shape_title=lambda label: f"{label} steps" if label else f"batch: images {TIMES} steps",
    charts=(
        Chart(
            relative=f"speed, {TIMES} eager",
            absolute="images/s",
            rate=lambda r: r["images_per_s"],
            ratio=lambda r: _speedup(r, "eager", "images"),
            unit="/s",
        ),
    ),
)

VIEWS = {"training": TRAINING, "generation": GENERATION, "images": IMAGES}

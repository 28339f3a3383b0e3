"""`ort-train bench-diffusion`: images by ONNX Runtime and by PyTorch, over batch sizes and steps.

What runs is decided here; `bench/worker.py` draws, `bench/turns.py` takes the engines in turns.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ort_train.bench.options import add_outputs, numbers, output_problems, show_and_save, words
from ort_train.bench.parity import finite
from ort_train.bench.process import Worker
from ort_train.bench.turns import (
    CaseRun,
    paired_ratios,
    short,
    spread,
    take_turns,
    until_interrupted,
)
from ort_train.errors import ConfigError
from ort_train.files import expanded
from ort_train.inference.diffusion.folder import PipelineFolder, PipelineInfo, read_index
from ort_train.inference.folder import INFO_FILE
from ort_train.inference.generation.session import default_num_threads
from ort_train.reports import provenance
from ort_train.reports import record as records

ENGINES = ("eager", "compile", "ort")
REFERENCE = "eager"
#: Of pixels from 0 to 1, which files round to 1/255. fp32 rounds to 6e-8; each model's largest
#: values differ by 1e-6 of their size, and steps feed one another: 1e-6 was seen after four. A
#: wrong term shows as 1e-2 and more.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Case:
    """An engine, images of a batch, steps."""

    engine: str
    batch_size: int
    steps: int

    def __str__(self) -> str:
        return f"{self.engine} {self.batch_size}x{self.steps}"


@dataclass
class Run(CaseRun):
    """A case of images; `config` is what its worker is told."""

    @property
    def images(self) -> Path:
        return self.files / "images.npy"

    def start_worker(self, timeout_s: float) -> Worker:
        command = [sys.executable, "-m", "ort_train.inference.diffusion.bench_worker"]
        return Worker(self.files, timeout_s, command)

    def request(self) -> dict[str, Any]:
        case = self.case
        return {
            "engine": case.engine,
            "batch_size": case.batch_size,
            "steps": case.steps,
            "images": str(self.images),
            **self.config,
        }

    def compare(self, reference: CaseRun) -> str | None:
        assert isinstance(reference, Run)
        error = float(np.abs(np.load(self.images) - np.load(reference.images)).max())
        self.parity = {"image_max_abs": finite(error), "tolerance": TOLERANCE}
        # Written so that a NaN, which compares false with everything, is a problem.
        if not error <= TOLERANCE:
            return f"pixels differ by {error:.2g} (allowed {TOLERANCE:g})"
        return None


def run_benchmark(
    source: str | Path,
    exported: str | Path | None,
    engines: Sequence[str],
    batch_sizes: Sequence[int],
    steps: Sequence[int],
    *,
    height: int | None = None,
    width: int | None = None,
    guidance_scale: float = 0.0,
    rounds: int = 3,
    threads: int | None = None,
    progress: bool = True,
    on_event: Callable[[str], None] | None = None,
    timeout_s: float = 1800.0,
) -> dict[str, Any]:
    """Measure a pipeline's images by every engine, from the same noise.

    Each case is an engine at a batch size and a number of steps, in a process of its own. A case
    whose pixels differ from eager's has no speed-up.

    Args:
        source: the pipeline's folder.
        exported: what `export_pipeline` wrote of it; None: `<source>-exports/onnx-fp32`, which is
            made if it is missing.
        engines: of `ENGINES`. Eager is run as the reference even if it isn't named.
        steps: of the denoising loop.
        height, width: pixels; None: the pipeline's own.
        guidance_scale: 0 for SD-Turbo and SDXL-Turbo; above 1 the UNet's batch is doubled.
        rounds: turns of each case.
        threads: of every engine; None: one a core.
        on_event: called with a line of text whenever a case has come a stage further.
        timeout_s: how long one stage of a case may take before it counts as hung.

    Returns:
        The record (`record.ImageRecord`). Ctrl-C keeps the shapes that were measured by then.

    Raises:
        ConfigError: with everything that is wrong, before any work starts.
        ExportError: a folder that is damaged or of another pipeline.
        KeyboardInterrupt: there is nothing to keep yet.
    """
    tell = on_event or (lambda line: None)
    source = expanded(source)
    index = read_index(source)
    height = _own_size(index) if height is None else height
    width = _own_size(index) if width is None else width
    _check(engines, batch_sizes, steps, height, width, guidance_scale, rounds, threads)
    threads = threads or default_num_threads()  # one number for all, or the ratios say nothing
    info, exported = _exported(source, exported, tell)
    started_at, machine = provenance.now(), provenance.machine()
    named = list(dict.fromkeys([REFERENCE, *engines]))
    shapes = [
        [
            Run(
                Case(engine, batch_size, num_steps),
                {
                    "folder": str((exported if engine == "ort" else source).absolute()),
                    "height": height,
                    "width": width,
                    "guidance_scale": guidance_scale,
                    "threads": threads,
                },
                reference_only=engine not in engines,
            )
            for engine in named
        ]
        for batch_size, num_steps in product(batch_sizes, steps)
    ]
    runs = list(chain.from_iterable(shapes))
    with tqdm(total=len(runs) * (1 + rounds), disable=None if progress else True) as bar:

        def measure(group: Sequence[Run]) -> None:
            take_turns(
                group,
                rounds,
                prepare={},
                turn={},
                prepared_line=lambda run: f"ready after {run.prepared['load_s']:.1f} s",
                turn_line=lambda run: f"{run.rounds[-1]['batch_s'][0]:.3g} s a batch",
                timeout_s=timeout_s,
                bar=bar,
                tell=tell,
            )

        was_interrupted = until_interrupted(shapes, measure)
    prepared: dict[str, Any] = next((run.prepared for run in runs if run.prepared), {})
    return records.assemble(
        started_at,
        machine | {"threads": prepared.get("threads")},
        {
            "kind": "images",
            "interrupted": was_interrupted,
            "model": {
                "pipeline": index.pipeline,
                "name": source.absolute().name,
                "num_parameters": sum(part.num_parameters for part in info.parts.values()),
            },
            "protocol": {
                "rounds": rounds,
                "height": height,
                "width": width,
                "guidance_scale": guidance_scale,
            },
            "results": [_result(run, runs) for run in runs],
        },
    )


def _own_size(index: PipelineFolder) -> int:
    """Pixels of a side, as the pipeline's own call takes them."""
    from ort_train.inference.diffusion.folder import load_config

    latents = load_config(index, "unet", index.path / "unet").sample_size
    levels = len(load_config(index, "vae", index.path / "vae").block_out_channels)
    return latents * 2 ** (levels - 1)


def _check(
    engines: Sequence[str],
    batch_sizes: Sequence[int],
    steps: Sequence[int],
    height: int,
    width: int,
    guidance_scale: float,
    rounds: int,
    threads: int | None,
) -> None:
    """Collect everything that is wrong."""
    numbers = [
        *(("batch size", value) for value in batch_sizes),
        *(("steps", value) for value in steps),
        ("rounds", rounds),
        ("threads", 1 if threads is None else threads),
    ]
    problems = [f"{name} {value} must be at least 1" for name, value in numbers if value < 1]
    problems += [
        f"engine {name!r} is none of {', '.join(ENGINES)}"
        for name in engines
        if name not in ENGINES
    ]
    if not engines:
        problems.append(f"no engine to measure: name some of {', '.join(ENGINES)}")
    problems += [
        f"{name} {value} must be a multiple of 8 pixels, as diffusers takes it"
        for name, value in (("height", height), ("width", width))
        if value < 8 or value % 8
    ]
    if not 0 <= guidance_scale < math.inf:
        problems.append(f"guidance scale {guidance_scale} must be 0 (none) or a number above")
    if problems:
        raise ConfigError(problems)


def _exported(
    source: Path, exported: str | Path | None, tell: Callable[[str], None]
) -> tuple[PipelineInfo, Path]:
    """The exported pipeline, made beside the source if it is missing."""
    from ort_train.inference.benchmark.exports import folder_for
    from ort_train.inference.diffusion.export import export_pipeline
    from ort_train.inference.diffusion.folder import read_exported

    if exported is not None:
        return read_exported(exported)[1], expanded(exported)
    out = folder_for(source, tell) / "onnx-fp32"
    if (out / INFO_FILE).is_file():
        tell(f"{out} is there already")
    else:
        tell(f"exporting {source} to {out}")
        export_pipeline(source, out, on_event=tell)
    return read_exported(out)[1], out


def _result(run: Run, runs: Sequence[Run]) -> dict[str, Any]:
    """The record's entry of one run."""
    case = run.case
    entry: dict[str, Any] = {
        "engine": case.engine,
        "batch_size": case.batch_size,
        "steps": case.steps,
        "status": run.status,
        "reason": run.reason,
        "reference_only": run.reference_only,
    }
    if run.status not in ("ok", "mismatch"):
        return entry
    batch_s = np.array(run.series("batch_s"))
    entry |= {
        "load_s": short(run.prepared["load_s"]),
        "peak_gib": None if run.peak_gib is None else short(run.peak_gib),
        "parity": run.parity,
        "images_per_s": spread(case.batch_size / batch_s),
        "batch_s": spread(batch_s),
        "speedups": {},
    }
    for baseline in (REFERENCE, "compile"):
        key = Case(baseline, case.batch_size, case.steps)
        if baseline == case.engine != REFERENCE:
            continue
        other = next((other for other in runs if other.case == key), None)
        ratios = paired_ratios(run, other, "batch_s")
        if ratios is not None:
            entry["speedups"][baseline] = {"images": spread(ratios)}
    return entry


# The command line: `ort-train bench-diffusion`.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ort-train bench-diffusion`."""
    add = parser.add_argument
    add("folder", metavar="DIR", help="the folder of a pipeline of diffusers'")
    add("--exported", metavar="DIR", help="its export (default: made beside it)")
    known = ", ".join(ENGINES)
    add("--engines", default="eager,ort", metavar="NAMES", help=f"comma-separated: {known}")
    add("--batch-sizes", default="1,2", metavar="NUMBERS", help="comma-separated images of a batch")
    add("--steps", default="1,4", metavar="NUMBERS", help="comma-separated steps of the loop")
    add("--height", type=int, metavar="N", help="pixels (default: the pipeline's own)")
    add("--width", type=int, metavar="N", help="pixels (default: the pipeline's own)")
    add(
        "--guidance-scale",
        type=float,
        default=0.0,
        metavar="X",
        help="of classifier-free guidance; turbo models take none (default: %(default)s)",
    )
    add("--rounds", type=int, default=3, metavar="N", help="turns of each engine")
    add("--threads", type=int, metavar="N", help="of every engine (default: one a core)")
    add_outputs(parser)


def main(args: argparse.Namespace) -> int:
    """Run `ort-train bench-diffusion`.

    Returns:
        0; 1 where an engine failed or drew other images.

    Raises:
        ConfigError: with every problem of the options, before anything is run.
    """
    problems = output_problems(args)
    engines = words("--engines", args.engines, ENGINES, problems)
    batch_sizes = numbers("--batch-sizes", args.batch_sizes, problems)
    steps = numbers("--steps", args.steps, problems)
    if problems:
        raise ConfigError(problems)
    record = run_benchmark(
        args.folder,
        args.exported,
        engines,
        batch_sizes,
        steps,
        height=args.height,
        width=args.width,
        guidance_scale=args.guidance_scale,
        rounds=args.rounds,
        threads=args.threads,
        on_event=lambda line: tqdm.write(line, file=sys.stderr),
    )
    return show_and_save(record, args)

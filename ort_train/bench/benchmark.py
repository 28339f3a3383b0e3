"""One recipe over several backends: interleaved rounds, fresh processes, a parity gate.

What is measured is decided here; `turns.py` runs the cases in turns, `run.py` holds
what one case yields, `worker.py` runs its steps, `parity.py` judges its numbers, `record.py`
says what a record holds, `report.py` shows it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby, product
from typing import Any

import numpy as np
from tqdm import tqdm

from ort_train.bench.options import (
    add_outputs,
    numbers,
    output_problems,
    show_and_save,
    words,
)
from ort_train.bench.run import Case, Run, result
from ort_train.bench.turns import take_turns, until_interrupted
from ort_train.config import RunConfig, parse
from ort_train.errors import ConfigError
from ort_train.near import near_matches
from ort_train.ortmodule.options import SPARSITY
from ort_train.overrides import add_recipe
from ort_train.reports import provenance
from ort_train.reports import record as records

BACKENDS = ("eager", "compile", "ort")
DENSE = "ort-dense"
"""Backend ort without what the recipe has it leave out of a batch."""
PRECISIONS = ("fp32", "bf16", "fp16")
#: Enough for shares of some percent; a graph's file holds hundreds of lines for each step.
PROFILE_STEPS = 5


def precisions_here(precision: str) -> tuple[str, ...]:
    """What is measured for a recipe's `train.precision`: for auto, what this machine would try."""
    import torch

    from ort_train.auto.candidates import no_bf16, precisions

    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    return tuple(
        each
        for each in precisions(precision)
        if precision != "auto" or each != "bf16" or no_bf16(device_type) is None
    )


def run_benchmark(
    config: RunConfig,
    cases: Sequence[Case],
    *,
    steps: int,
    rounds: int,
    warmup_steps: int,
    threads: int | None = None,
    profile_steps: int = 0,
    progress: bool = True,
    on_event: Callable[[str], None] | None = None,
    timeout_s: float = 900.0,
) -> dict[str, Any]:
    """Measure training iterations of every case on the same model, batches and seed.

    The cases of one shape live at the same time, each in its own process, and take turns, so that
    a disturbance of the machine meets all of them. A case that can't run, fails, or computes
    other numbers than eager fp32 says so in its result, and the others go on.

    Args:
        config: the recipe. Of its train section the learning rate, weight decay, seed and `ort`
            are taken; a step is always zero_grad, forward, backward and torch's fused AdamW, with
            no accumulation, clipping or schedule. Dropout is off, since its draws differ.
        cases: what to measure. Eager fp32 is run as the reference even when it isn't among them.
        steps: measured steps per round.
        rounds: turns of each case.
        warmup_steps: training steps before the first round, after the separately timed first.
        threads: of torch and of ORT; None: their own choice.
        profile_steps: after all rounds, backend ort runs this many more with a profile of its
            kernels.
        progress: show a progress bar on stderr, where that is a terminal.
        on_event: called with a line of text whenever a case has come a stage further.
        timeout_s: how long one stage of a case may take before it counts as hung.

    Returns:
        The record (`record.Record`). Ctrl-C ends the benchmark: the shapes that were measured by
        then are kept, and the cases of the others have failed.

    Raises:
        ConfigError: with everything that is wrong with the cases, before any is started.
        KeyboardInterrupt: there is nothing to keep yet.
    """
    runs = _plan(config, cases, steps, rounds, warmup_steps, threads)
    tell = on_event or (lambda line: None)
    if (price := _price_of_bf16(runs)) is not None:
        tell(f"{price}, whoever computes it; --precision fp32 leaves it out")
    started_at = provenance.now()
    machine = provenance.machine()  # before the load that is about to come
    shapes = [list(group) for _, group in groupby(runs, key=lambda run: run.shape)]
    with tqdm(
        total=len(runs) * (1 + rounds), disable=None if progress else True, unit="turn"
    ) as bar:

        def measure(group: Sequence[Run]) -> None:
            take_turns(
                group,
                rounds,
                prepare={
                    "num_batches": warmup_steps + steps * rounds,
                    "warmup_steps": warmup_steps,
                    "threads": threads,
                    "profile_steps": profile_steps,
                },
                turn={"steps": steps},
                prepared_line=lambda run: f"first step {run.prepared['first_step_s']:.2f} s",
                turn_line=lambda run: f"{1 / np.median(run.rounds[-1]['step_s']):.3g} it/s",
                timeout_s=timeout_s,
                bar=bar,
                tell=tell,
            )

        was_interrupted = until_interrupted(shapes, measure)
    prepared: dict[str, Any] = next((run.prepared for run in runs if run.prepared), {})
    machine |= {"threads": prepared.get("threads"), "gpu": prepared.get("gpu")}
    return records.assemble(
        started_at,
        machine,
        {
            "interrupted": was_interrupted,
            "recipe": config.name,
            "model": prepared.get("model"),
            "data": prepared.get("data"),
            "protocol": {
                "steps": steps,
                "rounds": rounds,
                "warmup_steps": warmup_steps,
                "dropout": "off",
                "optimizer": "torch.optim.AdamW(fused=True)",
                "caches": "empty",  # process.py
            },
            "results": [result(run, runs) for run in runs],
        },
    )


def _price_of_bf16(runs: Sequence[Run]) -> str | None:
    """In words, where it is measured on a processor that has no bf16."""
    import torch

    from ort_train.ortmodule.kernels import onednn

    is_measured = any(run.case.precision == "bf16" for run in runs)
    return onednn.slow_bf16() if is_measured and not torch.cuda.is_available() else None


def _plan(
    config: RunConfig,
    cases: Sequence[Case],
    steps: int,
    rounds: int,
    warmup_steps: int,
    threads: int | None,
) -> list[Run]:
    """The cases as runs, grouped by shape, each group led by its reference."""
    problems = [
        f"{name} {value} must be at least {least}"
        for name, value, least in (
            ("steps", steps, 1),
            ("rounds", rounds, 1),
            ("warmup_steps", warmup_steps, 0),
            ("threads", threads, 1),
        )
        if value is not None and value < least
    ]
    if not cases:
        problems.append(f"no cases to measure: name a backend of {', '.join(BACKENDS)}")
    full = [
        replace(
            case,
            micro_batch_size=(
                config.train.micro_batch_size
                if case.micro_batch_size is None
                else case.micro_batch_size
            ),
            block_size=config.data.block_size if case.block_size is None else case.block_size,
        )
        for case in cases
    ]
    runs: dict[Case, Run] = {}
    for shape in dict.fromkeys((case.micro_batch_size, case.block_size) for case in full):
        reference = Case("eager", "fp32", *shape)
        wanted = [case for case in full if (case.micro_batch_size, case.block_size) == shape]
        for case in dict.fromkeys([reference, *wanted]):
            if case.backend == DENSE and not any(map(config.train.ort.get, SPARSITY)):
                problems.append(
                    f"backend {DENSE} is ort without {' and '.join(SPARSITY)}, and train.ort of "
                    f"this recipe turns on neither: leave {DENSE} out, or turn one on"
                )
                continue
            if case.backend not in (*BACKENDS, DENSE):
                problems.append(
                    f"backend {case.backend!r} can't be measured: "
                    + near_matches(case.backend, BACKENDS)
                )
                continue
            try:
                runs[case] = Run(case, _case_config(config, case), case not in wanted)
            except ConfigError as error:
                problems += error.problems
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return list(runs.values())


def _case_config(config: RunConfig, case: Case) -> RunConfig:
    values = config.model_dump(mode="json")
    values["data"]["block_size"] = case.block_size
    is_dense = case.backend == DENSE
    if is_dense:
        values["train"]["ort"] |= dict.fromkeys(SPARSITY, False)
    values["train"] |= {
        "backend": "ort" if is_dense else case.backend,
        "precision": case.precision,
        "micro_batch_size": case.micro_batch_size,
    }
    return parse(values)


# The command line: `ort-train bench`.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ort-train bench`."""
    add_recipe(parser)
    add = parser.add_argument
    add(
        "--backends",
        default=",".join(BACKENDS),
        metavar="NAMES",
        help=f"comma-separated (default: %(default)s); {DENSE}: ort without label_sparsity and "
        "padding_sparsity, for recipes that turn one on",
    )
    add(
        "--precision",
        metavar="NAMES",
        help="comma-separated: fp32, bf16, fp16 (default: the recipe's)",
    )
    for option, what in (
        ("--batch-sizes", "comma-separated samples per forward"),
        ("--seq-lens", "comma-separated tokens per sample"),
    ):
        add(option, metavar="NUMBERS", help=f"{what} (default: the recipe's)")
    for option, what in (
        ("--steps", "measured steps per round"),
        ("--rounds", "turns of each backend"),
        ("--warmup", "training steps before the first round"),
    ):
        add(option, type=int, metavar="N", help=f"{what} (default: the recipe's)")
    add(
        "--threads", type=int, metavar="N", help="of torch and of ONNX Runtime (default: their own)"
    )
    add("--profile", action="store_true", help="say what the steps of backend ort spend time on")
    add("--tiny", action="store_true", help="shrink the model, for a trial in seconds")
    add_outputs(parser)


def main(args: argparse.Namespace) -> int:
    """Run `ort-train bench`.

    Returns:
        0; 1 where a backend failed or computed other numbers (one that can't run here is no
        failure); 130 where Ctrl-C left some shapes out.

    Raises:
        ConfigError: with every problem of the options, before anything is run.
    """
    from ort_train.recipes import load_recipe

    problems = output_problems(args)
    lists = {
        "--backends": words("--backends", args.backends, (*BACKENDS, DENSE), problems),
        "--precision": words("--precision", args.precision, PRECISIONS, problems),
        "--batch-sizes": numbers("--batch-sizes", args.batch_sizes, problems),
        "--seq-lens": numbers("--seq-lens", args.seq_lens, problems),
    }
    try:
        config = load_recipe(args.recipe, args.overrides, tiny=args.tiny)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    cases = [
        Case(backend, each, batch_size, block_size)
        for batch_size, block_size, precision, backend in product(
            lists["--batch-sizes"],
            lists["--seq-lens"],
            lists["--precision"],
            lists["--backends"],
        )
        for each in ([precision] if precision else precisions_here(config.train.precision))
    ]
    measure = config.measure
    record = run_benchmark(
        config,
        cases,
        steps=measure.steps if args.steps is None else args.steps,
        rounds=measure.rounds if args.rounds is None else args.rounds,
        warmup_steps=measure.warmup_steps if args.warmup is None else args.warmup,
        threads=args.threads,
        profile_steps=PROFILE_STEPS if args.profile else 0,
        on_event=lambda line: tqdm.write(line, file=sys.stderr),
    )
    return show_and_save(record, args)

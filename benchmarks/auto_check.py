"""Whether `backend="auto"` is as fast as the best single choice, after its trial.

    python benchmarks/auto_check.py [--rounds 15] [--only gpt2] [--threads 1]

Each case trains copies of one model in one process: every backend in every precision that the
hardware has, backend ort also with what the batches let it leave out, and `auto` with
`precision="auto"` and `loss_only=True`. They take turns over the same batches (forward and
backward, without dropout); a choice that is half as slow again as the best after three rounds gets
no more. `slower_by` is the median over the rounds of auto's time over that of the best single
choice, less 1; `same_choice` is auto's time over that of the single choice that it made: how far
it is from 1 is noise.

Writes auto_check.json beside this file, and exits with 1 where auto is more than 3% slower. A case
of an earlier run stays until it is run again.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ort_train.bench.turns import spread
from ort_train.files import replacing
from ort_train.reports import provenance

if TYPE_CHECKING:
    import torch

    from ort_train.auto.candidates import Candidate

FILE = Path(__file__).with_suffix(".json")
LIMIT = 0.03
NUM_BATCHES = 2
_FIRST_ROUNDS, _TOO_SLOW = 3, 1.5
# A turn takes about this long: of one short step, a round would say little.
_TURN_MS = 300.0


@dataclass(frozen=True)
class Case:
    """A recipe, or a model that none has.

    Attributes:
        model_type: of a made model, whose `fields` those of its transformers config are; else None.
    """

    recipe: str = ""
    overrides: tuple[str, ...] = ()
    tiny: bool = False
    model_type: str | None = None
    fields: tuple[tuple[str, int], ...] = ()


CASES = {
    "llama_256": Case("bench_llama_256"),
    "llama_512_padded": Case(
        "bench_llama_512_padded",
        (
            "model.config.num_hidden_layers=2",
            "model.config.vocab_size=8000",
            "train.micro_batch_size=4",
            "train.ort={label_sparsity: null, padding_sparsity: null}",
        ),
    ),
    "lora_tiny": Case("quickstart_lora", tiny=True),
    "qlora_tiny": Case("bench_llama_1024_qlora", tiny=True),
    "gpt2": Case(
        model_type="gpt2",
        fields=(
            ("n_embd", 256),
            ("n_layer", 2),
            ("n_head", 4),
            ("vocab_size", 5000),
            ("bos_token_id", 0),
            ("eos_token_id", 0),
        ),
    ),
    "bert_padded": Case(
        model_type="bert",
        fields=(
            ("hidden_size", 256),
            ("num_hidden_layers", 2),
            ("num_attention_heads", 4),
            ("intermediate_size", 1024),
            ("vocab_size", 5000),
        ),
    ),
}


def build(case: Case) -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    """The case's model in training mode, without dropout, and its batches."""
    from ort_train.bench import worker as bench_worker
    from ort_train.recipes import load_recipe

    if case.model_type is None:
        config = load_recipe(case.recipe, list(case.overrides), tiny=case.tiny)
        model, batches, *_ = bench_worker.build(config, NUM_BATCHES)
        return model.train(), batches[:NUM_BATCHES]
    return _made(case.model_type, dict(case.fields))


def _made(
    model_type: str, fields: dict[str, Any]
) -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    """A causal model on full rows, a masked one on padded rows with 15% of the labels."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    from ort_train.bench import worker as bench_worker
    from ort_train.data.batches import IGNORED_LABEL

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **fields)
    is_masked = model_type == "bert"
    made: Any = AutoModelForMaskedLM if is_masked else AutoModelForCausalLM
    model = made.from_config(config).train()
    bench_worker.disable_dropout(model)
    model.config.use_cache = False
    batches = []
    for _ in range(NUM_BATCHES):
        ids_BT = torch.randint(config.vocab_size, (4, 128))
        mask_BT = torch.ones_like(ids_BT)
        labels_BT = ids_BT
        if is_masked:
            lengths_B1 = torch.randint(32, 128, (len(ids_BT), 1))
            mask_BT = (torch.arange(ids_BT.shape[1]) < lengths_B1).long()
            is_label_BT = (torch.rand(ids_BT.shape) < 0.15) & (mask_BT == 1)
            labels_BT = ids_BT.masked_fill(~is_label_BT, IGNORED_LABEL)
        batches.append({"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT})
    return model, batches


def singles(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> list[Candidate]:
    """Every choice that auto has here."""
    from ort_train import OrtOptions
    from ort_train.auto.candidates import (
        AUTO_PRECISIONS,
        CONCRETE_BACKENDS,
        Candidate,
        densities,
        no_bf16,
        sparser,
    )

    found = [
        Candidate(backend, precision)
        for precision, backend in itertools.product(AUTO_PRECISIONS, CONCRETE_BACKENDS)
        if precision != "bf16" or no_bf16("cpu") is None
    ]
    density = densities(model.forward, [((), batch) for batch in batches])
    for candidate in [each for each in found if each.backend == "ort"]:
        found += sparser(candidate, OrtOptions(), density)
    return found


def step_ms(model: Any, batches: list[dict[str, torch.Tensor]], repeats: int = 1) -> float:
    """Mean time of forward and backward."""
    spent_s = 0.0
    for batch in batches * repeats:
        model.zero_grad(set_to_none=True)
        began = time.perf_counter()
        model(**batch).loss.backward()
        spent_s += time.perf_counter() - began
    return spent_s / (len(batches) * repeats) * 1e3


def measure(name: str, rounds: int, threads: int) -> dict[str, Any]:
    """A case's entry of the record, measured in this process."""
    import torch

    from ort_train import OrtOptions, decision, wrap
    from ort_train.quantization import hush_kernel_notice

    hush_kernel_notice()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(threads)
    model, batches = build(CASES[name])
    options = OrtOptions(num_threads=threads)
    ways: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
        str(single): lambda m, single=single: wrap(  # type: ignore[misc]
            m, single.backend, single.precision, single.options(options)
        )
        for single in singles(model, batches)
    }
    ways["auto"] = lambda m: wrap(m, "auto", "auto", options, loss_only=True)
    models, left_out = {}, {}
    for way, wrapped in ways.items():
        try:
            models[way] = wrapped(copy.deepcopy(model))
            for _ in range(2):
                step_ms(models[way], batches)
        except Exception as error:  # what can't be had is no choice
            models.pop(way, None)
            left_out[way] = str(error).split("\n", 1)[0]
    chosen = decision(models["auto"])
    assert chosen is not None, "auto saw fewer batches than it decides on"
    times = in_turns(models, batches, rounds)
    return {"case": name, **compared(times), "left_out": left_out, "decision": asdict(chosen)}


def in_turns(
    models: dict[str, torch.nn.Module], batches: list[dict[str, torch.Tensor]], rounds: int
) -> dict[str, list[float]]:
    """Times in ms of each round; those that are far behind the best get only a few."""
    times: dict[str, list[float]] = {name: [] for name in models}
    ways = list(models)
    turn_ms = step_ms(models["auto"], batches) * len(batches)
    repeats = max(1, round(_TURN_MS / turn_ms))
    for number in range(rounds):
        if number == _FIRST_ROUNDS:
            fastest = min(np.median(times[name]) for name in ways)
            ways = [
                name
                for name in ways
                if name == "auto" or np.median(times[name]) < _TOO_SLOW * fastest
            ]
        first = number % len(ways)  # so that none always follows the same one
        for name in ways[first:] + ways[:first]:
            times[name].append(step_ms(models[name], batches, repeats))
    return times


def compared(times: dict[str, list[float]]) -> dict[str, Any]:
    """Auto against the best single choice, round by round."""
    in_all = [n for n in times if n != "auto" and len(times[n]) == len(times["auto"])]
    best = min(in_all, key=lambda name: float(np.median(times[name])))
    ratios = np.array(times["auto"]) / np.array(times[best])
    return {
        "best": best,
        "slower_by": spread(ratios - 1),
        "vs_each": {
            name: round(float(np.median(np.array(times["auto"]) / np.array(times[name]))), 4)
            for name in in_all
        },
        "step_ms": {name: spread(np.array(each)) for name, each in times.items()},
        "rounds": {name: len(each) for name, each in times.items()},
    }


def with_same_choice(row: dict[str, Any]) -> dict[str, Any]:
    """The entry with auto's time over that of its own choice, made singly."""
    chosen = row["decision"]
    name = " + ".join((f"{chosen['backend']} {chosen['precision']}", *chosen["sparsity"]))
    return {**row, "choice": name, "same_choice": row["vs_each"].get(name)}


def main() -> int:
    """Measure the cases; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each choice, at least 3")
    parser.add_argument("--only", action="append", choices=CASES, help="run this case alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=FILE, help="the record")
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        row = with_same_choice(measure(args.measure, args.rounds, args.threads))
        print(json.dumps(row))
        return 0
    started_at, machine = provenance.now(), provenance.machine(args.threads)
    rows: dict[str, dict[str, Any]] = {}
    if args.out.is_file():
        rows = {row["case"]: row for row in json.loads(args.out.read_text())["cases"]}
    for name in args.only or CASES:
        command = [sys.executable, __file__, "--measure", name]
        command += ["--rounds", str(args.rounds), "--threads", str(args.threads)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        sha, is_dirty = provenance.git_state()
        rows[name] = {
            **json.loads(output.splitlines()[-1]),
            "recipe": asdict(CASES[name]),
            "git_sha": sha,
            "git_dirty": is_dirty,
        }
        content = {
            **provenance.envelope(started_at, machine),
            "limit": LIMIT,
            "cases": [rows[key] for key in CASES if key in rows],
        }
        with replacing(args.out) as file:
            file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        row = rows[name]
        print(
            f"{name}: auto took {row['choice']}, {row['slower_by']['median']:+.1%} to the best "
            f"({row['best']}); trial {row['decision']['cost_s']:.1f} s",
            flush=True,
        )
    over = [name for name, row in rows.items() if row["slower_by"]["median"] > LIMIT]
    print(f"more than {LIMIT:.0%} slower: {', '.join(over)}" if over else "all within 3%")
    return int(bool(over))


if __name__ == "__main__":
    sys.exit(main())

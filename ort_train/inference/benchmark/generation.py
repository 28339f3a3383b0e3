"""`ort-train bench-inference`: prompts and generation by several engines, held against eager.

What runs is decided here; `engines.py` names the engines, `exports.py` makes what they load,
`worker.py` and `llamacpp_worker.py` run them, `bench/turns.py` takes them in turns, `run.py` holds
what one case yields.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ort_train.bench.options import add_outputs, numbers, output_problems, show_and_save, words
from ort_train.bench.turns import take_turns, until_interrupted
from ort_train.errors import ConfigError
from ort_train.files import expanded
from ort_train.inference.benchmark import exports
from ort_train.inference.benchmark.engines import DEFAULT, ENGINES, GROUPS, REFERENCE, expand
from ort_train.inference.benchmark.gguf_convert import obstacle
from ort_train.inference.benchmark.run import Case, Run, result, speeds
from ort_train.inference.decoder.export import load_decoder_config
from ort_train.inference.generation.session import default_num_threads
from ort_train.reports import provenance
from ort_train.reports import record as records

PYTHON_VARIABLE = "ORT_TRAIN_LLAMACPP_PYTHON"
INSTALL_LLAMACPP = (
    "python3 -m venv llamacpp && CMAKE_ARGS='-DLLAVA_BUILD=OFF -DGGML_NATIVE=ON -DLLAMA_CURL=OFF "
    "-DLLAMA_OPENSSL=OFF' llamacpp/bin/pip install --no-binary llama-cpp-python llama-cpp-python "
    "gguf"
)
_SEED = 0


def run_benchmark(
    source: str | Path,
    engines: Sequence[str],
    batch_sizes: Sequence[int],
    prompt_lens: Sequence[int],
    *,
    new_tokens: int = 256,
    rounds: int = 3,
    threads: int | None = None,
    llamacpp_python: str | None = None,
    progress: bool = True,
    on_event: Callable[[str], None] | None = None,
    timeout_s: float = 1800.0,
) -> dict[str, Any]:
    """Measure prompts and generation of every engine on the same model and tokens.

    Each case is an engine at a shape, in a process of its own. Prompts are random tokens; what
    follows is chosen greedily.

    Args:
        source: the folder of a run, or of a transformers model.
        engines: names of `engines.ENGINES`. Eager is run as the reference even if it isn't named.
        new_tokens: generated after each prompt.
        rounds: turns of each case.
        threads: of every engine; None: one a core.
        llamacpp_python: the interpreter of an environment with llama-cpp-python and gguf.
        on_event: called with a line of text whenever something is made or a case has come further.
        timeout_s: how long one stage of a case may take before it counts as hung.

    Returns:
        The record (`record.GenerationRecord`). Ctrl-C keeps the shapes that were measured by then.

    Raises:
        ConfigError: with everything that is wrong, before any work starts.
        ExportError: the model is no plain decoder, or can't be exported or converted.
        KeyboardInterrupt: there is nothing to keep yet.
    """
    tell = on_event or (lambda line: None)
    source = expanded(source)
    model = exports.locate(source, tell)
    config = _read_config(model)
    _check(config, engines, batch_sizes, prompt_lens, new_tokens, rounds, threads, llamacpp_python)
    load_decoder_config(model)  # what generates nothing is refused there
    threads = threads or default_num_threads()  # one number for all, or the ratios say nothing
    folders = exports.make(model, [REFERENCE, *engines], llamacpp_python, tell)
    rounded = {
        weights: exports.make_rounded(model, weights, tell)
        for weights in dict.fromkeys(
            ENGINES[name].weights for name in engines if ENGINES[name].rounds_weights
        )
    }
    started_at, machine = provenance.now(), provenance.machine()
    named = list(dict.fromkeys([REFERENCE, *engines]))
    sizes = list(product(batch_sizes, prompt_lens))
    with (
        tempfile.TemporaryDirectory(prefix="ort_train-prompts-") as folder,
        tqdm(
            total=len(sizes) * len(named) * (1 + rounds), disable=None if progress else True
        ) as bar,
    ):
        shapes: list[list[Run]] = []
        for batch_size, prompt_len in sizes:
            prompts = Path(folder) / f"{batch_size}x{prompt_len}.npy"
            np.save(prompts, _prompts(config["vocab_size"], batch_size, prompt_len))
            shared = {"prompts": str(prompts), "new_tokens": new_tokens, "threads": threads}
            reference = Case(REFERENCE, batch_size, prompt_len)
            on_rounded = {
                weights: Run(reference, {"model": str(rounded_model.absolute()), **shared})
                for weights, rounded_model in rounded.items()
            }
            group = [
                Run(
                    Case(engine, batch_size, prompt_len),
                    {"model": str(folders[engine].absolute()), **shared},
                    on_own_weights=on_rounded.get(ENGINES[engine].weights),
                    reference_only=engine not in engines,
                    python=(
                        str(llamacpp_python)
                        if ENGINES[engine].runs_in == "llamacpp"
                        else sys.executable
                    ),
                )
                for engine in named
            ]
            shapes.append(group)

        def measure(group: Sequence[Run]) -> None:
            on_own_weights = {id(run.on_own_weights): run.on_own_weights for run in group}
            for number, run in enumerate(filter(None, on_own_weights.values())):
                bar.set_description(f"{run.case} on rounded weights")
                outputs = f"{run.case.batch_size}x{run.case.prompt_len}-{number}"
                run.run_once(Path(folder) / outputs, timeout_s)
            take_turns(
                group,
                rounds,
                prepare={},
                turn={},
                prepared_line=lambda run: f"ready after {run.prepared['load_s']:.1f} s",
                turn_line=lambda run: speeds(run, new_tokens),
                timeout_s=timeout_s,
                bar=bar,
                tell=tell,
            )

        was_interrupted = until_interrupted(shapes, measure)
    runs = list(chain.from_iterable(shapes))
    prepared: dict[str, Any] = next((run.prepared for run in runs if run.prepared), {})
    found = (run.prepared.get("engine_version") for run in runs)
    llamacpp_version = next(filter(None, found), None)
    record = records.assemble(
        started_at,
        machine | {"threads": prepared.get("threads")},
        {
            "kind": "generation",
            "interrupted": was_interrupted,
            "model": {
                "architecture": config["model_type"],
                "name": source.absolute().name,
                "num_parameters": _num_parameters(model),
            },
            "protocol": {
                "new_tokens": new_tokens,
                "rounds": rounds,
                "warmup": "one prompt and generation",
            },
            "results": [result(run, runs, new_tokens) for run in runs],
        },
    )
    if llamacpp_version is not None:
        record["versions"]["llama-cpp-python"] = llamacpp_version
    return record


def _check(
    config: dict[str, Any],
    engines: Sequence[str],
    batch_sizes: Sequence[int],
    prompt_lens: Sequence[int],
    new_tokens: int,
    rounds: int,
    threads: int | None,
    llamacpp_python: str | None,
) -> None:
    """Collect everything that is wrong."""
    numbers = [
        *(("batch size", value) for value in batch_sizes),
        *(("prompt length", value) for value in prompt_lens),
        ("new tokens", new_tokens),
        ("rounds", rounds),
        ("threads", 1 if threads is None else threads),
    ]
    problems = [f"{name} {value} must be at least 1" for name, value in numbers if value < 1]
    unknown = [engine for engine in engines if engine not in ENGINES]
    problems += [f"engine {name!r} is none of {', '.join(ENGINES)}" for name in unknown]
    if not engines:
        problems.append(f"no engine to measure: name some of {', '.join(ENGINES)}")
    positions = config.get("max_position_embeddings", config.get("n_positions"))  # GPT-2's name
    problems += [
        f"a prompt of {length} tokens and {new_tokens} new ones exceed the {positions} positions "
        f"of the model: leave that length out, or pass a smaller --new-tokens"
        for length in prompt_lens
        if positions is not None and length + new_tokens > positions
    ]
    if any(name in ENGINES and ENGINES[name].runs_in == "llamacpp" for name in engines):
        if reason := obstacle(config):
            problems.append(f"llama.cpp can't be measured on this model: {reason}")
        problems += _python_problems(llamacpp_python)
    if problems:
        raise ConfigError(problems)


def _python_problems(python: str | None) -> list[str]:
    how = f"install it in an environment of its own ({INSTALL_LLAMACPP})"
    if python is None:
        return [
            f"llama.cpp's environment isn't known: {how}, then pass --llamacpp-python "
            f"llamacpp/bin/python, or set {PYTHON_VARIABLE}"
        ]
    try:
        subprocess.run(
            [python, "-c", "import llama_cpp, gguf, numpy"], check=True, capture_output=True
        )
    except OSError as error:
        return [f"--llamacpp-python {python} can't be run ({error.strerror}): {how}"]
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        told = lines[-1] if lines else f"exit code {error.returncode}"
        return [f"--llamacpp-python {python} has no llama.cpp ({told}): {how}"]
    return []


def _read_config(model: Path) -> dict[str, Any]:
    file = model / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is damaged: {error}") from None
    if missing := [name for name in ("model_type", "vocab_size") if name not in config]:
        raise ConfigError(
            f"{file} has no {' and no '.join(missing)}: it is no config of a language model"
        )
    return config


def _num_parameters(model: Path) -> int:
    """Of the tensors in a folder's safetensors."""
    from safetensors import safe_open

    total = 0
    for file in model.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                total += int(np.prod(tensors.get_slice(name).get_shape()))
    return total


def _prompts(vocab_size: int, batch_size: int, prompt_len: int) -> np.ndarray:
    """Random tokens: what they say has no bearing on speed."""
    return np.random.default_rng(_SEED).integers(0, vocab_size, (batch_size, prompt_len))


# The command line: `ort-train bench-inference`.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ort-train bench-inference`."""
    add = parser.add_argument
    known = ", ".join([*ENGINES, *GROUPS])
    add("folder", metavar="DIR", help="the folder of a run or of a transformers model")
    add(
        "--engines",
        default=",".join(DEFAULT),
        metavar="NAMES",
        help=f"comma-separated: {known}",
    )
    add("--batch-sizes", default="1,2,4,8,16", metavar="NUMBERS", help="comma-separated rows")
    add(
        "--prompt-lens",
        default="32,64,128,256,512,1024,2048",
        metavar="NUMBERS",
        help="comma-separated tokens of each prompt",
    )
    add("--new-tokens", type=int, default=256, metavar="N", help="generated after each prompt")
    add("--rounds", type=int, default=3, metavar="N", help="turns of each engine")
    add("--threads", type=int, metavar="N", help="of every engine (default: one a core)")
    add(
        "--llamacpp-python",
        metavar="PATH",
        default=os.environ.get(PYTHON_VARIABLE),
        help="the interpreter of an environment with llama.cpp "
        f"(default: the variable {PYTHON_VARIABLE})",
    )
    add_outputs(parser)


def main(args: argparse.Namespace) -> int:
    """Run `ort-train bench-inference`.

    Returns:
        0; 1 where an engine failed or computed other numbers.

    Raises:
        ConfigError: with every problem of the options, before anything is run.
    """
    problems = output_problems(args)
    engines = expand(words("--engines", args.engines, [*ENGINES, *GROUPS], problems))
    batch_sizes = numbers("--batch-sizes", args.batch_sizes, problems)
    prompt_lens = numbers("--prompt-lens", args.prompt_lens, problems)
    if problems:
        raise ConfigError(problems)
    record = run_benchmark(
        args.folder,
        engines,
        batch_sizes,
        prompt_lens,
        new_tokens=args.new_tokens,
        rounds=args.rounds,
        threads=args.threads,
        llamacpp_python=args.llamacpp_python,
        on_event=lambda line: tqdm.write(line, file=sys.stderr),
    )
    return show_and_save(record, args)

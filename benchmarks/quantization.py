"""What each scheme of `ort-train quantize` costs in accuracy and brings in size and speed.

`python benchmarks/quantization.py RUN_MODEL data.folder=...` measures the perplexity of a trained
model (a transformers folder), and on one of 125 million random weights, which is large enough for
its products to decide, the speed of generating one row, all schemes taking turns. `--memory` adds
the peak memory of quantizing a model of 3 GB, without the comparison. Writes quantization.json and
quantization.svg beside this file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
RECORD, CHART = HERE / "quantization.json", HERE / "quantization.svg"
SPEED_MODEL = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 2048,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
MEMORY_MODEL = {
    **SPEED_MODEL,
    "hidden_size": 2048,
    "num_hidden_layers": 14,
    "num_attention_heads": 16,
    "intermediate_size": 5632,
}
NUM_ROWS, LENGTH = 64, 128


def schemes() -> dict[str, Any]:
    from ort_train.inference.quantization.quantize import Scheme

    found: dict[str, Any] = {"fp16": Scheme("fp16"), "int8": Scheme("int8")}
    for symmetric in (False, True):
        for level in (0, 4):
            name = f"int4 {'sym' if symmetric else 'asym'}, level {level}"
            found[name] = Scheme("int4", 32, symmetric, level)
    found["int4 asym, level 4, block 128"] = Scheme("int4", block_size=128)
    return found


def made_model(folder: Path, fields: dict[str, int]) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ort_train.inference import export_model

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**fields)).save_pretrained(folder / "made")
    export_model(folder / "made", folder / "exported")
    return folder / "exported"


def training(model: Path) -> dict[str, Any] | None:
    """How the run that the model is of trained it, where it is one of ort_train's."""
    from ort_train.recipes import load_recipe

    if not (model.parent / "config.yaml").is_file():
        return None
    config = load_recipe(model.parent / "config.yaml")
    train = config.train
    return {"recipe": config.name, "steps": train.max_steps, "batch": train.micro_batch_size}


def accuracy(model: Path, overrides: list[str], folder: Path, threads: int) -> dict[str, Any]:
    from ort_train.inference import export_model, load_folder
    from ort_train.inference.quantization.quantize import quantize_folder
    from ort_train.inference.text import make_rows
    from ort_train.reports.provenance import scrub

    exported = folder / "trained"
    export_model(model, exported)
    rows = make_rows(load_folder(exported), overrides, NUM_ROWS, LENGTH)
    assert rows.source is not None
    results = {}
    for name, scheme in schemes().items():
        report = quantize_folder(
            exported, folder / f"trained {name}", scheme, (), rows.ids_BT, np.inf, threads
        )
        found = report.comparison
        assert found is not None
        errors = [layer.rel_error for layer in report.layers]
        results[name] = {
            "perplexity": round(found.reading.perplexity, 3),
            "perplexity_increase": round(found.perplexity_increase, 6),
            "mean_kl": round(found.mean_kl, 7),
            "agreement": round(found.agreement, 4),
            "weight_rel_error": {"median": np.median(errors), "max": max(errors)},
        }
        fp32 = found.reference.perplexity
        print(name, results[name], flush=True)
    return {
        "training": training(model),
        "text": scrub(rows.source),
        "num_predictions": found.reading.num_tokens,
        "fp32_perplexity": round(fp32, 3),
        "schemes": results,
    }


def speed(folder: Path, threads: int) -> dict[str, Any]:
    from ort_train.inference import load_folder
    from ort_train.inference.quantization.evaluate import decoding_speed
    from ort_train.inference.quantization.quantize import quantize_folder

    exported = made_model(folder, SPEED_MODEL)
    models = {"fp32": load_folder(exported)}
    for name, scheme in schemes().items():
        quantize_folder(exported, folder / name, scheme)
        models[name] = load_folder(folder / name)
    # The first model once more: how far two equal ones lie apart.
    turns = decoding_speed([*models.values(), models["fp32"]], threads)
    results = {}
    for name, speeds in zip([*models, "fp32 again"], turns, strict=True):
        low, middle, high = np.percentile(np.array(speeds) / np.array(turns[0]), [20, 50, 80])
        size = models[name.removesuffix(" again")].num_bytes
        results[name] = {
            "mib": round(size / 2**20, 1),
            "tokens_per_s": round(float(np.median(speeds)), 1),
            "x_fp32": {"median": round(middle, 3), "p20": round(low, 3), "p80": round(high, 3)},
        }
        print(name, results[name], flush=True)
    return {"model": SPEED_MODEL, "schemes": results}


def memory(folder: Path) -> dict[str, Any]:
    exported = made_model(folder, MEMORY_MODEL)
    size = sum(path.stat().st_size for path in exported.iterdir())
    code = (
        "import sys\n"
        "from ort_train.bench.serve import peak_resident_gib\n"
        "from ort_train.inference.quantization.quantize import Scheme, quantize_folder\n"
        "before = peak_resident_gib()\n"
        "quantize_folder(sys.argv[1], sys.argv[2], Scheme(sys.argv[3]))\n"
        "print(before, peak_resident_gib())"
    )
    results = {}
    for bits in ("int4", "int8", "fp16"):
        command = [sys.executable, "-c", code, str(exported), str(folder / bits), bits]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        before, peak = map(float, done.stdout.split()[-2:])
        results[bits] = {"peak_gib": round(peak, 2), "after_imports_gib": round(before, 2)}
        print(bits, results[bits], flush=True)
    return {"model": MEMORY_MODEL, "model_gib": round(size / 2**30, 2), "schemes": results}


def chart(record: dict[str, Any], path: Path = CHART) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    axes = figure.subplots()
    trained, made = record["accuracy"]["schemes"], record["speed"]["schemes"]
    for index, name in enumerate(("fp32", *trained)):
        increase = 0.0 if name == "fp32" else 100 * trained[name]["perplexity_increase"]
        ratio = made[name]["x_fp32"]
        spread = [[ratio["median"] - ratio["p20"]], [ratio["p80"] - ratio["median"]]]
        axes.errorbar(
            ratio["median"], increase, xerr=spread, fmt="o", color=f"C{index}", capsize=2.5,
            label=f"{name}, {made[name]['mib']:.0f} MiB",
        )  # fmt: skip
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(xlabel="speed of generating one row, x fp32", ylabel="perplexity over fp32's, %")
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.suptitle("Accuracy against speed of quantized models", x=0.01, ha="left")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    from ort_train.reports import provenance

    record: dict[str, Any] = {
        "command": provenance.command().replace(provenance.scrub(str(args.model)), "RUN/model"),
        "started_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": provenance.machine(threads=args.threads),
        "versions": provenance.versions(),
        "git_sha": provenance.git_state()[0],
    }
    with tempfile.TemporaryDirectory(prefix="ort_train-quantization-") as folder:
        record["accuracy"] = accuracy(args.model, args.overrides, Path(folder), args.threads)
    with tempfile.TemporaryDirectory(prefix="ort_train-quantization-") as folder:
        record["speed"] = speed(Path(folder), args.threads)
    if args.memory:
        with tempfile.TemporaryDirectory(prefix="ort_train-quantization-") as folder:
            record["memory"] = memory(Path(folder))
    RECORD.write_text(json.dumps(record, indent=1, default=float) + "\n")
    chart(record)


if __name__ == "__main__":
    main()

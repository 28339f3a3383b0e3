"""What engines run instead of a transformers folder: ONNX exports and GGUF files, made once.

They lie beside the model's folder, in `<its name>-exports`, and are made anew when it changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from ort_train.errors import ExportError
from ort_train.files import replacing
from ort_train.inference.benchmark.engines import ENGINES
from ort_train.reports.provenance import PACKAGE_ROOT
from ort_train.run_folder import CONFIG_FILE, MODEL_FOLDER

_SOURCE_FILE = "source.json"
# Raised when the same model would be exported as something else: earlier exports are made anew.
_GENERATION = 2


def locate(source: Path, say: Callable[[str], None]) -> Path:
    """The plain transformers folder of a run or a model; a run's adapter is merged first.

    Raises:
        ExportError: there is none.
        CheckpointError: a run that isn't complete.
    """
    if (source / CONFIG_FILE).is_file():
        if (source / MODEL_FOLDER / "config.json").is_file():
            return source / MODEL_FOLDER
        from ort_train.merge import merge

        folder = folder_for(source / MODEL_FOLDER, say) / "merged"
        if not folder.exists():
            say(merge(source, folder))
        return folder
    if not (source / "config.json").is_file():
        raise ExportError(
            f"{str(source)!r} is no model: it has neither a {CONFIG_FILE}, as a run of `ort-train "
            "train` leaves, nor transformers' config.json"
        )
    return source


def make(
    model: Path, engines: Sequence[str], llamacpp_python: str | None, say: Callable[[str], None]
) -> dict[str, Path]:
    """What each engine loads: the model's folder, or an export, which is made if it is missing.

    Args:
        model: a transformers folder.
        engines: their names.
        llamacpp_python: the interpreter that has `gguf`, for engines of llama.cpp.
        say: is told what is made, and what is found.
    """
    found = {}
    for name in engines:
        engine = ENGINES[name]
        if engine.runs_in == "torch":
            found[name] = model
        elif engine.runs_in == "ort":
            found[name] = _onnx(model, engine.weights, say)
        else:
            assert llamacpp_python is not None
            found[name] = _gguf(model, engine.weights, llamacpp_python, say)
    return found


def make_rounded(model: Path, weights: str, say: Callable[[str], None]) -> Path:
    """The model with the weights that engines of rounded ones multiply by, for PyTorch.

    Args:
        model: a transformers folder.
        weights: "int4" or "q4_0".
        say: is told what is made, and what is found.
    """
    from ort_train.inference.quantization.rounded import write_rounded

    out = folder_for(model, say) / f"rounded-{weights}"
    if out.exists():
        say(f"eager on {weights} weights: {out} is there already")
    else:
        say(f"eager on {weights} weights: writing {out}")
        write_rounded(model, out, weights)
    return out


def _onnx(model: Path, precision: str, say: Callable[[str], None]) -> Path:
    from ort_train.inference.decoder.export import describe, export_model

    out = folder_for(model, say) / f"onnx-{precision}"
    if out.exists():
        say(f"{precision}: {out} is there already")
        return out
    if precision == "int4":
        from ort_train.inference.quantization.quantize import Scheme, quantize_folder

        plain = _onnx(model, "fp32", say)
        say(f"{precision}: quantizing {plain} to {out}")
        quantize_folder(plain, out, Scheme("int4"))  # the benchmark compares the outputs itself
        return out
    say(f"{precision}: exporting {model} to {out}")
    say(describe(export_model(model, out, precision, say=say)))
    return out


def _gguf(model: Path, kind: str, python: str, say: Callable[[str], None]) -> Path:
    out = folder_for(model, say) / f"{kind}.gguf"
    if out.exists():
        say(f"{kind}: {out} is there already")
        return out
    say(f"{kind}: converting {model} to {out}")
    path = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
    with replacing(out) as temporary:
        done = subprocess.run(
            [
                python,
                "-m",
                "ort_train.inference.benchmark.gguf_convert",
                str(model),
                str(temporary),
                kind,
            ],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            told = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise ExportError(f"{str(model)!r} can't be converted to GGUF: {told}")
    return out


def folder_for(model: Path, say: Callable[[str], None]) -> Path:
    """The folder of a model's exports, emptied when the model or how it is exported has changed.

    Args:
        model: a folder; a pipeline's has a folder for each of its models.
    """
    folder = model.absolute().with_name(f"{model.absolute().name}-exports")
    state = {
        "model": model.absolute().name,
        "files": _digest(model),
        "generation": _GENERATION,
    }
    file = folder / _SOURCE_FILE
    if folder.exists():
        if not file.is_file():
            raise ExportError(
                f"{str(folder)!r} is where exports of {model.name} go, and it is something else: "
                "move it away"
            )
        if json.loads(file.read_text()) == state:
            return folder
        say(f"{model} has changed, or this program has: exports in {folder} are made anew")
        shutil.rmtree(folder)
    folder.mkdir()
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(state, indent=2) + "\n")
    return folder


def _digest(model: Path) -> str:
    """Of names, sizes and times of change: reading weights would take as long as exporting them."""
    digest = hashlib.sha256()
    for file in sorted(path for path in model.rglob("*") if path.is_file()):
        status = file.stat()
        digest.update(f"{file.relative_to(model)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]

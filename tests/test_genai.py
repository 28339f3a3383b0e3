"""onnxruntime-genai, in an environment of its own, runs an exported folder as it is."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from decoders import FUSED, save_decoder

from ort_train.inference import OrtGenerator, export_model

ROWS = [[5, 6, 7, 8, 9], [250]]
NEW_TOKENS = 16
# Runs there, where there is no ort_train.
SCRIPT = """
import json, sys
import onnxruntime_genai as og

rows, new_tokens = json.loads(sys.argv[2]), int(sys.argv[3])
model = og.Model(sys.argv[1])
for row in rows:
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(row) + new_tokens, do_sample=False, batch_size=1)
    generator = og.Generator(model, params)
    generator.append_tokens(row)
    while not generator.is_done():
        generator.generate_next_token()
    print(json.dumps([int(token) for token in generator.get_sequence(0)]))
"""


@pytest.fixture(scope="module")
def genai_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has onnxruntime-genai, whose own ONNX Runtime mustn't meet ours."""
    folder = tmp_path_factory.mktemp("genai") / "env"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "--retries", "1", "onnxruntime-genai"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        pytest.skip(f"pip can't get onnxruntime-genai: {lines[-1][:200]}")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "phi", "gemma", "qwen3"])
def test_genai_generates_the_same_tokens(name: str, genai_python: Path, tmp_path: Path) -> None:
    model_type, fields = FUSED[name]
    save_decoder(tmp_path / "model", model_type, **fields)
    exported = export_model(tmp_path / "model", tmp_path / "out")
    command = [genai_python, "-c", SCRIPT, exported.path, json.dumps(ROWS), str(NEW_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    generator = OrtGenerator(exported.path, num_threads=1)
    for row, line in zip(ROWS, done.stdout.splitlines(), strict=True):
        ours = generator.generate([row], max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
        assert json.loads(line) == ours
    assert "onnxruntime_genai" not in sys.modules

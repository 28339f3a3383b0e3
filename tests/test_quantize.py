"""Exported models with 4- and 8-bit weights: the numbers are the formula's, files whole or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from ort_train.cli import main
from ort_train.errors import ConfigError, ExportError, ModelError
from ort_train.inference import export_model, load_folder
from ort_train.inference.quantization import blockwise
from ort_train.inference.quantization.evaluate import compare, decoding_speed
from ort_train.inference.quantization.quantize import Scheme, quantize_folder

K, N = 70, 24  # 70 inputs: the last block of 32 isn't full, and the blocks are odd in number
IDS = np.random.default_rng(0).integers(0, 300, (3, 12))


def rows() -> np.ndarray:
    made = np.random.default_rng(0).standard_normal((N, K)).astype(np.float32)
    made[3] = 0.0  # a block of zeros
    made[4] = np.abs(made[4])  # a block without negative numbers
    return made


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_rounds_to_the_nearest_number(block_size: int, symmetric: bool) -> None:
    weight = rows()
    quantized = blockwise.quantize_int4(weight, block_size, symmetric)
    assert quantized.packed_NGB.shape == (N, -(-K // block_size), block_size // 2)
    stored = blockwise.dequantize_int4(quantized, K)
    assert not stored[3].any()
    for start in range(0, K, block_size):
        part = slice(start, start + block_size)
        block, found = weight[:, part], stored[:, part]
        if symmetric:
            step = np.abs(block).max(1, keepdims=True) / 8
            # The largest magnitude is at -8; what lies beyond +7 of its other side is cut to 7.
            limit = np.where(np.abs(block) > 7.5 * step, 1.0, 0.5) * step
        else:
            low, high = np.minimum(block.min(1), 0), np.maximum(block.max(1), 0)
            step = ((high - low) / 15)[:, None]
            limit = step  # half for the number, half for the zero point
        assert (np.abs(found - block) <= limit * (1 + 1e-5) + 1e-7).all()


def test_int8_rounds_to_the_nearest_number() -> None:
    weight = rows()
    numbers, scales = blockwise.quantize_int8(weight)
    stored = blockwise.dequantize_int8(numbers, scales)
    assert (np.abs(stored - weight) <= scales[:, None] / 2 * (1 + 1e-5)).all()
    assert not stored[3].any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("level", [0, 4])
def test_onnx_runtime_multiplies_by_what_is_stored(symmetric: bool, level: int) -> None:
    weight = rows()
    quantized = blockwise.quantize_int4(weight, 32, symmetric)
    tensors = [
        numpy_helper.from_array(quantized.packed_NGB, "q"),
        numpy_helper.from_array(quantized.scales_NG.reshape(-1), "s"),
    ]
    if not symmetric:
        assert quantized.zero_points_N is not None
        tensors.append(numpy_helper.from_array(quantized.zero_points_N.reshape(-1), "z"))
    node = helper.make_node(
        "MatMulNBits", ["x", *(t.name for t in tensors)], ["y"], domain="com.microsoft",
        K=K, N=N, bits=4, block_size=32, accuracy_level=level,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, N])],
        tensors,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(1).standard_normal((5, K)).astype(np.float32)
    found = session.run(None, {"x": x})[0]
    expected = x @ blockwise.dequantize_int4(quantized, K).T
    # fp32 sums of 70; at level 4 the inputs are rounded to 8 bits, 1/254 of a block's largest.
    tolerance = 1e-5 if level == 0 else 0.02
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any) -> Path:
    """An exported Llama whose logits depend on their tokens."""
    from ort_train.data.tokenizer import make_tokenizer

    base = tmp_path_factory.mktemp("quantize")
    model = tiny_llama(vocab_size=300, initializer_range=0.1)
    model.save_pretrained(base / "model")
    make_tokenizer("to be or not to be", 300).save_pretrained(base / "model")
    export_model(base / "model", base / "exported")
    return base / "exported"


@pytest.mark.parametrize(
    ("scheme", "largest_kl"),
    [
        (Scheme("int4", symmetric=True, accuracy_level=0), 0.05),
        (Scheme("int4", accuracy_level=0), 0.05),
        (Scheme("int4", accuracy_level=4), 0.06),
        (Scheme("int8"), 1e-3),
        (Scheme("fp16"), 1e-5),
    ],
    ids=str,
)
def test_a_folder_is_quantized(
    scheme: Scheme, largest_kl: float, folder: Path, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = quantize_folder(folder, tmp_path / "out", scheme, ids_BT=IDS, max_kl=largest_kl)
    made = load_folder(tmp_path / "out")
    assert made.info.precision == scheme.bits
    assert report.bytes_after < report.bytes_before * (0.6 if scheme.bits == "fp16" else 0.8)
    assert report.comparison is not None
    assert 0 < report.comparison.mean_kl < largest_kl
    operators = {
        node.op_type for node in onnx.load(made.model_file, load_external_data=False).graph.node
    }
    kernel = {"int4": "MatMulNBits", "int8": "DynamicQuantizeMatMul", "fp16": "MatMul"}
    assert kernel[scheme.bits] in operators
    assert ("MatMul" in operators) == (scheme.bits == "fp16")
    # Of normal weights: 4 bits leave about 10%, 8 bits 0.7%, fp16 0.02%.
    low, high = {"int4": (0.05, 0.15), "int8": (0.003, 0.015), "fp16": (1e-5, 1e-3)}[scheme.bits]
    assert len(report.layers) == 2 * 5 + 1  # qkv, o, gate, up, down; lm_head
    assert all(low < layer.rel_error < high for layer in report.layers)
    assert json.loads((tmp_path / "out" / "quantize.json").read_text())["layers"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_quantized_folder_computes_with_the_stored_weights(
    folder: Path, tmp_path: Path
) -> None:
    """The same as the fp32 folder with dequantized weights put in."""
    import shutil

    scheme = Scheme("int4", accuracy_level=0)
    quantize_folder(folder, tmp_path / "q4", scheme)
    shutil.copytree(folder, tmp_path / "rounded")
    model = onnx.load(tmp_path / "rounded" / "model.onnx")
    weights = {node.input[1] for node in model.graph.node if node.op_type == "MatMul"}
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            array = numpy_helper.to_array(tensor)
            rows = np.ascontiguousarray(array.T)
            quantized = blockwise.quantize_int4(rows, scheme.block_size, False)
            rounded = np.ascontiguousarray(blockwise.dequantize_int4(quantized, len(array)).T)
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    (tmp_path / "rounded" / "model.onnx.data").unlink()
    onnx.save(
        model, tmp_path / "rounded" / "model.onnx",
        save_as_external_data=True, location="model.onnx.data",
    )  # fmt: skip
    found = compare(load_folder(tmp_path / "rounded"), load_folder(tmp_path / "q4"), IDS)
    assert found.mean_kl < 1e-9  # fp32 rounding only
    assert found.agreement == 1.0


def test_layers_are_left_out_by_pattern(folder: Path, tmp_path: Path) -> None:
    report = quantize_folder(
        folder, tmp_path / "out", Scheme("int8"), exclude=["/lm_head/*", "*layers.0*"]
    )
    assert report.left_out
    assert all("lm_head" in name or "layers.0" in name for name in report.left_out)
    nodes = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.node
    kept = [node.name for node in nodes if node.op_type == "MatMul"]
    assert sorted(kept) == sorted(report.left_out)
    assert not {layer.name for layer in report.layers} & set(kept)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # gpt2: Gemm with biases, a tied head
def test_layers_left_out_of_half_precision_stay_whole(kind: str, tmp_path: Path) -> None:
    from decoders import save_decoder

    save_decoder(tmp_path / "model", kind)
    exported = export_model(tmp_path / "model", tmp_path / "exported")
    exclude = ["*lm_head*", "*attn*"]
    report = quantize_folder(exported.path, tmp_path / "out", Scheme("fp16"), exclude, IDS)
    assert len(report.left_out) == 1 + 2 * 2
    before, after = (onnx.load(tmp_path / name / "model.onnx") for name in ("exported", "out"))
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in before.graph.initializer}
    for node in before.graph.node:
        if node.op_type == "Transpose" and node.input[0] in known:
            known[node.output[0]] = known[node.input[0]].T
    own = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    read = {node.name: node for node in after.graph.node}
    for node in before.graph.node:
        if node.name in report.left_out:
            for weight, kept in zip(node.input[1:], read[node.name].input[1:], strict=True):
                assert own[kept].dtype == np.float32
                assert np.array_equal(known[weight], own[kept])


def test_integers_in_half_precision_stay_as_they_are(folder: Path, tmp_path: Path) -> None:
    """Large ones lie beside the weights, as `ort-train optimize` puts constants there."""
    model = onnx.load(folder / "model.onnx")
    positions = numpy_helper.from_array(np.arange(500), "positions")
    model.graph.initializer.append(positions)
    ids = next(node for node in model.graph.node if "input_ids" in node.input)
    zero = numpy_helper.from_array(np.zeros(1, np.int64), "zero")
    model.graph.initializer.append(zero)
    nodes = [
        helper.make_node("Gather", ["positions", "zero"], ["nothing"], "nothing"),
        helper.make_node("Add", ["input_ids", "nothing"], ["ids"], "ids"),
    ]
    ids.input[list(ids.input).index("input_ids")] = "ids"
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    source = Path(shutil.copytree(folder, tmp_path / "source"))
    (source / "model.onnx.data").unlink()
    onnx.save(
        model, source / "model.onnx", save_as_external_data=True, location="model.onnx.data",
    )  # fmt: skip
    quantize_folder(source, tmp_path / "out", Scheme("fp16"), ids_BT=IDS, max_kl=1e-5)
    made = onnx.load(tmp_path / "out" / "model.onnx")
    (kept,) = (tensor for tensor in made.graph.initializer if tensor.name == "positions")
    assert np.array_equal(numpy_helper.to_array(kept), np.arange(500))


def test_a_result_that_differs_is_not_kept(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"KL divergence .* above 1e-09.*--accuracy-level 0"):
        quantize_folder(folder, tmp_path / "out", Scheme(), ids_BT=IDS, max_kl=1e-9)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_quantized(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"scheme 'int3'.*\n.*block_size 48.*\n.*level 7"):
        Scheme("int3", 48, accuracy_level=7)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="'nothing' fits no product: they are named like"):
        quantize_folder(folder, tmp_path / "out", Scheme(), exclude=["nothing"])
    with pytest.raises(ModelError, match="left out by --exclude"):
        quantize_folder(folder, tmp_path / "out", Scheme(), exclude=["*"])
    with pytest.raises(ExportError, match="no exported model"):
        quantize_folder(tmp_path, tmp_path / "out", Scheme())
    quantize_folder(folder, tmp_path / "once", Scheme("int8"))
    with pytest.raises(ModelError, match="is int8 already"):
        quantize_folder(tmp_path / "once", tmp_path / "twice", Scheme())
    assert [path.name for path in tmp_path.iterdir()] == ["once"]


def test_speed_is_measured_in_turns(folder: Path) -> None:
    speeds = decoding_speed([load_folder(folder)] * 2, num_threads=1)
    assert len(speeds) == 2
    assert len(speeds[0]) == len(speeds[1]) >= 3
    assert min(speeds[0]) > 0


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", str(folder), "--out", str(out), "--rows", "2", "--length", "16"]
    assert main([*arguments, "--scheme", "int8", "data.source=offline", "--threads", "1"]) == 0
    report = json.loads((out / "quantize.json").read_text())
    comparison = report["comparison"]
    assert comparison["reading"]["num_tokens"] == 2 * 15
    shown = capsys.readouterr().out
    assert f"KL to fp32 {comparison['mean_kl']:.5f} nats" in shown
    assert "the Python documentation" in shown
    worst = max(report["layers"], key=lambda layer: layer["rel_error"])
    assert f"{worst['rel_error']:.4f}  {worst['name']}" in shown


def test_the_command_refuses_before_it_reads_a_text(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ort_train.inference import text

    monkeypatch.setattr(text, "make_rows", None)
    assert main(["quantize", str(folder), "--out", str(folder)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    quantize_folder(folder, tmp_path / "once", Scheme("int8"))
    assert main(["quantize", str(tmp_path / "once"), "--out", str(tmp_path / "twice")]) == 2
    assert "is int8 already" in capsys.readouterr().err


def test_without_a_tokenizer_tokens_are_random(folder: Path, tmp_path: Path) -> None:
    from ort_train.inference.text import make_rows

    shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    rows = make_rows(load_folder(tmp_path / "bare"), num_rows=3, length=1000)
    assert rows.source is None
    assert rows.ids_BT.shape == (3, 128)  # as many as the model has positions
    assert rows.ids_BT.max() < 300


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--scheme", "int8", "--symmetric"], "--symmetric is of --scheme int4, not of int8"),
        (["--length", "2", "--rows", "0"], "2 problems"),
        (["--max-kl", "nan"], "--max-kl nan must be 0 or more"),
        (["--max-kl", "-1"], "--max-kl -1.0 must be 0 or more"),
        (["--threads", "99999999999"], "should be from 1 to 1024"),
        (["data.packing=true"], "data.packing isn't read here: source, dataset"),
        (["data.max_eval_blocks=2"], "data.max_eval_blocks isn't read here: --rows says it"),
        (["data.block_size=64"], "data.block_size isn't read here: --length says it"),
        (["train.max_steps=1"], "only data.key=value is"),
        (["--max-kl", "1e-9", "data.source=offline"], "Nothing was written"),
        (["data.soruce=offline"], "did you mean data.source"),
    ],
)
def test_what_is_asked_wrongly(
    arguments: list[str],
    expected: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["quantize", str(folder), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_published_trade_off() -> None:
    """int4 costs a model trained here less than 3% of perplexity."""
    root = Path(__file__).resolve().parents[1]
    record = json.loads((root / "benchmarks" / "quantization.json").read_text())
    increases = {
        name: scheme["perplexity_increase"]
        for name, scheme in record["accuracy"]["schemes"].items()
        if name.startswith("int4")
    }
    assert len(increases) >= 4
    assert max(increases.values()) < 0.03
    assert all(peak["peak_gib"] < 2 for peak in record["memory"]["schemes"].values())
    assert record["memory"]["model_gib"] > 2.5

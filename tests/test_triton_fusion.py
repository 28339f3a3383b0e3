"""Triton fusion without a GPU: what is fused, and the kernels interpreted and compiled."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto as T
from onnx import helper
from trained_graphs import manager_of

from ort_train import wrap
from ort_train.errors import BackendUnavailableError, ConfigError
from ort_train.ortmodule import OrtOptions
from ort_train.ortmodule.triton import kernels as triton_kernels
from ort_train.ortmodule.triton.config import FusionConfig, read_config, supported_ops
from ort_train.ortmodule.triton.fusion import session_graph, subgraphs

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton (248 MB): make test-triton")
BATCH, TOKENS = 2, 6
_SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "vocab_size": 128, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_EXTRA = {
    "llama": {"num_key_value_heads": 2},
    "gemma": {"head_dim": 8, "num_key_value_heads": 1},
    "phi": {"resid_pdrop": 0.1},
}
ARCHITECTURES = ("llama", "phi", "gemma", "bert")


@functools.cache
def training_graph(model_type: str) -> Any:
    """The training graph of a tiny random model, as ONNX Runtime's session has it."""
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **_SIZES, **_EXTRA.get(model_type, {}))
    torch.manual_seed(0)
    name = "AutoModelForMaskedLM" if model_type == "bert" else "AutoModelForCausalLM"
    model = wrap(getattr(transformers, name).from_config(config).train(), backend="ort")
    ids = torch.arange(3, 3 + BATCH * TOKENS).reshape(BATCH, TOKENS)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    return session_graph(manager_of(model)._onnx_models.optimized_model)


def fused_operators(model_type: str) -> list[list[str]]:
    return [
        [node.op_type for node in model.graph.node]
        for model in subgraphs(training_graph(model_type))
    ]


def with_sizes(model: Any) -> Any:
    """Numbers in place of the named dimensions, which are those of ids."""
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = BATCH if dim.dim_param.endswith("dim0") else TOKENS
    return model


def some_values(value: Any, rng: np.random.Generator) -> np.ndarray:
    tensor = value.type.tensor_type
    shape = [dim.dim_value for dim in tensor.shape.dim]
    if tensor.elem_type == T.BOOL:
        return rng.integers(0, 2, shape).astype(bool)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    if np.issubdtype(dtype, np.integer):
        return rng.integers(1, 2**40, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def made(nodes: list[Any], inputs: dict[str, tuple[int, list[int]]], outputs: dict[str, int],
         **constants: Any) -> Any:  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info(n, *spec) for n, spec in inputs.items()],
        [helper.make_tensor_value_info(n, kind, None) for n, kind in outputs.items()],
        [onnx.numpy_helper.from_array(np.array(v), n) for n, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def made_subgraphs() -> dict[str, Any]:
    """What the architectures' graphs don't have: each is one way through the generator."""
    node = helper.make_node
    f = np.float32
    return {
        "powers": made(
            [node("Mul", ["x", "x"], ["s"], "n0"), node("Pow", ["s", "half"], ["r"], "n1"),
             node("Pow", ["x", "three"], ["c"], "n2"), node("Pow", ["x", "two"], ["q"], "n3"),
             node("Add", ["r", "c"], ["rc"], "n4"), node("Add", ["rc", "q"], ["y"], "n5")],
            {"x": (T.FLOAT, [3, 50])}, {"y": T.FLOAT}, half=f(0.5), two=f(2), three=f(3),
        ),
        "integers": made(
            [node("Div", ["a", "b"], ["q"], "n0"), node("Add", ["q", "b"], ["y"], "n1")],
            {"a": (T.INT64, [77]), "b": (T.INT64, [77])}, {"y": T.INT64},
        ),
        "long_rows": made(
            [node("Mul", ["x", "scale"], ["s"], "n0"),
             node("Softmax", ["s"], ["y"], "n1", axis=-1)],
            {"x": (T.FLOAT, [3, 5000])}, {"y": T.FLOAT}, scale=f(1.5),
        ),
        "half": made(
            [node("Mul", ["x", "x"], ["s"], "n0"), node("Softmax", ["s"], ["y"], "n1", axis=-1)],
            {"x": (T.FLOAT16, [5, 33])}, {"y": T.FLOAT16},
        ),
        "not_finite": made(
            [node("Where", ["c", "nan", "x"], ["w"], "n0"),
             node("Where", ["d", "infinity", "w"], ["y"], "n1")],
            {"c": (T.BOOL, [40]), "d": (T.BOOL, [40]), "x": (T.FLOAT, [40])}, {"y": T.FLOAT},
            nan=f(np.nan), infinity=f(-np.inf),
        ),
        "mean": made(
            [node("Exp", ["x"], ["e"], "n0"),
             node("ReduceMean", ["e"], ["y"], "n1", axes=[-1], keepdims=1)],
            {"x": (T.FLOAT, [4, 100])}, {"y": T.FLOAT},
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All subgraphs with their inputs, as the worker reads them."""
    path = tmp_path_factory.mktemp("subgraphs")
    models = {
        f"{model_type}-{index:02}": with_sizes(model)
        for model_type in ARCHITECTURES
        for index, model in enumerate(subgraphs(training_graph(model_type)))
    }
    for name, model in {**models, **made_subgraphs()}.items():
        rng = np.random.default_rng(0)
        onnx.save(model, path / f"{name}.onnx")
        np.savez(path / f"{name}.npz", **{v.name: some_values(v, rng) for v in model.graph.input})
    return path


def run_worker(mode: str, folder: Path, **environment: str) -> dict[str, dict[str, Any]]:
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("triton_worker.py")), mode, str(folder)],
        capture_output=True,
        text=True,
        timeout=900,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
            ),
            "TRITON_CACHE_DIR": str(folder / "cubins"),
            "ORT_TRAIN_CACHE": str(folder / "cache"),
            **environment,
        },
    )
    assert result.returncode == 0, result.stderr
    # It is to become an error, so the generated code must not cause it.
    assert "non-boolean condition" not in result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    answers = {line.pop("name"): line for line in lines}
    assert set(answers) == {path.stem for path in folder.glob("*.onnx")}
    errors = {name: answer["error"] for name, answer in answers.items() if "error" in answer}
    assert not errors
    return answers


@pytest.fixture(scope="module")
def interpreted(folder: Path) -> dict[str, dict[str, Any]]:
    return run_worker("interpret", folder, TRITON_INTERPRET="1", PYTHONHASHSEED="0")


# --- the fuser's rule ---


def test_forward_and_backward_of_llama_are_fused():
    taken = fused_operators("llama")
    for expected in (
        ["Where", "Add", "Softmax"],
        ["QuickGelu", "Mul"],
        ["Mul", "QuickGeluGrad"],
        ["Mul", "Mul", "Mul"],  # of the rotary embedding's gradient
    ):
        assert expected in taken


def test_min_nodes_and_ops_limit_what_is_fused():
    graph = training_graph("llama")
    large = subgraphs(graph, FusionConfig(min_nodes=4))
    assert [len(model.graph.node) for model in large] == [4]
    without = {name: rule for name, rule in supported_ops().items() if name != "Softmax"}
    taken = [n.op_type for m in subgraphs(graph, FusionConfig(ops=without)) for n in m.graph.node]
    assert "Softmax" not in taken
    assert "Where" in taken


def test_constants_go_inside_only_where_asked():
    graph = training_graph("llama")
    inside = [len(model.graph.initializer) for model in subgraphs(graph)]
    assert sum(inside) > 0
    none = subgraphs(graph, FusionConfig(initializer="none"))
    assert [len(model.graph.initializer) for model in none] == [0] * len(inside)


def test_no_cycle_through_the_rest_of_the_graph():
    """x -> Mul -> MatMul -> Add, and Mul -> Add: fused, Mul and Add would need each other."""
    node = helper.make_node
    spec = (T.FLOAT, [4, 4])
    model = made(
        [node("Mul", ["x", "x"], ["m"]), node("Exp", ["m"], ["e"]),
         node("MatMul", ["e", "x"], ["p"]), node("Add", ["p", "m"], ["a"]),
         node("Sqrt", ["a"], ["y"])],
        {"x": spec}, {"y": T.FLOAT},
    )  # fmt: skip
    taken = [[n.op_type for n in m.graph.node] for m in subgraphs(model)]
    assert taken == [["Mul", "Exp"], ["Add", "Sqrt"]]
    first = subgraphs(model)[0]
    assert [value.name for value in first.graph.output] == ["m", "e"]


def test_reductions_of_the_last_axis_alone():
    node = helper.make_node
    for axes, expected in (([-1], 1), ([1], 1), ([0], 0), ([0, 1], 0)):
        model = made(
            [node("Exp", ["x"], ["e"]), node("ReduceMean", ["e"], ["y"], axes=axes)],
            {"x": (T.FLOAT, [4, 4])}, {"y": T.FLOAT},
        )  # fmt: skip
        model.graph.value_info.append(helper.make_tensor_value_info("e", T.FLOAT, [4, 4]))
        assert len(subgraphs(model)) == expected


# --- the config ---


def test_a_written_config_is_read_back(tmp_path: Path):
    config = FusionConfig(min_nodes=3, initializer="none")
    path = config.write(tmp_path / "triton.json")
    assert read_config(path) == config
    assert [file.name for file in tmp_path.iterdir()] == ["triton.json"]
    assert OrtOptions(fusion="triton", triton_config=str(path)).triton_config == str(path)


def test_all_problems_of_a_config_at_once(tmp_path: Path):
    path = tmp_path / "triton.json"
    path.write_text(
        json.dumps(
            {
                "ops": {
                    "Tan": {"versions": [7]},
                    "Exp": {"versions": [7]},
                    "Softmax": {"versions": [13], "condition": {}},
                },
                "initializer": "all",
                "min_nodes": 0,
                "min_node": 2,
                "symbolic_shape_hint": {"*": 100},
            }
        )
    )
    with pytest.raises(ConfigError) as caught:
        OrtOptions(fusion="triton", triton_config=str(path))
    problems = "\n".join(caught.value.problems)
    for expected in (
        "no Triton kernel can be generated of 'Tan'",
        "ops.Exp.versions=[7] must be a list of those",
        "unknown key 'condition'; did you mean conditions",
        "initializer='all' ends in an assertion",
        "min_nodes=0 must be an integer of at least 1",
        "unknown key 'min_node'; did you mean min_nodes",
        "must map names to powers of two",
    ):
        assert expected in problems


def test_a_config_that_is_no_json(tmp_path: Path):
    path = tmp_path / "triton.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="can't be read as JSON"):
        OrtOptions(fusion="triton", triton_config=str(path))


# --- where it can't run ---


def test_without_a_gpu_it_is_refused():
    with pytest.raises(ConfigError, match="fusion='triton' works on CUDA devices only"):
        wrap(torch.nn.Linear(2, 2), backend="ort", options=OrtOptions(fusion="triton"))


def test_without_triton_it_is_refused(monkeypatch: pytest.MonkeyPatch):
    """ORTModule would only log it and train without."""
    monkeypatch.setattr(triton_kernels.importlib.util, "find_spec", lambda name: None)
    triton_kernels.load.cache_clear()
    with pytest.raises(BackendUnavailableError, match=r"not installed.*ort_train\[triton\]"):
        triton_kernels.prepare(debug=False)


# --- the kernels ---


def reference(model: Any, inputs: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> Any:
    """ONNX Runtime's own outputs; of dropout, whose masks are random, those of the found mask."""
    import onnxruntime

    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph, inputs = model.graph, dict(inputs)
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    for index, node in enumerate(list(graph.node)):
        if node.op_type != "Dropout":
            continue
        x, ratio, _ = node.input
        y, mask = node.output
        p = float(constants[ratio].reshape(()))
        graph.input.append(helper.make_tensor_value_info(mask, T.BOOL, list(found[mask].shape)))
        inputs[mask] = found[mask].astype(bool)
        keep, zero, scaled = (f"{y}/{name}" for name in ("keep", "zero", "scaled"))
        numbers = ((keep, np.float32(1 - p)), (zero, np.float32(0)))
        graph.initializer.extend(onnx.numpy_helper.from_array(v, n) for n, v in numbers)
        graph.node.remove(node)
        graph.node.insert(index, helper.make_node("Where", [mask, scaled, zero], [y]))
        graph.node.insert(index, helper.make_node("Div", [x, keep], [scaled]))
        (output,) = [value for value in graph.output if value.name == mask]
        graph.output.remove(output)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in graph.output]
    return dict(zip(names, session.run(None, inputs), strict=True))


@needs_triton
def test_interpreted_kernels_compute_what_onnx_runtime_does(
    folder: Path, interpreted: dict[str, dict[str, Any]]
):
    operators: set[str] = set()
    for name, answer in interpreted.items():
        model = onnx.load(folder / f"{name}.onnx")
        operators |= {node.op_type for node in model.graph.node}
        inputs = dict(np.load(folder / f"{name}.npz"))
        for index in range(answer["num_configs"]):
            found = dict(np.load(folder / f"{name}.out{index}.npz"))
            for output, expected in reference(model, inputs, found).items():
                # fp32: sums in another order and another exp, some units in the last place;
                # fp16 is rounded once, from fp32 on both sides or after each operator in one.
                tolerance = 2e-3 if expected.dtype == np.float16 else 2e-6
                np.testing.assert_allclose(
                    found[output], expected, rtol=5 * tolerance, atol=tolerance, err_msg=name
                )
    forward = {"Softmax", "QuickGelu", "Dropout", "Where", "Add", "Pow", "Div", "ReduceMean"}
    assert forward | {"SoftmaxGrad_13", "QuickGeluGrad", "DropoutGrad", "Sum"} <= operators


@needs_triton
def test_masks_of_dropout_keep_the_share_asked_for(
    folder: Path, interpreted: dict[str, dict[str, Any]]
):
    kept = []
    for name in interpreted:
        for node in onnx.load(folder / f"{name}.onnx").graph.node:
            if node.op_type == "Dropout":
                kept.append(np.load(folder / f"{name}.out0.npz")[node.output[1]].ravel())
    share = np.concatenate(kept).mean()
    # p = 0.1 of some 1000 elements: five standard deviations of the mean.
    assert abs(share - 0.9) < 5 * np.sqrt(0.09 / sum(map(len, kept)))


@needs_triton
def test_sources_are_the_same_in_every_process(
    folder: Path, interpreted: dict[str, dict[str, Any]]
):
    """Else neither ONNX Runtime nor Triton would find its cached kernels."""
    sources = sorted((folder / "cache").rglob("*.py"))
    run_worker("interpret", folder, TRITON_INTERPRET="1", PYTHONHASHSEED="1")
    assert sorted((folder / "cache").rglob("*.py")) == sources
    assert sources
    assert not any(re.search(r'device="cuda"', path.read_text()) for path in sources)


@needs_triton
def test_kernels_compile_for_a100_and_h100(folder: Path):
    answers = run_worker("compile", folder, TRITON_INTERPRET="0")
    for name, answer in answers.items():
        assert answer["num_kernels"] >= 1, name
        assert all(binary["is_whole"] for binary in answer["binaries"]), name
        assert {binary["capability"] for binary in answer["binaries"]} == {80, 90}, name


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_step_on_a_gpu_is_the_eager_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The C++ fuser itself: it takes subgraphs, and loss and gradients are eager's."""
    import transformers

    monkeypatch.chdir(tmp_path)  # triton_debug/ shows what was fused
    config = transformers.AutoConfig.for_model("llama", **_SIZES, **_EXTRA["llama"])
    ids = torch.arange(3, 3 + BATCH * TOKENS, device="cuda").reshape(BATCH, TOKENS)
    gradients = {}
    for backend in ("eager", "ort"):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).cuda().train()
        options = OrtOptions(fusion="triton", triton_debug=True) if backend == "ort" else None
        wrap(model, backend=backend, options=options)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        gradients[backend] = {n: p.grad for n, p in model.named_parameters()}
    assert list((tmp_path / "triton_debug").glob("*.py"))
    for name, expected in gradients["eager"].items():
        # fp32 without TF32: sums in another order
        torch.testing.assert_close(gradients["ort"][name], expected, rtol=1e-3, atol=1e-5)


def test_a_graph_without_fusion_is_not_fused_after_one_with_it():
    """ONNX Runtime asks for the operators with each session, once the fuser is registered."""
    package = SimpleNamespace(get_config=lambda: '{"ops": {"Add": {}}}')
    triton_kernels._only_where_asked_for(package)
    with OrtOptions(fusion="triton").environment():
        assert json.loads(package.get_config())["ops"] == {"Add": {}}
    with OrtOptions().environment():
        assert json.loads(package.get_config())["ops"] == {}

"""Graph passes: graphs change as told, their numbers don't, whatever their size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxoptimizer", reason="needs the extra inference")

import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from ort_train.cli import main
from ort_train.errors import ConfigError, ModelError
from ort_train.inference import onnx_files
from ort_train.inference.optimization import drawing, optimize, passes

SIZE = 32
GEMM_PASSES = ["fuse_transpose_into_gemm", "fuse_matmul_add_bias_into_gemm"]
REPORT_PASSES = ["eliminate_identity", *GEMM_PASSES]


def initializer(name: str, *shape: int) -> TensorProto:
    rng = np.random.default_rng(len(name) + sum(map(ord, name)))
    return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)


def save(path: Path, nodes: list[Any], initializers: list[Any], rows: int | str = 4) -> Path:
    """A model of rows x SIZE floats, its weights in a file beside it."""
    shape = [rows, SIZE]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, {"made_by": "a test"})
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    location = f"{path.name}.data"
    onnx.save(model, path, save_as_external_data=True, location=location, size_threshold=1024)
    return path


@pytest.fixture
def biased(tmp_path: Path) -> Path:
    """x W1 + b, an Identity, and a Gemm of a transposed weight."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["product"], "mlp/MatMul"),
        helper.make_node("Add", ["product", "b"], ["sum"], "mlp/Add"),
        helper.make_node("Identity", ["sum"], ["same"], "mlp/Identity"),
        helper.make_node("Transpose", ["w2"], ["w2t"], "head/Transpose", perm=[1, 0]),
        helper.make_node("Gemm", ["same", "w2t", "b"], ["y"], "head/Gemm"),
    ]
    weights = [initializer("w1", SIZE, SIZE), initializer("w2", SIZE, SIZE), initializer("b", SIZE)]
    return save(tmp_path / "in" / "biased.onnx", nodes, weights)


@pytest.fixture
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any) -> Path:
    import torch

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_llama(num_hidden_layers=1).eval()

        def forward(self, ids: Any, mask: Any) -> Any:
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    path = tmp_path_factory.mktemp("llama") / "llama.onnx"
    ids = torch.zeros(1, 8, dtype=torch.int64)
    torch.onnx.export(
        Logits(),
        (ids, torch.ones_like(ids)),
        str(path),
        dynamo=False,
        opset_version=17,
        input_names=["input_ids", "attention_mask"],
        output_names=["logits"],
        dynamic_axes={name: {0: "batch", 1: "length"} for name in ("input_ids", "attention_mask")},
    )
    return path


def run(path: Path, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


@pytest.mark.parametrize("large", [False, True])
def test_each_pass_and_all_together(
    large: bool, biased: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:  # as if it were larger than a protobuf message may be
        monkeypatch.setattr(onnx_files, "MAX_INLINE_BYTES", 1024)
    optimized, page = optimize.optimize_path(biased, tmp_path / "out.onnx", REPORT_PASSES)
    identity, transpose, fusion = optimized.singly
    assert (identity.before["Identity"], identity.after["Identity"]) == (1, 0)
    assert transpose.after == {"MatMul": 1, "Add": 1, "Identity": 1, "Gemm": 1}
    # No MatMul is left under the Gemm, where onnxoptimizer leaves it.
    assert fusion.after == {"Identity": 1, "Transpose": 1, "Gemm": 2}
    assert optimized.together.after == {"Gemm": 2}
    assert operators(tmp_path / "out.onnx") == ["Gemm", "Gemm"]
    x = np.random.default_rng(0).standard_normal((4, SIZE)).astype(np.float32)
    difference = passes.relative_difference(run(tmp_path / "out.onnx", x), run(biased, x))
    assert difference < 1e-5  # one sum of 32 in another order
    written = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    assert [value.name for value in written.graph.input] == ["x"]
    assert {p.key: p.value for p in written.metadata_props} == {"made_by": "a test"}
    assert "Gemm" in page.read_text()


def test_a_number_without_dimensions_stays_one(tmp_path: Path) -> None:
    """By an index of shape () Gather drops the axis, by one of shape (1,) it keeps it."""
    nodes = [
        helper.make_node("Identity", ["table"], ["same"], "same"),
        helper.make_node("Gather", ["same", "index"], ["row"], "row"),
        helper.make_node("Add", ["x", "row"], ["y"], "sum"),
    ]
    index = numpy_helper.from_array(np.array(1), "index")
    model = save(tmp_path / "in.onnx", nodes, [initializer("table", 3, SIZE), index])
    out = tmp_path / "out.onnx"
    optimize.optimize_path(model, out, ["eliminate_identity"])
    shapes = {t.name: list(t.dims) for t in onnx.load(out).graph.initializer}
    assert shapes == {"table": [3, SIZE], "index": []}
    x = np.zeros((4, SIZE), np.float32)
    assert np.array_equal(run(out, x), run(model, x))


def test_different_external_weights_stay_different(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("MatMul", ["h", "w2"], ["y"]),
    ]
    weights = [initializer("w1", SIZE, SIZE), initializer("w2", SIZE, SIZE)]
    path = save(tmp_path / "two.onnx", nodes, weights)
    # What the workaround is for: given as it is on the disk, the model would lose a weight.
    import onnxoptimizer

    bare = onnx.load(path, load_external_data=False)
    merged = onnxoptimizer.optimize(bare, ["eliminate_duplicate_initializer"])
    assert len(merged.graph.initializer) == 1
    for limit in (onnx_files.MAX_INLINE_BYTES, 1024):
        monkeypatch.setattr(onnx_files, "MAX_INLINE_BYTES", limit)
        assert not passes.optimize(path, ["eliminate_duplicate_initializer"]).together.changed


def test_a_llama_without_biases_has_nothing_for_the_gemm_passes(llama: Path) -> None:
    optimized = passes.optimize(llama, REPORT_PASSES)
    assert "Gemm" not in optimized.together.before
    changed = {report.names[0]: report.changed for report in optimized.singly}
    assert changed == {"eliminate_identity": True, **dict.fromkeys(GEMM_PASSES, False)}
    assert optimized.singly[1].lines() == [
        "fuse_transpose_into_gemm: no change, the graph is identical "
        f"({optimized.together.before.total()} nodes)"
    ]


def test_all_passes_keep_a_llamas_numbers(llama: Path) -> None:
    names = [name for name in passes.available() if name not in passes.REFUSED]
    together = passes.optimize(llama, names).together
    assert together.after.total() < together.before.total() * 0.6
    assert together.max_rel_diff is not None


def test_nothing_to_do_is_told_and_written_as_it_was(biased: Path, tmp_path: Path) -> None:
    out = tmp_path / "same.onnx"
    optimized, page = optimize.optimize_path(biased, out, ["fuse_bn_into_conv"])
    assert not optimized.together.changed
    assert operators(out) == operators(biased)
    assert "nothing changed" in page.read_text()


def test_a_pass_that_changes_the_numbers_is_refused(
    biased: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxoptimizer

    def wrong(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        changed.graph.node[1].input[1] = "product"
        return changed

    monkeypatch.setattr(onnxoptimizer, "optimize", wrong)
    with pytest.raises(ModelError, match=r"eliminate_identity changes output y .* Nothing was wr"):
        optimize.optimize_path(biased, tmp_path / "out" / "o.onnx", ["eliminate_identity"])
    assert not (tmp_path / "out").exists()


def test_a_folder_keeps_its_other_files(biased: Path, tmp_path: Path) -> None:
    folder = biased.parent
    for path in list(folder.iterdir()):
        path.rename(folder / path.name.replace("biased", "model"))
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "model.onnx.data"
    onnx.save(model, folder / "model.onnx")
    (folder / "config.json").write_text("{}")
    arguments = ["optimize", str(folder), "--passes", "eliminate_identity", "--out"]
    assert main([*arguments, str(tmp_path / "out")]) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"model.onnx", "model.onnx.data", "config.json", "optimize.html"}
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    assert main([*arguments, str(tmp_path / "out")]) == 2  # nothing is overwritten


def test_pictures_show_what_changed(biased: Path) -> None:
    optimized = passes.optimize(biased, ["fuse_matmul_add_bias_into_gemm"])
    before, after = optimized.before.graph, optimized.after.graph
    block = drawing.choose_block(before, after, "mlp")
    assert block == {"product", "sum", "same"}
    pictures = [
        drawing.draw(before, after, block, added=False),
        drawing.draw(after, before, block, added=True),
    ]
    labels = [re.findall(r"middle\">(\w+)<", picture) for picture in pictures]
    assert labels == [["MatMul", "Add", "Identity"], ["Gemm", "Identity"]]
    assert [picture.count("<path") for picture in pictures] == [2, 1]
    coloured = [
        picture.count(drawing._REMOVED) + picture.count(drawing._ADDED) for picture in pictures
    ]
    assert coloured == [2, 1]
    assert drawing.choose_block(before, before, None) is None
    around = drawing.choose_block(before, after, None)
    assert around is not None
    assert {"product", "sum"} <= around


def test_pictures_stay_small(llama: Path) -> None:
    optimized = passes.optimize(llama, ["eliminate_common_subexpression"])
    block = drawing.choose_block(optimized.before.graph, optimized.after.graph, None)
    assert block is not None
    picture = drawing.draw(optimized.before.graph, optimized.after.graph, block, added=False)
    assert 5 < picture.count("<rect") <= drawing.MAX_NODES


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--passes", "eliminate_idntity"], "did you mean eliminate_identity"),
        (["--passes", "split_init"], "refused: it cuts"),
        (["--passes", ","], "no passes"),
        ([], "give --passes"),
        (["--passes", "nop", "--dim", "batch"], "should be NAME=SIZE"),
        (["--passes", "nop", "--dim", "batch=3"], "no input has such a dimension: there are none"),
        (["--passes", "nop", "--block", "no_such_layer"], "there are, for example, head, mlp"),
    ],
)
def test_what_is_asked_wrongly(
    arguments: list[str],
    expected: str,
    biased: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out.onnx"
    assert main(["optimize", str(biased), "--out", str(out), *arguments]) == 2
    assert expected in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_sizes_that_would_be_ignored_are_named(llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"--dim bach: .* did you mean batch") as caught:
        passes.optimize(llama, ["nop"], {"bach": 3, "length": 0})
    assert caught.value.problems[1] == "--dim length=0 must be 1 or more"


def test_a_place_that_cant_be_is_found_before_work_starts(biased: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ModelError, match=r"can't be made, as .*/file' is no folder"):
        optimize.optimize_path(biased, tmp_path / "file" / "out.onnx", ["eliminate_identity"])
    with pytest.raises(ModelError, match=r"can't be made, as .*/file' is no folder"):
        optimize.check_out(biased.parent, tmp_path / "file" / "out")


def test_what_is_no_model(biased: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.onnx"
    text.write_text("not a model")
    for source in (text, tmp_path / "absent.onnx", tmp_path):
        with pytest.raises(ModelError, match=r"can't read|doesn't exist"):
            optimize.optimize_path(source, tmp_path / "o", ["nop"]) if source == tmp_path else (
                optimize.optimize_path(source, tmp_path / "o.onnx", ["nop"])
            )
    (biased.parent / "biased.onnx.data").write_bytes(b"")
    with pytest.raises(ModelError, match="isn't whole"):
        passes.optimize(biased, ["nop"])
    with pytest.raises(ModelError, match=r"must end in \.onnx"):
        optimize.optimize_path(biased, tmp_path / "folder", ["nop"])
    with pytest.raises(ModelError, match="is there already"):
        optimize.optimize_path(biased, biased, ["nop"])


def test_inputs_that_random_numbers_dont_fit_are_named(tmp_path: Path) -> None:
    def made(name: str, nodes: list[Any], *inputs: Any) -> Path:
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        graph = helper.make_graph(nodes, "graph", inputs, [output], [initializer("w", 4, 4)])
        opsets = [helper.make_opsetid("", 17)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / name)
        return tmp_path / name

    index = helper.make_tensor_value_info("i", TensorProto.INT64, [])
    several = helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, [4])
    nodes = [
        helper.make_node("SequenceAt", ["x", "i"], ["one"]),
        helper.make_node("Identity", ["one"], ["same"]),
        helper.make_node("Relu", ["same"], ["y"]),
    ]
    sequence = made("seq.onnx", nodes, several, index)
    with pytest.raises(ModelError, match="input x is no tensor"):
        passes.optimize(sequence, ["eliminate_identity"])
    nodes = [
        helper.make_node("Identity", ["x"], ["z"]),
        helper.make_node("MatMul", ["z", "w"], "y"),
    ]
    bare = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    with pytest.raises(ModelError, match="export it with a shape of the input x, which has none"):
        passes.optimize(made("bare.onnx", nodes, bare), ["eliminate_identity"])


def test_a_place_that_no_file_can_be_made_in_is_told(biased: Path) -> None:
    with pytest.raises(ModelError, match=r"'/proc/none/x\.onnx' can't be written"):
        optimize.optimize_path(biased, "/proc/none/x.onnx", ["eliminate_identity"])


def test_all_passes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimize", "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == passes.available()
    assert set(passes.REFUSED) <= set(passes.available())
    assert sum("refused" in line for line in listed) == len(passes.REFUSED)


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxoptimizer", None)
    with pytest.raises(ConfigError, match=r"ort_train\[inference\]"):
        passes.available()

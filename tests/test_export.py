"""Exported decoders compute what PyTorch's do, or aren't kept."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoders import FUSED, MAX_POSITIONS, TRACED, WINDOW, make_decoder, save_decoder
from tiny_runs import train_adapter
from transformers import AutoTokenizer

from ort_train.cli import main
from ort_train.errors import CheckpointError, ExportError
from ort_train.inference import export_model, load_folder
from ort_train.inference.decoder import fused, parity
from ort_train.inference.folder import DATA_FILE, INFO_FILE, MODEL_FILE, load_graph
from ort_train.inference.generation.session import DecoderSession

# fp32 sums in another order, on logits of some 1 to 10: seen is 1e-6.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_decoder(folder, "llama")
    return folder


@pytest.fixture(scope="module")
def exported_llama(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model(llama, tmp_path_factory.mktemp("exported") / "llama").path


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def torch_logits(model: Any, row: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor([row])).logits[0, -1].numpy()


def assert_decodes_as(model: Any, exported: Any) -> None:
    """Prompts of unequal lengths, then a step."""
    rows = [list(range(7, 7 + 3 * WINDOW)), [5, 9], [250]]
    decoding = DecoderSession(exported, num_threads=1).start(rows, 3 * WINDOW + 1)
    for row, logits in zip(rows, decoding.logits, strict=True):
        assert np.abs(torch_logits(model, row) - logits).max() < TOLERANCE
    decoding.step([3, 4, 5])
    for row, token, logits in zip(rows, [3, 4, 5], decoding.logits, strict=True):
        assert np.abs(torch_logits(model, [*row, token]) - logits).max() < TOLERANCE


@pytest.mark.parametrize("name", FUSED)
def test_fused_graph_has_pytorch_logits(name: str, tmp_path: Path) -> None:
    model_type, fields = FUSED[name]
    model = save_decoder(tmp_path / "model", model_type, **fields)
    exported = export_model(tmp_path / "model", tmp_path / "out")
    assert exported.info.kind == "fused"
    assert exported.info.parity is not None
    assert exported.info.parity.decode_steps == 32
    assert len(set(exported.info.parity.prompt_lengths)) == 3
    assert exported.info.parity.logits_max_abs < TOLERANCE
    # Once more, apart from the gate's own code.
    assert_decodes_as(model, exported)


@pytest.mark.parametrize("name", TRACED)
def test_traced_graph_has_pytorch_logits(name: str, tmp_path: Path) -> None:
    model_type, fields = TRACED[name]
    model = save_decoder(tmp_path / "model", model_type, **fields)
    said: list[str] = []
    exported = export_model(tmp_path / "model", tmp_path / "out", say=said.append)
    assert exported.info.kind == "traced"
    assert said[0].startswith("no fused graph: ")
    assert "runs slower" in said[0]
    assert_decodes_as(model, exported)
    graph = load_graph(exported.path).graph
    assert not any(node.op_type == "GroupQueryAttention" for node in graph.node)
    assert all(tensor.external_data or len(tensor.raw_data) < 1024 for tensor in graph.initializer)


def test_a_tied_embedding_is_written_once(tmp_path: Path) -> None:
    model = save_decoder(tmp_path / "model", "gpt2")
    exported = export_model(tmp_path / "model", tmp_path / "out", graph="traced")
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    padding = 4096 * len(load_graph(exported.path).graph.initializer)
    assert (exported.path / DATA_FILE).stat().st_size < 4 * num_weights + padding


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("mixtral", {"num_local_experts": 4}, "can't be traced: ONNX Runtime has no operator"),
        ("mamba", {"state_size": 4}, "cache that isn't keys and values"),
        ("bert", {}, "is a bert that reads both ways"),
    ],
)
def test_what_cant_be_exported_is_named(
    model_type: str,
    fields: dict[str, Any],
    message: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    save_decoder(tmp_path / "model", model_type, **fields)
    with pytest.raises(ExportError, match=message):
        export_model(tmp_path / "model", tmp_path / "out")
    assert left_over(tmp_path) == ["model"]
    assert "Torch IR" not in capfd.readouterr().out  # torch.onnx prints the whole trace


def test_tracing_leaves_torch_as_it_was(tmp_path: Path) -> None:
    from ort_train.ortmodule.export.exporter import symbolic_registry

    save_decoder(tmp_path / "model", "gpt2")

    def state() -> list[Any]:
        registry = symbolic_registry()
        groups = {name: registry.get_function_group(name) for name in registry.all_functions()}
        overrides = {name: dict(group._functions._overrides) for name, group in groups.items()}
        return [overrides, torch.Tensor.__bool__, torch.onnx.export, torch.is_grad_enabled()]

    before = state()
    export_model(tmp_path / "model", tmp_path / "out")
    assert state() == before


def test_windows_are_recorded(tmp_path: Path) -> None:
    save_decoder(tmp_path / "model", "qwen2", **FUSED["qwen2 windows"][1])
    said: list[str] = []
    exported = export_model(tmp_path / "model", tmp_path / "out", say=said.append)
    assert exported.info.sliding_windows == [None, WINDOW]
    assert "no genai_config.json: its sliding window is one token shorter" in said[0]
    assert not (exported.path / "genai_config.json").exists()


def test_a_window_that_the_model_doesnt_heed_is_none(tmp_path: Path) -> None:
    """A Llama made of a Mistral's weights may have kept it in its config."""
    window = 600  # longer than the gate's prompts
    model = save_decoder(
        tmp_path / "model", "llama", sliding_window=window, max_position_embeddings=1024
    )
    exported = export_model(tmp_path / "model", tmp_path / "out")
    assert exported.info.sliding_windows == [None, None]
    assert (exported.path / "genai_config.json").exists()
    row = torch.randint(0, 300, (window + 50,), generator=torch.Generator().manual_seed(0)).tolist()
    decoding = DecoderSession(exported, num_threads=1).start([row], len(row))
    assert np.abs(torch_logits(model, row) - decoding.logits[0]).max() < TOLERANCE


def test_a_window_that_is_off_by_one_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_decoder(tmp_path / "model", "mistral", sliding_window=WINDOW)
    right = fused.plan

    def wrong(config: Any) -> Any:
        made = right(config)
        made.windows[:] = [WINDOW + 1] * made.num_layers
        return made

    monkeypatch.setattr(fused, "plan", wrong)
    with pytest.raises(ExportError, match=r"differ from PyTorch's by .* no file is kept"):
        export_model(tmp_path / "model", tmp_path / "out")
    assert left_over(tmp_path) == ["model"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_wrong_epsilon_is_seen(
    precision: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    right = fused.plan
    monkeypatch.setattr(fused, "plan", lambda c: dataclasses.replace(right(c), eps=0.05))
    with pytest.raises(ExportError, match="no file is kept"):
        export_model(llama, tmp_path / "out", precision)
    assert left_over(tmp_path) == []


def test_a_logit_that_is_nan_is_refused(llama: Path, tmp_path: Path) -> None:
    expected = parity.reference(make_decoder("llama"), MAX_POSITIONS, [None])
    expected.logits[1][3, 5] = np.nan
    with pytest.raises(ExportError, match="by nan"):
        parity.check(export_model(llama, tmp_path / "out"), expected)


@pytest.mark.parametrize("name", ["llama", "phi", "gemma", "qwen3"])
def test_half_precision(name: str, tmp_path: Path) -> None:
    model_type, fields = FUSED[name]
    save_decoder(tmp_path / "model", model_type, **fields)
    exported = export_model(tmp_path / "model", tmp_path / "out", "fp16")
    whole = export_model(tmp_path / "model", tmp_path / "whole")
    assert exported.info.precision == "fp16"
    assert exported.info.cache_dtype == "float16"
    # Small weights have the same constants beside them.
    assert exported.num_bytes < 0.55 * whole.num_bytes
    assert exported.info.parity is not None
    assert whole.info.parity is not None
    assert exported.info.parity.logits_max_abs > whole.info.parity.logits_max_abs


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_precisions(precision: str, tmp_path: Path) -> None:
    make_decoder("llama", hidden_size=128).save_pretrained(tmp_path / "model")
    said: list[str] = []
    exported = export_model(tmp_path / "model", tmp_path / "out", precision, say=said.append)
    assert exported.info.precision == precision
    assert exported.info.kind == "fused"
    assert f"quantized to {precision}" in said[-1]
    assert "on random tokens" in said[-1]  # there is no tokenizer
    assert left_over(tmp_path) == ["model", "out"]
    operators = {node.op_type for node in load_graph(exported.path).graph.node}
    assert ("MatMulNBits" in operators) == (precision == "int4")


def test_weights_lie_in_the_data_file_once(tmp_path: Path) -> None:
    model = save_decoder(tmp_path / "model", "llama", tie_word_embeddings=True)
    exported = export_model(tmp_path / "model", tmp_path / "out")
    graph = load_graph(exported.path).graph
    assert all(tensor.external_data or len(tensor.raw_data) < 1024 for tensor in graph.initializer)
    tables = 2 * MAX_POSITIONS * 8 * 4  # cosines and sines
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    padding = 4096 * len(graph.initializer)
    size = (exported.path / DATA_FILE).stat().st_size
    assert weights <= size + 4096 * 2 <= weights + tables + padding + 4096 * 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sharded_weights_in_half_precision_are_exported_as_fp32(dtype: str, tmp_path: Path) -> None:
    model = make_decoder("llama").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    said: list[str] = []
    exported = export_model(tmp_path / "model", tmp_path / "out", say=said.append)
    assert exported.info.parity is not None
    assert exported.info.parity.logits_max_abs < TOLERANCE
    assert re.match("no tokenizer is exported, .*: it has no tokenizer's files$", said[0])
    with pytest.raises(ExportError, match="no tokenizer that can be loaded"):
        exported.load_tokenizer()


def test_a_tokenizer_that_transformers_makes_of_nothing_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of GPT-2, Qwen, Gemma and others it makes one that knows special tokens only."""
    make_decoder("qwen2").save_pretrained(tmp_path / "model")
    said: list[str] = []
    exported = export_model(tmp_path / "model", tmp_path / "out", say=said.append)
    assert "no tokenizer is exported" in said[0]
    assert not list(exported.path.glob("tokenizer*"))
    with pytest.raises(ExportError, match="it has no tokenizer's files"):
        exported.load_tokenizer()
    assert main(["generate", str(exported.path), "--prompt", "to be"]) == 2
    assert "pass token ids" in capsys.readouterr().err


def test_folder_is_complete(llama: Path, exported_llama: Path) -> None:
    assert left_over(exported_llama) == [
        "config.json",
        "genai_config.json",
        "generation_config.json",
        MODEL_FILE,
        DATA_FILE,
        INFO_FILE,
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    exported = load_folder(exported_llama)
    assert exported.load_config().model_type == "llama"
    assert len(exported.load_tokenizer()) == len(AutoTokenizer.from_pretrained(llama))
    genai = json.loads((exported_llama / "genai_config.json").read_text())
    decoder = genai["model"]["decoder"]
    assert decoder["head_size"] == 16
    assert set(decoder["inputs"]) == {
        "input_ids", "attention_mask", "past_key_names", "past_value_names",
    }  # fmt: skip
    assert genai["search"]["past_present_share_buffer"] is True
    assert genai["model"]["eos_token_id"] == 1


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_adapter(tmp_path_factory.mktemp("runs") / "lora")


def test_a_run_with_an_adapter_is_merged(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ort_train.merge import merge

    assert main(["export", str(lora_run), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "merged the adapter" in said
    assert "fused fp32 graph of llama" in said
    assert left_over(tmp_path) == ["out"]
    merge(lora_run, tmp_path / "merged")
    same = export_model(tmp_path / "merged", tmp_path / "same")
    assert (same.path / DATA_FILE).read_bytes() == (tmp_path / "out" / DATA_FILE).read_bytes()


def test_a_run_that_trained_the_whole_model(llama: Path, lora_run: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copyfile(lora_run / "config.yaml", tmp_path / "run" / "config.yaml")
    shutil.copytree(llama, tmp_path / "run" / "model")
    assert export_model(tmp_path / "run", tmp_path / "out").info.architecture == "llama"


def test_what_is_no_model_is_refused(llama: Path, lora_run: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out"
    with pytest.raises(ExportError, match="is no folder"):
        export_model(tmp_path / "nowhere", out)
    with pytest.raises(ExportError, match=r"neither a config\.yaml.* nor transformers' config"):
        export_model(empty, out)
    with pytest.raises(ExportError, match="an adapter without its base"):
        export_model(lora_run / "model", out)
    (empty / "config.json").write_text("{")
    with pytest.raises(ExportError, match="can't read the config"):
        export_model(empty, out)
    (empty / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ExportError, match="is a t5, which is no causal language model"):
        export_model(empty, out)
    (empty / "config.json").write_bytes((llama / "config.json").read_bytes())
    with pytest.raises(ExportError, match="can't load the model"):
        export_model(empty, out)
    assert not out.exists()


def test_an_exported_folder_is_named(exported_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is exported already: name the run, or the transf"):
        export_model(exported_llama, tmp_path / "out")


def test_quantized_weights_are_refused(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="quantized weights"):
        export_model(tmp_path / "model", tmp_path / "out")


def test_missing_weights_are_refused(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(llama, tmp_path / "model")
    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"lacks 1 .* \(model.layers.1.mlp.up_proj.weight"):
        export_model(tmp_path / "model", tmp_path / "out")


def test_nothing_is_overwritten(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="is not an empty folder"):
        export_model(llama, tmp_path)
    assert left_over(tmp_path) == ["mine.txt"]


def test_a_place_that_cant_be_is_found_before_work_starts(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    monkeypatch.setattr(parity, "reference", None)  # not come to
    with pytest.raises(ExportError, match=r"out' can't be made, as .*/file' is no folder"):
        export_model(llama, file / "below" / "out")
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == mounted)
    with pytest.raises(ExportError, match="is where a disk is mounted"):
        export_model(llama, mounted)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ExportError, match="nothing can be written into"):
        export_model(llama, tmp_path / "new" / "out")
    assert left_over(tmp_path) == ["file", "mounted"]


def test_a_link_is_followed(llama: Path, tmp_path: Path) -> None:
    """What it stands for may lie on another disk."""
    for name in ("empty", "missing"):
        disk = tmp_path / f"disk of {name}"
        disk.mkdir()
        if name == "empty":
            (disk / "target").mkdir()
        link = tmp_path / name
        link.symlink_to(disk / "target")
        assert export_model(llama, link).path == disk / "target"
        assert link.is_symlink()
        assert left_over(disk) == ["target"]
    assert left_over(tmp_path) == ["disk of empty", "disk of missing", "empty", "missing"]


def test_a_disk_that_fills_up_is_told(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parity, "measure", full)
    with pytest.raises(ExportError, match=r"nothing of it is kept: .*No space left on device"):
        export_model(llama, tmp_path / "out")
    assert left_over(tmp_path) == []


def test_a_full_disk_is_found_before_anything_is_written(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="the exported model needs"):
        export_model(llama, tmp_path / "out")
    assert left_over(tmp_path) == []
    # Half precision on the disk is fp32 in the graph.
    make_decoder("llama").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    stored = sum(file.stat().st_size for file in (tmp_path / "half").glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=stored * 3 // 2))
    with pytest.raises(CheckpointError, match="the exported model needs"):
        export_model(tmp_path / "half", tmp_path / "out")


def test_an_interrupted_export_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(parity, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_model(llama, tmp_path / "out")
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"head_dim": 24}, "its head_dim 24 is no multiple of 16"),
        (
            {"head_dim": 48, "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4,
             "short_factor": [1.0] * 24, "long_factor": [2.0] * 24,
             "original_max_position_embeddings": 64, "factor": 2.0}},
            "'longrope' changes with the length",
        ),
        ({"hidden_act": "tanh"}, "its activation 'tanh' is none of"),
        ({"sliding_window": 1}, "its window is a single key"),
    ],
)  # fmt: skip
def test_what_has_no_fused_graph_is_said(
    fields: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    save_decoder(tmp_path / "model", "mistral", **fields)
    with pytest.raises(ExportError, match=rf"has no fused graph: .*{reason}.*--graph traced"):
        export_model(tmp_path / "model", tmp_path / "out", graph="fused")
    with pytest.raises(ExportError, match=rf"fp32 only.* as .*{reason}.*leave out --precision"):
        export_model(tmp_path / "model", tmp_path / "out", "fp16")
    assert left_over(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("kind", "graph", "way"),
    [("longrope", "auto", "no fused graph: its rotary"), ("dynamic", "traced", "--graph fused")],
)
def test_a_rotary_embedding_that_cant_be_traced_is_named(
    kind: str, graph: str, way: str, tmp_path: Path
) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **factors}
    make_decoder(
        "llama", rope_parameters={**rope, "original_max_position_embeddings": 64}
    ).save_pretrained(tmp_path / "model")
    with pytest.raises(ExportError, match=rf"can't trace this llama, as .*'{kind}' changes.*{way}"):
        export_model(tmp_path / "model", tmp_path / "out", graph=graph)
    assert left_over(tmp_path) == ["model"]


def test_a_model_that_computes_in_bfloat16_is_named(tmp_path: Path) -> None:
    """Falcon's ALiBi, which its own code rounds."""
    save_decoder(tmp_path / "model", "falcon", alibi=True, num_key_value_heads=None)
    with pytest.raises(ExportError, match="this falcon can't be traced: it computes in bfloat16"):
        export_model(tmp_path / "model", tmp_path / "out")
    assert left_over(tmp_path) == ["model"]


def test_operators_of_torch_are_named(tmp_path: Path) -> None:
    save_decoder(tmp_path / "model", "mixtral", num_local_experts=4)
    with pytest.raises(ExportError, match=r"for .*\(the products of a mixture of exp") as caught:
        export_model(tmp_path / "model", tmp_path / "out")
    assert "aten::cumsum" in str(caught.value)
    assert "ATen" not in str(caught.value)
    assert "{" not in str(caught.value)


@pytest.mark.parametrize("activation", ["hardswish", "mish", "prelu"])
def test_operators_without_a_gradient_are_exported(activation: str, tmp_path: Path) -> None:
    """A training graph leaves them to torch; here ONNX Runtime runs them."""
    model = save_decoder(tmp_path / "model", "llama", hidden_act=activation)
    assert_decodes_as(model, export_model(tmp_path / "model", tmp_path / "out"))


def test_a_window_shorter_than_what_is_traced(tmp_path: Path) -> None:
    """The model's own cache forgets, that of the graph doesn't."""
    model_type, fields = TRACED["gemma2"]
    model = save_decoder(tmp_path / "model", model_type, **{**fields, "sliding_window": 3})
    exported = export_model(tmp_path / "model", tmp_path / "out")
    assert exported.info.sliding_windows == [3, None]
    assert_decodes_as(model, exported)


def test_a_forward_that_detaches_is_exported(tmp_path: Path) -> None:
    """There is nothing to stop a gradient of."""
    from transformers import XGLMConfig, XGLMForCausalLM

    torch.manual_seed(0)
    config = XGLMConfig(
        d_model=32, ffn_dim=64, num_layers=2, attention_heads=4, vocab_size=300,
        max_position_embeddings=MAX_POSITIONS,
    )  # fmt: skip
    model = XGLMForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    assert_decodes_as(model, export_model(tmp_path / "model", tmp_path / "out"))


def test_positions_end_where_alibi_does(tmp_path: Path) -> None:
    from transformers import MptConfig, MptForCausalLM

    torch.manual_seed(0)
    config = MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=48, vocab_size=300)
    model = MptForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    exported = export_model(tmp_path / "model", tmp_path / "out")
    assert exported.info.max_positions == 48
    assert_decodes_as(model, exported)


def test_windows_of_local_layers_alone_are_recorded(tmp_path: Path) -> None:
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=WINDOW, vocab_size=300, max_position_embeddings=MAX_POSITIONS,
    )  # fmt: skip
    GPTNeoForCausalLM(config).save_pretrained(tmp_path / "model")
    exported = export_model(tmp_path / "model", tmp_path / "out")
    assert exported.info.sliding_windows == [None, WINDOW]


def test_a_model_that_transformers_cant_run_is_named(llama: Path, tmp_path: Path) -> None:
    model = make_decoder("qwen2", use_sliding_window=True, sliding_window=WINDOW)
    model.config.layer_types = ["sliding_attention", "full_attention"]
    model.config.use_sliding_window, model.config.sliding_window = False, None
    model.config.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ExportError, match="this qwen2 doesn't run in PyTorch itself: "):
        export_model(tmp_path / "model", tmp_path / "out")
    assert left_over(tmp_path) == ["model"]


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_generation_config_is_refused(content: str, llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(content)
    with pytest.raises(ExportError, match=r"generation_config.json' can't be read \(.*mend it"):
        export_model(tmp_path / "model", tmp_path / "out")
    assert left_over(tmp_path) == ["model"]


def test_of_two_exports_into_one_place_the_first_is_kept(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, out = parity.check, tmp_path / "out"

    def overtaken(*args: Any) -> Any:
        monkeypatch.setattr(parity, "check", right)
        export_model(llama, out, "fp16")
        return right(*args)

    monkeypatch.setattr(parity, "check", overtaken)
    with pytest.raises(ExportError, match="another process has written there meanwhile"):
        export_model(llama, out)
    assert load_folder(out).info.precision == "fp16"
    assert left_over(tmp_path) == ["out"]


def test_a_place_that_no_folder_can_be_made_in_is_told(llama: Path) -> None:
    with pytest.raises(ExportError, match="isn't written, and nothing of it is kept"):
        export_model(llama, "/proc/none/out", "int4")


def test_unknown_choices_are_named(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="precision 'int3' should be one of fp32, fp16, int8"):
        export_model(llama, tmp_path / "out", "int3")
    with pytest.raises(ExportError, match="graph 'best' should be one of auto, fused, traced"):
        export_model(llama, tmp_path / "out", graph="best")


def test_a_damaged_folder_is_refused(exported_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"is no exported model, as it has no {MODEL_FILE}"):
        load_folder(tmp_path)

    def damaged(name: str) -> Path:
        folder = tmp_path / name.replace(" ", "-")
        return Path(shutil.copytree(exported_llama, folder))

    folder = damaged("cut off data")
    data = folder / DATA_FILE
    with data.open("r+b") as file:
        file.truncate(data.stat().st_size - 1)
    with pytest.raises(ExportError, match=rf"{DATA_FILE}' is cut off: it has \d+ bytes"):
        load_folder(folder)
    data.unlink()
    with pytest.raises(ExportError, match=f"has no {DATA_FILE}"):
        load_folder(folder)
    folder = damaged("cut off graph")
    graph = (folder / MODEL_FILE).read_bytes()
    for half in (graph[: len(graph) // 2], b"", b"no graph"):
        (folder / MODEL_FILE).write_bytes(half)
        with pytest.raises(ExportError, match=f"{MODEL_FILE}' is damaged"):
            load_folder(folder)
    folder = damaged("description")
    info = json.loads((folder / INFO_FILE).read_text())
    for content, message in (
        ("{", "can't be read"),
        ("[]", "has schema 'list'"),
        (json.dumps(info | {"schema": 2}), "has schema 2, this version reads 1"),
        (json.dumps(info | {"num_layers": "many"}), "num_layers"),
        (json.dumps(info | {"inputs": ["ids"]}), "differ in the inputs"),
    ):
        (folder / INFO_FILE).write_text(content)
        with pytest.raises(ExportError, match=message):
            load_folder(folder)


def test_errors_of_the_command_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("ort-train: ")

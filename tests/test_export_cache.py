"""Built graphs on disk: a second start computes bit for bit what the first did, without an export.

Where a second start is meant, `torch.onnx.export` raises, so nothing can have been exported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import subprocess
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import padded_batch as batch
from trained_graphs import engines, forward_of, manager_of

from ort_train import OrtOptions, wrap
from ort_train.errors import UnsupportedModelError
from ort_train.ortmodule import upstream
from ort_train.ortmodule.cache import cached_graph, export_cache, trace_key
from ort_train.ortmodule.cache.described import UndescribableError
from ort_train.ortmodule.call import describe_call
from ort_train.ortmodule.kernels.onednn import has_bf16

MakeModel = Callable[..., Any]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ORT_TRAIN_GRAPH_CACHE", str(tmp_path / "graphs"))


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to have every later export raise."""

    def refuse() -> None:
        def export(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("exported")

        monkeypatch.setattr(torch.onnx, "export", export)

    return refuse


def entries() -> list[Path]:
    folder = export_cache.folder()
    return sorted(path for path in folder.glob("*") if path.is_dir()) if folder.is_dir() else []


def steps(module: Any, inputs: list[Any], seed: int = 0) -> list[torch.Tensor]:
    """Losses and gradients of steps, in order."""
    torch.manual_seed(seed)
    results = []
    for each in inputs:
        module.zero_grad()
        loss = module(**each)["loss"]
        loss.backward()
        results.append(loss.detach().clone())
        results += [p.grad.clone() for p in module.parameters() if p.grad is not None]
    return results


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) > 1
    assert all(map(torch.equal, found, expected))


def saved_s(module: Any) -> float | None:
    (engine,) = engines(module)
    return engine.saved_s


# --- exact results of a second start


def _lora(make: MakeModel, **fields: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    model = make(**fields)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    return get_peft_model(model, config)


def _qlora(make: MakeModel) -> Any:
    import bitsandbytes

    model = make(hidden_size=128, intermediate_size=128)
    for part in list(model.modules()):
        for name, child in list(part.named_children()):
            if name.endswith("_proj"):
                layer = bitsandbytes.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=False,
                    compute_dtype=torch.float32,
                    quant_type="nf4",
                )
                layer.load_state_dict(child.state_dict())
                setattr(part, name, layer.to("cpu"))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    model.lm_head.weight.requires_grad_(True)
    return model


def _mixture(make: MakeModel) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
        )
    )  # fmt: skip


def _dropout(make: MakeModel) -> Any:
    return make(attention_dropout=0.2, attn_implementation="eager")


_KINDS: dict[str, tuple[Callable[[MakeModel], Any], dict[str, Any], str]] = {
    "full": (lambda make: make(), {}, "fp32"),
    "lora": (_lora, {}, "fp32"),
    "qlora": (_qlora, {}, "fp32"),
    "bf16": (lambda make: make(), {}, "bf16"),
    "sparsity": (lambda make: make(), {"label_sparsity": True, "padding_sparsity": True}, "fp32"),
    "dropout": (_dropout, {}, "fp32"),
    "recompute": (lambda make: make(), {"recompute": "layerwise"}, "fp32"),
    "experts": (_mixture, {}, "fp32"),
}


@pytest.mark.parametrize("kind", _KINDS)
def test_second_start_is_exact(
    kind: str,
    tiny_llama: MakeModel,
    no_export: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
):
    make, fields, precision = _KINDS[kind]
    if precision == "bf16" and not has_bf16():
        pytest.skip("this CPU doesn't multiply in bf16: products are emulated, slowly")
    inputs = [batch(), batch(3, 9, seed=1)]

    def started() -> Any:
        return wrap(make(tiny_llama), "ort", precision, OrtOptions(**fields)).train()

    def run(module: Any) -> list[torch.Tensor]:
        return steps(module, inputs)

    uncached = wrap(
        make(tiny_llama), "ort", precision, OrtOptions(export_cache=False, **fields)
    ).train()
    expected = run(uncached)
    assert not entries()
    first = started()
    assert_equal(run(first), expected)
    assert saved_s(first) is None
    assert len(entries()) == 1

    no_export()
    caplog.set_level(logging.INFO, "ort_train")
    second = started()
    assert_equal(run(second), expected)
    assert saved_s(second) is not None
    assert "from the cache, which saves" in caplog.text
    output = second(**inputs[0])
    assert type(output) is type(uncached(**inputs[0]))
    savings = [forward_of(module).savings for module in (second, uncached)]
    assert savings[0] == savings[1]
    if kind == "sparsity":
        assert savings[0].flops_per_padding > 0
        # Read logits come from a second graph, which isn't in the cache.
        with pytest.raises(UnsupportedModelError, match="exported"):
            output.logits.sum()


def test_dropout_resumes_with_a_cached_graph(tiny_llama: MakeModel, no_export: Callable[[], None]):
    inputs = [batch(seed=n) for n in range(4)]
    whole = wrap(_dropout(tiny_llama), "ort").train()
    expected = steps(whole, inputs)
    no_export()
    resumed = wrap(_dropout(tiny_llama), "ort").train()
    first = steps(resumed, inputs[:2])
    state = torch.get_rng_state()
    again = wrap(_dropout(tiny_llama), "ort").train()
    torch.manual_seed(99)
    second = []
    torch.set_rng_state(state)
    for each in inputs[2:]:
        again.zero_grad()
        loss = again(**each)["loss"]
        loss.backward()
        second.append(loss.detach())
        second += [p.grad.clone() for p in again.parameters() if p.grad is not None]
    assert_equal(first + second, expected)


_PROGRAM = """
import hashlib, logging, sys, torch
logging.basicConfig(level=logging.INFO)
from transformers import LlamaConfig, LlamaForCausalLM
from ort_train import wrap

if "refuse" in sys.argv:
    def export(*args, **kwargs):
        raise AssertionError("exported")
    torch.onnx.export = export
torch.manual_seed(0)
config = LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                     num_attention_heads=4, num_key_value_heads=2)
model = wrap(LlamaForCausalLM(config).train(), backend="ort")
ids = torch.randint(300, (2, 12))
loss = model(input_ids=ids, labels=ids).loss
loss.backward()
digest = hashlib.sha256(loss.detach().numpy())
for parameter in model.parameters():
    digest.update(parameter.grad.numpy())
print(digest.hexdigest())
"""


def test_processes_at_once_and_after(tmp_path: Path):
    """Of two that start together one builds, and the other waits; a third exports nothing."""
    file = tmp_path / "program.py"
    file.write_text(_PROGRAM)

    def start(*arguments: str) -> Any:
        return subprocess.Popen(
            [sys.executable, str(file), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    together = [process.communicate(timeout=300) for process in (start(), start())]
    later = start("refuse").communicate(timeout=300)
    outputs = [output.strip() for output, _ in (*together, later)]
    assert len(outputs[0]) == 64, together
    assert set(outputs) == {outputs[0]}, later[1]
    logs = "".join(log for _, log in together)
    assert logs.count("built a training graph") == 1
    assert logs.count("from the cache") == 1
    assert len(entries()) == 1


# --- the key


class _Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0
        self.table = {"bias": [1, 2]}
        self.linear = torch.nn.Linear(4, 4)
        self.register_buffer("mask", torch.ones(4), persistent=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": _loss(self.linear(x) * self.scale * self.mask + self.table["bias"][0])}


def _loss(x: torch.Tensor) -> torch.Tensor:
    return x.square().sum()


def _other_loss(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean()


def key(
    module: torch.nn.Module,
    options: OrtOptions | None = None,
    precision: str = "fp32",
    x: torch.Tensor | None = None,
) -> str:
    schema, tensors = describe_call((torch.zeros(2, 4) if x is None else x,), {})
    return trace_key.key_of(
        module, module.forward, schema, tensors, options or OrtOptions(), precision
    )


def test_key_of_equal_modules_is_equal():
    base = _Scaled()
    with torch.no_grad():
        base.linear.weight.zero_()  # values of parameters are inputs
    assert key(_Scaled()) == key(base)
    run_options = OrtOptions(num_threads=1, max_graphs=3, export_cache=False)
    assert key(_Scaled(), run_options) == key(_Scaled())


def _frozen(module: _Scaled) -> None:
    module.linear.weight.requires_grad_(False)


def _tied(module: _Scaled) -> None:
    module.other = module.linear


def _changed_entry(module: _Scaled) -> None:
    module.table["bias"][1] = 3


def _own_forward(module: _Scaled) -> None:
    module.linear.forward = lambda x: x  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.double(),
        _frozen,
        lambda module: setattr(module, "scale", 3.0),
        lambda module: setattr(module, "scale", 2),  # equal, and of another type
        _changed_entry,
        lambda module: module.mask.fill_(2.0),
        lambda module: module.register_buffer("mask", torch.ones(4), persistent=True),
        lambda module: module.linear.eval(),
        lambda module: setattr(module, "linear", torch.nn.Linear(4, 4, bias=False)),
        lambda module: setattr(module, "linear", torch.nn.Linear(4, 5)),
        _tied,
        _own_forward,
    ],
)
def test_what_a_module_is_changes_the_key(change: Callable[[_Scaled], Any]):
    module = _Scaled()
    change(module)
    assert key(module) != key(_Scaled())


def _environments() -> dict[str, Callable[[pytest.MonkeyPatch], Any]]:
    version = importlib.metadata.version

    def newer(name: str) -> Callable[[pytest.MonkeyPatch], Any]:
        def other(distribution: str) -> str:
            return "9.9.9" if distribution == name else version(distribution)

        return lambda patch: patch.setattr(importlib.metadata, "version", other)

    return {
        **{name: newer(name) for name in ("onnx", "transformers", "peft", "bitsandbytes")},
        "onnxruntime": newer("onnxruntime-training"),
        "torch": lambda patch: patch.setattr(torch, "__version__", "9.9.9"),
        "python": lambda patch: patch.setattr(sys, "version", "9.9.9"),
        "own source": lambda patch: patch.setattr(trace_key, "_source_digest", lambda: "other"),
        "processor": lambda patch: patch.setattr(trace_key, "_processor", lambda: "other"),
        "own function": lambda patch: patch.setitem(globals(), "_loss", _other_loss),
        "own method": lambda patch: patch.setattr(_Scaled, "extra_repr", lambda self: "x"),
        "torch's method": lambda patch: patch.setattr(torch.nn.Linear, "forward", _other_loss),
    }


@pytest.mark.parametrize("name", _environments())
def test_versions_and_code_change_the_key(name: str, monkeypatch: pytest.MonkeyPatch):
    before = key(_Scaled())
    _environments()[name](monkeypatch)
    assert key(_Scaled()) != before


def test_call_options_and_switches_change_the_key():
    keys = [
        key(_Scaled()),
        key(_Scaled(), precision="bf16"),
        key(_Scaled(), x=torch.zeros(3, 4)),
        key(_Scaled(), x=torch.zeros(2, 4, requires_grad=True)),
        key(_Scaled(), x=torch.zeros(2, 4, dtype=torch.float64)),
        key(_Scaled(), x=torch.zeros(2, 2, 4)),
        *(
            key(_Scaled(), OrtOptions(**{name: value}))
            for name, value in {
                "label_sparsity": True,
                "padding_sparsity": True,
                "recompute": "layerwise",
                "products": "onnxruntime",
                "compute_optimizer": False,
            }.items()
        ),
    ]
    torch.use_deterministic_algorithms(True)
    try:
        keys.append(key(_Scaled()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(set(keys)) == len(keys)


def test_source_of_a_users_module_changes_the_key():
    def module(source: str) -> torch.nn.Module:
        scope = types.ModuleType("users_own")
        sys.modules["users_own"] = scope
        try:
            exec(source, scope.__dict__)
        finally:
            del sys.modules["users_own"]
        return scope.Own()

    source = """
import torch
FACTOR = 2
class Own(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.silu(x) * FACTOR
"""
    keys = {
        key(module(source)),
        key(module("\n\n" + source)),  # a place in a file isn't part of it
        key(module(source.replace("FACTOR = 2", "FACTOR = 3"))),
        key(module(source.replace("silu", "gelu"))),
    }
    assert len(keys) == 3


def test_config_and_functions_of_transformers_change_the_key(
    tiny_llama: MakeModel, monkeypatch: pytest.MonkeyPatch
):
    from transformers.models.llama import modeling_llama

    inputs = batch()
    adapted = _lora(tiny_llama)  # peft's import is seen by transformers, and by the key

    def of(model: Any) -> str:
        schema, tensors = describe_call((), inputs)
        return trace_key.key_of(model, model.forward, schema, tensors, OrtOptions(), "fp32")

    keys = [
        of(tiny_llama()),
        of(tiny_llama(rms_norm_eps=1e-5)),
        of(tiny_llama(attn_implementation="eager")),
        of(adapted),
    ]
    assert of(tiny_llama(seed=3)) == keys[0]
    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama, "rotate_half", lambda x: x)
        keys.append(of(tiny_llama()))
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", _other_loss)
        keys.append(of(tiny_llama()))
    assert len(set(keys)) == len(keys)
    assert of(tiny_llama()) == keys[0]


_LOCK = threading.Lock()


class _Opaque(_Scaled):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        with _LOCK:
            return super().forward(x)


class _Random(_Scaled):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": super().forward(x)["loss"] * time.time()}


def _hooked() -> _Scaled:
    module = _Scaled()
    module.linear.register_forward_hook(lambda part, args, output: output * 2)
    return module


def _holding(value: Any) -> _Scaled:
    module = _Scaled()
    module.held = value
    return module


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (_hooked, {}, "'linear' has a hook on its forward"),
        (lambda: _holding(iter([1])), {}, "held is a builtins.list_iterator"),
        (lambda: _holding(torch.Generator()), {}, "held is a torch._C.Generator"),
        (_Opaque, {}, "global '_LOCK' is a _thread.lock"),
        (_Random, {}, "Python's time, whose results differ from run to run"),
        (_Scaled, {"compiled_extensions": True}, "option compiled_extensions registers"),
    ],
)
def test_what_cannot_be_told_has_no_key(
    make: Callable[[], _Scaled], options: dict[str, Any], reason: str
):
    with pytest.raises(UndescribableError, match=reason):
        key(make(), OrtOptions(**options))


def test_modules_with_hooks_train_uncached(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "ort_train")
    module = wrap(_hooked(), "ort").train()
    module(torch.ones(2, 4))["loss"].backward()
    assert "isn't cached: 'linear' has a hook" in caplog.text
    assert not entries()


# --- entries


@pytest.fixture
def cached(no_export: Callable[[], None]) -> tuple[Path, Callable[[], torch.Tensor]]:
    """The folder of an entry, and what trains by it or builds it anew; returns the loss."""

    def train() -> torch.Tensor:
        torch.manual_seed(0)
        module = wrap(_Scaled(), "ort").train()
        loss = module(torch.ones(2, 4))["loss"]
        loss.backward()
        return loss.detach()

    expected = train()
    (folder,) = entries()

    def trained() -> torch.Tensor:
        loss = train()
        assert torch.equal(loss, expected)
        return loss

    return folder, trained


def test_a_build_leaves_nothing_but_the_session_that_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upstream.load()
    training_manager = importlib.import_module("onnxruntime.training.ortmodule._training_manager")
    create = training_manager.TrainingAgent
    sessions: list[Any] = []

    def create_alone(*args: Any) -> Any:
        assert [session() for session in sessions] == [None] * len(sessions)
        session = create(*args)
        sessions.append(weakref.ref(session))
        return session

    monkeypatch.setattr(training_manager, "TrainingAgent", create_alone)
    module = wrap(_Scaled(), "ort").train()
    for _ in range(2):
        module(torch.ones(2, 4))["loss"].backward()
    assert len(sessions) == 2  # one that optimizes the graph for the cache, one that runs it
    manager = manager_of(module)
    assert manager._graph_builder is None
    assert manager._graph_transition_manager._exported_model_info.exported_model is None


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: _flip(folder / "graph.onnx"),
        lambda folder: _flip(folder / "facts.json"),
        lambda folder: (folder / "graph.onnx").write_bytes(
            (folder / "graph.onnx").read_bytes()[:100]
        ),
        lambda folder: (folder / "facts.json").write_text("{}"),
        lambda folder: (folder / "sha256").unlink(),
    ],
)
def test_damaged_entries_are_built_anew(
    cached: Any, damage: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
):
    folder, train = cached
    damage(folder)
    train()
    assert "is damaged" in caplog.text
    assert "built anew" in caplog.text
    caplog.clear()
    assert export_cache.load(folder.name) is not None
    train()
    assert not caplog.text


def test_entry_that_is_whole_but_of_another_form_is_built_anew(
    cached: Any, caplog: pytest.LogCaptureFixture
):
    folder, train = cached
    entry = export_cache.load(folder.name)
    assert entry is not None
    export_cache.store(folder.name, export_cache.Entry(entry.graph, {"inputs": []}))
    train()
    assert "can't be read" in caplog.text
    assert cached_graph.read(folder.name) is not None


def test_entries_used_longest_ago_are_removed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export_cache, "MAX_BYTES", 3500)
    for name in "abc":
        with export_cache.locked(name) as is_usable:
            assert is_usable
            export_cache.store(name, export_cache.Entry(bytes(1000), {}))
        times = export_cache.folder() / name
        os.utime(times, (ord(name), ord(name)))
    assert export_cache.load("a") is not None  # is now the one used last
    export_cache.store("d", export_cache.Entry(bytes(1000), {}))
    assert [path.name for path in entries()] == ["a", "c", "d"]


def test_large_constants_are_not_cached(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export_cache, "MAX_ENTRY_BYTES", 10)
    with export_cache.locked("a"):
        export_cache.store("a", export_cache.Entry(bytes(11), {}))
    assert not entries()


def test_unusable_folder_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ORT_TRAIN_GRAPH_CACHE", str(tmp_path / "file"))
    module = wrap(_Scaled(), "ort").train()
    module(torch.ones(2, 4))["loss"].backward()
    assert "aren't cached" in caplog.text
    assert module.linear.weight.grad is not None


def test_build_of_another_process_is_waited_for_so_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(export_cache, "WAIT_S", 0.1)
    with export_cache.locked("a"), export_cache.locked("a") as is_usable:
        assert not is_usable
    assert "not waited for" in caplog.text


def test_environment_turns_it_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("ORT_TRAIN_GRAPH_CACHE", "off")
    wrap(_Scaled(), "ort").train()(torch.ones(2, 4))["loss"].backward()
    monkeypatch.setenv("ORT_TRAIN_GRAPH_CACHE", str(tmp_path / "graphs"))
    assert not entries()


def test_bench_measures_without_earlier_graphs(tmp_path: Path):
    from ort_train.bench.process import Worker

    program = "import json, os; print(json.dumps({'is': os.environ['ORT_TRAIN_GRAPH_CACHE']}))"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    worker = Worker(scratch, 60, [sys.executable, "-c", program])
    try:
        assert worker.request("start") == {"is": str(scratch / "graphs")}
    finally:
        worker.kill()


class _Counting(_Scaled):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.scale += 1.0
        return super().forward(x)


def test_forward_that_writes_attributes_is_not_cached(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "ort_train")
    wrap(_Counting(), "ort").train()(torch.ones(2, 4))["loss"].backward()
    assert "its forward writes attribute 'scale'" in caplog.text
    assert not entries()


class _Unreadable:
    def __getattribute__(self, name: str) -> Any:
        if name == "__dict__":
            raise RuntimeError(name)
        return super().__getattribute__(name)


def test_objects_that_fail_when_looked_at_train_uncached(caplog: pytest.LogCaptureFixture):
    module = wrap(_holding(_Unreadable()), "ort").train()
    module(torch.ones(2, 4))["loss"].backward()
    assert "isn't cached: RuntimeError" in caplog.text
    assert not entries()

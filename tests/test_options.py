"""OrtOptions: checked at once, passed to upstream, gone from the environment afterwards."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from trained_graphs import manager_of

from ort_train import OrtOptions, wrap
from ort_train.errors import ConfigError
from ort_train.ortmodule import options as options_module
from ort_train.ortmodule.options import parse_options

DOCUMENT = (Path(__file__).parents[1] / "docs" / "options.md").read_text(encoding="utf-8")


def built(options: OrtOptions, module: torch.nn.Module | None = None) -> Any:
    """Upstream's training manager of a small module after its first step."""
    module = module or torch.nn.Linear(3, 2)
    wrap(module, backend="ort", options=options)
    module(torch.ones(2, 3)).sum().backward()
    return manager_of(module)


# --- checks ---


def test_all_problems_at_once():
    with pytest.raises(ConfigError) as caught:
        OrtOptions(
            num_threads=0,
            max_graphs=True,
            recompute="all",  # type: ignore[arg-type]
            log_level="loud",  # type: ignore[arg-type]
            compute_optimizer="no",  # type: ignore[arg-type]
            allow_spinning=3,  # type: ignore[arg-type]
            onnx_opset_version=18,
            recompute_config="nowhere.json",
            triton_config=5,  # type: ignore[arg-type]
            mem_efficient_grad_management=True,
            padding_sparsity=1,  # type: ignore[arg-type]
            max_tuning_duration_ms=10,
        )
    problems = "\n".join(caught.value.problems)
    for expected in (
        "num_threads=0 must be an integer of at least 1",
        "max_graphs=True must be an integer",
        "recompute='all' is not one of none, layerwise",
        "log_level='loud' is not one of",
        "compute_optimizer='no' must be true or false",
        "allow_spinning=3 must be true or false",
        "onnx_opset_version=18",
        "recompute_config='nowhere.json' is not a file",
        "triton_config=5 must be a string",
        "mem_efficient_grad_management inserts a torch.autograd.Function",
        "padding_sparsity=1 must be true or false",
        "max_tuning_duration_ms is given but tuning is off",
    ):
        assert expected in problems


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"save_onnx": True, "save_onnx_path": "/nonexistent"}, "not a writable folder"),
        ({"save_onnx": True, "onnx_prefix": ""}, "onnx_prefix is empty"),
        ({"save_onnx_path": "x"}, "save_onnx_path is given but save_onnx is off"),
        ({"tuning_results_path": "x"}, "tuning_results_path is given but tuning is off"),
        ({"triton_debug": True}, "triton_debug is given but fusion is 'none'"),
        ({"mem_efficient_grad_management": True}, "needs ORTModule's compiled extensions"),
        ({"allow_autograd_checkpoint": True}, "needs ORTModule's compiled extensions"),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], match: str):
    with pytest.raises(ConfigError, match=match):
        OrtOptions(**values)


def test_recompute_excludes_its_config(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text("[]")
    with pytest.raises(ConfigError, match="exclude each other"):
        OrtOptions(recompute="layerwise", recompute_config=str(file))


def test_parse_names_near_options_and_keeps_the_other_problems():
    with pytest.raises(ConfigError) as caught:
        parse_options({"num_thread": 2, "recompute": "no", "zzz": 1})
    assert len(caught.value.problems) == 3
    assert "did you mean num_threads" in caught.value.problems[0]
    assert "unknown option 'zzz' of backend ort" in caught.value.problems[1]
    assert "did you mean" not in caught.value.problems[1]
    assert parse_options({"num_threads": 2}) == OrtOptions(num_threads=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fusion", "triton"),
        ("tuning", True),
        ("print_memory_stats", True),
        ("conv_algo_search", "exhaustive"),
    ],
)
def test_options_for_cuda_only_are_refused_on_cpu(name: str, value: Any):
    options = OrtOptions(**{name: value}, compiled_extensions=True)
    (problem,) = options.device_problems("cpu")
    assert problem.startswith(f"{name}={value!r} works on CUDA devices only")
    assert options.device_problems("cuda") == []


def test_options_for_cpus_only_are_refused_on_cuda():
    options = OrtOptions(attention="torch", products="onednn")
    assert options.device_problems("cpu") == []
    problems = options.device_problems("cuda")
    assert [problem.split(" ")[0] for problem in problems] == [
        "products='onednn'",
        "attention='torch'",
    ]


# --- the environment ---


def test_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ORTMODULE_MEMORY_OPT_LEVEL", "2")
    monkeypatch.setattr(options_module, "_warned_of", {"ORTMODULE_MEMORY_OPT_LEVEL"})
    before = dict(os.environ)
    built(OrtOptions(compute_optimizer=False))
    assert dict(os.environ) == before
    with OrtOptions().environment():
        assert os.environ["ORTMODULE_MEMORY_OPT_LEVEL"] == "0"
        os.environ["ORTMODULE_SET_BY_UPSTREAM"] = "1"
    assert dict(os.environ) == before


def test_environment_after_a_failed_export(monkeypatch: pytest.MonkeyPatch):
    class Bad(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise FloatingPointError("inside forward")

    before = dict(os.environ)
    module = wrap(Bad(3, 2), backend="ort")
    with pytest.raises(Exception, match="inside forward"):
        module(torch.ones(1, 3))
    assert dict(os.environ) == before


def test_upstreams_variables_are_not_used_and_named_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(options_module, "_warned_of", set())
    monkeypatch.setenv("ORTMODULE_ENABLE_COMPUTE_OPTIMIZER", "0")
    monkeypatch.setenv("ORTMODULE_MEMORY_OPT_LEVEL", "1")
    with pytest.warns(
        UserWarning, match="ORTMODULE_ENABLE_COMPUTE_OPTIMIZER, ORTMODULE_MEMORY_OPT_LEVEL"
    ):
        manager = built(OrtOptions())
    assert manager._runtime_options.enable_compute_optimizer is True
    assert manager._runtime_options.memory_optimization_level == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        built(OrtOptions())


# --- what reaches upstream ---


@pytest.mark.parametrize(
    ("values", "attribute", "expected"),
    [
        ({}, "enable_compute_optimizer", True),
        ({"compute_optimizer": False}, "enable_compute_optimizer", False),
        ({}, "enable_label_sparse_optimizer", False),
        ({}, "enable_embedding_sparse_optimizer", False),
        ({"recompute": "layerwise"}, "memory_optimization_level", 1),
        ({"recompute": "layerwise_compromised"}, "memory_optimization_level", 2),
        ({"recompute": "layerwise"}, "recompute_probe_config", "1:1"),
        ({"conv_algo_search": "exhaustive"}, "conv_algo_search", "EXHAUSTIVE"),
        ({"print_memory_stats": True}, "print_memory_stat_by_step", True),
        ({}, "deepcopy_before_model_export", False),
        ({"deepcopy_before_export": True}, "deepcopy_before_model_export", True),
        ({}, "enable_custom_autograd_function", False),
        ({}, "enable_mem_efficient_grad_management", False),
        ({}, "onnx_opset_version", 17),
        ({}, "ortmodule_cache_dir", ""),
    ],
)
def test_switches_reach_upstream(
    values: dict[str, Any], attribute: str, expected: Any, monkeypatch: pytest.MonkeyPatch
):
    # Those for CUDA are refused here, but upstream keeps them on any device.
    monkeypatch.setattr(OrtOptions, "device_problems", lambda options, device_type: [])
    assert getattr(built(OrtOptions(**values))._runtime_options, attribute) == expected


def test_fallback_is_always_off():
    from onnxruntime.training.ortmodule._fallback import _FallbackPolicy

    assert built(OrtOptions())._runtime_options.fallback_policy is _FallbackPolicy.FALLBACK_DISABLE


def test_recompute_config_reaches_upstream(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text("[]")
    manager = built(OrtOptions(recompute_config=str(file)))
    assert manager._runtime_options.memory_optimizer_config_file_path == str(file)


@pytest.mark.parametrize("compute_optimizer", [True, False])
def test_compute_optimizer_off_trains(tiny_llama: Callable[..., Any], compute_optimizer: bool):
    """Upstream ends in a TypeError without it."""
    model = wrap(
        tiny_llama(), backend="ort", options=OrtOptions(compute_optimizer=compute_optimizer)
    )
    ids = torch.arange(16).reshape(2, 8)
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    loss.backward()
    expected = tiny_llama()(input_ids=ids, labels=ids).loss
    assert abs(loss - expected) < 1e-5  # fp32: 1e-6 from the order of summation


def test_log_level_reaches_upstream():
    from onnxruntime.training.ortmodule._logger import LogLevel

    manager = built(OrtOptions(log_level="fatal"))
    assert manager._debug_options.log_level == LogLevel.FATAL


def session_options(options: OrtOptions) -> Any:
    return built(options)._get_session_config()[0]


def spinning(options: OrtOptions) -> str:
    return session_options(options).get_session_config_entry("session.intra_op.allow_spinning")


def test_threads_reach_the_session():
    assert session_options(OrtOptions(num_threads=3)).intra_op_num_threads == 3


def test_spinning_reaches_the_session():
    assert spinning(OrtOptions(allow_spinning=True)) == "1"
    assert spinning(OrtOptions()) == "0"


def test_ranks_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(64)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert session_options(OrtOptions()).intra_op_num_threads == 4
        assert spinning(OrtOptions()) == "0"
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
        assert session_options(OrtOptions()).intra_op_num_threads == 1
        torch.set_num_threads(2)  # the user's own limit
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
        assert session_options(OrtOptions()).intra_op_num_threads == 2
    finally:
        torch.set_num_threads(threads)


def test_options_are_frozen_hashable_and_replaceable():
    options = OrtOptions(num_threads=2)
    assert hash(options) == hash(OrtOptions(num_threads=2))
    assert replace(options, num_threads=3).num_threads == 3
    with pytest.raises(AttributeError):
        options.num_threads = 4  # type: ignore[misc]


def test_every_variable_that_is_set_is_one_that_upstream_reads_with_each_graph(tmp_path):
    """Not when it is imported: by then there are no options yet."""
    file = tmp_path / "triton.json"
    file.write_text("{}")
    options = OrtOptions(
        fusion="triton", triton_config=str(file), tuning=True, max_tuning_duration_ms=1,
        tuning_results_path="tuned", save_onnx=True, save_onnx_path=str(tmp_path),
    )  # fmt: skip
    elsewhere = {
        "ORTMODULE_TRITON_CONFIG_FILE",  # when a session is made (ort_triton)
        "ORTMODULE_TRITON_DEBUG",  # when it is imported; triton/kernels.py writes what it says
        "ORTMODULE_ENABLE_CUSTOM_AUTOGRAD",  # likewise; export/functions.py
        "ORTMODULE_ALLOW_AUTOGRAD_CHECKPOINT",  # in the export
    }
    assert set(options._variables()) - elsewhere <= _read_by_upstream()


def test_every_option_is_documented_with_its_default_and_its_variable():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in DOCUMENT.splitlines()]
    documented = {row[0].strip("`"): row for row in rows if len(row) == 4 and row[0][:1] == "`"}
    assert list(documented) != []
    for option in fields(OrtOptions):
        default = str(option.default).lower() if option.default in (True, False) else option.default
        cell = "" if default is None else f"`{default}`"
        assert documented.pop(option.name)[1] == cell, option.name
    assert documented == {}  # nothing that is no option


def test_every_variable_of_upstream_is_documented():
    read = _read_by_upstream()
    assert "ORTMODULE_MEMORY_OPT_LEVEL" in read
    assert {name for name in read if f"`{name}`" not in DOCUMENT} == set()


def _read_by_upstream() -> set[str]:
    """By what is made anew for each ORTModule."""
    (package,) = find_spec("onnxruntime").submodule_search_locations  # type: ignore[union-attr]
    source = (Path(package) / "training" / "ortmodule" / "options.py").read_text(encoding="utf-8")
    return set(re.findall(r'"(ORTMODULE_[A-Z0-9_]+)"', source))

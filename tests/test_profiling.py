"""Shares of a training step by kinds of kernels."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from example_records import example, result

from ort_train import OrtOptions, record, report, wrap
from ort_train.errors import ConfigError
from ort_train.ortmodule import profiling


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("FusedMatMul", "matrix_products"),
        ("ort_train::product_tn", "matrix_products"),
        ("ort_train::batched_product_nn", "matrix_products"),
        ("SimplifiedLayerNormalizationGrad", "norms"),
        ("SoftmaxCrossEntropyLossInternalGrad", "loss"),
        ("ort_train::cross_entropy_mean_grad", "loss"),
        ("SoftmaxGrad_13", "softmax"),
        ("QuickGeluGrad", "activations"),
        ("ort_train::gelu_tanh_grad", "activations"),
        ("ort_train::relu_grad", "activations"),
        ("embedding_backward", "embedding"),
        ("ort_train::to_bf16", "rounding"),
        ("ort_train::dequantize_4bit", "decoding"),
        ("ConcatTraining", "copies"),
        ("Mul", "elementwise"),
        ("LessOrEqual", "other_kernels"),
    ],
)
def test_kinds(operator: str, kind: str):
    assert profiling.kind_of(operator) == kind


def test_each_kernels_median_over_the_last_steps_counts():
    def event(name: str, operator: str, microseconds: int, index: int) -> dict[str, Any]:
        arguments = {"op_name": operator, "node_index": str(index)}
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": microseconds,
                "args": arguments}  # fmt: skip

    events = [{"cat": "Session", "name": "model_loading", "dur": 9}]
    for microseconds in (5000, 10, 900, 20):  # the first run warms up, another is disturbed
        events += [
            event("a", "Gemm", microseconds, 0),
            event("a", "Gemm", microseconds, 1),  # another node of the same name
            event("b", "ATen", 3, 2),
        ]
    seconds = profiling._seconds_by_kind(events, {"b": "ort_train::product_nn"}, 3)
    assert seconds == {"matrix_products": pytest.approx((2 * 20 + 3) / 1e6)}


def test_shares_of_a_step(tiny_llama: Callable[..., Any], tmp_path: Path):
    options = OrtOptions(num_threads=1, profile_prefix=str(tmp_path / "profile"))
    model = wrap(tiny_llama().train(), "ort", options=options)
    ids = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(0))
    step_s = []
    for _ in range(4):
        began = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        step_s.append(time.perf_counter() - began)
    shares = profiling.shares(model, step_s[2:])
    assert tuple(shares) == profiling.KINDS
    assert sum(shares.values()) == pytest.approx(1)
    assert all(0 <= share < 1 for share in shares.values())
    for kind in ("matrix_products", "norms", "loss", "softmax", "embedding"):
        assert shares[kind] > 0, kind


def test_a_folder_that_is_missing_is_said(tmp_path: Path):
    with pytest.raises(ConfigError, match="is not a folder"):
        OrtOptions(profile_prefix=str(tmp_path / "none" / "profile"))


def test_record_and_page_show_it(tmp_path: Path):
    shares = {**dict.fromkeys(profiling.KINDS, 0.0), "matrix_products": 0.8, "outside_kernels": 0.2}
    profile = {"steps": 5, "forward_backward_ms": 10.0, "shares": shares}
    made = example(result("eager", 1.0), result("ort", 2.0, profile=profile))
    record.write(made, tmp_path / "record.json")
    line = "forward and backward: matrix products 80%, outside kernels 20%"
    loaded = record.load(tmp_path / "record.json")
    assert sum(line in each for each in report.summary_lines(loaded)) == 1

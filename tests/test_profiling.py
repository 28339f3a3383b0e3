"""Shares of a training step by kinds of kernels."""

from __future__ import annotations

import html
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from example_records import example, result

from ort_train import OrtOptions, wrap
from ort_train.errors import ConfigError
from ort_train.ortmodule import profiling
from ort_train.ortmodule.kernels.peak import peak_gflops
from ort_train.reports import record, report


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


def event(name: str, operator: str, microseconds: int, index: int, *sizes: list[int]) -> Any:
    """Of ONNX Runtime's profile; the sizes are those of inputs and the output."""
    *inputs, output = ([{"float": each}] for each in sizes or [[4, 8], [8, 2], [4, 2]])
    arguments = {
        "op_name": operator,
        "node_index": str(index),
        "input_type_shape": [*itertools.chain(*inputs)],
        "output_type_shape": output,
    }
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": microseconds, "args": arguments}


def test_each_kernels_median_over_the_last_steps_counts():
    events = [{"cat": "Session", "name": "model_loading", "dur": 9}]
    for microseconds in (5000, 10, 900, 20):  # the first run warms up, another is disturbed
        events += [
            event("a", "Gemm", microseconds, 0),
            event("a", "Gemm", microseconds, 1),  # another node of the same name
            event("b", "ATen", 3, 2),
            event("c", "Mul", 4, 3),
        ]
    kernels = profiling._kernels(events, {"b": "ort_train::product_nn"}, 3)
    flops = 2 * 4 * 8 * 2
    assert kernels == [
        ("Gemm", pytest.approx(20e-6), flops),
        ("Gemm", pytest.approx(20e-6), flops),
        ("ort_train::product_nn", pytest.approx(3e-6), flops),
        ("Mul", pytest.approx(4e-6), 0),
    ]
    shares = profiling.shares(kernels, 100e-6)
    assert tuple(shares) == profiling.KINDS
    assert shares["matrix_products"] == pytest.approx(0.43)
    assert shares["elementwise"] == pytest.approx(0.04)
    assert shares["outside_kernels"] == pytest.approx(0.53)
    assert profiling.products_gflops(kernels) == pytest.approx(3 * flops / 43e-6 / 1e9)
    assert profiling.products_gflops(kernels[3:]) is None


def test_batches_that_differ_count_with_their_medians():
    """As where padding is left out."""
    events = [
        event("a", "ort_train::product_nt", rows, 0, [rows, 8], [2, 8], [2], [rows, 2])
        for rows in (100, 50, 60)
    ]
    (kernel,) = profiling._kernels(events, {}, 3)
    assert kernel.flops == 2 * 60 * 8 * 2


@pytest.mark.parametrize(
    ("a", "b", "output", "flops"),
    [
        ([4, 8], [8, 2], [4, 2], 2 * 4 * 8 * 2),
        ([8, 4], [8, 2], [4, 2], 2 * 4 * 8 * 2),  # a transposed first
        ([4, 8], [2, 8], [4, 2], 2 * 4 * 8 * 2),  # b
        ([8, 4], [2, 8], [4, 2], 2 * 4 * 8 * 2),  # both
        ([3, 4, 8], [8, 2], [3, 4, 2], 2 * 12 * 8 * 2),  # a batch of rows
        ([3, 4, 8], [2, 8], [3, 4, 2], 2 * 12 * 8 * 2),
        ([3, 4, 8], [3, 4, 2], [8, 2], 2 * 8 * 12 * 2),  # a weight's gradient
        ([3, 5, 4, 8], [3, 5, 8, 2], [3, 5, 4, 2], 2 * 15 * 4 * 8 * 2),
        ([3, 5, 8, 4], [3, 5, 8, 2], [3, 5, 4, 2], 2 * 15 * 4 * 8 * 2),
        ([3, 5, 4, 8], [3, 5, 2, 8], [3, 5, 4, 2], 2 * 15 * 4 * 8 * 2),
        ([3, 5, 4, 4], [3, 5, 4, 4], [3, 5, 4, 4], 2 * 15 * 4 * 4 * 4),
        ([1, 4, 8], [3, 8, 2], [3, 4, 2], 2 * 3 * 4 * 8 * 2),  # one for each of a batch
        ([3, 1, 4, 8], [5, 8, 2], [3, 5, 4, 2], 2 * 15 * 4 * 8 * 2),
        ([4, 3, 8], [8, 3, 2], [3, 4, 2], 2 * 3 * 4 * 8 * 2),  # transBatchA, transBatchB
        ([8, 3, 4], [2, 3, 8], [3, 4, 2], 2 * 3 * 4 * 8 * 2),
        ([8], [8, 2], [2], 2 * 8 * 2),  # a vector
        ([3, 5, 4, 8], [8], [3, 5, 4], 2 * 15 * 4 * 8),
        ([0, 8], [8, 2], [0, 2], 0),  # nothing left of a batch
        ([3, 0, 8], [3, 8, 2], [3, 0, 2], 0),
    ],
)  # fmt: skip
def test_flops_of_a_product(a: list[int], b: list[int], output: list[int], flops: int):
    assert profiling.product_flops(a, b, output) == flops


@pytest.mark.parametrize(
    ("a", "b", "output"),
    [
        ([4, 8], [7, 2], [4, 2]),
        ([3, 4, 8], [3, 7, 2], [3, 4, 2]),
        ([3, 4, 8], [3, 8, 2], [3, 5, 2]),
    ],
)
def test_what_makes_no_product_is_refused(a: list[int], b: list[int], output: list[int]):
    with pytest.raises(ValueError, match="doesn't make"):
        profiling.product_flops(a, b, output)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_peak(precision: str):
    began = time.perf_counter()
    found = peak_gflops(precision, sides=(64, 96), seconds=0.01)
    least = 2 * 64**3 / (time.perf_counter() - began) / 1e9  # each product is a part of that time
    assert least < found < 1e6


# --- Profiles of graphs


def profiled(model: torch.nn.Module, num_steps: int = 4) -> tuple[list[profiling.Kernel], float]:
    """The kernels of the last steps; the median of their forward and backward, in seconds."""
    ids = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(0))
    step_s = []
    for _ in range(num_steps):
        began = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        step_s.append(time.perf_counter() - began)
    return profiling.end(model, 2), statistics.median(step_s[2:])


@pytest.mark.parametrize(
    ("precision", "products"),
    # In fp32 torch computes those with a large matrix only, and a tiny model has none.
    [("fp32", {"FusedMatMul", "Gemm"}), ("bf16", {"ort_train::product_", "ort_train::batched_"})],
)
def test_a_step(precision: str, products: set[str], tiny_llama: Callable[..., Any], tmp_path: Path):
    options = OrtOptions(num_threads=1, profile_prefix=str(tmp_path / "profile"))
    module = tiny_llama().train()
    kernels, forward_backward_s = profiled(wrap(module, "ort", precision, options))
    shares = profiling.shares(kernels, forward_backward_s)
    assert sum(shares.values()) == pytest.approx(1)
    assert all(0 <= share < 1 for share in shares.values())
    for kind in ("matrix_products", "norms", "loss", "softmax", "embedding"):
        assert shares[kind] > 0, kind

    for prefix in products:
        assert any(kernel.operator.startswith(prefix) for kernel in kernels), prefix
    config = module.config
    num_tokens, length = 64, 32
    width = config.num_attention_heads * config.head_dim
    weights = [m.weight for m in module.modules() if isinstance(m, torch.nn.Linear)]
    forward = 2 * num_tokens * sum(weight.numel() for weight in weights)
    # The angles of the rotary embedding aside, which are less than a ten-thousandth of a weight's.
    attention = 2 * 2 * num_tokens * length * width * config.num_hidden_layers
    found = sum(kernel.flops for kernel in kernels)
    assert found == pytest.approx(3 * (forward + attention), rel=1e-3)
    assert profiling.products_gflops(kernels) == pytest.approx(
        found / (shares["matrix_products"] * forward_backward_s) / 1e9
    )


def test_a_folder_that_is_missing_is_said(tmp_path: Path):
    with pytest.raises(ConfigError, match="is not a folder"):
        OrtOptions(profile_prefix=str(tmp_path / "none" / "profile"))


def test_record_and_page_show_it(tmp_path: Path):
    shares = {**dict.fromkeys(profiling.KINDS, 0.0), "matrix_products": 0.8, "outside_kernels": 0.2}
    profile = {"steps": 5, "forward_backward_ms": 10.0, "shares": shares}
    made = example(result("eager", 1.0), result("ort", 2.0, profile=profile))
    record.write(made, tmp_path / "record.json")
    line = "forward and backward: matrix products 80%, outside kernels 20%"
    loaded = record.load(tmp_path / "record.json")  # as records before the peak was measured
    assert sum(each.endswith(line) for each in report.summary_lines(loaded)) == 1
    assert loaded["results"][1]["profile"]["peak_gflops"] is None

    reached = {"products_gflops": 280.4, "peak_gflops": 350.1, "products_share_of_peak": 0.8009}
    made = example(result("eager", 1.0), result("ort", 2.0, profile=profile | reached))
    line += "; matrix products at 280 GFLOPS, 80% of the machine's measured 350"
    assert sum(each.endswith(line) for each in report.summary_lines(made)) == 1
    report.html(made, tmp_path / "page.html")
    assert line in html.unescape((tmp_path / "page.html").read_text(encoding="utf-8"))

"""A case of `ort-train passes-bench` in a process of its own: forward passes, timed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ort_train.bench.serve import peak_resident_gib, serve

Run = Callable[[], np.ndarray]


class Session:
    """One model in one runner, or several graphs in ONNX Runtime that take turns.

    Args:
        runner: eager, compile or ort; cold: graphs in ONNX Runtime, one after the other, each made
            and timed at once and without a warm-up, as no benchmark should.
        values: .npy file of the input.
        output: .npz file to write the outputs to, by variant.
        sizes: name, hidden and heads of the model, for eager and compile.
        graphs: .onnx files and whether ONNX Runtime optimizes them, by variant.
        warmup: runs before the first round.
        threads: of products; None: the library's own choice.
        repeats: of cold: runs of each graph.
    """

    def __init__(
        self,
        runner: str,
        values: str,
        output: str = "",
        sizes: Mapping[str, Any] | None = None,
        graphs: Mapping[str, tuple[str, bool]] | None = None,
        warmup: int = 0,
        threads: int | None = None,
        repeats: int = 0,
    ):
        self.runner, self.output, self.warmup = runner, output, warmup
        self.values = np.load(values)
        self.sizes, self.graphs, self.threads = sizes, graphs or {}, threads
        self.repeats = repeats
        self.runs: dict[str, Run] = {}
        self.turn = 0

    def start(self) -> dict[str, Any]:
        """Make every variant, save its first output, warm up."""
        if self.runner == "cold":
            return self._cold()
        if self.runner == "ort":
            self.runs = {
                variant: self._ort(file, optimized)
                for variant, (file, optimized) in self.graphs.items()
            }
        else:
            self.runs = {self.runner: self._torch()}
        outputs: dict[str, Any] = {}
        first_ms = {}
        for variant, run in self.runs.items():
            began = time.perf_counter()
            outputs[variant] = run()
            first_ms[variant] = (time.perf_counter() - began) * 1e3
        np.savez(self.output, **outputs)
        self.round(self.warmup)
        return {"first_ms": first_ms}

    def round(self, repeats: int) -> dict[str, list[float]]:
        """Seconds of `repeats` runs of each variant, in turns, each turn begun by another one."""
        times: dict[str, list[float]] = {variant: [] for variant in self.runs}
        variants = list(self.runs)
        for _ in range(repeats):
            self.turn += 1
            for index in range(len(variants)):
                variant = variants[(self.turn + index) % len(variants)]
                began = time.perf_counter()
                self.runs[variant]()
                times[variant].append(time.perf_counter() - began)
        return times

    def finish(self) -> dict[str, Any]:
        """Peak memory in GiB."""
        return {"peak_gib": peak_resident_gib()}

    def _cold(self) -> dict[str, Any]:
        mean_ms = {}
        for variant, (file, optimized) in self.graphs.items():
            run = self._ort(file, optimized)
            began = time.perf_counter()
            for _ in range(self.repeats):
                run()
            mean_ms[variant] = (time.perf_counter() - began) / self.repeats * 1e3
        return {"mean_ms": mean_ms}

    def _ort(self, file: str, optimized: bool) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        level = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = (
            level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
        )
        options.log_severity_level = 3
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        # Idle threads of one variant's pool would take the cores of the next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        feeds = {"input": self.values}
        return lambda: session.run(None, feeds)[0]

    def _torch(self) -> Run:
        import torch

        from ort_train.inference.optimization.models import make_model

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        assert self.sizes is not None
        model: Any = make_model(**self.sizes)
        if self.runner == "compile":
            model = torch.compile(model)
        values = torch.from_numpy(self.values)

        def run() -> np.ndarray:
            with torch.inference_mode():
                return model(values).numpy()

        return run


if __name__ == "__main__":
    sys.exit(serve(Session))

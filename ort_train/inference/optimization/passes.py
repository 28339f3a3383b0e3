"""onnxoptimizer's graph passes, one by one and together, each shown to keep the model's numbers.

onnxoptimizer 0.4.2 takes a model as one protobuf message, which ends at 2 GiB, and reads an
external tensor as an empty one: eliminate_duplicate_initializer then merges different weights of
one shape. So large weights are given to it as inputs of the graph, which it doesn't look into.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ort_train.errors import ConfigError, ModelError
from ort_train.inference import onnx_files
from ort_train.inference.optimization.feeds import random_feeds, symbolic_dimensions
from ort_train.near import near_matches

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto
    from onnxruntime import InferenceSession

#: Passes whose result is another model, or one that its callers can't call any more.
REFUSED = {
    "split_init": "it cuts the part that computes the outputs away",
    "split_predict": "it cuts the part that makes the weights away, and leaves inputs behind",
    "lift_lexical_references": "it takes a graph inside If or Loop, not a whole model",
    "rename_input_output": "it renames the inputs and outputs that callers name",
    "rewrite_input_dtype": "it changes the types of the inputs that callers give",
}
#: Leftovers of a fusion, such as the product under a Gemm, which nothing reads any more.
_SWEEP = "eliminate_deadend"
# Largest difference of an output over its largest magnitude. A fusion adds in another order, which
# costs about 1e-7 a sum in fp32, and grows over the layers; fp16 rounds to 5e-4.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2}
# Batch and length of the inputs that the graphs are compared on.
_TRIAL_SIZES = ((2, 8), (1, 5))


@dataclass(frozen=True)
class PassReport:
    """What one pass, or several in a row, did to a graph.

    Attributes:
        names: of the passes.
        before: number of nodes by operator.
        after: likewise.
        num_rewired: nodes of the result that the original doesn't have, operator and connections.
        max_rel_diff: of the outputs on random inputs, over their largest magnitude; None where
            nothing changed.
    """

    names: tuple[str, ...]
    before: Counter[str]
    after: Counter[str]
    num_rewired: int = 0
    max_rel_diff: float | None = None
    initializers: tuple[int, int] = (0, 0)

    @property
    def changed(self) -> bool:
        """Whether the graph is another one, and not only its nodes' names."""
        return (
            bool(self.num_rewired) or self.before != self.after or len(set(self.initializers)) > 1
        )

    def lines(self) -> list[str]:
        """The change in words: a head, then a line for each operator whose number changed."""
        name = " + ".join(self.names)
        if not self.changed:
            return [f"{name}: no change, the graph is identical ({self.before.total()} nodes)"]
        total = f"{self.before.total()} -> {self.after.total()} nodes"
        head = (
            f"{name}: {total}, {self.num_rewired} rewired or new, outputs within "
            f"{self.max_rel_diff:.1e}"
        )
        before, after = self.initializers
        if before != after:
            head += f", {before} -> {after} initializers"
        operators = sorted(set(self.before) | set(self.after))
        changes = [
            f"  {operator}: {self.before[operator]} -> {self.after[operator]}"
            for operator in operators
            if self.before[operator] != self.after[operator]
        ]
        return [head, *changes]


@dataclass(frozen=True)
class Optimized:
    """A graph, what passes made of it, and how.

    Attributes:
        before: the original, large weights being inputs where the model is large.
        after: the same after all passes.
        singly: the report of each pass on the original.
        together: of all of them in a row.
    """

    before: ModelProto
    after: ModelProto
    singly: list[PassReport]
    together: PassReport
    weights: frozenset[str] = field(default_factory=frozenset)


def available() -> list[str]:
    """Every pass of the installed onnxoptimizer, by name."""
    return sorted(_onnxoptimizer().get_available_passes())


def optimize(
    source: str | Path,
    names: Sequence[str],
    sizes: Mapping[str, int] | None = None,
    max_inline_bytes: int | None = None,
) -> Optimized:
    """Apply passes to a model in memory: each to the original, and all of them in a row.

    Args:
        source: an .onnx file, or a folder that holds model.onnx; of any size.
        names: of the passes, in the order of their application.
        sizes: of the inputs' symbolic dimensions, for the comparison on random inputs.
        max_inline_bytes: of a model whose weights the passes see; None: what protobuf can hold.

    Raises:
        ConfigError: names that are no passes, or passes that yield another model.
        ModelError: the model can't be read or run, or a pass fails on it or changes its outputs.
    """
    check_names(names)
    file = onnx_files.model_file(source)
    if max_inline_bytes is None:
        max_inline_bytes = onnx_files.MAX_INLINE_BYTES
    graph = _Graph(file, dict(sizes or {}), max_inline_bytes)
    names = tuple(dict.fromkeys(names))
    after = graph.apply(names)
    together = graph.report(names, after)
    singly = [together]
    if len(names) > 1:
        singly = [graph.report((name,), graph.apply((name,))) for name in names]
    return Optimized(graph.original, after, singly, together, frozenset(graph.weights))


def save(optimized: Optimized, source: str | Path, file: Path) -> None:
    """Write the optimized model.

    Args:
        source: where the original's weights are.
        file: the .onnx file to be written; its weights go to file.data.
    """
    source = onnx_files.model_file(source)
    model = copy.deepcopy(optimized.after)
    original = onnx_files.read_graph(source)
    own = {tensor.name: tensor for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in optimized.weights]
    used = set(_read_names(model.graph))
    outer = [
        tensor
        for tensor in original.graph.initializer
        if tensor.name in optimized.weights and tensor.name in used
    ]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    onnx_files.replace_initializers(model, [*own.values(), *outer])
    onnx_files.write_model(model, file, source.parent)


def _read_names(graph: GraphProto) -> Iterator[str]:
    """Whatever nodes read, those inside If and Loop among them."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _read_names(inner)
                yield from (value.name for value in inner.output)


def check_names(names: Sequence[str]) -> None:
    """Refuse what is no pass, and what doesn't keep the model.

    Raises:
        ConfigError: with all problems.
    """
    known = available()
    problems = [
        f"pass {name!r} is unknown: {near_matches(name, known)}"
        for name in names
        if name not in known
    ]
    problems += [f"pass {name} is refused: {REFUSED[name]}" for name in names if name in REFUSED]
    if not names:
        problems.append("no passes: name some with --passes, --list shows them")
    if problems:
        raise ConfigError(problems)


def _check_sizes(sizes: Mapping[str, int], model: ModelProto) -> None:
    known = symbolic_dimensions(model)
    problems = [
        f"--dim {name}: no input has such a dimension: {near_matches(name, known)}"
        for name in sizes
        if name not in known
    ]
    problems += [f"--dim {n}={size} must be 1 or more" for n, size in sizes.items() if size < 1]
    if problems:
        raise ConfigError(problems)


class _Graph:
    """A model that passes are applied to, and its outputs on random inputs."""

    def __init__(self, file: Path, sizes: dict[str, int], max_inline_bytes: int):
        from onnx import inliner

        self.file = file
        model = onnx_files.read_graph(file)
        if model.functions:  # onnxoptimizer drops them, and calls of them stay behind
            model = inliner.inline_local_functions(model)
        _check_sizes(sizes, model)
        self.weights = self._take_weights(model, max_inline_bytes)
        self.original = model
        self.sizes = sizes
        # Of two shapes: a pass may have taken the first one's for the only one.
        self._trials: list[_Trial] = []

    def _take_weights(self, model: ModelProto, max_inline_bytes: int) -> dict[str, np.ndarray]:
        """Load the weights into the model, or make inputs of the large ones."""
        from onnx import helper, numpy_helper

        folder, tensors = self.file.parent, model.graph.initializer
        total = model.ByteSize() + sum(map(onnx_files.tensor_bytes, tensors))
        fits = total < max_inline_bytes
        inner, outer = [], {}
        for tensor in tensors:
            array = onnx_files.read_array(tensor, folder)
            if fits or array.nbytes < onnx_files.MIN_EXTERNAL_BYTES:
                inner.append(numpy_helper.from_array(np.asarray(array), tensor.name))
            else:
                outer[tensor.name] = array
                value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
                model.graph.input.append(value)
        onnx_files.replace_initializers(model, inner)
        return outer

    def apply(self, names: tuple[str, ...]) -> ModelProto:
        """The original after some passes; the very original where they change nothing."""
        import onnx

        optimizer = _onnxoptimizer()
        # Fusions ask for shapes, which exporters don't write.
        shaped = onnx.shape_inference.infer_shapes(self.original)
        try:
            result = optimizer.optimize(shaped, list(names))
            if _differs(result, self.original):
                result = optimizer.optimize(result, [_SWEEP])
        except RuntimeError as error:
            raise ModelError(
                f"onnxoptimizer {optimizer.__version__}'s {' + '.join(names)} fails on "
                f"{self.file.name}: {str(error)[:300]}; leave it out"
            ) from error
        if not _differs(result, self.original):
            return self.original
        # onnxoptimizer keeps neither of these.
        del result.metadata_props[:]
        result.metadata_props.extend(self.original.metadata_props)
        known = {value.name for value in self.original.graph.value_info}
        values = [value for value in result.graph.value_info if value.name in known]
        del result.graph.value_info[:]
        result.graph.value_info.extend(values)
        return result

    def report(self, names: tuple[str, ...], result: ModelProto) -> PassReport:
        """What passes changed, after a run of both graphs on the same inputs."""
        before = _counts(self.original)
        if result is self.original:
            return PassReport(names, before, before)
        difference = self._compare(result, names)
        own = Counter(map(_wiring, self.original.graph.node))
        new = Counter(map(_wiring, result.graph.node))
        return PassReport(
            names,
            before,
            _counts(result),
            (new - own).total(),
            difference,
            (len(self.original.graph.initializer), len(result.graph.initializer)),
        )

    def _compare(self, result: ModelProto, names: tuple[str, ...]) -> float:
        if not self._trials:
            session = self._session(self.original)
            for batch, length in _TRIAL_SIZES:
                feeds = random_feeds(self.original, self.sizes, self.weights, batch, length)
                self._trials.append(_Trial(feeds, self._run(session, feeds)))
        session = self._session(result)
        worst = 0.0
        for trial in self._trials:
            outputs = self._run(session, trial.feeds)
            rows = zip(self.original.graph.output, trial.outputs, outputs, strict=True)
            for output, expected, mine in rows:
                difference = relative_difference(mine, expected)
                tolerance = TOLERANCES.get(str(expected.dtype), 0.0)
                # Not `>`: NaN is over every tolerance.
                if not difference <= tolerance:
                    raise ModelError(
                        f"{' + '.join(names)} changes output {output.name} by {difference:.1e} of "
                        f"its largest value, over the tolerance {tolerance:g}: the pass is wrong "
                        "for this model, leave it out. Nothing was written"
                    )
                worst = max(worst, difference)
        return worst

    def _session(self, model: ModelProto) -> InferenceSession:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # Of the graphs as they are: ONNX Runtime's own fusions would hide what a pass did.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        try:
            return onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises types of its own
            raise ModelError(
                f"ONNX Runtime refuses {self.file.name}: {str(error)[:300]}"
            ) from error

    def _run(self, session: InferenceSession, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        taken = [value.name for value in session.get_inputs()]
        everything = {**feeds, **self.weights}
        try:
            return session.run(None, {name: everything[name] for name in taken})
        except Exception as error:
            way = "give the sizes of its symbolic dimensions with --dim NAME=SIZE"
            bare = [
                value.name
                for value in self.original.graph.input
                if value.name in feeds and not value.type.tensor_type.HasField("shape")
            ]
            if bare:
                way = f"export it with a shape of the input {bare[0]}, which has none"
            raise ModelError(
                f"{self.file.name} doesn't run on random inputs ({str(error)[:300]}): {way}"
            ) from error


@dataclass(frozen=True)
class _Trial:
    feeds: dict[str, np.ndarray]
    outputs: list[np.ndarray]


def relative_difference(values: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest magnitude expected; NaN where one isn't finite."""
    if values.shape != expected.shape:
        return float("inf")
    if expected.size == 0:
        return 0.0
    values, expected = values.astype(np.float64), expected.astype(np.float64)
    scale = np.abs(expected).max()
    difference = np.abs(values - expected).max()
    return float(difference / scale if scale else difference)


def _counts(model: ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def _wiring(node: NodeProto) -> bytes:
    """A node without its name."""
    bare = type(node)()
    bare.CopyFrom(node)
    bare.name = bare.doc_string = ""
    return bare.SerializeToString(deterministic=True)


def _differs(result: ModelProto, original: ModelProto) -> bool:
    """Whether there are other nodes or initializers, whatever their order."""
    if Counter(map(_wiring, result.graph.node)) != Counter(map(_wiring, original.graph.node)):
        return True
    names = [{tensor.name for tensor in m.graph.initializer} for m in (result, original)]
    return names[0] != names[1]


def _onnxoptimizer() -> Any:
    try:
        import onnxoptimizer
    except ImportError as error:
        raise ConfigError(
            "onnxoptimizer isn't installed: pip install 'ort_train[inference]'"
        ) from error
    return onnxoptimizer

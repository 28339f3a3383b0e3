"""Which subgraphs of a training graph ONNX Runtime's Triton fuser takes, and by what rules.

The fuser itself (`orttraining/orttraining/core/optimizer/triton_fusion.cc` of onnxruntime, read at
a commit after 1.19.2) runs in CUDA sessions only. Its rule is written again here, so that the
kernels of a graph can be generated, run in Triton's interpreter and compiled without a GPU.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ort_train.ortmodule.graph import GraphIndex, attribute
from ort_train.ortmodule.triton.config import FusionConfig

_REDUCTIONS = ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum")


class _Graph:
    """What the rule asks of an onnx.ModelProto; a name stands for a value (`NodeArg`)."""

    def __init__(self, model: Any):
        self.nodes = _in_topological_order(model.graph)
        self.opsets = {entry.domain or "": entry.version for entry in model.opset_import}
        self.index = GraphIndex(model.graph)

    def num_edges(self, node: Any) -> int:
        """To its consumers; to be an output of the graph is no edge."""
        return sum(map(self.index.num_reads, node.output))


def _in_topological_order(graph: Any) -> list[Any]:
    """ONNX asks for this order of nodes, but ORTModule's graphs don't keep it."""
    produced_by = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    order: list[int] = []
    state: dict[int, bool] = {}
    for root in range(len(graph.node)):
        stack = [(root, False)]
        while stack:
            index, is_done = stack.pop()
            if is_done:
                state[index] = True
                order.append(index)
            elif index not in state:
                state[index] = False
                stack.append((index, True))
                needed = {produced_by[n] for n in graph.node[index].input if n in produced_by}
                stack.extend((i, False) for i in sorted(needed, reverse=True) if i not in state)
    return [graph.node[index] for index in order]


def _reduces(graph: _Graph, node: Any, expected: list[int]) -> bool:
    """Whether a reduction's constant axes are the expected ones."""
    import onnx

    axes = attribute(node, "axes")
    if axes is None:
        tensor = graph.index.initializers.get(node.input[1]) if len(node.input) == 2 else None
        if tensor is None:
            return False
        axes = onnx.numpy_helper.to_array(tensor).tolist()
    if any(axis < 0 for axis in (*axes, *expected)):
        shape = graph.index.shapes.get(node.input[0])
        if shape is None:
            return False
        axes, expected = ([a % len(shape) for a in each] for each in (axes, expected))
    return sorted(axes) == sorted(expected)


def _is_supported(graph: _Graph, node: Any, config: FusionConfig) -> bool:
    import onnx

    rule = config.ops.get(node.op_type)
    if rule is None or (node.domain or "") != rule.get("domain", ""):
        return False
    opset = graph.opsets.get(node.domain or "", 1)
    if not node.domain:
        since = onnx.defs.get_schema(node.op_type, opset, "").since_version
        if since not in rule["versions"]:
            return False
    axes = rule.get("conditions", {}).get("axes")
    return axes is None or _reduces(graph, node, json.loads(axes))


@dataclass
class _Partition:
    nodes: list[Any] = field(default_factory=list)
    outputs: set[str] = field(default_factory=set)
    #: Values that hang on this partition through a node that isn't in it: a node that needs one
    #: can't join without a cycle.
    dependencies: set[str] = field(default_factory=set)
    num_open: int = 0

    def add(self, node: Any, graph: _Graph) -> None:
        self.nodes.append(node)
        self.outputs.update(node.output)
        self.num_open += graph.num_edges(node)

    def absorb(self, other: _Partition) -> None:
        self.nodes += other.nodes
        self.outputs |= other.outputs
        self.dependencies |= other.dependencies
        self.num_open += other.num_open

    def is_worth_it(self, config: FusionConfig) -> bool:
        rules = [config.ops[node.op_type] for node in self.nodes]
        num_nodes = sum(not rule.get("is_no_op", False) for rule in rules)
        return num_nodes >= config.min_nodes or all(
            rule.get("ignore_min_nodes", False) for rule in rules
        )


def _partitions(graph: _Graph, config: FusionConfig) -> list[list[Any]]:
    """Groups of nodes, in the order in which the fuser replaces them."""
    open_partitions: dict[int, _Partition] = {}
    chosen: dict[int, _Partition] = {}
    num_made = 0
    for node in graph.nodes:
        is_supported = _is_supported(graph, node, config)
        joined = []
        for number, partition in open_partitions.items():
            num_links = sum(name in partition.outputs for name in node.input if name)
            hangs_on = any(name in partition.dependencies for name in node.input if name)
            partition.num_open -= num_links
            if is_supported and num_links and not hangs_on:
                joined.append(number)
            elif num_links or hangs_on:
                partition.dependencies.update(name for name in node.output if name)
        if joined:
            first, *others = sorted(joined)
            for number in reversed(others):
                open_partitions[first].absorb(open_partitions.pop(number))
            open_partitions[first].add(node, graph)
        elif is_supported:
            open_partitions[num_made] = _Partition()
            open_partitions[num_made].add(node, graph)
            num_made += 1
        for number in [n for n, p in open_partitions.items() if p.num_open == 0]:
            partition = open_partitions.pop(number)
            if partition.is_worth_it(config):
                chosen[number] = partition
    return [chosen[number].nodes for number in sorted(chosen)]


def _goes_inside(graph: _Graph, node: Any, name: str, config: FusionConfig) -> bool:
    """Whether a constant becomes part of the subgraph instead of its input."""
    tensor = graph.index.initializers.get(name)
    if tensor is None or config.initializer == "none":
        return False
    is_axes = node.op_type in _REDUCTIONS and len(node.input) >= 2 and node.input[1] == name
    return is_axes or list(tensor.dims) in ([], [1])


def _subgraph(graph: _Graph, nodes: list[Any], config: FusionConfig) -> Any:
    import onnx

    made = {name for node in nodes for name in node.output if name}
    uses_inside = Counter(name for node in nodes for name in node.input)
    inputs: list[str] = []
    constants: dict[str, Any] = {}
    for node in nodes:
        for name in node.input:
            if name and _goes_inside(graph, node, name, config):
                constants[name] = graph.index.initializers[name]
            elif name and name not in made and name not in inputs:
                inputs.append(name)
    num_uses = graph.index.num_reads
    outputs = [
        name
        for node in nodes
        for name in node.output
        if name and (not num_uses(name) or num_uses(name) > uses_inside[name])
    ]
    values = [graph.index.infos.get(name) or _constant_info(graph, name) for name in inputs]
    typed = [graph.index.infos.get(name) or onnx.ValueInfoProto(name=name) for name in outputs]
    proto = onnx.helper.make_graph(nodes, "fused", values, typed, list(constants.values()))
    opsets = [onnx.helper.make_opsetid(*entry) for entry in graph.opsets.items()]
    return onnx.helper.make_model(proto, opset_imports=opsets, ir_version=8)


def _constant_info(graph: _Graph, name: str) -> Any:
    import onnx

    tensor = graph.index.initializers.get(name)
    if tensor is None:
        return onnx.ValueInfoProto(name=name)
    return onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))


def session_graph(model: Any) -> Any:
    """A training graph as ONNX Runtime's session has it when the fuser looks at it.

    The session first removes Identity nodes and folds constants, without which few backward nodes
    are connected. Its CPU provider does the same and infers the types of all values.

    Args:
        model: an onnx.ModelProto, such as ORTModule's `optimized_model`.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "session.onnx")
        onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return onnx.load(options.optimized_model_filepath)


def subgraphs(model: Any, config: FusionConfig | None = None) -> list[Any]:
    """The subgraphs of a training graph that the fuser turns into Triton kernels.

    Args:
        model: an onnx.ModelProto with the types of its values.
        config: what may be taken; None: the fuser's own defaults.

    Returns:
        One onnx.ModelProto each, in the fuser's order: connected operators without a cycle through
        the rest of the graph. Nodes of all devices are looked at; in a CUDA session those that
        ONNX Runtime puts onto the CPU (shapes) are left out.
    """
    config = config or FusionConfig()
    graph = _Graph(model)
    return [_subgraph(graph, nodes, config) for nodes in _partitions(graph, config)]

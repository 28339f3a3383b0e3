"""Where a module's forward lets no gradient through: `detach`, `.data` and `torch.no_grad`.

torch's exporter drops `detach` (`torch.onnx.symbolic_opset9.detach`: "ORT is inference only"),
makes a constant of `.data` (the first batch's), and exports all of a forward without gradients, so
that `torch.no_grad` in it says nothing. ONNX Runtime would then differentiate through all three,
without a word (onnxruntime-training 1.19.2, torch 2.8 to 2.14).

Here each becomes a node that ONNX Runtime's gradient builder stops at. In the finished graph it is
an Identity.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ort_train.ortmodule.graph import (
    FLOATS,
    GraphIndex,
    attribute,
    declare,
    inputs_of,
    inputs_within,
)
from ort_train.ortmodule.kernels.aten import aten_node, operator_name
from ort_train.ortmodule.kernels.torch_operators import call_of
from ort_train.ortmodule.patching import replaced

OPERATOR = "ort_train::stop_gradient"


# --- In a trace


class _Detaching(TorchFunctionMode):
    """What functions return is detached."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs))}

        def detached(value: Any) -> Any:
            # What was written to in place stays the object that it is.
            is_new = isinstance(value, torch.Tensor) and id(value) not in given
            return value.detach() if is_new and value.is_floating_point() else value

        return pytree.tree_map(detached, result)


class _GradMode:
    """Whether the forward that this thread traces has switched gradients off."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._is_off = False
        self._before: list[bool] = []
        self._detaching: _Detaching | None = None

    def _switch(self, is_off: bool) -> None:
        if is_off and self._detaching is None:
            self._detaching = _Detaching()
            self._detaching.__enter__()
        elif not is_off and self._detaching is not None:
            self._detaching.__exit__(None, None, None)
            self._detaching = None
        self._is_off = is_off

    def of(self, context: type, is_off: Callable[[Any], bool]) -> contextlib.AbstractContextManager:
        """A context manager of torch's meanwhile switches this, too.

        Args:
            is_off: of an instance.
        """
        methods: Any = context
        enter, leave = methods.__enter__, methods.__exit__

        @functools.wraps(enter)
        def entering(each: Any) -> Any:
            before = self._is_off
            result = enter(each)
            if threading.get_ident() == self._thread:
                self._before.append(before)
                self._switch(is_off(each))
            return result

        @functools.wraps(leave)
        def leaving(each: Any, *exception: Any) -> Any:
            result = leave(each, *exception)
            if threading.get_ident() == self._thread and self._before:
                self._switch(self._before.pop())
            return result

        return replaced(context, __enter__=entering, __exit__=leaving)


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """What is traced meanwhile keeps what stops gradients."""
    mode = _GradMode()

    def get_data(tensor: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_tracing() and torch._C._get_value_trace(tensor) is not None:
            return tensor.detach()
        return base.__get__(tensor)

    base: Any = torch._C.TensorBase.data
    data = property(get_data, base.__set__)
    with (
        mode.of(torch.no_grad, lambda each: True),
        mode.of(torch.enable_grad, lambda each: False),
        mode.of(torch.inference_mode, lambda each: each.mode),
        mode.of(torch.set_grad_enabled, lambda each: not each.mode),
        replaced(torch.Tensor, data=data),
    ):
        try:
            yield
        finally:
            mode._switch(False)


# --- In a graph


def hide(graph: Any) -> None:
    """Have shape inference take the nodes for what they compute.

    Args:
        graph: onnx.GraphProto as exported, changed in place.
    """
    for node in graph.node:
        if operator_name(node) == OPERATOR:
            _make_identity(node)
            node.doc_string = OPERATOR


def hidden(name: str, output: str) -> Any:
    """A node as :func:`hide` leaves them.

    Args:
        name: of the value that no gradient shall pass behind.
        output: its name behind the node.
    """
    from onnx import helper

    return helper.make_node("Identity", [name], [output], name=output, doc_string=OPERATOR)


def is_hidden(node: Any) -> bool:
    """Whether it is one of them."""
    return bool(node.doc_string == OPERATOR)


#: Whose results are integers or booleans.
_NOT_DIFFERENTIABLE = frozenset(
    {
        "And", "ArgMax", "ArgMin", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less",
        "LessOrEqual", "NonZero", "Not", "Or", "Shape", "Size", "Xor",
    }
)  # fmt: skip


def passed(graph: Any) -> set[str]:
    """The values that a gradient of the outputs can reach.

    Args:
        graph: onnx.GraphProto as exported.
    """
    index = GraphIndex(graph)
    return index.ancestors(*index.outputs, passes=_passes)


def _passes(node: Any, name: str) -> bool:
    """Whether a gradient of a node reaches a value that it reads."""
    operator = operator_name(node)
    if (call := call_of(operator)) is not None:
        return any(node.input[i] == name for i in call.trained)
    if operator == "Cast":
        return attribute(node, "to") in FLOATS
    return operator != OPERATOR and operator not in _NOT_DIFFERENTIABLE


def apply(graph: Any, trained: frozenset[str]) -> None:
    """Keep the nodes that a gradient would pass, and leave out the others.

    Args:
        graph: onnx.GraphProto after :func:`hide`, changed in place.
        trained: names of its inputs that get a gradient.
    """
    if not any(map(is_hidden, graph.node)):
        return
    differentiable = set(trained)
    renamed: dict[str, str] = {}
    kept = {info.name for info in graph.output}
    kept.update(name for node in graph.node for name in inputs_within(node))
    nodes = []
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        is_differentiable = not differentiable.isdisjoint(inputs_of(node))
        if is_hidden(node):
            if is_differentiable:
                # ONNX Runtime passes the first node behind a parameter, whatever it is
                # (`gradient_graph_builder.cc`, BFSWithStopGradient).
                (name,), between = node.input, f"{node.name}/stopped"
                nodes.append(aten_node(OPERATOR, [name], [between], f"{node.name}/before"))
                declare(graph, [between, *node.output])
                node = aten_node(OPERATOR, [between], node.output, node.name)
            elif node.output[0] not in kept:
                renamed[node.output[0]] = node.input[0]
                continue
        elif is_differentiable:
            differentiable.update(node.output)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def replace(graph: Any) -> None:
    """In a finished training graph nothing has to be stopped any more.

    Args:
        graph: onnx.GraphProto of forward and backward, changed in place.
    """
    for node in graph.node:
        if operator_name(node) == OPERATOR:
            _make_identity(node)


def _make_identity(node: Any) -> None:
    node.op_type, node.domain = "Identity", ""
    del node.attribute[:]

"""Look-ups in graphs whose branches read values from outside of them."""

from __future__ import annotations

from typing import Any

import pytest
from onnx import TensorProto, helper

from ort_train.ortmodule.export import stop_gradient
from ort_train.ortmodule.graph import GraphIndex
from ort_train.ortmodule.passes import products
from ort_train.ortmodule.sparse.rewriting import Rewriter


def info(name: str, *sizes: int, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, sizes)


def branching(*before: Any, read: str) -> Any:
    """A graph of `x` (4, 4) and of `b`, which chooses a branch; both branches read a value."""
    branch = [
        helper.make_graph([helper.make_node(kind, [read], ["z"])], kind, [], [info("z", 4, 4)])
        for kind in ("Neg", "Abs")
    ]
    node = helper.make_node("If", ["b"], ["y"], then_branch=branch[0], else_branch=branch[1])
    inputs = [info("x", 4, 4), info("b", kind=TensorProto.BOOL)]
    return helper.make_graph([*before, node], "graph", inputs, [info("y", 4, 4)])


def moved(operator: str = "Transpose", **attributes: Any) -> Any:
    return helper.make_node(operator, ["x"], ["moved"], name="moving", **attributes)


def test_what_a_branch_reads_is_read():
    index = GraphIndex(branching(moved(perm=[1, 0]), read="moved"))
    assert index.ancestors("y") == {"y", "b", "moved", "x"}
    assert [node.op_type for node in index.consumers("moved")] == ["If"]
    assert index.num_reads("moved") == 2
    assert {position for _, position in index.reads["moved"]} == {None}


def by_products(graph: Any) -> None:
    products.replace(graph, products.Wanted(is_bf16=True))


def by_rewriting(graph: Any) -> None:
    Rewriter(graph).finish()


def by_stopping_gradients(graph: Any) -> None:
    stop_gradient.apply(graph, frozenset())


@pytest.mark.parametrize(
    ("change", "node"),
    [
        (by_products, moved(perm=[1, 0])),
        (by_rewriting, moved(perm=[1, 0])),
        (by_stopping_gradients, moved("Identity", doc_string=stop_gradient.OPERATOR)),
    ],
)
def test_what_only_a_branch_reads_remains(change: Any, node: Any):
    graph = branching(node, read="moved")
    change(graph)
    assert [each.name for each in graph.node] == ["moving", ""]


def test_what_a_branch_reads_stays_fp32():
    """Rounded for a product, but read in fp32 by a branch as well."""
    product = helper.make_node("MatMul", ["x", "w"], ["moved"], name="product")
    following = helper.make_node("MatMul", ["moved", "w"], ["p"], name="following")
    graph = branching(product, following, read="moved")
    graph.input.append(info("w", 32, 32))
    graph.output.append(info("p", 4, 32))
    products.replace(graph, products.Wanted(is_bf16=True))
    (kind,) = (each.type.tensor_type.elem_type for each in graph.value_info if each.name == "moved")
    assert kind == TensorProto.FLOAT

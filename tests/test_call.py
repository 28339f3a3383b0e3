"""A call split into tensors and a schema, and put together again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ort_train.errors import UnsupportedModelError
from ort_train.ortmodule.call import (
    describe_call,
    describe_result,
    fits_pattern,
    merge,
    size_pattern,
)

A, B = torch.zeros(2, 3), torch.ones(4)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((A,), {}),
        ((A, 1, None, B), {"x": "text", "y": torch.float32}),
        (({"a": A, "n": {"b": (B, 2.5)}},), {"flag": True, "tail": [A, [None, B]]}),
        ((), {}),
        ((1, 2, 3), {"only": "constants"}),
        ((), {"device": torch.device("cpu"), "z": 1j, "t": A}),
    ],
)
def test_call_is_rebuilt_as_it_was(args: tuple[Any, ...], kwargs: dict[str, Any]):
    schema, tensors = describe_call(args, kwargs)
    found_args, found_kwargs = schema.rebuild(tensors)
    assert _plain(found_args) == _plain(args)
    assert _plain(found_kwargs) == _plain(kwargs)
    assert all(isinstance(name, str) and name.isidentifier() for name in schema.names)
    assert len(set(schema.names)) == len(schema.names) == len(tensors)


def _plain(value: Any) -> Any:
    """Nests with tensors by identity, so that they compare."""
    if isinstance(value, torch.Tensor):
        return ("tensor", id(value))
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(each) for each in value)
    return value


def schema_of(*args: Any, **kwargs: Any) -> Any:
    return describe_call(args, kwargs)[0]


def test_equal_calls_have_equal_schemas_whatever_the_values_and_sizes():
    first, second = schema_of(A, n=1), schema_of(torch.rand(7, 9), n=1)
    assert first == second
    assert hash(first) == hash(second)


@pytest.mark.parametrize(
    "other",
    [
        schema_of(A, n=2),
        schema_of(A, n=1.0),
        schema_of(A, n=True),
        schema_of(A, m=1),
        schema_of(A),
        schema_of([A], n=1),
        schema_of(A[0], n=1),
        schema_of(A.double(), n=1),
        schema_of(torch.zeros(2, 3, requires_grad=True), n=1),
        schema_of(A, B, n=1),
    ],
)
def test_other_calls_have_other_schemas(other: Any):
    assert schema_of(A, n=1) != other


def test_order_of_keywords_is_no_difference_to_the_result():
    first, tensors = describe_call((), {"a": A, "b": B})
    second, others = describe_call((), {"b": B, "a": A})
    assert _plain(first.rebuild(tensors)[1]) == _plain(second.rebuild(others)[1])


def test_counts_that_differ_from_batch_to_batch_are_tensors():
    first = schema_of(num_items_in_batch=30)
    assert first == schema_of(num_items_in_batch=31)
    assert first.constants == ()
    _, (tensor,) = describe_call((), {"num_items_in_batch": 30})
    assert tensor.item() == 30
    absent = schema_of(num_items_in_batch=None)
    assert absent.constants == ((0, None),)


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", range(3), lambda: None])
def test_what_no_graph_can_take_is_named(value: Any):
    with pytest.raises(UnsupportedModelError, match=rf"'odd' is a {type(value).__name__}"):
        describe_call((), {"odd": value})


def test_result_is_rebuilt_in_its_own_type():
    from transformers.modeling_outputs import CausalLMOutputWithPast

    result = CausalLMOutputWithPast(loss=B.sum(), logits=A, hidden_states=(A, B))
    schema, tensors = describe_result(result)
    found = schema.rebuild(tuple(t + 1 for t in tensors))
    assert type(found) is CausalLMOutputWithPast
    assert found.keys() == result.keys()
    assert torch.equal(found.hidden_states[1], B + 1)
    assert found["logits"] is found.logits


def test_result_that_no_graph_can_return():
    with pytest.raises(UnsupportedModelError, match="returns a set"):
        describe_result({"x": A, "odd": {1}})


def test_merge_puts_constants_at_their_positions():
    assert merge(("a", "b"), ((0, 1), (2, 3), (3, 4))) == [1, "a", 3, 4, "b"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("traced", "called", "fits"),
    [
        (((2, 8), (2, 8)), ((3, 5), (3, 5)), True),
        (((2, 8), (2, 8)), ((3, 3), (3, 3)), True),
        (((2, 8), (2, 8)), ((1, 5), (1, 5)), True),
        (((2, 8), (2, 8)), ((3, 5), (1, 5)), False),  # would need a broadcast
        (((1, 8), (1, 8)), ((3, 5), (3, 5)), False),
        (((1, 8), (1, 8)), ((1, 5), (1, 5)), True),
        (((4, 4),), ((4, 5),), False),
        (((4, 4),), ((6, 6),), True),
        (((2, 8), (1, 8)), ((3, 5), (1, 5)), True),
        (((2, 8), (1, 8)), ((3, 5), (3, 5)), False),
        (((),), ((),), True),
    ],
)
def test_sizes_that_a_trace_serves(traced: Any, called: Any, fits: bool):
    pattern = size_pattern(tuple(torch.empty(shape) for shape in traced))
    assert fits_pattern(tuple(torch.empty(shape) for shape in called), pattern) is fits

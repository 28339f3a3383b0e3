"""A built ORTModule as an entry of the cache, and an ORTModule that takes an entry for its build.

What is kept of a build is the graph that runs. On a CPU that is the graph behind ONNX Runtime's
session optimizations, whose session then starts in a tenth of the time; a build that is going to be
cached runs that very graph, too, so that both compute the same by construction. It is the gradient
graph before them on other devices, where activations are recomputed (ONNX Runtime plans that anew
for each session), and where it draws random numbers: written and read, nodes run in another order,
and dropout's masks would be others than without a cache.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ort_train.ortmodule import decisions
from ort_train.ortmodule.cache import export_cache
from ort_train.ortmodule.cache.export_cache import Entry
from ort_train.ortmodule.call import ResultSchema
from ort_train.ortmodule.decisions import Decisions
from ort_train.ortmodule.patching import replaced
from ort_train.ortmodule.sparse.sparsity import Savings

logger = logging.getLogger(__name__)

_PACKAGE = "onnxruntime.training.ortmodule"
#: What is read of ONNX Runtime's GraphInfo once the graph stands.
_GRAPH_INFO = (
    "user_output_names",
    "module_output_indices_requires_save_for_backward",
    "output_grad_indices_non_differentiable",
    "output_grad_indices_require_full_shape",
)
_STUB = ("tensor_idx", "name", "dtype", "shape", "shape_dims")


@dataclass(frozen=True)
class Found:
    """What a build finds of a module, beside its graph.

    Attributes:
        result_schema: of what it returns.
        savings: what its graph leaves out.
        decisions: that its forward took by the sizes of the batch.
    """

    result_schema: ResultSchema
    savings: Savings
    decisions: Decisions


class NotCacheableError(Exception):
    """What was built can't be written down; the message says what."""


#: Of which ONNX Runtime seeds each node when the session is built (`generator/random.h`); dropout
#: follows `set_seed` in every step.
SEEDED_ONCE = frozenset(
    {"RandomUniformLike", "RandomNormalLike", "RandomUniform", "RandomNormal", "Bernoulli",
     "Multinomial"}
)  # fmt: skip
_RANDOM = SEEDED_ONCE | {"Dropout", "BitmaskDropout", "BiasDropout", "BitmaskBiasDropout"}


def random_operators(manager: Any) -> frozenset[str]:
    """Those in the graph of ORTModule's TrainingManager that draw random numbers."""
    return _RANDOM.intersection(
        node.op_type for node in manager._onnx_models.optimized_model.graph.node
    )


# --- From a build to an entry


@contextlib.contextmanager
def optimized_once(manager: Any, is_on: bool) -> Iterator[None]:
    """A session that is created meanwhile runs its optimized graph, as its cached kin will.

    Args:
        manager: ORTModule's TrainingManager.
        is_on: False leaves it as it is.
    """
    if not is_on:
        yield
        return
    create = manager._create_execution_agent

    def create_twice() -> None:
        if random_operators(manager):
            create()
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "session.onnx"
            with _session_options(manager, optimized_model_filepath=str(path)):
                create()
            _put_graph(manager, path.read_bytes())
        manager._execution_agent = None  # or its session would stand beside the next one
        _create_unoptimized(manager, create)
        manager.runs_optimized_graph = True  # ours, for `take`

    with replaced(manager, _create_execution_agent=create_twice):
        yield


@contextlib.contextmanager
def _session_options(manager: Any, **values: Any) -> Iterator[None]:
    """Sessions that are created meanwhile get these options."""
    get_config = manager._get_session_config

    def with_values() -> Any:
        session_options, *rest = get_config()
        for name, value in values.items():
            setattr(session_options, name, value)
        return (session_options, *rest)

    with replaced(manager, _get_session_config=with_values):
        yield


def _create_unoptimized(manager: Any, create: Callable[[], None]) -> None:
    level = importlib.import_module("onnxruntime").GraphOptimizationLevel.ORT_DISABLE_ALL
    with _session_options(manager, graph_optimization_level=level):
        create()


def _put_graph(manager: Any, graph: bytes) -> None:
    import onnx

    manager._onnx_models.optimized_model = onnx.load_model_from_string(graph)


def keep(
    key: str,
    manager: Any,
    found: Found,
    build_s: float,
    name: str,
) -> None:
    """Put a build that has run into the cache.

    Args:
        key: of the entry.
        manager: ORTModule's TrainingManager.
        found: what else is known of it.
        build_s: seconds that it took.
        name: of the module, for the log.
    """
    try:
        entry = take(manager, found)
    except NotCacheableError as error:
        logger.info("the training graph of %s isn't cached: %s", name, error)
        return
    export_cache.store(key, Entry(entry.graph, {**entry.facts, "build_s": build_s}))


def take(manager: Any, found: Found) -> Entry:
    """What a second start needs of a build that has run.

    Raises:
        NotCacheableError: naming what can't be written down.
    """
    exported = manager._graph_transition_manager._exported_model_info
    outputs = exported.module_forward_output_schema
    stub = importlib.import_module("onnxruntime.training.utils.torch_io_helper")._TensorStub
    if not isinstance(outputs, tuple) or not all(isinstance(each, stub) for each in outputs):
        raise NotCacheableError(f"its outputs are {outputs!r}")
    facts = {
        "is_optimized": getattr(manager, "runs_optimized_graph", False),
        "inputs": exported.onnx_graph_input_names,
        "inputs_with_gradient": exported.onnx_graph_input_names_require_grad,
        "outputs": [[getattr(each, name) for name in _STUB] for each in outputs],
        "graph_info": {name: list(getattr(manager._graph_info, name)) for name in _GRAPH_INFO},
        "result": _written(found.result_schema),
        "savings": [found.savings.flops_per_padding, found.savings.flops_per_ignored_label],
        "decisions": found.decisions.written(),
    }
    if manager._graph_info.frontier_node_arg_map:
        raise NotCacheableError("its graph keeps values between steps")
    return Entry(manager._onnx_models.optimized_model.SerializeToString(), facts)


def _written(schema: ResultSchema) -> dict[str, Any]:
    try:
        spec = pytree.treespec_dumps(schema.spec)
        is_same = pytree.treespec_loads(spec) == schema.spec
    except (NotImplementedError, TypeError, ValueError, KeyError) as error:
        raise NotCacheableError(f"its output type can't be written down: {error}") from error
    if not is_same:
        raise NotCacheableError("its output type isn't the same when it is read again")
    deferred = schema.deferred and [schema.deferred[0], str(schema.deferred[1])]
    constants = [[position, _constant(value)] for position, value in schema.constants]
    return {"spec": spec, "constants": constants, "deferred": deferred}


def _constant(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)}
    raise NotCacheableError(f"it returns a {type(value).__name__}")


# --- From an entry to an ORTModule


def read(key: str) -> Built | None:
    """The build of a key; None where there is none, or one that can't be read."""
    entry = export_cache.load(key)
    if entry is None:
        return None
    try:
        return Built(entry)
    except ValueError as error:
        export_cache.discard(key, str(error))
        return None


class Built:
    """An entry that was read: what stands in for export, gradient graph and passes.

    Args:
        entry: as it was taken.

    Raises:
        ValueError: where it isn't what :func:`take` writes.
    """

    def __init__(self, entry: Entry):
        import onnx

        facts = entry.facts
        try:
            self._is_optimized = bool(facts["is_optimized"])
            self._graph = onnx.load_model_from_string(entry.graph)
            self._inputs: list[str] = facts["inputs"]
            self._with_gradient: list[str] = facts["inputs_with_gradient"]
            self._outputs = facts["outputs"]
            self._graph_info = {name: facts["graph_info"][name] for name in _GRAPH_INFO}
            self.found = Found(
                _read(facts["result"]),
                Savings(*facts["savings"]),
                decisions.read(facts["decisions"]),
            )
            self.build_s = float(facts["build_s"])
        except Exception as error:  # protobuf and pytree have errors of their own
            raise ValueError(f"it can't be read: {error}") from error

    @contextlib.contextmanager
    def replacing_build(self, manager: Any, key: str) -> Iterator[None]:
        """The manager's first step takes this for its export and its gradient graph.

        A step that fails may owe it to the entry, which is removed then.
        """
        import onnx

        transition = importlib.import_module(f"{_PACKAGE}._graph_transition_manager")
        io_helper = importlib.import_module("onnxruntime.training.utils.torch_io_helper")
        owner = transition.GraphTransitionManager
        outputs = tuple(
            io_helper._TensorStub(**dict(zip(_STUB, stub, strict=True))) for stub in self._outputs
        )
        create = manager._create_execution_agent

        def export(**kwargs: Any) -> Any:
            return onnx.ModelProto(), outputs, self._inputs, self._with_gradient

        def build(config: Any) -> None:
            manager._onnx_models.optimized_model = self._graph
            manager._graph_info = SimpleNamespace(frontier_node_arg_map={}, **self._graph_info)
            # As `_training_manager.py`, `_build_graph`: each input's place among the gradients.
            places = iter(range(len(self._inputs)))
            wanted = set(self._with_gradient)
            manager._gradient_map = [next(places) if n in wanted else -1 for n in self._inputs]

        def create_session() -> None:
            if self._is_optimized:
                _create_unoptimized(manager, create)
            else:
                create()

        statics = {
            "_export_model": staticmethod(export),
            "_infer_shapes": staticmethod(lambda model: model),
        }
        methods = {
            "_initialize_graph_builder": lambda info: None,
            "_build_graph": build,
            "_create_execution_agent": create_session,
        }
        try:
            with replaced(owner, **statics), replaced(manager, **methods):
                yield
        except Exception as error:
            export_cache.discard(key, f"its first step failed with {error}")
            raise


def _read(result: dict[str, Any]) -> ResultSchema:
    deferred = result["deferred"]
    return ResultSchema(
        pytree.treespec_loads(result["spec"]),
        tuple((position, _constant_read(value)) for position, value in result["constants"]),
        deferred and (deferred[0], _dtype(deferred[1])),
    )


def _constant_read(value: Any) -> Any:
    return _dtype(value["dtype"]) if isinstance(value, dict) else value


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype

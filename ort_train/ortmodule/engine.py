"""One exported training graph of a module: built on its first call, then run step by step."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ort_train.ortmodule import upstream
from ort_train.ortmodule.cache import cached_graph, export_cache, trace_key
from ort_train.ortmodule.cache.described import UndescribableError
from ort_train.ortmodule.call import CallSchema
from ort_train.ortmodule.constants.constants import Constants
from ort_train.ortmodule.constants.read_values import ReadValues
from ort_train.ortmodule.explain import explained
from ort_train.ortmodule.export import (
    attention,
    gradients,
    layers_4bit,
    slices,
    splits,
    stop_gradient,
    symbolics,
    transformers_compat,
)
from ort_train.ortmodule.export.graph_module import (
    MODULE_PREFIX,
    GraphModule,
    buffers_kept,
    quiet_exporter,
    training_flags_kept,
    without_checkpointing,
)
from ort_train.ortmodule.kernels import attention_kernels, memory, openmp
from ort_train.ortmodule.module_state import ModuleState
from ort_train.ortmodule.options import OrtOptions
from ort_train.ortmodule.ort_module import construct, recomputes
from ort_train.ortmodule.passes import embeddings, graph_passes, products, quantized
from ort_train.ortmodule.sparse import sparsity

logger = logging.getLogger(__name__)


class Engine:
    """A training graph for one schema of calls.

    Args:
        module: holds the parameters and buffers.
        forward: the module's own forward.
        schema: the calls that this graph serves.
        options: how ONNX Runtime builds and runs it.
        precision: "fp32", or "bf16" for the matrix products of a graph on the CPU.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        forward: Callable[..., Any],
        schema: CallSchema,
        options: OrtOptions,
        precision: str = "fp32",
    ):
        self._options = options
        self._precision = precision
        self._graph_module = GraphModule(module, forward, schema, bool(options.label_sparsity))
        self._ort_module: Any = None
        self._is_stochastic = False
        self._recomputes_dropout = False
        #: The last forward recomputes dropout, and its backward hasn't run. ONNX Runtime seeds each
        #: Dropout when the session is built (`memory_optimizer.cc`), and the recomputed one draws
        #: from a generator of its own: after a forward without backward the two are out of step,
        #: and gradients would be those of other masks. Such a graph must not run again.
        self.awaits_backward = False
        self._state: ModuleState | None = None
        self._buffer_names: tuple[str, ...] = ()
        self._constants: Constants | None = None
        #: Seconds that export, gradient graph and session took.
        self.build_s = 0.0
        #: Those that a graph from the cache spared; None for one that was built.
        self.saved_s: float | None = None
        #: What the graph leaves out of a batch (sparsity.py).
        self.savings = sparsity.Savings()

    def __call__(
        self,
        tensors: tuple[torch.Tensor, ...],
        state: ModuleState,
        make_deferred: Callable[[torch.dtype], Any] | None = None,
    ) -> Any:
        """One training forward; the result is differentiable by torch's autograd.

        Args:
            tensors: the call's tensors, in the schema's order.
            state: of the module; other parameters and buffers than last time's are bound anew.
            make_deferred: what stands for logits that the graph doesn't compute.
        """
        named = dict(zip(self._graph_module.schema.names, tensors, strict=True))
        if self._options.allow_spinning and self._is_on_cpu:
            openmp.quiet()
        if self._ort_module is None:
            outputs = self._build_and_run(named)
            self._graph_module.decisions.hold(tensors)
            self._state = state
        else:
            if state is not self._state:
                self._bind(state)
            if self._is_stochastic:
                self._seed()
            outputs = self._ort_module(**named)
        if self._recomputes_dropout:
            self._await_backward(outputs)
        schema = self._graph_module.result_schema
        assert schema is not None
        return schema.rebuild(tuple(outputs), make_deferred)

    def _await_backward(self, outputs: tuple[torch.Tensor, ...]) -> None:
        self.awaits_backward = True

        def began(gradient: torch.Tensor) -> None:
            self.awaits_backward = False

        for output in outputs:
            if output.requires_grad:
                output.register_hook(began)

    def _bind(self, state: ModuleState) -> None:
        """ORTModule keeps the parameter and buffer objects of its first step; follow changes."""
        info = self._training_manager._graph_transition_manager._post_export_processed_model_info
        if self._state is None or state.parameter_ids != self._state.parameter_ids:
            info._buffer_for_ort_runs = None
            layers_4bit.bind_scales(self._graph_module, self._graph_module.module)
        else:
            for name in self._buffer_names:
                info._buffer_for_ort_runs[MODULE_PREFIX + name] = state.buffers[name]
        self._state = state

    def decided_otherwise(self, tensors: tuple[torch.Tensor, ...]) -> str | None:
        """The line whose outcome isn't the graph's for a batch of these sizes, or None.

        Args:
            tensors: the call's tensors, in the schema's order.
        """
        return self._graph_module.decisions.differing(tensors)

    def changed_constant(self, buffers: Mapping[str, torch.Tensor]) -> str | None:
        """What is constant in the graph and isn't what it was, in words, or None.

        Args:
            buffers: of the module, by name.
        """
        return None if self._constants is None else self._constants.changed(buffers)

    @staticmethod
    def _seed() -> None:
        """ONNX Runtime's generator follows torch's, so a restored RNG state restores dropout."""
        onnxruntime = importlib.import_module("onnxruntime")
        onnxruntime.set_seed(Engine._draw_seed())

    @staticmethod
    def _draw_seed() -> int:
        return int(torch.randint(2**31 - 1, (), device="cpu"))

    @property
    def is_stochastic(self) -> bool:
        """Whether a second run of the same call gives other numbers."""
        return self._is_stochastic

    def end_profiling(self) -> tuple[Path, Any]:
        """The file of what OrtOptions.profile_prefix asked for, whole now, and the graph that ran.

        Returns:
            path; onnx.GraphProto of forward and backward
        """
        session = self._training_manager._execution_agent._inference_session
        graph = self._training_manager._onnx_models.optimized_model.graph
        return Path(session.end_profiling()), graph

    @property
    def _training_manager(self) -> Any:
        return self._ort_module._torch_module._execution_manager(True)

    def _build_and_run(self, named: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        started = time.perf_counter()
        module = self._graph_module.module
        key = self._cache_key(tuple(named.values()))
        if self._options.keep_freed_memory:
            memory.keep_freed()
            weakref.finalize(self, memory.release)
        if self._options.profile_prefix is not None:
            memory.keep_all()
        with (
            # Upstream restores the random state of the current device, which a trace draws from.
            contextlib.nullcontext() if self._is_on_cpu else torch.cuda.device(self._device),
            training_flags_kept(module),
            without_checkpointing(module) as recompute_asked,
        ):
            options = self._options
            if recompute_asked and options.recompute == "none" and not options.recompute_config:
                options = replace(options, recompute="layerwise")
                logger.info("gradient checkpointing is on: ONNX Runtime recomputes layer by layer")
            rng_state = torch.get_rng_state()
            values = ReadValues(module, self._graph_module.module_forward)
            with upstream.export_scope(options, self._transform), quiet_exporter():
                with training_flags_kept(module):  # upstream's constructor calls train()
                    self._ort_module = construct(self._graph_module, options, self._is_on_cpu)
                symbolics.register(options.onnx_opset_version)
                gradients.register()
                embeddings.register()
                graph_passes.register()
                self._seed()
                try:
                    with (
                        self._cached(key, options, started, values),
                        self._export_scope(options, named.values()),
                    ):
                        outputs = self._ort_module(**named)
                except Exception as error:
                    self._ort_module = None
                    torch.set_rng_state(rng_state)
                    who = f"backend 'ort' can't train {type(module).__name__}"
                    types = {parameter.dtype for parameter in module.parameters()}
                    raise explained(error, who, torch.float64 in types) from error
        self._note_randomness(recomputes(options), rng_state)
        self._note_constants(values)
        self.build_s = time.perf_counter() - started
        if self.saved_s is None:
            logger.info("built a training graph for %s in %.1f s", self._name, self.build_s)
        return outputs

    @contextlib.contextmanager
    def _export_scope(
        self, options: OrtOptions, tensors: Collection[torch.Tensor]
    ) -> Iterator[None]:
        """How this module's layers, products and attention are exported meanwhile.

        Args:
            tensors: of the first batch.
        """
        module = self._graph_module.module
        is_attention_faster = self._is_on_cpu and (
            bool(options.padding_sparsity) or attention_kernels.is_faster(self._precision, tensors)
        )
        with (
            buffers_kept(module),
            transformers_compat.export_scope(module),
            quantized.export_scope(module, options.onnx_opset_version),
            products.export_scope(
                options.products, self._precision, options.keep_rounded_weights, tensors
            ),
            attention.export_scope(
                options.attention,
                is_faster=is_attention_faster,
                # It has to find attention's products in the graph.
                is_free=not recomputes(options),
            ),
        ):
            yield

    def _note_randomness(self, has_recompute: bool, rng_state: torch.Tensor) -> None:
        """Whether the graph draws random numbers, and from which generators.

        Args:
            has_recompute: whether it computes activations again in backward.
            rng_state: torch's, before the build.
        """
        random = cached_graph.random_operators(self._training_manager)
        self._is_stochastic = bool(random)
        if once := random & cached_graph.SEEDED_ONCE:
            logger.warning(
                "ONNX Runtime seeds %s when a graph is built: the noise follows torch's seed from "
                "run to run, but a resumed run draws other than one that goes on",
                ", ".join(sorted(once)),
            )
        self._recomputes_dropout = self._is_stochastic and has_recompute
        if self._recomputes_dropout:
            logger.warning(
                "dropout is recomputed by ONNX Runtime, which seeds its masks once: they follow "
                "torch's seed from run to run, but a resumed run draws others than one that goes on"
            )
        # A graph without randomness leaves torch's stream alone, another draws one number a step.
        torch.set_rng_state(rng_state)
        if self._is_stochastic:
            self._draw_seed()

    def _note_constants(self, values: ReadValues) -> None:
        transition = self._training_manager._graph_transition_manager
        graph_inputs = set(transition._exported_model_info.onnx_graph_input_names)
        buffers = dict(self._graph_module.module.named_buffers())
        self._buffer_names = tuple(n for n in buffers if MODULE_PREFIX + n in graph_inputs)
        constant = {name: b for name, b in buffers.items() if name not in self._buffer_names}
        self._constants = Constants(values, constant)

    @property
    def _name(self) -> str:
        return type(self._graph_module.module).__name__

    def _cache_key(self, tensors: tuple[torch.Tensor, ...]) -> str | None:
        """What the graph of a first call is cached by, or None where it isn't."""
        if not self._options.export_cache or export_cache.is_off():
            return None
        part = self._graph_module
        try:
            return trace_key.key_of(
                part.module,
                part.module_forward,
                part.schema,
                tensors,
                self._options,
                self._precision,
            )
        except UndescribableError as error:
            logger.info("the training graph of %s isn't cached: %s", self._name, error)
        except Exception as error:  # of objects that can't even be looked at; training can go on
            logger.warning("the training graph of %s isn't cached: %r", self._name, error)
        return None

    @contextlib.contextmanager
    def _cached(
        self, key: str | None, options: OrtOptions, started: float, values: ReadValues
    ) -> Iterator[None]:
        """A first step meanwhile takes its graph from the cache, or puts it there."""
        if key is None:
            yield
            return
        manager = self._training_manager
        can_optimize = self._is_on_cpu and not recomputes(options)
        with export_cache.locked(key) as is_usable:
            built = cached_graph.read(key) if is_usable else None
            if built is not None:
                with built.replacing_build(manager, key):
                    yield
                self._graph_module.result_schema = built.found.result_schema
                self._graph_module.decisions = built.found.decisions
                self.savings = built.found.savings
                self.saved_s = max(0.0, built.build_s - (time.perf_counter() - started))
                logger.info(
                    "took the training graph of %s from the cache, which saves %.1f s of %.1f s",
                    self._name,
                    self.saved_s,
                    built.build_s,
                )
                return
            with cached_graph.optimized_once(manager, is_usable and can_optimize):
                yield
            if is_usable and (written := values.changed()) is not None:
                # Without a trace it would keep its value, and change in the next call in eval mode.
                logger.info(
                    "the training graph of %s isn't cached: its forward writes %s",
                    self._name,
                    written,
                )
            elif is_usable:
                schema = self._graph_module.result_schema
                assert schema is not None
                found = cached_graph.Found(schema, self.savings, self._graph_module.decisions)
                build_s = time.perf_counter() - started
                cached_graph.keep(key, manager, found, build_s, self._name)

    @property
    def _is_on_cpu(self) -> bool:
        return self._device.type == "cpu"

    @functools.cached_property
    def _device(self) -> torch.device:
        """The GPU's where module or call has a tensor on one: a call may have numbers beside."""
        part = self._graph_module
        devices = [device for _, _, device, _ in part.schema.tensors]
        devices += [parameter.device for parameter in part.module.parameters()]
        return next((each for each in devices if each.type != "cpu"), torch.device("cpu"))

    def _transform(self, model: Any) -> None:
        """Change the exported graph before its gradient is built: what must see the exporter's own
        nodes first."""
        options, schema = self._options, self._graph_module.schema
        trainable = frozenset(
            f"{MODULE_PREFIX}{name}"
            for name, parameter in self._graph_module.module.named_parameters(
                remove_duplicate=False
            )
            if parameter.requires_grad
        )
        inputs = zip(schema.names, schema.tensors, strict=True)
        given = {name for name, (*_, requires_grad) in inputs if requires_grad}
        splits.apply(model.graph)
        stop_gradient.apply(model.graph, trainable | given)
        if options.label_sparsity or options.padding_sparsity:
            self.savings = sparsity.apply(
                model.graph,
                labels=bool(options.label_sparsity),
                padding=bool(options.padding_sparsity),
                trainable=trainable,
            )
        slices.apply(model.graph)

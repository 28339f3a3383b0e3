"""Running an exported decoder: a prompt, then one token at a time, with the cache kept in place.

Shapes as suffixes: B rows of the batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ort_train.errors import ExportError, GenerationError
from ort_train.inference.folder import ExportedModel, cache_names

_DEVICE = "cpu"
_MAX_THREADS = 1024  # more than any machine's cores; ONNX Runtime would start them all


def default_num_threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


class DecoderSession:
    """An exported model, loaded into ONNX Runtime on the CPU.

    Args:
        num_threads: of matrix products and attention; None: one a core.
        options: onnxruntime.SessionOptions to start from.

    Raises:
        ExportError: ONNX Runtime can't load the graph.
    """

    def __init__(self, model: ExportedModel, num_threads: int | None = None, options: Any = None):
        import onnxruntime as ort

        if num_threads is not None and not 1 <= num_threads <= _MAX_THREADS:
            raise GenerationError(f"num_threads {num_threads} should be from 1 to {_MAX_THREADS}")
        if options is None:
            options = ort.SessionOptions()
            # Of each constant in fp16 it warns that it can't compute it beforehand.
            options.log_severity_level = 3
        options.intra_op_num_threads = num_threads or default_num_threads()
        options.inter_op_num_threads = 1
        self.model = model
        try:
            self.session = ort.InferenceSession(
                str(model.model_file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own types share no public base
            raise ExportError(f"ONNX Runtime can't load {str(model.path)!r}: {error}") from error

    def start(self, prompts: Sequence[Sequence[int]], capacity: int) -> Decoding:
        """Run the prompts, of any lengths.

        Args:
            prompts: token ids of each row, without padding.
            capacity: tokens that each row may come to have, prompt included; the cache's size.

        Raises:
            GenerationError: an empty prompt, an unknown token, or a capacity that is too small, or
                larger than the model has positions.
        """
        self._check(prompts, capacity)
        return Decoding(self, prompts, capacity)

    def _check(self, prompts: Sequence[Sequence[int]], capacity: int) -> None:
        info = self.model.info
        lengths = [len(prompt) for prompt in prompts]
        if not lengths or not min(lengths):
            raise GenerationError("a prompt has no token: give each row one at least")
        if max(lengths) > capacity:
            raise GenerationError(
                f"a cache for {capacity} tokens is too small for a prompt of {max(lengths)}: it "
                "should be as long as the longest prompt and the tokens to generate"
            )
        if info.max_positions is not None and capacity > info.max_positions:
            raise GenerationError(
                f"{max(lengths)} tokens of prompt and {capacity - max(lengths)} to generate exceed "
                f"max_position_embeddings {info.max_positions} of the model: shorten the prompt, "
                "or generate fewer"
            )
        _check_tokens(min(map(min, prompts)), max(map(max, prompts)), info.vocab_size)


class Decoding:
    """A batch being generated.

    Attributes:
        logits: (B, V), float32, of each row's last token. Overwritten by the next step.
    """

    def __init__(self, session: DecoderSession, prompts: Sequence[Sequence[int]], capacity: int):
        self._session = session.session
        self._info = session.model.info
        self._capacity = capacity
        self._lengths = np.array([len(prompt) for prompt in prompts])
        batch_size, width = len(prompts), int(self._lengths.max())
        self.logits = np.empty((batch_size, self._info.vocab_size), np.float32)
        self._bindings = self._session.io_binding()
        self._bindings.bind_output(
            "logits", _DEVICE, 0, np.float32,
            (batch_size, 1, self._info.vocab_size), self.logits.ctypes.data,
        )  # fmt: skip
        self._past = cache_names("past_key_values", self._info.num_layers)
        self._present = cache_names("present", self._info.num_layers)
        self._buffers: list[Any] = []
        self._bind_cache(batch_size)
        # What is padded is masked, so that any token will do.
        tokens = np.zeros((batch_size, width), np.int64)
        self._mask = np.zeros((batch_size, capacity), np.int64)
        self._width = width
        for row, prompt in enumerate(prompts):
            start = 0 if self._is_right_padded else width - len(prompt)
            tokens[row, start : start + len(prompt)] = prompt
            self._mask[row, start : start + len(prompt)] = 1
        mask = self._mask[:, :width]
        self._run(tokens, np.maximum(mask.cumsum(1) - 1, 0))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row so far."""
        return self._lengths.tolist()

    def step(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Append one token to each row.

        Args:
            tokens: (B,).

        Returns:
            `logits`.

        Raises:
            GenerationError: the cache is full, or these are no tokens of the model for its rows.
        """
        tokens = np.asarray(tokens, np.int64)
        if tokens.shape != self._lengths.shape:
            raise GenerationError(
                f"tokens of shape {tokens.shape} should be one for each of {len(self._lengths)} "
                "rows"
            )
        # ONNX Runtime would take a negative one as counted from the vocabulary's end.
        _check_tokens(int(tokens.min()), int(tokens.max()), self._info.vocab_size)
        if self._width == self._capacity:
            raise GenerationError(
                f"the cache is full: it was made for {self._capacity} tokens, prompt included"
            )
        if self._is_right_padded:
            self._mask[np.arange(len(self._lengths)), self._lengths] = 1
        else:
            self._mask[:, self._width] = 1
        positions = self._lengths[:, None].astype(np.int64)
        self._width += 1
        self._lengths += 1
        self._run(tokens[:, None], positions)
        return self.logits

    @property
    def _is_right_padded(self) -> bool:
        return self._info.padding_side == "right"

    def _bind_cache(self, batch_size: int) -> None:
        import onnxruntime as ort

        dtype = np.dtype(self._info.cache_dtype)
        length = self._capacity if self._info.shares_buffer else 0
        shape = (batch_size, self._info.num_kv_heads, length, self._info.head_dim)
        for past, present in zip(self._past, self._present, strict=True):
            # Zeros: what is masked is multiplied by 0, and 0 x NaN is NaN. The value is kept, as it
            # holds the array, and a binding only its address.
            buffer = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), _DEVICE)
            self._buffers.append(buffer)
            self._bindings.bind_ortvalue_input(past, buffer)
            if self._info.shares_buffer:
                self._bindings.bind_ortvalue_output(present, buffer)
            else:
                self._bindings.bind_output(present, _DEVICE)

    def _run(self, tokens: np.ndarray, positions: np.ndarray) -> None:
        bindings = self._bindings
        # Kept until they are used: a binding is an address. The mask is a copy of a few numbers, as
        # the whole mask's rows are longer.
        inputs = {"input_ids": tokens, "attention_mask": self._mask[:, : self._width].copy()}
        if "position_ids" in self._info.inputs:
            inputs["position_ids"] = positions
        for name, value in inputs.items():
            bindings.bind_cpu_input(name, value)
        self._session.run_with_iobinding(bindings)
        if not self._info.shares_buffer:
            values = dict(zip(self._info.outputs, bindings.get_outputs(), strict=True))
            for past, present in zip(self._past, self._present, strict=True):
                bindings.bind_ortvalue_input(past, values[present])
                bindings.bind_output(present, _DEVICE)


def _check_tokens(lowest: int, highest: int, vocab_size: int) -> None:
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise GenerationError(
            f"token {wrong} is outside the model's vocabulary of {vocab_size}: was the prompt made "
            "with another tokenizer?"
        )

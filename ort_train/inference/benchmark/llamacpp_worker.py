"""One case of a benchmark of generation, run by llama.cpp in its own environment.

Needs llama-cpp-python and numpy, and of this package only what needs the standard library alone.
Other requests and replies than those of `worker.py` there are none.
"""

from __future__ import annotations

import ctypes
import sys
import time
from typing import Any

import numpy as np

from ort_train.bench.serve import peak_resident_gib, serve
from ort_train.inference.benchmark.engines import EXTRA_PROMPTS


class LlamaCppSession:
    """Prompts and greedy generation through llama.cpp's C interface.

    Args:
        engine: its name.
        model: a GGUF file.
        prompts: .npy file of token ids, (B, T).
        new_tokens: generated after each prompt.
        threads: None: one a core.
        outputs: .npz file to write logits and tokens to.
    """

    def __init__(
        self,
        engine: str,
        model: str,
        prompts: str,
        new_tokens: int,
        threads: int | None,
        outputs: str,
    ):
        import os

        import llama_cpp

        self.began = time.perf_counter()
        self.api = llama_cpp
        self.prompts = np.load(prompts)
        self.new_tokens = new_tokens
        self.outputs = outputs
        self.num_threads = threads or len(os.sched_getaffinity(0))
        num_rows, length = self.prompts.shape
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), parameters)
        if not self.model:
            raise RuntimeError(f"llama.cpp can't load {model}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = num_rows * (length + new_tokens)
        context.n_batch = max(num_rows * length, 1)
        context.n_seq_max = num_rows
        context.n_threads = context.n_threads_batch = self.num_threads
        context.no_perf = True
        if engine.endswith("f32"):
            # Its cache is f16 by default.
            context.type_k = context.type_v = llama_cpp.GGML_TYPE_F32
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        if not self.context:
            raise RuntimeError("llama.cpp can't make a context of this size")
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.batch = llama_cpp.llama_batch_init(num_rows * length, 0, 1)

    def start(self) -> dict[str, Any]:
        logits, tokens, _, _ = self._generate()
        np.savez(self.outputs, logits=logits, tokens=tokens)
        return {
            "load_s": time.perf_counter() - self.began,
            "threads": self.num_threads,
            "engine_version": self.api.__version__,
        }

    def round(self) -> dict[str, Any]:
        prompts_s = []
        for _ in range(EXTRA_PROMPTS):
            began = time.perf_counter()
            self._prompt()
            prompts_s.append(time.perf_counter() - began)
        _, _, prompt_s, generate_s = self._generate()
        return {"prompt_s": [*prompts_s, prompt_s], "generate_s": [generate_s]}

    def finish(self) -> dict[str, Any]:
        return {"peak_gib": peak_resident_gib()}

    def _generate(self) -> tuple[np.ndarray, np.ndarray, float, float]:
        """Logits after the prompts (B, V), generated tokens (B, N), seconds of both."""
        num_rows, length = self.prompts.shape
        generated = np.empty((num_rows, self.new_tokens), np.int64)
        began = time.perf_counter()
        logits = self._prompt()
        first = logits.copy()
        halfway = time.perf_counter()
        tokens = logits.argmax(1)
        for step in range(self.new_tokens):
            generated[:, step] = tokens
            self._decode(tokens[:, None], length + step)
            tokens = self._logits(range(num_rows)).argmax(1)
        ended = time.perf_counter()
        return first, generated, halfway - began, ended - halfway

    def _prompt(self) -> np.ndarray:
        """Run the prompts with an empty cache; logits of each row's last token, (B, V)."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        num_rows, length = self.prompts.shape
        self._decode(self.prompts, 0)
        return self._logits([(row + 1) * length - 1 for row in range(num_rows)])

    def _decode(self, tokens: np.ndarray, position: int) -> None:
        """Tokens (B, T) of all rows in one batch, row after row; logits of each row's last."""
        batch, (num_rows, length) = self.batch, tokens.shape
        batch.n_tokens = num_rows * length
        index = 0
        for row in range(num_rows):
            for offset in range(length):
                batch.token[index] = int(tokens[row, offset])
                batch.pos[index] = position + offset
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = row
                batch.logits[index] = offset == length - 1
                index += 1
        if self.api.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def _logits(self, indices: Any) -> np.ndarray:
        rows = []
        for index in indices:
            pointer = self.api.llama_get_logits_ith(self.context, index)
            floats = ctypes.POINTER(ctypes.c_float)
            array = ctypes.cast(pointer, floats)
            rows.append(np.ctypeslib.as_array(array, shape=(self.vocab_size,)))
        return np.stack(rows)


if __name__ == "__main__":
    sys.exit(serve(LlamaCppSession))

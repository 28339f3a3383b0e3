"""One case of a benchmark of generation in a fresh process: PyTorch or ONNX Runtime.

Answers what `bench.process.Worker` asks:
    prepare  load the model; one prompt and generation, whose logits and tokens go to a file
    round    a prompt and a generation, timed
    finish   peak memory; the process ends after it

Shapes as suffixes: B rows of the batch, T tokens of a prompt, N new tokens, V vocabulary.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

from ort_train.bench.serve import peak_resident_gib, serve
from ort_train.inference.benchmark.engines import ENGINES, EXTRA_PROMPTS

#: Eager's highest logits of each step that are kept for the comparison of tokens.
NUM_CANDIDATES = 32


def make_session(
    engine: str,
    model: str,
    prompts: str,
    new_tokens: int,
    threads: int | None,
    outputs: str,
) -> _Session:
    """The session of an engine.

    Args:
        engine: a name of `ENGINES`.
        model: a transformers folder, or an exported one.
        prompts: .npy file of token ids, (B, T).
        new_tokens: N, generated after each prompt.
        threads: None: the library's own choice.
        outputs: .npz file to write logits and tokens to.
    """
    began = time.perf_counter()
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    session_class = _OrtSession if ENGINES[engine].runs_in == "ort" else _TorchSession
    session = session_class(engine, model, np.load(prompts), new_tokens, threads)
    session.began, session.outputs = began, outputs
    return session


class _Session:
    """What is the same for both."""

    began: float
    outputs: str
    num_threads: int

    def __init__(self, prompts_BT: np.ndarray, new_tokens: int):
        self.prompts_BT = prompts_BT
        self.new_tokens = new_tokens

    def prompt(self) -> np.ndarray:
        """Run the prompts with an empty cache; logits of each row's last token, (B, V)."""
        raise NotImplementedError

    def step(self, tokens_B: np.ndarray) -> np.ndarray:
        """Append a token to each row; the next logits, (B, V)."""
        raise NotImplementedError

    def start(self) -> dict[str, Any]:
        size = (*self.prompts_BT.shape[:1], self.new_tokens, NUM_CANDIDATES)
        candidates, values = np.zeros(size, np.int64), np.zeros(size, np.float32)

        def note(step: int, logits_BV: np.ndarray) -> None:
            kept = min(NUM_CANDIDATES, logits_BV.shape[1])
            best = np.argpartition(-logits_BV, kept - 1, axis=1)[:, :kept]
            candidates[:, step, :kept] = best
            values[:, step, :kept] = np.take_along_axis(logits_BV, best, 1)

        logits_BV, tokens_BN, _, _ = self._generate(note)
        np.savez(
            self.outputs, logits=logits_BV, tokens=tokens_BN, candidates=candidates, values=values
        )
        return {"load_s": time.perf_counter() - self.began, "threads": self.num_threads}

    def round(self) -> dict[str, Any]:
        # A prompt takes a moment, which a disturbance can fill: its time is the median of several.
        prompts_s = []
        for _ in range(EXTRA_PROMPTS):
            began = time.perf_counter()
            self.prompt()
            prompts_s.append(time.perf_counter() - began)
        _, _, prompt_s, generate_s = self._generate(None)
        return {"prompt_s": [*prompts_s, prompt_s], "generate_s": [generate_s]}

    def finish(self) -> dict[str, Any]:
        return {"peak_gib": peak_resident_gib()}

    def _generate(self, note: Any) -> tuple[np.ndarray, np.ndarray, float, float]:
        """Logits after the prompts, generated tokens, seconds of both."""
        tokens_BN = np.empty((len(self.prompts_BT), self.new_tokens), np.int64)
        began = time.perf_counter()
        logits_BV = self.prompt()
        halfway = time.perf_counter()
        first_BV = logits_BV.copy()
        for step in range(self.new_tokens):
            if note is not None:
                note(step, logits_BV)
            tokens_BN[:, step] = logits_BV.argmax(1)
            logits_BV = self.step(tokens_BN[:, step])
        return first_BV, tokens_BN, halfway - began, time.perf_counter() - halfway


class _OrtSession(_Session):
    def __init__(
        self,
        engine: str,
        model: str,
        prompts_BT: np.ndarray,
        new_tokens: int,
        threads: int | None,
    ):
        from ort_train.inference.folder import load_folder
        from ort_train.inference.generation.session import DecoderSession, default_num_threads

        super().__init__(prompts_BT, new_tokens)
        self.num_threads = threads or default_num_threads()
        self.session = DecoderSession(load_folder(model), self.num_threads)
        self.capacity = prompts_BT.shape[1] + new_tokens

    def prompt(self) -> np.ndarray:
        self.decoding = self.session.start(self.prompts_BT.tolist(), self.capacity)
        return self.decoding.logits

    def step(self, tokens_B: np.ndarray) -> np.ndarray:
        return self.decoding.step(tokens_B)


class _TorchSession(_Session):
    """transformers' model, its forward called as `generate` does, without what else that does."""

    def __init__(
        self,
        engine: str,
        model: str,
        prompts_BT: np.ndarray,
        new_tokens: int,
        threads: int | None,
    ):
        import torch
        from transformers import AutoModelForCausalLM, StaticCache

        super().__init__(prompts_BT, new_tokens)
        self.num_threads = torch.get_num_threads()
        dtype = getattr(torch, ENGINES[engine].weights)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self.forward: Any = self.model
        self.static_cache: Any = None
        if engine == "compile":
            from ort_train.backends import available
            from ort_train.errors import BackendUnavailableError

            can_run, reason = available("compile")
            if not can_run:
                raise BackendUnavailableError(reason)
            # One for all runs: for a new one everything would be compiled anew.
            self.static_cache = StaticCache(
                config=self.model.config, max_cache_len=prompts_BT.shape[1] + new_tokens
            )
            self.forward = torch.compile(self.model)

    def prompt(self) -> np.ndarray:
        import torch
        from transformers import DynamicCache

        if self.static_cache is None:
            self.cache: Any = DynamicCache(config=self.model.config)
        else:
            self.cache = self.static_cache
            # Its tensors were made in inference mode, and may be changed in no other.
            with torch.inference_mode():
                self.cache.reset()
        return self._run(self.prompts_BT)

    def step(self, tokens_B: np.ndarray) -> np.ndarray:
        return self._run(tokens_B[:, None])

    def _run(self, tokens_BT: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            output = self.forward(
                input_ids=torch.from_numpy(tokens_BT),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[:, -1].float().numpy()


if __name__ == "__main__":
    sys.exit(serve(make_session))

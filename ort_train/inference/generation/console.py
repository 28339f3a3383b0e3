"""`ort-train generate`: prompts from the command line, text to the terminal."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from ort_train.errors import GenerationError
from ort_train.inference.generation.generate import OrtGenerator

_DEFAULT_NEW_TOKENS = 128
_DEFAULT_LENGTH = 20  # of transformers before 5, whose configs always have one
_SAMPLING = ("temperature", "top_k", "top_p", "seed")


def generate(args: argparse.Namespace) -> None:
    """Run the command; its speed goes to stderr, apart from the text.

    Raises:
        GenerationError: options that contradict one another, or prompts that can't be continued.
    """
    prompts = _prompts(args.prompt)
    options = _options(args)
    generator = OrtGenerator(args.folder, args.threads)
    tokenizer: Any = generator.tokenizer
    rows = [_encode(tokenizer, prompt, args.chat) for prompt in prompts]
    streamer = None
    if len(rows) == 1:
        from transformers import TextStreamer

        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    started = time.perf_counter()
    options |= _length(args.max_new_tokens, generator, max(map(len, rows)))
    ids = generator.generate(rows, streamer=streamer, seed=args.seed, **options)
    seconds = time.perf_counter() - started
    answers = ids[:, max(map(len, rows)) :]
    if streamer is None:
        for prompt, answer in zip(prompts, answers, strict=True):
            print(f"--- {prompt}\n{tokenizer.decode(answer, skip_special_tokens=True)}\n")
    rate = answers.numel() / seconds
    print(
        f"{len(rows)} x {answers.shape[1]} tokens in {seconds:.2f} s, prompts of "
        f"{', '.join(str(len(row)) for row in rows)} tokens included: {rate:.1f} tokens/s",
        file=sys.stderr,
    )


def _prompts(given: list[str] | None) -> list[str]:
    if not given:
        raise GenerationError('nothing to continue: pass --prompt "some text", or --prompt -')
    if given.count("-") > 1:
        raise GenerationError("--prompt - reads all of stdin: give it once")
    try:
        prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in given]
        for prompt in prompts:
            prompt.encode()  # bytes that are no UTF-8 are in it as surrogates
    except UnicodeError as error:
        raise GenerationError(f"a prompt isn't UTF-8: {error}") from None
    return prompts


def _options(args: argparse.Namespace) -> dict[str, Any]:
    sampling = {name: getattr(args, name) for name in _SAMPLING if getattr(args, name) is not None}
    if args.greedy and sampling:
        names = ", ".join("--" + name.replace("_", "-") for name in sampling)
        raise GenerationError(f"--greedy draws nothing, so {names} would be ignored: leave one out")
    sampling.pop("seed", None)  # an argument of its own
    options = dict(sampling)
    if args.greedy:
        options["do_sample"] = False
    elif sampling or args.seed is not None:
        options["do_sample"] = True
    if args.repetition_penalty is not None:
        options["repetition_penalty"] = args.repetition_penalty
    if args.stop:
        options["stop_strings"] = args.stop
    return options


def _length(given: int | None, generator: OrtGenerator, longest: int) -> dict[str, int]:
    """How much to generate; nothing where the folder's own config says it."""
    if given is not None:
        return {"max_new_tokens": given}
    config, limit = generator.generation_config, generator.info.max_positions
    if config.max_new_tokens is not None or config.max_length not in (None, _DEFAULT_LENGTH):
        return {}
    room = _DEFAULT_NEW_TOKENS if limit is None else max(1, limit - longest)
    return {"max_new_tokens": min(_DEFAULT_NEW_TOKENS, room)}


def _encode(tokenizer: Any, prompt: str, is_chat: bool) -> list[int]:
    if is_chat:
        if not tokenizer.chat_template:
            raise GenerationError("the tokenizer has no chat template: leave out --chat")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
    # A template writes the special tokens itself.
    row: list[int] = tokenizer(prompt, add_special_tokens=not is_chat)["input_ids"]
    if not row and tokenizer.bos_token_id is not None:
        row = [tokenizer.bos_token_id]
    if not row:
        raise GenerationError(
            "an empty prompt, and the model has no token to begin with: write one"
        )
    return row

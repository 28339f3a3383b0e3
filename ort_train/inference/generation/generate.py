"""Generating text from an exported model, with the arguments of transformers' `generate`.

Shapes as suffixes: B rows of the batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ort_train.errors import GenerationError
from ort_train.inference.folder import load_folder, read_generation_config
from ort_train.inference.generation.sampling import (
    Sampling,
    make_processors,
    merge_options,
    padding_token,
    resolve,
)
from ort_train.inference.generation.session import DecoderSession, Decoding

if TYPE_CHECKING:
    from transformers import (
        GenerationConfig,
        LogitsProcessorList,
        PretrainedConfig,
        PreTrainedTokenizerBase,
        StoppingCriteriaList,
    )
    from transformers.generation.streamers import BaseStreamer


class OrtGenerator:
    """An exported folder, loaded to generate.

    Args:
        folder: written by `ort-train export` or `ort-train quantize`.
        num_threads: None: one a core.

    Raises:
        ExportError: no exported model, or a damaged one.
    """

    def __init__(self, folder: str | Path, num_threads: int | None = None):
        self._session = DecoderSession(load_folder(folder), num_threads)
        self.info = self._session.model.info

    @functools.cached_property
    def config(self) -> PretrainedConfig:
        """transformers' config."""
        return self._session.model.load_config()

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the model."""
        return self._session.model.load_tokenizer()

    @functools.cached_property
    def generation_config(self) -> GenerationConfig:
        """Defaults of `generate`: generation_config.json, special tokens from config.json."""
        from transformers import GenerationConfig

        found = read_generation_config(self._session.model.path) or GenerationConfig()
        text_config = self.config.get_text_config()
        for name in ("eos_token_id", "pad_token_id"):
            if getattr(found, name) is None:
                setattr(found, name, getattr(text_config, name, None))
        return found

    def generate(
        self,
        inputs: torch.Tensor | Sequence[Sequence[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        streamer: BaseStreamer | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Continue prompts.

        Args:
            inputs: token ids (B, T), padded on either side; or a list of rows without padding.
            attention_mask: (B, T), 1 for the tokens of a row and 0 for its padding. None: what is
                `pad_token_id` is padding, unless that ends a text, too: then none is.
            logits_processor: applied where transformers does: after penalties and bans, before
                temperature and the cuts of sampling.
            stopping_criteria: asked after each token.
            streamer: gets the prompt, then each token.
            input_ids: `inputs`, by its other name.
            tokenizer: for stop_strings; None: the folder's own.
            seed: of sampling; None: torch's random generator goes on.
            options: of transformers' generate, those in `sampling.OPTIONS`.

        Returns:
            (B, T + new tokens), int64: the inputs as they were given (rows of a list: padded on
            the left), then what was generated, padded after a row's end.

        Raises:
            GenerationError: an option that isn't taken, or prompts that the model hasn't room for.
        """
        if inputs is not None and input_ids is not None:
            raise GenerationError("inputs and input_ids are two names of one thing: leave one out")
        config = merge_options(self.generation_config, generation_config, options)
        given_BT, prompts = _rows(
            input_ids if inputs is None else inputs, attention_mask, padding_token(config)
        )
        longest = max(map(len, prompts))
        width = longest if given_BT is None else given_BT.shape[1]
        sampling = resolve(config, width, longest, self.info.max_positions)
        generator = None if seed is None else _seeded(seed)
        # As wide as they were given: processors and criteria count the padding of all rows, too.
        ids_BT, starts = _left_padded(prompts, width, sampling)
        processors = make_processors(sampling, ids_BT[:, :width], starts, logits_processor or ())
        criteria = self._criteria(sampling, stopping_criteria, tokenizer)
        if given_BT is None:
            given_BT = ids_BT[:, :width]
        if streamer is not None:
            streamer.put(given_BT)
        # The last token's logits aren't needed, so it never enters the cache.
        decoding = self._session.start(prompts, longest + sampling.max_new_tokens - 1)
        end = width
        is_done = np.zeros(len(prompts), bool)
        while True:
            tokens = _choose(decoding, ids_BT[:, :end], processors, sampling, generator)
            tokens[is_done] = sampling.pad_token_id
            ids_BT[:, end] = torch.from_numpy(tokens)
            end += 1
            if streamer is not None:
                streamer.put(ids_BT[:, end - 1])
            is_done |= np.isin(tokens, sampling.eos_token_ids)
            if criteria:
                is_done |= criteria(ids_BT[:, :end], None).numpy()
            if is_done.all() or end == ids_BT.shape[1]:
                break
            decoding.step(tokens)
        if streamer is not None:
            streamer.end()
        return torch.cat([given_BT, ids_BT[:, width:end]], dim=1)

    def _criteria(
        self,
        sampling: Sampling,
        given: StoppingCriteriaList | None,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> StoppingCriteriaList:
        """Reasons to stop beside the length and the end of text."""
        from transformers import StoppingCriteriaList, StopStringCriteria

        criteria = StoppingCriteriaList(given or ())
        if strings := sampling.config.stop_strings:
            criteria.append(StopStringCriteria(tokenizer or self.tokenizer, strings))
        return criteria


def _choose(
    decoding: Decoding,
    ids_BT: torch.Tensor,
    processors: LogitsProcessorList,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> np.ndarray:
    """The next token of each row (B,)."""
    if not processors and not sampling.do_sample:
        return decoding.logits.argmax(-1)
    try:
        # A copy: a processor may write into it.
        scores_BV = processors(ids_BT, torch.from_numpy(decoding.logits).clone())
    except ValueError as error:  # some of transformers' look at their tokens only here
        raise GenerationError(f"a logits processor fails: {error}") from error
    if not sampling.do_sample:
        return scores_BV.argmax(-1).numpy()
    try:
        tokens_B1 = torch.multinomial(scores_BV.softmax(-1), 1, generator=generator)
    except RuntimeError as error:  # NaN
        raise GenerationError(
            f"there is no next token to draw: temperature {sampling.config.temperature!r} is too "
            "near 0 for the scores, or a processor of yours leaves no token"
        ) from error
    return tokens_B1.squeeze(1).numpy()


def _seeded(seed: int) -> torch.Generator:
    try:
        return torch.Generator().manual_seed(operator.index(seed))
    except (TypeError, ValueError) as error:
        raise GenerationError(
            f"seed {seed!r} should be a whole number from -2**63 to 2**64 - 1"
        ) from error


def _rows(
    inputs: torch.Tensor | Sequence[Sequence[int]] | None,
    attention_mask: torch.Tensor | None,
    padding_token: int | None,
) -> tuple[torch.Tensor | None, list[list[int]]]:
    """The inputs as a tensor (None for a list of rows), and each row without its padding."""
    if inputs is None:
        raise GenerationError("generate needs token ids: tokenizer(text, return_tensors='pt')")
    if not isinstance(inputs, torch.Tensor):
        if attention_mask is not None:
            raise GenerationError("a list of rows has no padding: leave out attention_mask")
        try:
            rows = [list(map(operator.index, row)) for row in inputs]
        except (TypeError, ValueError) as error:
            raise GenerationError(
                "token ids should be a tensor (batch, tokens) or a list of rows, not this "
                f"{type(inputs).__name__}: [[5, 6]] is one row, and what a tokenizer returns goes "
                "in as generate(**inputs)"
            ) from error
        _check_rows(rows)
        return None, rows
    if inputs.dim() != 2:
        raise GenerationError(f"token ids of shape {tuple(inputs.shape)} should be (batch, tokens)")
    if inputs.is_floating_point() or inputs.is_complex() or inputs.dtype == torch.bool:
        raise GenerationError(f"token ids are whole numbers, and these are {inputs.dtype}")
    if attention_mask is not None:
        attention_mask = torch.as_tensor(attention_mask)
    if attention_mask is None:
        rows = [[token for token in row if token != padding_token] for row in inputs.tolist()]
    elif attention_mask.shape != inputs.shape:
        raise GenerationError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, the token ids have "
            f"{tuple(inputs.shape)}"
        )
    else:
        rows = [row[mask.bool()].tolist() for row, mask in zip(inputs, attention_mask, strict=True)]
    _check_rows(rows)
    return inputs.long().cpu(), rows


def _check_rows(rows: list[list[int]]) -> None:
    if not rows or not all(rows):
        raise GenerationError("a prompt has no token: give each row one at least")


def _left_padded(
    prompts: list[list[int]], width: int, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, width + new tokens) with the prompts, and where each begins (B,)."""
    shape = (len(prompts), width + sampling.max_new_tokens)
    ids_BT = torch.full(shape, sampling.pad_token_id)
    starts = [width - len(prompt) for prompt in prompts]
    for row, prompt, start in zip(ids_BT, prompts, starts, strict=True):
        row[start:width] = torch.tensor(prompt)
    return ids_BT, torch.tensor(starts)

"""Choosing the next token: which options there are, and transformers' own processors for them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from ort_train.errors import GenerationError

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, LogitsProcessorList

#: Options of transformers' generate that are taken, with its meanings and defaults.
OPTIONS = (
    "max_new_tokens", "max_length", "min_new_tokens", "min_length", "do_sample", "temperature",
    "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size",
    "bad_words_ids", "suppress_tokens", "stop_strings", "eos_token_id", "pad_token_id",
)  # fmt: skip
# Say nothing about which tokens come out of one sequence a row.
_WITHOUT_EFFECT = (
    "bos_token_id", "decoder_start_token_id", "use_cache", "cache_implementation", "cache_config",
    "max_cache_len", "compile_config", "disable_compile", "early_stopping", "length_penalty",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind",
    "transformers_version",
)  # fmt: skip
# Values, beside None and False, with which an option that isn't taken changes nothing.
_NEUTRAL: dict[str, float] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "diversity_penalty": 0.0,
    "encoder_no_repeat_ngram_size": 0,
}
_WHOLE_NUMBERS = ("max_new_tokens", "max_length", "min_new_tokens", "min_length", "pad_token_id")
# Numbers, by name: whether only sampling reads them, what holds for them, and that in words.
_RULES: dict[str, tuple[bool, Callable[[Any], bool], str]] = {
    "temperature": (True, lambda v: v > 0, "above 0 (greedy: do_sample=False, or --greedy)"),
    "top_k": (True, lambda v: v >= 0, "0 (no limit) or more"),
    "top_p": (True, lambda v: 0 <= v <= 1, "from 0 to 1"),
    "min_p": (True, lambda v: 0 <= v <= 1, "from 0 to 1"),
    "typical_p": (True, lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "repetition_penalty": (False, lambda v: v > 0, "above 0"),
    "no_repeat_ngram_size": (False, lambda v: v >= 0, "0 (no limit) or more"),
    "min_length": (False, lambda v: v >= 0, "0 or more"),
    "min_new_tokens": (False, lambda v: v >= 0, "0 or more"),
}
_DEFAULT_NEW_TOKENS = 20  # transformers'
_DEFAULT_TOP_K = 50  # transformers'


@dataclass(frozen=True)
class Sampling:
    """Options of one generation, complete.

    Attributes:
        eos_token_ids: each of them ends a row.
        pad_token_id: follows a row that has ended.
    """

    config: GenerationConfig
    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int

    @property
    def do_sample(self) -> bool:
        return bool(self.config.do_sample)


def merge_options(
    defaults: GenerationConfig, given: GenerationConfig | None, options: Mapping[str, Any]
) -> GenerationConfig:
    """The options of one generation: those of the call, then of `given`, then the model's defaults.

    Raises:
        GenerationError: an option that isn't taken, or a value that can't be.
    """
    unknown = [name for name in options if name not in OPTIONS]
    if refused := [name for name in unknown if _has_effect(name, options[name])]:
        raise GenerationError(
            f"OrtGenerator.generate doesn't take {', '.join(refused)}; it takes "
            f"{', '.join(OPTIONS)}"
        )
    config = copy.deepcopy(defaults if given is None else given)
    if given is not None:
        for name, value in defaults.to_dict().items():
            if getattr(config, name, None) is None:
                setattr(config, name, value)
    if config.top_k is None:
        config.top_k = _DEFAULT_TOP_K  # before the call's: its None is no limit
    # A length of the call replaces both of the configs.
    if {"max_new_tokens", "max_length"} & set(options):
        config.max_new_tokens = config.max_length = None
    for name in OPTIONS:
        if name in options:
            setattr(config, name, options[name])
    _refuse_others(config)
    _check_ranges(config)
    return config


def padding_token(config: GenerationConfig) -> int | None:
    """The token that is padding in prompts without a mask, as transformers sees it; None: none."""
    pad = config.pad_token_id
    return None if pad is None or pad in _eos_token_ids(config) else int(pad)


def resolve(
    config: GenerationConfig, width: int, longest: int, max_positions: int | None
) -> Sampling:
    """The options of one generation, complete.

    Args:
        width: tokens of the prompts with their padding, from which max_length counts.
        longest: tokens of the longest prompt.

    Raises:
        GenerationError: lengths that the model hasn't.
    """
    eos_ids = _eos_token_ids(config)
    pad = config.pad_token_id
    if pad is None:
        pad = eos_ids[0] if eos_ids else 0
    return Sampling(
        config, _num_new_tokens(config, width, longest, max_positions), eos_ids, int(pad)
    )


def make_processors(
    sampling: Sampling,
    prompt_ids: torch.Tensor,
    starts: torch.Tensor,
    given: Sequence[Any] = (),
) -> LogitsProcessorList:
    """transformers' processors, in the order in which its generate applies them.

    Args:
        prompt_ids: (B, T), padded on the left.
        starts: (B,), where each row's own tokens begin.
        given: the caller's, which come before temperature and the cuts of sampling.

    Raises:
        GenerationError: a value that a processor doesn't take.
    """
    try:
        return _make_processors(sampling, prompt_ids, starts, given)
    except (TypeError, ValueError) as error:
        raise GenerationError(f"transformers' own check: {error}") from error


def _make_processors(
    sampling: Sampling, prompt_ids: torch.Tensor, starts: torch.Tensor, given: Sequence[Any]
) -> LogitsProcessorList:
    import torch
    import transformers as tf

    config, width = sampling.config, prompt_ids.shape[1]
    eos = torch.tensor(sampling.eos_token_ids)
    processors = tf.LogitsProcessorList()
    if config.repetition_penalty not in (None, 1.0):
        # Padding isn't repeated text.
        ignored = {"prompt_ignore_length": starts} if bool(starts.any()) else {}
        processors.append(
            tf.RepetitionPenaltyLogitsProcessor(float(config.repetition_penalty), **ignored)
        )
    if config.no_repeat_ngram_size:
        processors.append(tf.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.bad_words_ids is not None:
        processors.append(tf.NoBadWordsLogitsProcessor(config.bad_words_ids, eos))
    if config.min_length and len(eos):
        processors.append(tf.MinLengthLogitsProcessor(config.min_length, eos))
    if config.min_new_tokens and len(eos):
        processors.append(tf.MinNewTokensLengthLogitsProcessor(width, config.min_new_tokens, eos))
    if config.suppress_tokens is not None:
        processors.append(tf.SuppressTokensLogitsProcessor(config.suppress_tokens))
    processors.extend(given)
    if not sampling.do_sample:
        return processors
    if config.temperature not in (None, 1.0):
        processors.append(tf.TemperatureLogitsWarper(float(config.temperature)))
    if config.top_k:
        processors.append(tf.TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        processors.append(tf.TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        processors.append(tf.MinPLogitsWarper(config.min_p))
    if config.typical_p is not None and config.typical_p < 1.0:
        processors.append(tf.TypicalLogitsWarper(config.typical_p))
    return processors


def _eos_token_ids(config: GenerationConfig) -> tuple[int, ...]:
    eos = config.eos_token_id
    if eos is None:
        return ()
    eos = getattr(eos, "tolist", lambda: eos)()  # a tensor's
    ids = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    if not all(_is_int(one) for one in ids):
        raise GenerationError(f"eos_token_id {eos!r} should be a token's number, or several")
    return ids


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _has_effect(name: str, value: Any) -> bool:
    if name in _WITHOUT_EFFECT or value is None or value is False:
        return False
    return isinstance(value, bool) or value != _NEUTRAL.get(name)


def _refuse_others(config: GenerationConfig) -> None:
    fields = config.to_dict()
    refused = [
        f"{name}={value!r}"
        for name, value in fields.items()
        if name not in OPTIONS and not name.startswith("_") and _has_effect(name, value)
    ]
    if refused:
        raise GenerationError(
            f"the generation config has {', '.join(refused)}, which OrtGenerator doesn't take: "
            "unset it, or generate with transformers"
        )


def _check_ranges(config: GenerationConfig) -> None:
    """What the processors would find only in the middle of the work, or not at all."""
    for name in _WHOLE_NUMBERS:
        value = getattr(config, name, None)
        if value is not None and not _is_int(value):
            raise GenerationError(f"{name} {value!r} should be a whole number")
    for name, (is_of_sampling, holds, rule) in _RULES.items():
        value = getattr(config, name, None)
        # Without sampling its options do nothing, as in transformers: configs say temperature 0.
        if value is None or (is_of_sampling and not config.do_sample):
            continue
        if not isinstance(value, Real) or not holds(value):
            raise GenerationError(f"{name} {value!r} should be {rule}")
    if config.do_sample not in (True, False, None):
        raise GenerationError(f"do_sample {config.do_sample!r} should be True or False")
    strings = () if config.stop_strings is None else config.stop_strings
    strings = strings if isinstance(strings, list | tuple | set) else [strings]
    if any(not isinstance(one, str) or not one for one in strings):
        raise GenerationError(
            f"stop_strings {config.stop_strings!r} should be texts of one character or more"
        )


def _num_new_tokens(
    config: GenerationConfig, width: int, longest: int, max_positions: int | None
) -> int:
    if config.max_new_tokens is not None:
        count = config.max_new_tokens
    elif config.max_length is not None:
        count = config.max_length - width
        if count < 1:
            raise GenerationError(
                f"max_length {config.max_length} is no longer than the prompt's {width} tokens, "
                "which it includes: set max_new_tokens instead"
            )
    else:
        left = _DEFAULT_NEW_TOKENS if max_positions is None else max_positions - longest
        count = max(1, min(_DEFAULT_NEW_TOKENS, left))
    if count < 1:
        raise GenerationError(f"max_new_tokens {count} should be 1 or more")
    if max_positions is not None and longest >= max_positions:
        raise GenerationError(
            f"{longest} tokens of prompt and {count} to generate exceed max_position_embeddings "
            f"{max_positions} of the model: shorten the prompt"
        )
    if max_positions is not None and longest + count > max_positions:
        raise GenerationError(
            f"{longest} tokens of prompt and {count} to generate exceed max_position_embeddings "
            f"{max_positions} of the model: shorten the prompt, or set max_new_tokens to "
            f"{max_positions - longest} or less"
        )
    return count

"""Tokenizers: loaded, or trained on a corpus."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ort_train import cache
from ort_train.config import MIN_VOCAB_SIZE, ModelConfig
from ort_train.errors import ModelError
from ort_train.files import expanded, replacing
from ort_train.models import load_arguments

logger = logging.getLogger(__name__)

_DEFAULT_VOCAB_SIZE = 4096
_BOS, _EOS, _PAD, _MASK = "<|bos|>", "<|eos|>", "<|pad|>", "<|mask|>"
_TOKENIZER_FORMAT = 1  # part of the cache's key: raise it when the training changes


def make_tokenizer(
    text: str,
    vocab_size: int,
    cache_dir: str | Path | None = None,
    with_mask: bool = False,
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE on the text, or reads the one trained on it before.

    Args:
        vocab_size: entries at most, special tokens included; a short text yields fewer.
        cache_dir: None: $ORT_TRAIN_CACHE, or ~/.cache/ort_train. Where it can't be written, the
            tokenizer is trained each time.
        with_mask: have a mask token, too.

    Returns:
        A tokenizer with bos, eos and pad tokens, which adds none of them by itself.

    Raises:
        ModelError: the vocabulary has no room for the 256 bytes and the special tokens.
    """
    special = {"bos_token": _BOS, "eos_token": _EOS, "pad_token": _PAD}
    if with_mask:
        special["mask_token"] = _MASK
    fewest = MIN_VOCAB_SIZE + with_mask
    if vocab_size < fewest:
        raise ModelError(
            f"model.vocab_size {vocab_size} is too small for a byte-level BPE, which has 256 bytes "
            f"and {len(special)} special tokens: set it to {fewest} or more"
        )
    kind = f"{_TOKENIZER_FORMAT} {vocab_size}{' mask' if with_mask else ''}"
    key = hashlib.sha256(f"{kind}\n{text}".encode()).hexdigest()[:32]
    root = expanded(cache_dir) if cache_dir else cache.root()
    path = root / "tokenizers" / f"{key}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # One of several ranks trains, the others read.
        with FileLock(path.with_suffix(".lock")):
            trained = _read_tokenizer(path, special.values())
            if trained is None:
                trained = _train_tokenizer(text, vocab_size, special.values())
                with replacing(path) as file:
                    file.write_text(trained.to_str(), encoding="utf-8")
    except OSError as error:
        logger.warning("the tokenizer isn't cached: %s", error)
        trained = _train_tokenizer(text, vocab_size, special.values())
    return PreTrainedTokenizerFast(tokenizer_object=trained, **special)


def load_tokenizer(
    model: ModelConfig, text: str | None = None, cache_dir: str | Path | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer that the config names, the loaded model's own, or one trained on the text.

    Where it has no pad token, the eos token becomes it, with a notice.

    Args:
        text: the training corpus; read only for a made model that names no tokenizer.

    Raises:
        ModelError: it can't be loaded, has neither pad nor eos token, or no mask token where the
            task needs one.
    """
    is_masked = model.task == "masked-lm"
    name = model.tokenizer or model.name_or_path
    if name is None:
        if text is None:
            raise ModelError(
                f"a made {model.architecture} needs a tokenizer: set model.tokenizer, or give the "
                "text to train one on"
            )
        vocab_size = model.vocab_size or _DEFAULT_VOCAB_SIZE
        return make_tokenizer(text, vocab_size, cache_dir, with_mask=is_masked)
    revision = None if model.tokenizer else model.revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **load_arguments(model, name, revision))
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"can't load the tokenizer of {name}: {error}") from error
    if not knows_text(tokenizer):
        raise ModelError(
            f"{name} has no tokenizer's files: set model.tokenizer to a model or folder that has"
        )
    if is_masked and tokenizer.mask_token_id is None:
        raise ModelError(
            f"the tokenizer of {name} has no mask token, which model.task masked-lm needs: set "
            "model.tokenizer to one that has"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer of {name} has neither a pad nor an eos token, and batches can't be "
                "padded: set model.tokenizer to one that has"
            )
        tokenizer.pad_token = tokenizer.eos_token
        logger.warning(
            "the tokenizer of %s has no pad token: its eos token %s pads", name, tokenizer.eos_token
        )
    return tokenizer


def knows_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether there is more than special tokens.

    From a folder without its files AutoTokenizer makes an empty tokenizer of some kinds (GPT-2,
    Qwen2, Gemma in transformers 5), without an error.
    """
    return len(tokenizer) > len(set(tokenizer.all_special_ids))


def _train_tokenizer(text: str, vocab_size: int, special: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def _read_tokenizer(path: Path, special: Iterable[str]) -> Tokenizer | None:
    """The cached tokenizer; None where there is none, or a corrupt one."""
    if not path.exists():
        return None
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exception
        logger.warning("training the tokenizer again, as %s can't be read: %s", path, error)
        return None
    whole = all(tokenizer.token_to_id(token) is not None for token in special)
    return tokenizer if whole else None

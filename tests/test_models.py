"""ort_train.models and ort_train.data.tokenizer: loaded and made, and what doesn't fit."""

from __future__ import annotations

import logging

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from ort_train.config import ModelConfig, parse
from ort_train.data import tokenizer as tokenizer_module
from ort_train.data.tokenizer import load_tokenizer, make_tokenizer
from ort_train.errors import ModelError
from ort_train.models import load_model, tiny_config
from ort_train.recipes import tiny

TEXT = "".join(f" = Title {i} = \n \n Some <unk> words , number {i} .\n" for i in range(200))
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(TEXT, 300)


@pytest.fixture
def saved(tmp_path, tiny_llama, tokenizer):
    """A folder as save_pretrained leaves it."""
    tiny_llama(vocab_size=300).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def made(**fields) -> ModelConfig:
    return ModelConfig(**{"architecture": "llama", "config": SIZES, **fields})


# --- tokenizers


def test_made_tokenizer_is_lossless_and_adds_nothing(tokenizer):
    text = " = Größe = \n \t<unk> 漢字 🙂\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 300
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_made_tokenizer_is_cached_by_content(tmp_path, monkeypatch):
    first = make_tokenizer(TEXT, 280, tmp_path)
    (entry,) = tmp_path.glob("tokenizers/*.json")
    monkeypatch.setattr(
        tokenizer_module, "_train_tokenizer", lambda *args: pytest.fail("trained again")
    )
    assert make_tokenizer(TEXT, 280, tmp_path).get_vocab() == first.get_vocab()
    monkeypatch.undo()
    make_tokenizer(TEXT, 290, tmp_path)
    make_tokenizer(TEXT + "more", 280, tmp_path)
    assert entry in (entries := list(tmp_path.glob("tokenizers/*.json")))
    assert len(entries) == 3
    assert {path.suffix for path in tmp_path.glob("tokenizers/*")} <= {".json", ".lock"}


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}', "\xff"])
def test_corrupt_cache_entry_is_made_again(tmp_path, content):
    vocabulary = make_tokenizer(TEXT, 280, tmp_path).get_vocab()
    (entry,) = tmp_path.glob("tokenizers/*.json")
    whole = entry.read_bytes()
    entry.write_bytes(content.encode("latin-1"))
    assert make_tokenizer(TEXT, 280, tmp_path).get_vocab() == vocabulary
    assert entry.read_bytes() == whole


def test_foreign_cache_entry_is_made_again(tmp_path):
    make_tokenizer(TEXT, 280, tmp_path)
    (entry,) = tmp_path.glob("tokenizers/*.json")
    Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(entry))
    assert len(make_tokenizer(TEXT, 280, tmp_path)) == 280


def test_cache_that_cant_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert len(make_tokenizer(TEXT, 280, tmp_path / "file")) == 280
    assert "the tokenizer isn't cached" in caplog.text


def test_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    assert len(make_tokenizer(TEXT, 280, tmp_path)) == 280
    assert [path.suffix for path in tmp_path.glob("tokenizers/*")] in ([], [".lock"])


def test_vocabulary_needs_room_for_the_bytes():
    with pytest.raises(ModelError, match=r"model\.vocab_size 200 is too small .* set it to 259"):
        make_tokenizer(TEXT, 200)
    assert len(make_tokenizer("", 259)) == 259


def test_load_tokenizer_takes_the_one_named(saved, tokenizer):
    for config in (
        ModelConfig(name_or_path=saved),
        made(tokenizer=saved),
        ModelConfig(name_or_path="some/model", tokenizer=saved),
    ):
        assert load_tokenizer(config, TEXT).get_vocab() == tokenizer.get_vocab()
    assert len(load_tokenizer(made(vocab_size=270), TEXT)) == 270
    with pytest.raises(ModelError, match=r"needs a tokenizer: set model\.tokenizer"):
        load_tokenizer(made())


def test_a_model_without_its_tokenizers_files(tmp_path):
    """transformers 5 makes a tokenizer of special tokens only for some kinds of models."""
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(ModelConfig(name_or_path=str(tmp_path)))


def test_tokenizer_that_cant_be_loaded(tmp_path):
    with pytest.raises(ModelError, match="can't load the tokenizer of"):
        load_tokenizer(made(tokenizer=str(tmp_path)))
    with pytest.raises(ModelError, match="can't load the tokenizer of no/such"):
        load_tokenizer(made(tokenizer="no/such"))


def save_word_tokenizer(folder, **special) -> str:
    words = Tokenizer(WordLevel({"a": 0, "<e>": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return str(folder)


def test_eos_pads_where_there_is_no_pad_token(tmp_path, caplog):
    name = save_word_tokenizer(tmp_path, eos_token="<e>")
    with caplog.at_level(logging.WARNING):
        assert load_tokenizer(made(tokenizer=name)).pad_token == "<e>"
    assert "has no pad token: its eos token <e> pads" in caplog.text


def test_neither_pad_nor_eos_token(tmp_path):
    name = save_word_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="neither a pad nor an eos token"):
        load_tokenizer(made(tokenizer=name))


# --- made models


def test_made_model(tokenizer):
    model = load_model(made(), tokenizer, seed=0, block_size=64)
    assert model.config.vocab_size == len(tokenizer) == 300
    assert model.config.hidden_size == 32
    assert model.config._attn_implementation == "sdpa"
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(model.config, field) == getattr(tokenizer, field)
        assert getattr(model.generation_config, field) == getattr(tokenizer, field)
    assert model.training
    assert model.dtype == torch.float32


def test_made_model_follows_the_seed(tokenizer):
    first, second, other = (
        load_model(made(), tokenizer, seed, 64).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_made_model_options(tokenizer):
    config = made(attention="eager", dtype="bfloat16", config={**SIZES, "vocab_size": 1000})
    model = load_model(config, tokenizer, 0, 64)
    assert model.config.vocab_size == 1000
    assert model.config._attn_implementation == "eager"
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (made(architecture="lama"), "model.architecture lama is unknown .*did you mean .*llama"),
        (made(architecture="zzz"), "should be a model_type such as llama"),
        (made(config={"hidden_sise": 3}), r"unknown to llama: hidden_sise \(did you mean hidden_"),
        (made(config={**SIZES, "hidden_size": "x"}), "model.config doesn't make a llama: "),
        (made(config={**SIZES, "hidden_size": 33}), "model.config doesn't make a llama: "),
        (made(architecture="t5", config={}), "can't make a t5 as a causal language model"),
        (made(architecture="gptj", config={"n_embd": 64, "n_layer": 1}), "model.attention=eager"),
        (made(config={**SIZES, "max_position_embeddings": 63}), "64 exceeds .* 63 .*block_size=63"),
        (made(architecture="gpt2", config={"n_positions": 32}), "64 exceeds the 32 positions"),
    ],
)
def test_made_models_that_dont_fit(tokenizer, config, expected):
    with pytest.raises(ModelError, match=f"(?s){expected}"):
        load_model(config, tokenizer, 0, block_size=64)


def test_positions_that_no_token_has_dont_count(tokenizer):
    """RoBERTa's first token has the position after the padding token's id."""
    sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}

    def load(max_position_embeddings: int) -> torch.nn.Module:
        config = sizes | {"max_position_embeddings": max_position_embeddings}
        roberta = made(architecture="roberta", task="masked-lm", config=config)
        return load_model(roberta, tokenizer, 0, block_size=64)

    with pytest.raises(ModelError, match=r"64 exceeds the 63 positions .* data.block_size=63"):
        load(64 + tokenizer.pad_token_id)
    ids = torch.full((1, 64), 5)
    assert load(65 + tokenizer.pad_token_id)(input_ids=ids).logits.shape == (1, 64, 300)


# --- loaded models


def test_loaded_model_keeps_its_weights(saved, tiny_llama):
    config = ModelConfig(name_or_path=saved, config={"attention_dropout": 0.5})
    model = load_model(config, load_tokenizer(config), 7, 128)
    assert torch.equal(model.lm_head.weight, tiny_llama().lm_head.weight)
    assert model.config.attention_dropout == 0.5
    assert model.config.pad_token_id == load_tokenizer(config).pad_token_id
    assert model.training


@pytest.mark.parametrize(
    ("fields", "block_size", "expected"),
    [
        ({}, 129, "data.block_size 129 exceeds the 128 positions"),
        ({"config": {"hidden_sise": 3}}, 8, "fields unknown to llama: hidden_sise"),
        ({"config": {"hidden_size": "x"}}, 8, "model.config doesn't fit"),
        ({"config": {"intermediate_size": 96}}, 8, r"can't load .*set model.config=\{\}"),
        ({"name_or_path": "no/such"}, 8, "can't load model no/such"),
    ],
)
def test_loaded_models_that_dont_fit(saved, tokenizer, fields, block_size, expected):
    config = ModelConfig(**{"name_or_path": saved, **fields})
    with pytest.raises(ModelError, match=f"(?s){expected}"):
        load_model(config, tokenizer, 0, block_size)


def test_tokenizer_larger_than_the_vocabulary(saved):
    large = make_tokenizer(TEXT, 320)
    assert len(large) == 320
    with pytest.raises(ModelError, match="has 320 tokens, but the model's vocabulary only 300: "):
        load_model(ModelConfig(name_or_path=saved), large, 0, 8)


def test_corrupt_weights(saved, tokenizer, tmp_path):
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match=r"can't load .* as a causal language model"):
        load_model(ModelConfig(name_or_path=saved), tokenizer, 0, 8)


# --- tiny models

SDPA = """
llama mistral mixtral phi phi3 gemma gemma3_text gpt2 gpt_neox opt falcon qwen2 qwen3 qwen3_moe olmo
stablelm starcoder2 cohere granite
""".split()  # noqa: SIM905


@pytest.mark.parametrize(
    ("architecture", "attention"),
    [*((name, "sdpa") for name in SDPA), ("gemma2", "eager"), ("bloom", "eager")],
)
def test_every_architecture_has_a_tiny_form(tokenizer, architecture, attention):
    config = tiny(
        parse(
            {
                "model": {"architecture": architecture, "attention": attention},
                "train": {"max_steps": 1},
            }
        )
    )
    model = load_model(config.model, tokenizer, 0, config.data.block_size)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    ids = torch.arange(64).reshape(2, 32)
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.isfinite()


def test_tiny_config_keeps_what_isnt_a_size():
    fields = {"hidden_size": 4096, "rms_norm_eps": 1e-5, "vocab_size": 9, "num_hidden_layers": 1}
    shrunk = tiny_config("mistral", {**fields, "num_key_value_heads": 1})
    assert shrunk["rms_norm_eps"] == 1e-5
    assert shrunk["num_hidden_layers"] == 1
    assert shrunk["num_key_value_heads"] == 1
    assert shrunk["hidden_size"] == 64
    assert "vocab_size" not in shrunk


def test_tiny_config_keeps_the_spelling_given():
    assert tiny_config("gpt2", {"hidden_size": 768})["hidden_size"] == 64
    assert tiny_config("gpt2", {"n_embd": 768})["n_embd"] == 64

"""Fixtures that several test modules share: tiny models are made, nothing is downloaded."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Tokenizers are cached for the session, not in the user's home; graphs aren't."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORT_TRAIN_GRAPH_CACHE", "off")
        patch.setenv("ORT_TRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("ORT_TRAIN_DATA", raising=False)
        yield


@pytest.fixture(scope="session")
def _graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="module")
def shared_graphs(_graphs: Path):
    """Graphs that a test of another subject has built are taken from the cache, also by processes
    that it starts: what they compute is the same to the bit (test_export_cache.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORT_TRAIN_GRAPH_CACHE", str(_graphs))
        yield


@pytest.fixture(autouse=True)
def _no_precision_of_another_test():
    """TrainingArguments of transformers 4.57 leave a run's precision behind for the next one's."""
    name = "ACCELERATE_MIXED_PRECISION"
    before = os.environ.pop(name, None)
    yield
    os.environ.pop(name, None)
    if before is not None:
        os.environ[name] = before


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Any]:
    """Makes a seeded Llama of some 100k parameters; keywords are fields of its config."""

    def make(seed: int = 0, **fields: Any):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {
            "vocab_size": 300,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
        }
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **fields}))

    return make


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What several processes have to train as: the cases of test_zero.py in eager PyTorch."""
    from test_zero import CASES, launch

    cases = {name: {**case, "backend": "eager"} for name, case in CASES.items()}
    return launch(tmp_path_factory.mktemp("alone"), cases, num_ranks=1)


@pytest.fixture(scope="session")
def wikitext_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of wiki.valid.tokens and wiki.test.tokens: the real ones, or some like them."""
    real = ROOT.parent / "shared" / "data" / "wikitext-2"
    if (real / "wiki.valid.tokens").is_file():
        return real
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("wikitext-2")
    articles = [f" \n = {title} = \n \n {text}\n" for title, text in sorted(topics.items())]
    half = len(articles) // 2
    (folder / "wiki.valid.tokens").write_text("".join(articles[:half]), encoding="utf-8")
    (folder / "wiki.test.tokens").write_text("".join(articles[half:]), encoding="utf-8")
    return folder

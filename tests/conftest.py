"""Fixtures that several test modules share: tiny models are made, nothing is downloaded."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
#: This session is one of so many that share the tests (pytest-xdist).
NUM_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
NUM_CORES = len(os.sched_getaffinity(0))
_MAX_WORKERS = 8
#: What a worker and the processes that its tests start take at most, about.
_WORKER_GIB = 4

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
if NUM_WORKERS > 1:  # read when torch is imported; each would take every core
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, NUM_CORES // NUM_WORKERS)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """`-n auto`: one a core, unless memory is short."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    available_gib = psutil.virtual_memory().available / 2**30
    return max(1, min(NUM_CORES, _MAX_WORKERS, int(available_gib / _WORKER_GIB)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers take the next file when they have done one: the long ones come first, so that none
    is left with one at the end."""
    if NUM_WORKERS > 1:
        weight: Counter[Path] = Counter()
        for item in items:
            weight[item.path] += 10 if item.get_closest_marker("slow") else 1  # see its definition
        items.sort(key=lambda item: (-weight[item.path], item.path))


@pytest.fixture(scope="session")
def _shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers: a worker's own lies in it."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if NUM_WORKERS > 1 else own


@pytest.fixture(scope="session", autouse=True)
def _own_cache(_shared_folder: Path):
    """Tokenizers are cached for the session, not in the user's home; graphs aren't."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORT_TRAIN_GRAPH_CACHE", "off")
        patch.setenv("ORT_TRAIN_CACHE", str(_shared_folder / "cache"))
        patch.delenv("ORT_TRAIN_DATA", raising=False)
        yield


@pytest.fixture(scope="session")
def _graphs(_shared_folder: Path) -> Path:
    return _shared_folder / "graphs"


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

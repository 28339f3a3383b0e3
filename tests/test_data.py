"""ort_train.data.corpora: where the text comes from, and how it becomes blocks."""

from __future__ import annotations

import http.server
import threading
import time

import datasets
import numpy as np
import pytest
from huggingface_hub import constants

from ort_train.data import corpora as data
from ort_train.data.corpora import hub_problem, load_corpus, make_blocks
from ort_train.data.tokenizer import make_tokenizer
from ort_train.errors import DataError

TEXT = "".join(f" = Title {i} = \n \n Some <unk> words , number {i} .\n" for i in range(200))


@pytest.fixture
def folder(tmp_path):
    """Writes a folder of text files."""

    def write(**files: str | bytes):
        for name, content in files.items():
            path = tmp_path / name.replace("__", ".")
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return tmp_path

    return write


@pytest.fixture
def hub(monkeypatch):
    """A reachable hub that holds the given splits, or raises the given error."""

    def hold(splits: dict[str, list[str | None]] | Exception, column: str = "text"):
        def load_dataset(*args):
            if isinstance(splits, Exception):
                raise splits
            return datasets.DatasetDict(
                {name: datasets.Dataset.from_dict({column: rows}) for name, rows in splits.items()}
            )

        monkeypatch.setattr(data, "hub_problem", lambda *args: None)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    return hold


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(TEXT, 300)


# --- sources


def test_wikitext_folder_without_its_train_split(wikitext_dir):
    corpus = load_corpus(folder=wikitext_dir)
    assert corpus.train_text == (wikitext_dir / "wiki.valid.tokens").read_text(encoding="utf-8")
    assert corpus.eval_text == (wikitext_dir / "wiki.test.tokens").read_text(encoding="utf-8")
    assert "training on wiki.valid.tokens, evaluating on wiki.test.tokens" in corpus.source
    assert "no train split" in corpus.source


def test_wikitext_folder_with_all_splits(folder):
    where = folder(
        wiki__train__tokens="train\n",
        wiki__valid__tokens="valid\n",
        wiki__test__tokens="test\n",
        LICENSE__txt="not the corpus",
    )
    corpus = load_corpus(source="folder", folder=where)
    assert (corpus.train_text, corpus.eval_text) == ("train\n", "valid\n")
    assert "no train split" not in corpus.source


def test_folder_of_plain_text_is_split(folder):
    where = folder(b__txt="second\n" * 10, a__txt="\ufefffirst\r\n" * 10)
    corpus = load_corpus(folder=str(where))
    whole = corpus.train_text + corpus.eval_text
    assert whole.startswith("first\n")
    assert whole.endswith("second\n")
    assert corpus.train_text.endswith("\n")
    assert 0.8 < len(corpus.train_text) / len(whole) <= 0.9
    assert "split 90/10" in corpus.source


def test_plain_text_with_an_evaluation_file(folder):
    corpus = load_corpus(folder=folder(novel__txt="a\n", novel_val__txt="b\n"))
    assert (corpus.train_text, corpus.eval_text) == ("a\n", "b\n")


def test_home_is_expanded(folder, monkeypatch):
    where = folder(a__txt=TEXT)
    monkeypatch.setenv("HOME", str(where.parent))
    assert load_corpus(folder=f"~/{where.name}").train_text.startswith(" = Title 0 = \n")


def test_folder_from_the_environment(folder, monkeypatch):
    monkeypatch.setenv("ORT_TRAIN_DATA", str(folder(a__txt=TEXT)))
    corpus = load_corpus()
    assert corpus.train_text + corpus.eval_text == TEXT
    assert "not taken: hub: HF_HUB_OFFLINE is set" in corpus.source


def test_usual_folder_below_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "data" / "wikitext-2").mkdir(parents=True)
    (tmp_path / "data" / "wikitext-2" / "wiki.valid.tokens").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path / "data" / "wikitext-2") in load_corpus().source


def test_offline_text_is_the_last_resort(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "__file__", str(tmp_path / "site-packages" / "x" / "data/corpora.py"))
    corpus = load_corpus()
    assert corpus.source.startswith("the Python documentation that every CPython carries")
    assert "hub: HF_HUB_OFFLINE is set" in corpus.source
    assert "folder: data.folder and ORT_TRAIN_DATA unset" in corpus.source
    assert len(corpus.train_text) > 300_000
    with pytest.raises(DataError, match=r"no corpus: folder: .*data\.source=offline"):
        load_corpus(source="folder")


def test_hub_alone_isnt_replaced():
    with pytest.raises(
        DataError, match=r"no corpus: hub: HF_HUB_OFFLINE is set, and .* isn't cach"
    ):
        load_corpus(source="hub")


def test_hub_rows_become_lines(hub):
    hub({"train": ["", " = A = \n", "x", None], "validation": ["v"], "test": ["t"]})
    corpus = load_corpus()
    assert corpus.train_text == "\n = A = \nx\n\n"
    assert corpus.eval_text == "v\n"
    assert corpus.source == "Salesforce/wikitext wikitext-2-raw-v1 from the hub"


def test_hub_dataset_without_evaluation_split(hub):
    hub({"train": ["row"] * 100})
    corpus = load_corpus(dataset="a/b", subset=None)
    assert (len(corpus.train_text), len(corpus.eval_text)) == (360, 40)
    assert corpus.source == "a/b from the hub, split 90/10 for training and evaluation"


def test_a_cached_dataset_is_taken_offline(hub, monkeypatch):
    hub({"train": ["a"], "test": ["b"]})
    inner = datasets.load_dataset

    def load_dataset(*args):
        assert constants.HF_HUB_OFFLINE
        assert datasets.config.HF_HUB_OFFLINE
        return inner(*args)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(data, "hub_problem", lambda *args: "is silent")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert "from the cache (hub: is silent)" in load_corpus().source
    assert not constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_broken_connection_falls_through(hub, folder, monkeypatch):
    hub(ConnectionError("reset by peer"))
    monkeypatch.setenv("ORT_TRAIN_DATA", str(folder(a__txt=TEXT)))
    assert "not taken: hub: reset by peer" in load_corpus().source


@pytest.mark.parametrize(
    ("held", "options", "expected"),
    [
        (datasets.exceptions.DatasetNotFoundError("no such"), {}, "data.dataset Salesf.*no such"),
        (ValueError("BuilderConfig 'x' not found"), {"subset": "x"}, "data.subset x: Builder"),
        ({"test": ["a"]}, {}, "has no train split, only test"),
        ({"train": ["a"]}, {"text_column": "body"}, "text_column body isn't in .* one of text"),
        ({"train": ["", "  "]}, {}, "the training text of .* is empty"),
    ],
)
def test_a_wrong_dataset_isnt_replaced(hub, held, options, expected):
    hub(held)
    with pytest.raises(DataError, match=expected):
        load_corpus(**options)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "holds no .*tokens and no .*txt files"),
        ({"a__csv": "x"}, "holds no .*tokens"),
        ({"a__txt": " \n"}, "the training text of folder .* is empty"),
        ({"train__txt": "a", "valid__txt": ""}, "the evaluation text of folder .* is empty"),
        ({"a__txt": b"caf\xe9 "}, r"a\.txt isn't UTF-8 text \(byte 3: .*iconv"),
    ],
)
def test_folders_that_cant_be_read(folder, files, expected):
    with pytest.raises(DataError, match=expected):
        load_corpus(folder=folder(**files))


def test_unreadable_file(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(DataError, match=r"can't read .*a\.txt: Is a directory"):
        load_corpus(folder=tmp_path)


def test_missing_folder_isnt_replaced(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"gone doesn't exist: set data\.folder"):
        load_corpus(folder=tmp_path / "gone")
    monkeypatch.setenv("ORT_TRAIN_DATA", str(tmp_path / "gone"))
    with pytest.raises(DataError, match="gone doesn't exist"):
        load_corpus()


# --- is there a hub?


@pytest.fixture
def endpoint(monkeypatch):
    """A local server in the hub's place that answers in the given way."""
    servers = []

    def serve(status: int, headers: dict[str, str] | None = None, delay_s: float = 0):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                time.sleep(delay_s)
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "*")
    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_hub_that_answers(endpoint):
    endpoint(200)
    assert hub_problem("datasets/a/b") is None


def test_hub_that_refuses(endpoint):
    endpoint(401, {"X-Error-Code": "RepoNotFound"})
    assert hub_problem("datasets/a/b") is None


def test_proxy_that_answers_in_the_hubs_place(endpoint):
    endpoint(403)
    assert hub_problem("datasets/a/b") == "answers with status 403"


def test_silent_hub_costs_no_more_than_the_timeout(endpoint):
    endpoint(200, delay_s=1)
    start = time.perf_counter()
    assert hub_problem("datasets/a/b", timeout_s=0.2) is not None
    assert time.perf_counter() - start < 0.9


def test_unreachable_hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "*")
    assert "can't be reached" in hub_problem("datasets/a/b")


# --- blocks


def test_blocks_are_the_text_back_to_back(tokenizer):
    blocks = make_blocks(TEXT, tokenizer, 16)
    assert blocks.column_names == ["input_ids", "attention_mask", "labels"]
    ids = np.array(blocks["input_ids"][:])
    assert ids.shape == (len(blocks), 16)
    assert blocks["labels"][:] == blocks["input_ids"][:]
    assert set(np.array(blocks["attention_mask"][:]).flat) == {1}
    assert TEXT.startswith(tokenizer.decode(ids.flatten()))
    num_tokens = len(tokenizer(TEXT)["input_ids"])
    assert len(blocks) == num_tokens // 16
    assert {str(feature.feature.dtype) for feature in blocks.features.values()} == {"int64"}


def test_text_longer_than_a_chunk_loses_nothing(tokenizer, monkeypatch):
    monkeypatch.setattr(data, "_CHUNK_CHARS", 100)
    monkeypatch.setattr(data, "_CHUNKS_PER_BATCH", 3)
    for text in (TEXT, TEXT.replace("\n", " "), "x" * 1000):
        assert "".join(data._chunks(text)) == text
        ids = make_blocks(text, tokenizer, 1)["input_ids"][:]
        assert tokenizer.decode(np.array(ids).flatten()) == text


def test_max_blocks_stops_the_tokenizer(tokenizer, monkeypatch):
    monkeypatch.setattr(data, "_CHUNK_CHARS", 100)
    monkeypatch.setattr(data, "_CHUNKS_PER_BATCH", 1)
    seen = []

    def counting(batch, **options):
        seen.extend(batch)
        return tokenizer(batch, **options)

    blocks = make_blocks(TEXT, counting, 16, max_blocks=3)
    assert len(blocks) == 3
    assert sum(map(len, seen)) < len(TEXT) / 10
    assert blocks["input_ids"][:] == make_blocks(TEXT, tokenizer, 16)["input_ids"][:3]


def test_fewer_blocks_than_asked_for(tokenizer):
    assert len(make_blocks(TEXT, tokenizer, 16, max_blocks=10**6)) == len(
        make_blocks(TEXT, tokenizer, 16)
    )


@pytest.mark.parametrize("text", ["", "short"])
def test_text_shorter_than_a_block(tokenizer, text):
    with pytest.raises(DataError, match=r"shorter than one sample of data\.block_size 64"):
        make_blocks(text, tokenizer, 64)


def test_real_text_makes_blocks(wikitext_dir):
    corpus = load_corpus(folder=wikitext_dir)
    tokenizer = make_tokenizer(corpus.train_text, 512)
    blocks = make_blocks(corpus.eval_text, tokenizer, 64, max_blocks=8).with_format("torch")
    assert blocks[:]["input_ids"].shape == (8, 64)
    assert int(blocks[:]["input_ids"].max()) < 512
    assert corpus.eval_text.startswith(tokenizer.decode(blocks[0]["input_ids"]))

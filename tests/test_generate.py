"""Generation from exported decoders: transformers' tokens, for every kind of batch and option."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from decoders import FUSED, MAX_POSITIONS, TRACED, VOCAB_SIZE, save_decoder
from transformers import BatchEncoding, GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from ort_train.cli import main
from ort_train.errors import ExportError, GenerationError
from ort_train.inference import OrtGenerator, export_model, load_folder
from ort_train.inference.folder import DATA_FILE
from ort_train.inference.generation.session import DecoderSession

PAD = 2
NEW_TOKENS = 24


class Pair(NamedTuple):
    """A model and its export."""

    model: Any
    generator: OrtGenerator


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    model_type, fields = {**FUSED, **TRACED}[getattr(request, "param", "llama")]
    folder = tmp_path_factory.mktemp("generate")
    model = save_decoder(folder / "model", model_type, **fields)
    exported = export_model(folder / "model", folder / "out")
    return Pair(model, OrtGenerator(exported.path, num_threads=1))


each_architecture = pytest.mark.parametrize(
    "pair",
    ["llama", "mistral", "phi", "gemma", "qwen2 windows", "qwen3", *TRACED],
    indirect=True,
)


def batch(side: str, *lengths: int) -> dict[str, torch.Tensor]:
    """Seeded prompts of these lengths, padded on a side."""
    torch.manual_seed(sum(lengths))
    ids = torch.full((len(lengths), max(lengths)), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(length) if side == "right" else slice(max(lengths) - length, None)
        ids[row, place] = torch.randint(3, VOCAB_SIZE, (length,))
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def expected(model: Any, prompts: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """New tokens of transformers' generate, from prompts that are padded on the left."""
    options = {"max_new_tokens": NEW_TOKENS, **options}
    width = prompts["input_ids"].shape[1]
    return model.generate(**prompts, **options)[:, width:]


def rows_of(prompts: dict[str, torch.Tensor]) -> list[list[int]]:
    pairs = zip(prompts["input_ids"], prompts["attention_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


@each_architecture
def test_greedy_tokens_are_those_of_transformers(pair: Pair) -> None:
    for lengths in ((5,), (9, 9), (30, 4, 1)):  # one row, equal rows, rows across a window
        left = batch("left", *lengths)
        want = expected(pair.model, left, do_sample=False)
        ours = pair.generator.generate(**left, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert torch.equal(ours, torch.cat([left["input_ids"], want], 1))
        right = batch("right", *lengths)
        assert rows_of(right) == rows_of(left)
        ours = pair.generator.generate(**right, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert torch.equal(ours, torch.cat([right["input_ids"], want], 1))
        ours = pair.generator.generate(rows_of(left), max_new_tokens=NEW_TOKENS, do_sample=False)
        assert torch.equal(ours[:, max(lengths) :], want)


@each_architecture
def test_a_row_has_the_same_tokens_alone_and_in_a_batch(pair: Pair) -> None:
    prompts = batch("left", 17, 6, 2)
    together = pair.generator.generate(**prompts, max_new_tokens=NEW_TOKENS, eos_token_id=None)
    for row, tokens in zip(rows_of(prompts), together, strict=True):
        alone = pair.generator.generate([row], max_new_tokens=NEW_TOKENS, eos_token_id=None)
        assert torch.equal(alone[0, len(row) :], tokens[17:])


def test_without_a_mask_padding_is_what_it_is_in_transformers(pair: Pair) -> None:
    ids = torch.randint(9, VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(0))
    ids[1, :4] = 7  # whose embedding isn't zero, as that of the model's own padding is
    tokens = []
    for end in (1, 7, [1, 7], None):  # what ends a text is no padding
        options = {"max_new_tokens": NEW_TOKENS, "pad_token_id": 7, "eos_token_id": end}
        want = pair.model.generate(ids, do_sample=False, **options)
        ours = pair.generator.generate(ids, do_sample=False, **options)
        assert torch.equal(ours, want)
        tokens.append(ours[1, 9:].tolist())
    assert tokens[1] == tokens[2]
    assert tokens[0] != tokens[1]


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 8},
        {"min_length": 20},
        {"suppress_tokens": [5, 6, 7]},
        {"bad_words_ids": [[9], [10, 11]]},
        {"do_sample": True},
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "top_k": None},
        {"do_sample": True, "temperature": 0.6, "top_k": 10, "top_p": 0.8},
        {"do_sample": True, "temperature": 1.7, "min_p": 0.05, "repetition_penalty": 1.2},
        {"do_sample": True, "typical_p": 0.7, "top_k": 0},
    ],
    ids=str,
)
def test_options_mean_what_they_do_in_transformers(pair: Pair, options: dict[str, Any]) -> None:
    prompts = batch("left", 12, 5)
    torch.manual_seed(7)
    want = expected(pair.model, prompts, **options)
    ours = pair.generator.generate(**prompts, max_new_tokens=NEW_TOKENS, seed=7, **options)
    assert torch.equal(ours[:, 12:], want)
    torch.manual_seed(7)  # without a seed of its own, torch's generator goes on
    ours = pair.generator.generate(**prompts, max_new_tokens=NEW_TOKENS, **options)
    assert torch.equal(ours[:, 12:], want)


def test_padding_that_all_rows_have_counts_as_in_transformers(pair: Pair) -> None:
    """As a tokenizer's pad_to_multiple_of makes it."""
    prompts = {
        name: torch.nn.functional.pad(tensor, (6, 0), value=PAD if name == "input_ids" else 0)
        for name, tensor in batch("left", 10, 5).items()
    }
    widths = []

    def until_30(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        widths.append(ids.shape[1])
        return torch.full((len(ids),), ids.shape[1] >= 30, dtype=torch.bool)

    ends = list(range(3, 150))  # half of all tokens, so that min_length decides
    for options in (
        {"min_length": 22, "eos_token_id": ends},
        {"min_new_tokens": 6, "eos_token_id": ends},
        {"max_length": 30, "max_new_tokens": None, "eos_token_id": None},
        {"eos_token_id": None, "stopping_criteria": StoppingCriteriaList([until_30])},
    ):
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **options}
        want = pair.model.generate(**prompts, **options)
        assert torch.equal(pair.generator.generate(**prompts, **options), want)
    assert widths == 2 * list(range(17, 31))


def test_a_processor_of_the_caller_comes_before_the_cuts(pair: Pair) -> None:
    def raised(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_add(1, torch.tensor([9, 10, 11]), torch.full((len(ids), 3), 50.0))

    prompts = batch("left", 12, 5)
    options: dict[str, Any] = {"do_sample": True, "top_k": 3, "temperature": 5.0}
    options["logits_processor"] = LogitsProcessorList([raised])
    torch.manual_seed(7)
    want = expected(pair.model, prompts, **options)
    ours = pair.generator.generate(**prompts, max_new_tokens=NEW_TOKENS, seed=7, **options)
    assert torch.equal(ours[:, 12:], want)
    assert len(want.unique()) == 3


def test_without_sampling_its_options_are_not_read(pair: Pair) -> None:
    plain = pair.generator.generate([[5, 6]], do_sample=False)
    options = {"do_sample": False, "temperature": 0.0, "top_k": -1, "top_p": 1.5}
    assert torch.equal(pair.generator.generate([[5, 6]], **options), plain)


def test_ends_of_a_text_may_be_a_tensor(pair: Pair) -> None:
    prompts = batch("left", 12, 5)
    want = expected(pair.model, prompts, do_sample=False, eos_token_id=[1, 9])
    options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": torch.tensor([1, 9])}
    ours = pair.generator.generate(**prompts, do_sample=False, **options)
    assert torch.equal(ours[:, 12:], want)


def test_options_of_transformers_that_change_nothing_are_let_pass(pair: Pair) -> None:
    plain = pair.generator.generate([[5, 6]])
    options = {"num_beams": 1, "use_cache": True, "return_dict_in_generate": False}
    assert torch.equal(pair.generator.generate([[5, 6]], **options), plain)


def test_seeds(pair: Pair) -> None:
    def sampled(seed: Any) -> list[int]:
        options = {"do_sample": True, "temperature": 2.0, "max_new_tokens": NEW_TOKENS}
        return pair.generator.generate([[5, 6]], seed=seed, **options).tolist()

    before = torch.get_rng_state()
    assert sampled(1) == sampled(1) != sampled(2)
    assert sampled(np.int64(1)) == sampled(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_end_by_themselves_and_are_padded(pair: Pair) -> None:
    prompts = batch("left", 12, 5)
    free = expected(pair.model, prompts, do_sample=False)
    end = int(free[0, 3])  # ends the first row early
    for options in ({"eos_token_id": end}, {"eos_token_id": [end, int(free[1, 9])]}):
        options = {**options, "do_sample": False, "pad_token_id": 0}
        want = expected(pair.model, prompts, **options)
        ours = pair.generator.generate(**prompts, max_new_tokens=NEW_TOKENS, **options)
        assert torch.equal(ours[:, 12:], want)
        assert (want[0, 4:] == 0).all()
    assert want.shape[1] < NEW_TOKENS  # both had ended


def test_stop_strings(pair: Pair) -> None:
    prompts = batch("left", 12)
    tokenizer = pair.generator.tokenizer
    free = expected(pair.model, prompts, do_sample=False)
    text = tokenizer.decode(free[0, 5:7])
    options: dict[str, Any] = {"stop_strings": [text], "do_sample": False}
    want = expected(pair.model, prompts, tokenizer=tokenizer, **options)
    ours = pair.generator.generate(**prompts, max_new_tokens=NEW_TOKENS, **options)
    assert torch.equal(ours[:, 12:], want)
    assert want.shape[1] < NEW_TOKENS


def test_streamer_processor_and_criteria_are_used(pair: Pair) -> None:
    seen: list[list[int]] = []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            seen.append(value.flatten().tolist())

        def end(self) -> None:
            seen.append([])

    def only_nine(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([9]), 0.0)

    def third(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        return torch.full((len(ids),), ids.shape[1] == 2 + 3)

    streamer: Any = Streamer()
    processors: Any = [only_nine]
    ours = pair.generator.generate(
        torch.tensor([[5, 6]]),
        None,
        processors,
        StoppingCriteriaList([third]),
        streamer,
        max_new_tokens=8,
    )
    assert ours.tolist() == [[5, 6, 9, 9, 9]]
    assert seen == [[5, 6], [9], [9], [9], []]


def test_defaults_come_from_the_folder(pair: Pair, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(_folder(pair), tmp_path / "model"))
    GenerationConfig(max_new_tokens=3, repetition_penalty=1.5).save_pretrained(folder)
    generator = OrtGenerator(folder, num_threads=1)
    prompts = batch("left", 12)
    want = expected(pair.model, prompts, max_new_tokens=3, repetition_penalty=1.5)
    assert torch.equal(generator.generate(**prompts)[:, 12:], want)
    assert generator.generate(**prompts, max_length=14).shape == (1, 14)
    given = GenerationConfig(max_new_tokens=5)
    assert generator.generate(**prompts, generation_config=given).shape == (1, 17)
    (folder / "generation_config.json").unlink()
    generator = OrtGenerator(folder, num_threads=1)
    assert generator.generate(**prompts, eos_token_id=None).shape == (1, 32)  # transformers' 20
    (folder / "generation_config.json").write_text('{"max_new_tokens": 3, "chat_format": "raw"}')
    generator = OrtGenerator(folder, num_threads=1)
    assert generator.generate(**prompts, eos_token_id=None).shape == (1, 15)
    with pytest.raises(GenerationError, match="the generation config has max_token=3"):
        generator.generate(**prompts, generation_config=GenerationConfig(max_token=3))
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ExportError, match="can't be read"):
        OrtGenerator(folder, num_threads=1).generate(**prompts)
    GenerationConfig(num_beams=4).save_pretrained(folder)
    with pytest.raises(GenerationError, match="the generation config has num_beams=4"):
        OrtGenerator(folder, num_threads=1).generate(**prompts)


def _folder(pair: Pair) -> Path:
    return pair.generator._session.model.path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "doesn't take num_beams; it takes max_new_tokens"),
        ({"top_h": 0.6, "output_scores": True}, "doesn't take top_h, output_scores"),
        ({"forced_eos_token_id": 1}, "doesn't take forced_eos_token_id"),
        ({"max_new_token": 3}, "doesn't take max_new_token"),
        ({"temperature": 0.0, "do_sample": True}, "temperature 0.0 should be above 0"),
        ({"top_p": 1.5, "do_sample": True}, "top_p 1.5 should be from 0 to 1"),
        ({"top_k": -1, "do_sample": True}, "top_k -1 should be"),
        ({"temperature": "hot", "do_sample": True}, "temperature 'hot' should be above 0"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size -1 should be 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens 2.5 should be a whole number"),
        ({"max_new_tokens": "5"}, "max_new_tokens '5' should be a whole number"),
        ({"eos_token_id": "x"}, "eos_token_id 'x' should be a token's number"),
        ({"stop_strings": ["a", ""]}, r"stop_strings \['a', ''\] should be texts of one"),
        ({"stop_strings": 5}, "stop_strings 5 should be texts of one"),
        ({"do_sample": "no"}, "do_sample 'no' should be True or False"),
        ({"bad_words_ids": [[VOCAB_SIZE]]}, rf"logits processor fails: .*\[{VOCAB_SIZE}\]"),
        ({"bad_words_ids": [5]}, "`bad_words_ids` has to be a list of lists"),
        ({"repetition_penalty": -1.0}, "repetition_penalty -1.0 should be above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens 0 should be 1 or more"),
        ({"seed": 1.5}, "seed 1.5 should be a whole number"),
        ({"seed": "a"}, "seed 'a' should be a whole number"),
        ({"seed": 2**64}, f"seed {2**64} should be a whole number"),
        ({"temperature": 1e-40, "do_sample": True}, "temperature 1e-40 is too near 0 for"),
        ({"max_length": 2}, "max_length 2 is no longer than the prompt's 2 tokens"),
        (
            {"max_new_tokens": MAX_POSITIONS},
            rf"2 tokens of prompt and {MAX_POSITIONS} to generate exceed max_position_embeddings "
            rf"{MAX_POSITIONS} .* set max_new_tokens to {MAX_POSITIONS - 2} or less",
        ),
    ],
)  # fmt: skip
def test_options_that_cant_be_are_refused(
    pair: Pair, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(GenerationError, match=message):
        pair.generator.generate(torch.tensor([[5, 6]]), **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs token ids"),
        ({"inputs": []}, "a prompt has no token"),
        ({"inputs": [[5], []]}, "a prompt has no token"),
        ({"inputs": torch.tensor([5, 6])}, r"shape \(2,\) should be \(batch, tokens\)"),
        ({"inputs": [[5, VOCAB_SIZE]]}, f"token {VOCAB_SIZE} is outside the model's vocabulary"),
        ({"inputs": [[-1]]}, "token -1 is outside"),
        (
            {"inputs": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 3)},
            r"attention_mask has shape \(1, 3\), the token ids have \(1, 2\)",
        ),
        (
            {"inputs": torch.tensor([[5, 6]]), "attention_mask": torch.zeros(1, 2)},
            "a prompt has no token",
        ),
        ({"inputs": [[5]], "attention_mask": torch.ones(1, 1)}, "leave out attention_mask"),
        ({"inputs": torch.tensor([[5, 6], [PAD, PAD]])}, "a prompt has no token"),
        ({"inputs": torch.tensor([[5.7, 6.0]])}, "are whole numbers, and these are torch.float32"),
        ({"inputs": [[5.7]]}, "should be a tensor"),
        ({"inputs": [5, 6]}, r"not this list: \[\[5, 6\]\] is one row"),
        ({"inputs": BatchEncoding({"input_ids": [[5]]})}, r"goes in as generate\(\*\*inputs\)"),
        (
            {"inputs": torch.tensor([[5]]), "input_ids": torch.tensor([[6]])},
            "inputs and input_ids are two names",
        ),
        ({"inputs": [[5] * (MAX_POSITIONS + 1)]}, f"{MAX_POSITIONS + 1} tokens of prompt and 1"),
    ],
)
def test_prompts_that_cant_be_are_refused(
    pair: Pair, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(GenerationError, match=message):
        pair.generator.generate(**arguments)


def test_the_whole_length_can_be_used(pair: Pair) -> None:
    prompts = batch("left", 40)
    want = expected(pair.model, prompts, max_new_tokens=MAX_POSITIONS - 40, eos_token_id=None)
    options = {"max_new_tokens": MAX_POSITIONS - 40, "eos_token_id": None}
    ours = pair.generator.generate(**prompts, **options)
    assert torch.equal(ours[:, 40:], want)


def test_a_cache_that_is_too_small_is_refused(pair: Pair) -> None:
    session = DecoderSession(load_folder(_folder(pair)), num_threads=1)
    with pytest.raises(
        GenerationError, match="a cache for 3 tokens is too small for a prompt of 4"
    ):
        session.start([[5, 6, 7, 8]], 3)
    with pytest.raises(GenerationError, match="exceed max_position_embeddings"):
        session.start([[5]], MAX_POSITIONS + 1)
    decoding = session.start([[5, 6, 7], [8]], 4)
    for tokens, message in (
        ([9], r"shape \(1,\) should be one for each of 2 rows"),
        ([9, -1], "token -1 is outside"),
        ([9, 10**6], "token 1000000 is outside"),
    ):
        with pytest.raises(GenerationError, match=message):
            decoding.step(tokens)
    assert decoding.lengths == [3, 1]
    decoding.step([9, 9])
    assert decoding.lengths == [4, 2]
    with pytest.raises(GenerationError, match="the cache is full: it was made for 4 tokens"):
        decoding.step([9, 9])


def test_past_and_present_share_one_buffer(pair: Pair) -> None:
    session = DecoderSession(load_folder(_folder(pair)), num_threads=1)
    decoding = session.start([[5, 6, 7], [8]], 5)
    addresses = [buffer.data_ptr() for buffer in decoding._buffers]
    assert len(set(addresses)) == 2 * session.model.info.num_layers
    decoding.step([9, 10])
    outputs = decoding._bindings.get_outputs()[1:]
    assert [value.data_ptr() for value in outputs] == addresses
    keys = decoding._buffers[0].numpy()
    assert keys.shape == (2, 2, 5, 16)  # rows, heads, capacity, head size
    assert np.abs(keys[1, :, 1]).max() > 0  # the second row's new key follows its first
    assert np.abs(keys[:, :, 4]).max() == 0


def test_threads_are_checked(pair: Pair) -> None:
    with pytest.raises(GenerationError, match="num_threads 0 should be from 1 to 1024"):
        OrtGenerator(_folder(pair), num_threads=0)


def test_damaged_folders_are_refused(pair: Pair, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(_folder(pair), tmp_path / "model"))
    (folder / DATA_FILE).write_bytes(b"")
    with pytest.raises(ExportError, match="is cut off"):
        OrtGenerator(folder)


def run(*arguments: str) -> int:
    return main(["generate", *arguments, "--threads", "1"])


def test_command_streams_one_prompt(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(_folder(pair))
    assert run(folder, "--prompt", "to be", "--max-new-tokens", "5", "--greedy") == 0
    printed = capsys.readouterr()
    tokenizer = pair.generator.tokenizer
    row = tokenizer("to be")["input_ids"]
    ids = pair.generator.generate([row], max_new_tokens=5, do_sample=False)[0, len(row) :]
    assert printed.out == tokenizer.decode(ids, skip_special_tokens=True) + "\n"
    assert f"{len(ids)} tokens in" in printed.err
    assert "tokens/s" in printed.err


def test_command_generates_what_the_folder_says_or_what_fits(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(_folder(pair), tmp_path / "model"))

    def num_tokens(**defaults: Any) -> int:
        GenerationConfig(**defaults).save_pretrained(folder)
        assert run(str(folder), "--prompt", "to be") == 0
        return int(capsys.readouterr().err.split("1 x ")[1].split()[0])

    num_prompt = len(pair.generator.tokenizer("to be")["input_ids"])
    never = {"eos_token_id": [VOCAB_SIZE]}
    assert num_tokens(max_new_tokens=3, **never) == 3
    assert num_tokens(max_length=num_prompt + 4, **never) == 4
    assert num_tokens(**never) == MAX_POSITIONS - num_prompt


def test_command_continues_a_batch(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(_folder(pair))
    arguments = [folder, "--prompt", "to be", "--prompt", "that is the question"]
    arguments += ["--max-new-tokens", "5", "--top-k", "20", "--temperature", "0.8", "--seed", "3"]
    assert run(*arguments) == 0
    first = capsys.readouterr().out
    assert "--- to be\n" in first
    assert "--- that is the question\n" in first
    assert run(*arguments) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to continue"),
        (["--prompt", "a", "--greedy", "--top-p", "0.5"], "--greedy draws nothing, so --top-p"),
        (["--prompt", "-", "--prompt", "-"], "give it once"),
        (["--prompt", "a", "--chat"], "no chat template"),
        (["--prompt", "a\udcff"], "a prompt isn't UTF-8"),
        (["--prompt", "a", "--temperature", "0"], "or --greedy"),
        (["--prompt", "a", "--max-new-tokens", "9999"], "exceed max_position_embeddings"),
    ],
)
def test_command_says_what_is_wrong(
    pair: Pair, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(_folder(pair)), *arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""

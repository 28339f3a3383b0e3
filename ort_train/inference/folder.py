"""The folder of an exported model: what is in it, reading it, writing it whole or not at all.

    model.onnx              the graph; weights of 1 KiB and more lie in the next file
    model.onnx.data         the weights (ONNX external data), each at a multiple of 4096 bytes
    config.json, generation_config.json, tokenizer files    as transformers reads them
    genai_config.json       onnxruntime-genai's, see `genai.py`; not with a sliding window
    ort_train_export.json   what this package needs to run it: `ExportInfo`

The graph's inputs are `input_ids` (batch, sequence) and `attention_mask` (batch, total), int64;
`position_ids` (batch, sequence), int64, of a traced graph only; and for each layer
`past_key_values.N.key` and `.value` (batch, kv heads, past, head size). Its outputs are `logits`
(batch, 1, vocabulary), of each row's last token; and `present.N.key` and `.value`. Logits are
float32; the cache has `cache_dtype`.

Two kinds of graph differ in what they want of a batch:

- `fused` (GroupQueryAttention): rows are padded on the right, and each new token continues its
  own row: the mask of row b is (length of b) ones, then zeros. Left padding gives wrong logits.
  Past and present may be, and in this package are, the same buffer, longer than what is filled.
- `traced` (torch.onnx): rows are padded on the left, `position_ids` count from each row's first
  token, and present is past and the new tokens, one after the other.

A sequence of several tokens is a prompt: with a past there is one new token at a time.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ort_train import checkpoints
from ort_train.errors import ExportError
from ort_train.files import expanded, new_folder, new_folder_obstacle, temporary_beside

if TYPE_CHECKING:
    import onnx
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

SCHEMA = 1
MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
INFO_FILE = "ort_train_export.json"
#: Not copied from one exported folder to another: each writes its own.
OWN_FILES = (MODEL_FILE, DATA_FILE, INFO_FILE)
_TOKENIZER_FILES = ("*token*", "*vocab*", "*.model", "*.spm", "*merges*", "*bpe*")
_NEEDED = (MODEL_FILE, INFO_FILE, "config.json")


class Parity(BaseModel):
    """Distance of the exported model's logits to PyTorch's fp32."""

    model_config = ConfigDict(extra="allow")

    logits_max_abs: float  # prompt and decode steps, all rows
    tolerance: float  # what it was held against
    prompt_lengths: list[int]  # tokens of each row of the batch
    decode_steps: int


class ExportInfo(BaseModel):
    """`ort_train_export.json`."""

    model_config = ConfigDict(extra="allow")

    schema_: Literal[1] = Field(alias="schema", default=1)
    kind: Literal["fused", "traced"]
    precision: str  # fp32 | fp16, or a scheme of quantization
    architecture: str  # transformers' model_type
    inputs: list[str]
    outputs: list[str]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int | None  # tokens of prompt and answer; null: no limit but memory
    sliding_windows: list[int | None]  # of each layer: keys that a query sees, itself included
    cache_dtype: Literal["float32", "float16"] = "float32"
    source: str
    versions: dict[str, str | None] = {}
    parity: Parity | None = None

    @property
    def padding_side(self) -> Literal["left", "right"]:
        """Where the graph wants its padding."""
        return "right" if self.kind == "fused" else "left"

    @property
    def shares_buffer(self) -> bool:
        """Whether past and present may be one buffer."""
        return self.kind == "fused"


@dataclass(frozen=True)
class ExportedModel:
    """A folder that has been looked at and found whole.

    Attributes:
        num_bytes: of the graph and its weights.
    """

    path: Path
    info: ExportInfo
    num_bytes: int

    @property
    def model_file(self) -> Path:
        return self.path / MODEL_FILE

    def load_config(self) -> PretrainedConfig:
        """transformers' config."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.path)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the model.

        Raises:
            ExportError: the folder has none, or a damaged one.
        """
        try:
            return read_tokenizer(self.path)
        except Exception as error:  # tokenizers raises bare Exception
            raise ExportError(
                f"{str(self.path)!r} has no tokenizer that can be loaded ({error}): pass token "
                "ids, or put the tokenizer's files into the folder"
            ) from error


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder of transformers.

    Raises:
        Exception: there is none that can be loaded; transformers and tokenizers raise any.
    """
    from transformers import AutoTokenizer

    from ort_train.data.tokenizer import knows_text

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        if any(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)):
            raise
        # What transformers makes of it speaks of converters.
        raise ExportError("it has no tokenizer's files") from error
    if not knows_text(tokenizer):
        raise ExportError("it has no tokenizer's files")
    return tokenizer


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """transformers' defaults of generation in a folder; None where it has none.

    Keys that transformers doesn't know, and so ignores, are left out.

    Raises:
        ExportError: the file is damaged.
    """
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        known = vars(GenerationConfig())
        return GenerationConfig(**{n: value for n, value in content.items() if n in known})
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise ExportError(
            f"{str(file)!r} can't be read ({error}): mend it, or remove it for the defaults"
        ) from error


def load_folder(folder: str | Path) -> ExportedModel:
    """Reads a folder's description and checks that graph and weights are whole.

    Raises:
        ExportError: naming the file that is missing, damaged or cut off.
    """
    folder = expanded(folder)
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        raise ExportError(
            f"{str(folder)!r} is no exported model, as it has no {' and no '.join(missing)}: write "
            "one with `ort-train export RUN_OR_MODEL_DIR --out DIR`"
        )
    info = _read_info(folder / INFO_FILE)
    model = load_graph(folder)
    _check_names(folder, info, model)
    return ExportedModel(
        folder, info, (folder / MODEL_FILE).stat().st_size + _check_data(model, folder)
    )


def load_graph(folder: Path) -> onnx.ModelProto:
    """The graph, its weights left on disk.

    Raises:
        ExportError: it is no ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(folder / MODEL_FILE), load_external_data=False)
    except (DecodeError, OSError) as error:
        raise ExportError(f"{str(folder / MODEL_FILE)!r} is damaged: {error}") from None
    if not model.graph.node:
        raise ExportError(f"{str(folder / MODEL_FILE)!r} is damaged: it holds no graph")
    return model


def write_info(folder: Path, info: ExportInfo) -> None:
    """Write `ort_train_export.json` into a folder that is being staged."""
    content = info.model_dump(mode="json", by_alias=True)
    (folder / INFO_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: ExportedModel, folder: Path) -> None:
    """Copy configs and tokenizer from one exported folder into another that is being staged."""
    for path in source.path.iterdir():
        if path.is_file() and path.name not in OWN_FILES:
            shutil.copy2(path, folder / path.name)


@contextlib.contextmanager
def staged(out: str | Path, num_bytes: int = 0) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends without an error.

    Args:
        num_bytes: that will be written, asked of the disk first.

    Raises:
        ExportError: `out` holds something, or can't be written.
        CheckpointError: the disk has less room.
    """
    out = check_out(out)
    checkpoints.check_room(out, num_bytes, "the exported model")
    with _told(out), new_folder(out) as folder:
        yield folder


@contextlib.contextmanager
def scratch(out: Path, what: str) -> Iterator[Path]:
    """A folder on the disk of `out`, which has room for models, removed at the end.

    Raises:
        ExportError: it can't be made, or written to.
    """
    with _told(out), temporary_beside(out, what) as folder:
        yield folder


@contextlib.contextmanager
def _told(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"{str(out)!r} isn't written, and nothing of it is kept: {error}"
        ) from error


def check_out(out: str | Path) -> Path:
    """The folder to write, links followed, made sure to be new or empty, and to have a place.

    Raises:
        ExportError: it holds something, or can't be made.
    """
    out = expanded(out).resolve()
    if (obstacle := new_folder_obstacle(out)) is not None:
        raise ExportError(f"{str(out)!r} {obstacle}")
    return out


def cache_names(prefix: str, num_layers: int) -> list[str]:
    """Names of the cache's inputs ("past_key_values") or outputs ("present"), layer by layer."""
    return [f"{prefix}.{i}.{part}" for i in range(num_layers) for part in ("key", "value")]


def _read_info(file: Path) -> ExportInfo:
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{str(file)!r} can't be read ({error}): export the model again"
        ) from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise ExportError(
            f"{str(file)!r} has schema {found!r}, this version reads {SCHEMA}: export the model "
            "again with `ort-train export`"
        )
    try:
        return ExportInfo.model_validate(content)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ExportError(f"{str(file)!r}: {'; '.join(lines)}: export the model again") from None


def _check_names(folder: Path, info: ExportInfo, model: onnx.ModelProto) -> None:
    """The graph is the one that is described: a mix of two exports isn't run."""

    def compare(what: str, described: Sequence[str], found: Sequence[str]) -> None:
        if differing := sorted(set(described) ^ set(found)):
            raise ExportError(
                f"{str(folder)!r}: {MODEL_FILE} and {INFO_FILE} differ in the {what} "
                f"{', '.join(differing[:3])}: they are of different exports; export the model again"
            )

    compare("inputs", info.inputs, [value.name for value in model.graph.input])
    compare("outputs", info.outputs, [value.name for value in model.graph.output])


def _check_data(model: onnx.ModelProto, folder: Path) -> int:
    """Check that every weight's bytes are there; returns the bytes of the weights' files."""
    sizes: dict[str, int] = {}
    for tensor in model.graph.initializer:
        if not tensor.external_data:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        location = entry["location"]
        file = folder / location
        if location not in sizes:
            if not file.is_file():
                raise ExportError(
                    f"{str(folder)!r} has no {location}, the weights: export it again"
                )
            sizes[location] = file.stat().st_size
        end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
        if end > sizes[location]:
            raise ExportError(
                f"{str(file)!r} is cut off: it has {sizes[location]} bytes, and the weight "
                f"{tensor.name} ends at {end}: copy or export the model again"
            )
    return sum(sizes.values())

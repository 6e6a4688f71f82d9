"""What an encoder looks like, from the JSON files beside its weights, each of them checked.

`config.json` is transformers' (`BertConfig`, `XLMRobertaConfig`). `modules.json`, `1_Pooling/config.json` and
`sentence_bert_config.json` are those of sentence-transformers; without them a text's vector is the mean of its tokens',
as sentence-transformers has it for a plain transformers folder.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from synapse.models.config import LARGEST_DIMENSION
from synapse.models.encoder.names import (
    CONFIG_FILE,
    MODULES_FILE,
    POOLING_FILE,
    POOLING_FOLDER,
    SENTENCE_FILE,
    TOKENIZER_CONFIG_FILE,
)
from synapse.models.errors import ModelFileCorrupt, UnsupportedModel

Architecture = Literal["bert", "xlm-roberta"]
Pooling = Literal["mean", "cls"]

MAX_JSON_BYTES = 2**20
MOST_BLOCKS = 1024
SHORTEST_TEXT = 8  # tokens: the least that leaves room for words between the tokens that begin and end a text
POOLING_FOLDER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
POOLING_FLAG = "pooling_mode_"
POOLINGS: Mapping[str, Pooling] = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls"}
POSITIONS_BEFORE_TEXT = 1
"""XLM-RoBERTa counts positions from the padding token's id plus this."""


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """The shape of a BERT-family encoder, and how a text's vector is made of its tokens'.

    Attributes:
        architecture: ``bert`` counts positions from 0, ``xlm-roberta`` from `padding_id` + 1.
        blocks, hidden, intermediate, heads, vocab, token_types: counts and widths.
        positions: rows of the table of position embeddings.
        padding_id: the id of the padding token.
        norm_eps: epsilon of the layer norms.
        pooling: the mean of all tokens, or the first one.
        max_tokens: longest text, in tokens, those that begin and end it included.
        lower_case: texts are put into lower case before the tokenizer sees them.
    """

    architecture: Architecture
    blocks: int
    hidden: int
    intermediate: int
    heads: int
    vocab: int
    positions: int
    token_types: int
    padding_id: int
    norm_eps: float
    pooling: Pooling
    max_tokens: int
    lower_case: bool

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def first_position(self) -> int:
        """The row of the position table for the first token of a text."""
        return self.padding_id + POSITIONS_BEFORE_TEXT if self.architecture == "xlm-roberta" else 0


def read_encoder_config(folder: Path) -> EncoderConfig:
    """What the JSON files of a folder say.

    Raises:
        ModelFileCorrupt: a file is missing, is not JSON, or contradicts itself.
        UnsupportedModel: it describes something that no engine here can run.
    """
    fields = _Fields(CONFIG_FILE, read_json_object(folder, CONFIG_FILE))
    architecture = fields.text("model_type", "")
    if architecture not in ("bert", "xlm-roberta"):
        raise UnsupportedModel(
            f"{CONFIG_FILE}: the model type {architecture[:40]!r} is no encoder that can be run",
            hint="supported are bert (MiniLM, BGE small and base, …) and xlm-roberta (BGE-M3, …)",
        )
    for name, only in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        found = fields.text(name, only)
        if found != only:
            raise UnsupportedModel(f"{CONFIG_FILE}: {name} is {found[:40]!r}; supported is {only!r}")
    if fields.raw.get("is_decoder") or fields.raw.get("add_cross_attention"):
        raise UnsupportedModel(f"{CONFIG_FILE}: this is a decoder; an encoder reads its whole text at once")
    xlm = architecture == "xlm-roberta"
    hidden, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    vocab, positions = fields.whole("vocab_size"), fields.whole("max_position_embeddings")
    padding_id = fields.whole("pad_token_id", default=1 if xlm else 0, low=0, high=vocab - 1)
    if hidden % heads:
        raise ModelFileCorrupt(f"{CONFIG_FILE}: {heads} heads do not divide a width of {hidden}")
    sentence = _Fields(SENTENCE_FILE, _optional_object(folder, SENTENCE_FILE))
    tokenizer = _Fields(TOKENIZER_CONFIG_FILE, _optional_object(folder, TOKENIZER_CONFIG_FILE))
    usable = positions - (padding_id + POSITIONS_BEFORE_TEXT if xlm else 0)
    max_tokens = min(usable, sentence.limit("max_seq_length") or tokenizer.limit("model_max_length") or usable)
    if max_tokens < SHORTEST_TEXT:
        raise ModelFileCorrupt(f"a text could have {max_tokens} tokens; at least {SHORTEST_TEXT} are needed")
    return EncoderConfig(
        architecture=cast(Architecture, architecture),
        blocks=fields.whole("num_hidden_layers", high=MOST_BLOCKS),
        hidden=hidden,
        intermediate=fields.whole("intermediate_size"),
        heads=heads,
        vocab=vocab,
        positions=positions,
        token_types=fields.whole("type_vocab_size", default=2),
        padding_id=padding_id,
        norm_eps=fields.epsilon("layer_norm_eps"),
        pooling=_read_pooling(folder, hidden),
        max_tokens=max_tokens,
        lower_case=sentence.flag("do_lower_case", False),
    )


def read_json(folder: Path, name: str, limit: int = MAX_JSON_BYTES) -> Any:
    """The JSON value of a file, or None when there is no such file.

    Raises:
        ModelFileCorrupt: it is too large, not UTF-8, not JSON, or nested too deeply.
    """
    try:
        with (folder / name).open("rb") as file:
            raw = file.read(limit + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelFileCorrupt(f"{name} cannot be read: {error.strerror}") from error
    if len(raw) > limit:
        raise ModelFileCorrupt(f"{name} has more than {limit} bytes, the most that are read")
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ModelFileCorrupt(f"{name} is not valid JSON: {why[:200]}") from error


def read_json_object(folder: Path, name: str, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """As `read_json`, for a file that must be there and hold an object."""
    value = read_json(folder, name, limit)
    if value is None:
        raise ModelFileCorrupt(f"{name} is missing", hint="an encoder is a folder as `save_pretrained` writes it")
    if not isinstance(value, dict):
        raise ModelFileCorrupt(f"{name} must hold a JSON object, not {type(value).__name__}")
    return value


def _optional_object(folder: Path, name: str) -> dict[str, Any]:
    return read_json_object(folder, name) if (folder / name).exists() else {}


def _read_pooling(folder: Path, hidden: int) -> Pooling:
    """How sentence-transformers pools: from its modules, or the mean without any."""
    name = _pooling_folder(folder)
    if name is None:
        return "mean"
    where = f"{name}/{CONFIG_FILE}"
    config = _Fields(where, read_json_object(folder, where))
    width = config.whole("word_embedding_dimension", default=config.raw.get("embedding_dimension", hidden))
    if width != hidden:
        raise ModelFileCorrupt(f"{where}: the pooled width is {width}, but {CONFIG_FILE} says {hidden}")
    chosen = [key.removeprefix(POOLING_FLAG) for key, on in config.raw.items() if key.startswith(POOLING_FLAG) and on]
    if "pooling_mode" in config.raw:
        chosen = [config.text("pooling_mode", "")]
    if len(chosen) != 1 or chosen[0] not in POOLINGS:
        raise UnsupportedModel(
            f"{where}: pooling by {' and '.join(chosen)[:80] or 'nothing'}; supported are mean and cls"
        )
    return POOLINGS[chosen[0]]


def _pooling_folder(folder: Path) -> str | None:
    """The folder of the pooling's config, which must be the only module between the transformer and the norm."""
    modules = read_json(folder, MODULES_FILE)
    if modules is None:
        return POOLING_FOLDER if (folder / POOLING_FILE).exists() else None
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelFileCorrupt(f"{MODULES_FILE} must hold a list of modules")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UnsupportedModel(
            f"{MODULES_FILE} names the modules {', '.join(kinds)[:120]}; supported are Transformer, Pooling, Normalize"
        )
    transformer, pooling = (module.get("path", "") for module in modules[:2])
    if transformer != "":
        raise UnsupportedModel(
            f"{MODULES_FILE}: the transformer must lie in the folder itself, not in {transformer!r:.80}"
        )
    if not isinstance(pooling, str) or not POOLING_FOLDER_NAME.fullmatch(pooling):
        raise ModelFileCorrupt(f"{MODULES_FILE}: {pooling!r:.80} is not the name of a folder")
    return pooling


class _Fields:
    """The fields of one JSON object, read with their types and bounds."""

    def __init__(self, name: str, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self._name = name

    def text(self, key: str, default: str) -> str:
        value = self.raw.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "text")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def whole(self, key: str, *, default: int | None = None, low: int = 1, high: int = LARGEST_DIMENSION) -> int:
        value = self.raw.get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self._wrong(key, value, f"a whole number from {low} to {high}")
        return value

    def limit(self, key: str) -> int | None:
        """A number of tokens; None where it is left out, or so large that it means no limit (transformers has 1e30)."""
        value = self.raw.get(key)
        if value is None or (isinstance(value, int | float) and value > LARGEST_DIMENSION):
            return None
        return self.whole(key)

    def epsilon(self, key: str) -> float:
        value = self.raw.get(key, 1e-12)
        if not isinstance(value, int | float) or not math.isfinite(value) or not 0 < value < 1:
            raise self._wrong(key, value, "a number between 0 and 1")
        return float(value)

    def _wrong(self, key: str, value: object, expected: str) -> ModelFileCorrupt:
        if value is None:
            return ModelFileCorrupt(f"{self._name} does not say {key}")
        return ModelFileCorrupt(f"{self._name}: {key} is {value!r:.60}, not {expected}")

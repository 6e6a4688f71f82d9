"""Texts to the token ids that an encoder reads, from `tokenizer.json`, or for BERT from `vocab.txt`.

`tokenizer.json` (format of the `tokenizers` library) is a small program. Only the parts that the tokenizers of BERT
(WordPiece) and XLM-RoBERTa (SentencePiece's Unigram) are made of are taken, so that no regular expression of a
stranger runs here, and every id that comes out is checked before it becomes an index.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import models, normalizers, pre_tokenizers, processors

from synapse.models.encoder.config import EncoderConfig, read_json, read_json_object
from synapse.models.encoder.names import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, VOCABULARY_FILE
from synapse.models.errors import ModelFileCorrupt, UnsupportedModel

MAX_TOKENIZER_BYTES = 128 * 2**20
MOST_FRAMING_TOKENS = 4
"""Tokens that begin and end a text."""

SECTIONS: Mapping[str, frozenset[str]] = {
    "model": frozenset({"WordPiece", "Unigram"}),
    "normalizer": frozenset(
        {
            "Sequence", "BertNormalizer", "Precompiled", "Replace", "Strip", "Lowercase", "StripAccents",
            "NFC", "NFD", "NFKC", "NFKD",
        }
    ),
    "pre_tokenizer": frozenset({"Sequence", "BertPreTokenizer", "Metaspace", "Whitespace", "WhitespaceSplit"}),
    "post_processor": frozenset({"TemplateProcessing", "BertProcessing", "RobertaProcessing"}),
}  # fmt: skip
"""What may stand in each section of `tokenizer.json`. The decoder is left out: nothing here is decoded."""
NESTED = ("normalizers", "pretokenizers")
KNOWN_PATTERNS = frozenset({" {2,}"})
"""The regular expressions that XLM-RoBERTa's normalizer has; no other one is run."""
LONE_SURROGATE = re.compile("[\ud800-\udfff]")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """The tokens of one text, int32, and whether some of it was cut off because it was too long."""

    ids: NDArray[np.int32]
    truncated: bool


class EncoderTokenizer:
    """One encoder's tokenizer. Safe to use from several threads."""

    def __init__(self, backend: tokenizers.Tokenizer, config: EncoderConfig) -> None:
        framing = backend.num_special_tokens_to_add(False)
        if not 1 <= framing <= MOST_FRAMING_TOKENS:
            raise UnsupportedModel(f"the tokenizer begins and ends a text with {framing} tokens; 1 to 4 are supported")
        if config.lower_case:
            normalizer = [backend.normalizer] if backend.normalizer else []
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *normalizer])
        backend.no_padding()
        backend.enable_truncation(config.max_tokens)
        self._backend = backend
        self._vocab = config.vocab
        self._max_tokens = config.max_tokens

    def encode(self, texts: Sequence[str]) -> list[TokenizedText]:
        """The tokens of each text, with those that begin and end it, cut to the longest that the encoder reads.

        As in sentence-transformers, a special token's text becomes that token. What UTF-8 cannot carry (lone
        surrogates) becomes U+FFFD.

        Raises:
            ModelFileCorrupt: the tokenizer gave what no sound one gives.
        """
        prepared = [LONE_SURROGATE.sub("\ufffd", text) for text in texts]
        encodings = _guarded(lambda: self._backend.encode_batch_fast(prepared))
        found = []
        for encoding in encodings:
            ids = np.asarray(encoding.ids, np.int64)
            if not 0 < len(ids) <= self._max_tokens or ids.min() < 0 or ids.max() >= self._vocab:
                raise ModelFileCorrupt(f"the tokenizer gave {len(ids)} tokens, or one outside 0 to {self._vocab - 1}")
            found.append(TokenizedText(ids.astype(np.int32), bool(encoding.overflowing)))
        return found


def load_encoder_tokenizer(folder: Path, config: EncoderConfig) -> EncoderTokenizer:
    """The tokenizer of the encoder in a folder.

    Raises:
        ModelFileCorrupt: its file is missing, or is not what it should be.
        UnsupportedModel: it is of a kind that is not known here.
    """
    if (folder / TOKENIZER_FILE).exists():
        backend = _from_json(read_json_object(folder, TOKENIZER_FILE, MAX_TOKENIZER_BYTES))
    elif config.architecture == "bert" and (folder / VOCABULARY_FILE).exists():
        backend = _from_vocabulary(folder)
    else:
        raise ModelFileCorrupt(
            f"there is no {TOKENIZER_FILE}",
            hint="make one with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
        )
    size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if not 0 < size <= config.vocab:
        raise ModelFileCorrupt(f"the tokenizer has ids up to {size - 1}, but the model has {config.vocab} tokens")
    return EncoderTokenizer(backend, config)


def _from_json(parsed: dict[str, Any]) -> tokenizers.Tokenizer:
    for section, allowed in SECTIONS.items():
        _check_part(section, parsed.get(section), allowed)
    # Padding and truncation are set here, and nothing is decoded.
    wanted = {**parsed, "truncation": None, "padding": None, "decoder": None}
    return _guarded(lambda: tokenizers.Tokenizer.from_str(json.dumps(wanted)))


def _check_part(section: str, part: object, allowed: frozenset[str]) -> None:
    """Raises `UnsupportedModel` when a section, or one nested in it, is of a kind that is not allowed."""
    if part is None and section != "model":
        return
    if not isinstance(part, dict):
        raise ModelFileCorrupt(f"{TOKENIZER_FILE}: {section} must be an object")
    kind = part.get("type")
    if kind not in allowed:
        raise UnsupportedModel(
            f"{TOKENIZER_FILE}: the {section} is {kind!r:.60}", hint=f"supported are {', '.join(sorted(allowed))}"
        )
    pattern = part.get("pattern")
    if isinstance(pattern, dict) and pattern.get("Regex", next(iter(KNOWN_PATTERNS))) not in KNOWN_PATTERNS:
        raise UnsupportedModel(f"{TOKENIZER_FILE}: the {section} runs the pattern {pattern['Regex']!r:.60}")
    for key in NESTED:
        nested = part.get(key, [])
        if not isinstance(nested, list):
            raise ModelFileCorrupt(f"{TOKENIZER_FILE}: {key} must be a list")
        for each in nested:
            _check_part(section, each, allowed)


def _from_vocabulary(folder: Path) -> tokenizers.Tokenizer:
    """BERT's own form: one token a line, its id the number of the line; the settings as transformers writes them."""
    try:
        with (folder / VOCABULARY_FILE).open("rb") as file:
            raw = file.read(MAX_TOKENIZER_BYTES + 1)
        lines = raw.decode("utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileCorrupt(f"{VOCABULARY_FILE} cannot be read: {error}") from error
    if len(raw) > MAX_TOKENIZER_BYTES:
        raise ModelFileCorrupt(f"{VOCABULARY_FILE} has more than {MAX_TOKENIZER_BYTES} bytes, the most that are read")
    vocabulary = {line.removesuffix("\r"): number for number, line in enumerate(lines)}
    if len(vocabulary) != len(lines):
        raise ModelFileCorrupt(f"{VOCABULARY_FILE} has the same token twice")
    settings = read_json(folder, TOKENIZER_CONFIG_FILE)
    settings = settings if isinstance(settings, dict) else {}
    unknown, first, last = "[UNK]", "[CLS]", "[SEP]"
    for token in (unknown, first, last):
        if token not in vocabulary:
            raise ModelFileCorrupt(f"{VOCABULARY_FILE} has no token {token}")
    accents = settings.get("strip_accents")
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=unknown, max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars") is not False,
        strip_accents=accents if isinstance(accents, bool) else None,
        lowercase=settings.get("do_lower_case") is not False,
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(token, vocabulary[token]) for token in (first, last)]
    )
    backend.add_special_tokens([token for token in (unknown, first, last, "[PAD]", "[MASK]") if token in vocabulary])
    return backend


def _guarded(work: Callable[[], T]) -> T:
    """What the `tokenizers` library raises for a file that makes no sense, as `ModelFileCorrupt`.

    It is written in Rust; where it gives up on a broken invariant, pyo3's PanicException comes, which is no Exception.
    """
    try:
        return work()
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ModelFileCorrupt(f"the tokenizer cannot be used: {str(error)[:200]}") from error
        raise

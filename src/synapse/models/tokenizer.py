"""Text to token ids and back: the tokenizer that a GGUF file describes, rebuilt with the `tokenizers` library.

Two families exist in Llama-like models: byte-level BPE (``gpt2`` in GGUF), where `tokenizer.ggml.pre` names how text is
cut into words before merging, and SentencePiece's BPE (``llama`` in GGUF), where merges follow from scores.
"""

from __future__ import annotations

import pickle
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Generic, TypeVar

import structlog
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from synapse.errors import InvalidInput
from synapse.models.errors import ModelFileCorrupt, UnsupportedModel
from synapse.models.gguf_file import ModelFile
from synapse.models.pre_tokenizers import HOW_TO_SAY, PRE_TOKENIZERS, UNSAID, byte_of_character, pre_tokenizer_name
from synapse.models.record import pre_tokenizer_of

T = TypeVar("T")

log = structlog.get_logger(__name__)

END_OF_TURN = frozenset(
    ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>")
)
"""Control tokens that end an answer, whether or not the file says so, and whatever type it gives them."""
CONTROL_SHAPE = re.compile(r"<[|\uff5c].+[|\uff5c]>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]|<<?/?SYS>>?")
"""How tokens look that set turns apart: one of these that the chat template writes is a control token as well."""

SPACE = "\u2581"  # how SentencePiece writes a space
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
SLICE = 1000
"""Items of a list that are read from a pickle at once: less than a millisecond."""
MOST_SPLIT_STEPS = 10**8  # of all tokens together, when merges are worked out from scores


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`, as in llama.cpp."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Slices(Generic[T]):
    """A long list that pickles in pieces, none of which keeps the interpreter for long when it is read again."""

    def __init__(self, items: Iterable[T] = (), pieces: Sequence[bytes] = ()) -> None:
        self._items = items
        self._pieces = pieces

    def __iter__(self) -> Iterator[T]:
        yield from self._items
        for piece in self._pieces:
            yield from pickle.loads(piece)  # noqa: S301 (it comes from `__reduce__`)

    def __reduce__(self) -> tuple[type[Slices[T]], tuple[tuple[()], list[bytes]]]:
        items = list(self)
        return Slices, ((), [pickle.dumps(items[i : i + SLICE]) for i in range(0, len(items), SLICE)])


class Tokenizer:
    """One model's tokenizer. Safe to use from several threads.

    Attributes:
        vocab_size: how many ids there are.
        bos_id: the token that begins a text, if the model has one.
        eos_ids: the tokens that end a text or a turn.
        add_bos: the model expects `bos_id` before a plain text (a chat template writes its own).
        special_tokens: control tokens by their text: never text that a user wrote.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        pieces: Sequence[bytes],
        first_ids: Mapping[int, int],
        special_tokens: Mapping[str, int],
        bos_id: int | None,
        eos_ids: frozenset[int],
        add_bos: bool,
    ) -> None:
        self._backend = backend
        self._pieces = pieces
        self._first_ids = first_ids
        self._special_ids = frozenset(special_tokens.values())
        self._lock = threading.Lock()
        self.vocab_size = len(pieces)
        self.special_tokens: Mapping[str, int] = MappingProxyType(dict(special_tokens))
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self.add_bos = add_bos

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The token ids of a text; no BOS is added.

        Args:
            text: any text; what UTF-8 cannot carry (lone surrogates) becomes U+FFFD.
            special: whether a control token's text becomes that token. False is for text from outside: it then is
                spelled out in ordinary tokens.

        Raises:
            InvalidInput: `special` is False and this vocabulary has no other spelling for a control token in the text.
        """
        text = LONE_SURROGATE.sub("\ufffd", text)
        with self._lock:
            self._backend.encode_special_tokens = not special
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if not special and not self._special_ids.isdisjoint(ids):
            raise InvalidInput("the text contains a control token of the model, and it has no other spelling for it")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids, control tokens included; incomplete UTF-8 becomes U+FFFD.

        Raises:
            InvalidInput: an id is not in the vocabulary.
        """
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise InvalidInput(f"token ids must be between 0 and {self.vocab_size - 1}")
        known = [self._first_ids.get(token, token) for token in ids]
        text: str = self._backend.decode(known, skip_special_tokens=False)
        return text

    def token_bytes(self, token: int) -> bytes:
        """The bytes that this token adds in the middle of a text; none for a control token."""
        return self._pieces[token]

    def to_json(self) -> str:
        """The whole tokenizer in the format of ``tokenizer.json``."""
        return str(self._backend.to_str())


@dataclass(frozen=True, slots=True)
class TokenizerParts:
    """What a tokenizer is made of, worked out and checked: `build` is quick. It pickles, for another process.

    Attributes:
        pre: the rule of `PRE_TOKENIZERS`; None for SentencePiece.
        prefix: whether SentencePiece puts a space before each stretch of text.
        unknown: SentencePiece's token for what has no other.
        tokens: of the vocabulary; the first of those that are alike is the one that text becomes.
        pieces: the bytes of each token.
    """

    pre: str | None
    prefix: bool
    unknown: str | None
    tokens: Slices[str]
    merges: Slices[tuple[str, str]]
    pieces: Slices[bytes]
    first_ids: Mapping[int, int]
    control: tuple[str, ...]
    user_defined: tuple[str, ...]
    bos_id: int | None
    eos_ids: frozenset[int]
    add_bos: bool

    def build(self) -> Tokenizer:
        """The tokenizer."""
        ids: dict[str, int] = {}
        for token, text in enumerate(self.tokens):
            if text:
                ids.setdefault(text, token)
        merges = list(self.merges)
        if self.pre is not None:
            rule = PRE_TOKENIZERS[self.pre]
            backend = tokenizers.Tokenizer(models.BPE(ids, merges, ignore_merges=rule.ignore_merges))
            backend.normalizer = rule.normalizer()
            backend.pre_tokenizer = rule.pre_tokenizer()
            backend.decoder = decoders.ByteLevel()
        else:
            backend = tokenizers.Tokenizer(
                models.BPE(ids, merges, unk_token=self.unknown, fuse_unk=True, byte_fallback=True)
            )
            _spell_as_sentencepiece(backend, prefix=self.prefix)
        backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in self.control])
        backend.add_tokens([AddedToken(text, normalized=False) for text in self.user_defined])
        return Tokenizer(
            backend,
            pieces=list(self.pieces),
            first_ids=self.first_ids,
            special_tokens={text: ids[text] for text in self.control},
            bos_id=self.bos_id,
            eos_ids=self.eos_ids,
            add_bos=self.add_bos,
        )


def load_tokenizer(file: ModelFile) -> Tokenizer:
    """The tokenizer of a model. Where its file does not say how words are cut, the record beside it may.

    Raises:
        ModelFileCorrupt: its metadata is missing or contradicts itself.
        UnsupportedModel: it is of a kind, or cuts words in a way, that is not known here.
        InvalidInput: the record says a way that is not known.
    """
    return tokenizer_parts(file).build()


def tokenizer_parts(file: ModelFile) -> TokenizerParts:
    """What the tokenizer of a model is made of.

    Raises:
        as `load_tokenizer`.
    """
    vocabulary = _Vocabulary(file.metadata)
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        written = pre_tokenizer_name(file.metadata)
        pre = written or pre_tokenizer_name(file.metadata, pre_tokenizer_of(file.path))
        if not pre:
            log.warning(
                "model.no_pre_tokenizer",
                model=file.path.name,
                reason=f"{UNSAID}; GPT-2's rule is used, and numbers and spaces may come out wrong",
                hint=HOW_TO_SAY,
            )
        rule, unknown = pre or "default", None
        merges, pieces = vocabulary.listed_merges(), vocabulary.byte_level_pieces()
        add_bos = PRE_TOKENIZERS[rule].add_bos
    elif kind == "llama":
        rule, unknown = None, next((text for text, kind in vocabulary.typed() if kind == TokenType.UNKNOWN), None)
        merges, pieces = vocabulary.scored_merges(), vocabulary.sentencepiece_pieces()
        add_bos = True
    else:
        raise UnsupportedModel(
            f"the tokenizer kind {str(kind)[:40]!r} is not supported",
            hint="supported are gpt2 (byte-level BPE) and llama (SentencePiece BPE)",
        )
    bos_id = vocabulary.id_of("bos")
    return TokenizerParts(
        pre=rule,
        prefix=vocabulary.flag("add_space_prefix", True),
        unknown=unknown,
        tokens=Slices(vocabulary.tokens),
        merges=Slices(merges),
        pieces=Slices(pieces),
        first_ids=vocabulary.first_ids,
        control=tuple(vocabulary.control),
        user_defined=tuple(vocabulary.user_defined),
        bos_id=bos_id,
        eos_ids=vocabulary.end_ids(),
        add_bos=vocabulary.flag("add_bos_token", add_bos) and bos_id is not None,
    )


def _spell_as_sentencepiece(backend: tokenizers.Tokenizer, *, prefix: bool) -> None:
    """As the tokenizer.json of Llama 2 and Mistral: each stretch between control tokens begins with an extra space."""
    space = [normalizers.Prepend(SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )


class _Vocabulary:
    """The ``tokenizer.ggml.*`` metadata, checked."""

    def __init__(self, metadata: Mapping[str, object]) -> None:
        self._metadata = metadata
        tokens = self._strings("tokens")
        # Some official files have an entry twice, or empty ones: the first id is the one that text becomes.
        self.ids: dict[str, int] = {}
        for i, text in enumerate(tokens):
            if text:
                self.ids.setdefault(text, i)
        if not self.ids:
            raise ModelFileCorrupt("all tokens of the tokenizer are empty")
        self.first_ids = {i: self.ids[text] for i, text in enumerate(tokens) if text and self.ids[text] != i}
        kinds = metadata.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens))
        if not isinstance(kinds, list) or len(kinds) != len(tokens):
            raise ModelFileCorrupt("the tokenizer must have one token type for each token")
        self._kinds = kinds
        self.tokens = tokens
        # Whatever its type says, a token that begins or ends texts is not something a user can write.
        marks = {tokens[i] for i in map(self.id_of, ("bos", "eos", "eot")) if i is not None}
        marks |= END_OF_TURN
        template = metadata.get("tokenizer.chat_template")
        if isinstance(template, str):
            marks |= {text for text in self.ids if CONTROL_SHAPE.fullmatch(text) and text in template}
        kinds_of_control = (TokenType.CONTROL, TokenType.UNKNOWN)
        control_texts = dict.fromkeys(t for t, k in self.typed() if t and (k in kinds_of_control or t in marks))
        self.control = [*control_texts]
        control = set(self.control)
        added = (t for t, k in self.typed() if t and k == TokenType.USER_DEFINED and t not in control)
        self.user_defined = [*dict.fromkeys(added)]

    def _strings(self, key: str) -> list[str]:
        values = self._metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
            raise ModelFileCorrupt(f"the metadata has no list of strings tokenizer.ggml.{key}")
        return values

    def typed(self) -> zip[tuple[str, int]]:
        return zip(self.tokens, self._kinds, strict=True)

    def id_of(self, name: str) -> int | None:
        """The id of the token that plays a role, for example ``bos``."""
        key = f"tokenizer.ggml.{name}_token_id"
        value = self._metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or not 0 <= value < len(self.tokens):
            raise ModelFileCorrupt(f"{key} is {str(value)[:40]}, but there are {len(self.tokens)} tokens")
        return value

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._metadata.get(f"tokenizer.ggml.{name}", default))

    def end_ids(self) -> frozenset[int]:
        ids = {self.id_of(name) for name in ("eos", "eot", "eom")} | {
            self.ids[text] for text in self.control if text in END_OF_TURN
        }
        return frozenset(i for i in ids if i is not None)

    def listed_merges(self) -> list[tuple[str, str]]:
        """The merges in the file, best first, without those that would spell a control token."""
        control, merges = set(self.control), []
        for line in self._strings("merges"):
            left, _, right = line.partition(" ")
            if not (left in self.ids and right in self.ids and left + right in self.ids):
                raise ModelFileCorrupt(f"the merge {line[:40]!r} is not of two tokens into a third")
            if left + right not in control:
                merges.append((left, right))
        return merges

    def scored_merges(self) -> list[tuple[str, str]]:
        """The merges that SentencePiece's scores imply, best first, in the order in which transformers has them.

        A token can come from each way to cut it into two tokens; better scores come first, then longer halves.
        """
        scores = self._metadata.get("tokenizer.ggml.scores")
        if not isinstance(scores, list) or len(scores) != len(self.tokens):
            raise ModelFileCorrupt("the tokenizer must have one score for each token")
        if sum(len(text) ** 2 for text in self.tokens) > MOST_SPLIT_STEPS:
            raise ModelFileCorrupt("the tokens are too long to be words")
        whole = {t for t, k in self.typed() if k in (TokenType.NORMAL, TokenType.UNUSED)} - set(self.control)
        merges: list[tuple[float, int, int, str, str]] = []
        for i, (text, score) in enumerate(zip(self.tokens, scores, strict=True)):
            if text not in whole or self.ids.get(text) != i:
                continue
            cuts = ((text[:i], text[i:]) for i in range(1, len(text)))
            pairs = [pair for pair in cuts if pair[0] in self.ids and pair[1] in self.ids]
            pairs.sort(key=lambda pair: (self.ids[pair[0]], self.ids[pair[1]]))
            merges += [(score, len(left), len(right), left, right) for left, right in pairs]
        merges.sort(key=lambda merge: merge[:3], reverse=True)
        return [merge[3:] for merge in merges]

    def byte_level_pieces(self) -> list[bytes]:
        bytes_of, control, added = byte_of_character(), set(self.control), set(self.user_defined)
        pieces = []
        for text in self.tokens:
            if text in control:
                pieces.append(b"")
            elif text in added or not all(character in bytes_of for character in text):
                pieces.append(text.encode())
            else:
                pieces.append(bytes(bytes_of[character] for character in text))
        return pieces

    def sentencepiece_pieces(self) -> list[bytes]:
        control, pieces = set(self.control), []
        for text, kind in self.typed():
            if text in control:
                pieces.append(b"")
            elif kind == TokenType.BYTE:
                pieces.append(_byte(text))
            else:
                pieces.append(text.replace(SPACE, " ").encode())
        return pieces


def _byte(text: str) -> bytes:
    """The byte of a token like ``<0x0A>``."""
    try:
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes.fromhex(text[3:5])
    except ValueError as error:
        raise ModelFileCorrupt(f"the byte token {text!r} is not of the form <0x0A>") from error
    raise ModelFileCorrupt(f"the byte token {text[:40]!r} is not of the form <0x0A>")

"""Tokenizers rebuilt from GGUF give the same ids and the same text as transformers'."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from support.small_gguf import write_small_gguf
from support.tiny_tokenizers import (
    CONTROL,
    TEXTS,
    byte_level_reference,
    sentencepiece_parts,
    sentencepiece_reference,
    sentencepiece_writer,
    write_byte_level,
)
from synapse.errors import InvalidInput
from synapse.models.errors import ModelFileCorrupt, UnsupportedModel
from synapse.models.gguf_file import open_model_file
from synapse.models.tokenizer import Tokenizer, load_tokenizer

NO_FIXTURE_CHECK = [HealthCheck.function_scoped_fixture]
NOT_IN_DEFAULT = "\x04\x06\x13\x14\x16\x1d"  # SmolLM2 has no tokens for these bytes, nor for planes 4 to 11
KINDS = ("gpt-2", "smollm", "llama-bpe", "qwen2")


def _load(path: Path) -> Tokenizer:
    return load_tokenizer(open_model_file(path))


@pytest.fixture(scope="module")
def default_tokenizer(default_model: Path) -> Tokenizer:
    return _load(default_model)


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any, Path]:
    tokens, scores, kinds = sentencepiece_parts()
    path = write_small_gguf(
        tmp_path_factory.mktemp("spm") / "spm.gguf",
        tokenizer=sentencepiece_writer(tokens, scores, kinds),
        vocab=len(tokens),
    )
    return _load(path), sentencepiece_reference(tokens, scores), path


@pytest.mark.peer
@pytest.mark.parametrize("kind", KINDS)
def test_byte_level_tokens_and_text_equal_those_of_transformers(kind: str, tmp_path: Path) -> None:
    reference, backend = byte_level_reference(kind)
    tokenizer = _load(write_byte_level(tmp_path / "bpe.gguf", kind, backend))
    for text in (*TEXTS, "".join(TEXTS), f"<|im_start|>{TEXTS[2]}<|im_end|>\n<|endoftext|>", ""):
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False), text
        assert tokenizer.decode(ids) == reference.decode(ids), text


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["gpt-2", "llama-bpe", "tekken"])
def test_words_are_cut_as_in_transformers_own_reading_of_the_file(kind: str, tmp_path: Path) -> None:
    path = write_byte_level(tmp_path / "bpe.gguf", kind, byte_level_reference("gpt-2")[1])
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    tokenizer = _load(path)
    for text in TEXTS:
        words = reference.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        backend = json.loads(tokenizer.to_json())
        ours = type(reference.backend_tokenizer).from_str(json.dumps(backend)).pre_tokenizer.pre_tokenize_str(text)
        assert ours == words, text


@pytest.mark.peer
def test_the_default_models_tokens_and_text_equal_those_of_transformers(
    default_tokenizer: Tokenizer, default_reference: Any
) -> None:
    # How digits are cut is the next test.
    words = ["".join(character for character in text if not character.isnumeric()) for text in TEXTS]
    for text in (*words, "from 12:30, 7 days", "在2024年11月", "<|im_start|>user\nहाय 🎉<|im_end|>\n"):
        ids = default_tokenizer.encode(text)
        assert ids == default_reference.encode(text, add_special_tokens=False), text
        assert default_tokenizer.decode(ids) == default_reference.decode(ids) == text


@pytest.mark.peer
def test_the_default_model_cuts_digits_off_as_it_was_trained(
    default_tokenizer: Tokenizer, default_reference: Any
) -> None:
    # transformers' GGUF reader does not know `smollm` and leaves this step of the published tokenizer.json out, which
    # shows where a digit follows several spaces, or is none of 0 to 9.
    backend = type(default_reference.backend_tokenizer).from_str(default_reference.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in (*TEXTS, "[\n    1,\n    2]", "one:\n\n1. a\n\n2. b", "x  =  10", "٣  ४"):
        assert default_tokenizer.encode(text) == backend.encode(text, add_special_tokens=False).ids, text


@pytest.mark.peer
def test_sentencepiece_tokens_and_text_equal_those_of_transformers(spm: tuple[Tokenizer, Any, Path]) -> None:
    tokenizer, reference, _ = spm
    for text in (*TEXTS, "<s>[INST] привет [/INST] hello</s><s>again", "你<unk>好"):
        if not text[0].isspace():  # a leading space: see below
            ids = tokenizer.encode(text)
            assert ids == reference.encode(text, add_special_tokens=False), text
            assert tokenizer.decode(ids) == reference.decode(ids), text


@pytest.mark.peer
def test_sentencepiece_tokens_equal_those_of_transformers_own_reading_of_the_file(
    spm: tuple[Tokenizer, Any, Path],
) -> None:
    tokenizer, _, path = spm
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        if not text[0].isspace():
            assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False), text


def test_sentencepiece_text_that_begins_with_a_space_keeps_it(spm: tuple[Tokenizer, Any, Path]) -> None:
    tokenizer = spm[0]
    assert tokenizer.decode(tokenizer.encode("  two")) == "  two"
    assert tokenizer.encode(" a") != tokenizer.encode("a")


@settings(max_examples=200, deadline=None, suppress_health_check=NO_FIXTURE_CHECK)
@given(
    text=st.text(st.characters(exclude_characters=NOT_IN_DEFAULT, exclude_categories=("Cs",), max_codepoint=0x3FFFF))
)
def test_the_bytes_of_byte_level_tokens_are_the_bytes_of_the_text(default_tokenizer: Tokenizer, text: str) -> None:
    ids = default_tokenizer.encode(text, special=False)
    assert b"".join(map(default_tokenizer.token_bytes, ids)) == text.encode()
    assert default_tokenizer.decode(ids) == text


@settings(max_examples=200, deadline=None, suppress_health_check=NO_FIXTURE_CHECK)
@given(text=st.text(st.characters(exclude_characters="\u2581", exclude_categories=("Cs",))))
def test_the_bytes_of_sentencepiece_tokens_are_the_bytes_of_the_text(
    spm: tuple[Tokenizer, Any, Path], text: str
) -> None:
    tokenizer = spm[0]
    ids = tokenizer.encode(text, special=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == (b" " + text.encode() if text else b"")


@settings(max_examples=200, deadline=None, suppress_health_check=NO_FIXTURE_CHECK)
@given(parts=st.lists(st.sampled_from([*CONTROL, "<|im_", "end|>", "<", "|>", " ", "x", "<repo_name>", "\n"])))
def test_text_from_outside_never_becomes_a_control_token(default_tokenizer: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    ids = default_tokenizer.encode(text, special=False)
    assert not set(ids) & set(default_tokenizer.special_tokens.values())
    assert default_tokenizer.decode(ids) == text


def test_control_tokens_are_parsed_unless_told_otherwise(default_tokenizer: Tokenizer) -> None:
    assert default_tokenizer.encode("<|im_end|>") == [2]
    assert len(default_tokenizer.encode("<|im_end|>", special=False)) > 1
    assert default_tokenizer.token_bytes(2) == b""
    assert default_tokenizer.decode([1, 2]) == "<|im_start|><|im_end|>"


def test_parsing_control_tokens_or_not_does_not_leak_between_threads(default_tokenizer: Tokenizer) -> None:
    plain = default_tokenizer.encode("<|im_end|>", special=False)

    def encode(i: int) -> bool:
        return default_tokenizer.encode("<|im_end|>", special=bool(i % 2)) == ([2] if i % 2 else plain)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(encode, range(2000)))


def test_the_ends_of_a_turn_are_known(default_tokenizer: Tokenizer) -> None:
    assert default_tokenizer.eos_ids == {0, 2}
    assert default_tokenizer.bos_id == 1
    assert not default_tokenizer.add_bos
    assert default_tokenizer.vocab_size == 49152


def test_lone_surrogates_become_replacement_characters(default_tokenizer: Tokenizer) -> None:
    assert default_tokenizer.decode(default_tokenizer.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("ids", [[-1], [49152], [0, 10**9]])
def test_ids_outside_the_vocabulary_are_refused(default_tokenizer: Tokenizer, ids: list[int]) -> None:
    with pytest.raises(InvalidInput, match="between 0 and 49151"):
        default_tokenizer.decode(ids)


def _byte_level(**changes: Any) -> Callable[[gguf.GGUFWriter], None]:
    """Writes a vocabulary of eight tokens, with some keys changed or, for None, left out."""
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": ["a", "b", "ab", "c", "<think>", "<|im_end|>", "d", "Ġ"],
        "token_type": [1, 1, 1, 1, 4, 3, 1, 1],
        "merges": ["a b"],
        "eos_token_id": 6,
    } | changes

    def write(writer: gguf.GGUFWriter) -> None:
        for key, value in values.items():
            name = "tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}"
            match value:
                case None:
                    continue
                case bool():
                    writer.add_bool(name, value)
                case str():
                    writer.add_string(name, value)
                case int():
                    writer.add_uint32(name, value)
                case list():
                    writer.add_array(name, value)

    return write


def _small(tmp_path: Path, **changes: Any) -> Tokenizer:
    vocab = len(changes["tokens"]) if isinstance(changes.get("tokens"), list) and "eos_token_id" in changes else 8
    return _load(write_small_gguf(tmp_path / "small.gguf", tokenizer=_byte_level(**changes), vocab=vocab))


def test_user_defined_tokens_are_kept_whole_and_control_tokens_end_the_turn(tmp_path: Path) -> None:
    tokenizer = _small(tmp_path)
    assert tokenizer.encode("ab<think>c") == [2, 4, 3]
    assert tokenizer.encode("ab<think>c", special=False) == [2, 4, 3]
    assert tokenizer.token_bytes(4) == b"<think>"
    assert tokenizer.special_tokens == {"<|im_end|>": 5, "d": 6}  # `d` ends texts, whatever its type says
    assert tokenizer.eos_ids == {5, 6}


@pytest.mark.parametrize("kind", [gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED])
def test_what_the_template_writes_and_ends_of_turn_are_control_tokens_whatever_their_type(
    kind: gguf.TokenType, tmp_path: Path
) -> None:
    letters = [*sorted(set("<|im_end|><|turn|>think/")), "th"]
    tokens = ["<|im_end|>", "<|turn|>", "<think>", *letters]
    types = [kind, kind, gguf.TokenType.USER_DEFINED, *[1] * len(letters)]
    template = "{{ '<|turn|>' + messages[0].content }}{{ '<think>' }}"
    tokenizer = _small(
        tmp_path,
        tokens=tokens,
        token_type=[int(t) for t in types],
        merges=["t h"],
        eos_token_id=None,
        chat_template=template,
    )
    assert tokenizer.special_tokens == {"<|im_end|>": 0, "<|turn|>": 1}
    assert tokenizer.eos_ids == {0}
    assert not {0, 1} & set(tokenizer.encode("<|im_end|><|turn|>", special=False))
    assert tokenizer.encode("<|turn|>") == [1]
    assert tokenizer.token_bytes(2) == b"<think>"


def test_an_empty_or_a_repeated_entry_loads_the_first_id_encodes_and_all_decode(tmp_path: Path) -> None:
    tokens = ["a", "b", "ab", "a", "", "ab", "", "d", "<|im_end|>"]
    types = [1, 1, 1, 1, 1, 1, 3, 1, 3]
    tokenizer = _small(tmp_path, tokens=tokens, token_type=types, eos_token_id=8)
    assert tokenizer.encode("aba") == [2, 0]
    assert [tokenizer.decode([token]) for token in range(9)] == tokens
    assert [tokenizer.token_bytes(token) for token in range(8)] == [text.encode() for text in tokens[:8]]


def test_text_that_has_only_a_control_token_to_spell_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="control token"):
        _small(tmp_path).encode("abd", special=False)


def test_bos_is_added_when_the_file_or_the_family_says_so(tmp_path: Path) -> None:
    assert not _small(tmp_path, bos_token_id=5).add_bos
    assert _small(tmp_path, bos_token_id=5, add_bos_token=True).add_bos
    assert _small(tmp_path, bos_token_id=5, pre="llama-bpe").add_bos
    assert not _small(tmp_path, bos_token_id=5, pre="llama-bpe", add_bos_token=False).add_bos
    assert not _small(tmp_path, pre="llama-bpe").add_bos  # there is no BOS


def test_a_whole_word_in_the_vocabulary_wins_over_merges_in_llama_3(tmp_path: Path) -> None:
    assert _small(tmp_path, merges=["a c"], tokens=["a", "b", "ab", "c", "ac", "x", "d", "Ġ"]).encode("ab") == [0, 1]
    llama = _small(tmp_path, pre="llama-bpe", merges=["a c"], tokens=["a", "b", "ab", "c", "ac", "x", "d", "Ġ"])
    assert llama.encode("ab") == [2]


def test_an_unknown_pre_tokenizer_or_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="'viking'") as caught:
        _small(tmp_path, pre="viking")
    assert "llama-bpe" in (caught.value.hint or "")
    with pytest.raises(UnsupportedModel, match="'t5'"):
        _small(tmp_path, model="t5")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "tokens"),
        ({"merges": None}, "merges"),
        ({"token_type": [1, 1]}, "token type"),
        ({"merges": ["a q"]}, "'a q'"),
        ({"merges": ["ab"]}, "'ab'"),
        ({"eos_token_id": 8}, "eos_token_id is 8"),
        ({"model": "llama"}, "score"),
        ({"model": "llama", "scores": [0.0] * 8, "token_type": [1, 1, 1, 1, 6, 3, 1, 1]}, "byte token"),
        ({"model": "llama", "scores": [0.0] * 8, "tokens": ["a" * 20000, *"bcdefgh"]}, "too long"),
    ],
)
def test_vocabularies_that_contradict_themselves_are_corrupt(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelFileCorrupt, match=message):
        _small(tmp_path, **changes)

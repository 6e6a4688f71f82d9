"""Tokenizers of encoders give the ids of transformers, and what a stranger wrote into them does not run."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import BertTokenizer

from benchmarks.texts import SENTENCES
from support.tiny_encoders import TinyEncoder, build_tiny_encoder
from support.tiny_tokenizers import TEXTS
from synapse.models.encoder.config import EncoderConfig, read_encoder_config
from synapse.models.encoder.tokenizer import load_encoder_tokenizer
from synapse.models.errors import ModelFileCorrupt, UnsupportedModel

ALL_TEXTS = [
    *SENTENCES,
    *TEXTS,
    "",
    "[CLS] a [MASK]",
    "<s> a <mask>",
    " spaces  and\ttabs\n",
    "ÀÉÎ ÜPPER",
    "long " * 99,
]


@pytest.fixture(scope="module", params=["bert", "xlm-roberta"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyEncoder:
    return build_tiny_encoder(tmp_path_factory.mktemp("encoders") / request.param, request.param)


@pytest.fixture
def parsed(tiny: TinyEncoder) -> Any:
    return json.loads((tiny.folder / "tokenizer.json").read_text())


@pytest.fixture
def config(tiny: TinyEncoder) -> EncoderConfig:
    return read_encoder_config(tiny.folder)


def ids_of(folder: Path, config: EncoderConfig, texts: list[str]) -> list[list[int]]:
    return [text.ids.tolist() for text in load_encoder_tokenizer(folder, config).encode(texts)]


def write(folder: Path, parsed: Any) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(parsed))
    return folder


def test_the_ids_are_those_of_transformers(tiny: TinyEncoder, config: EncoderConfig) -> None:
    expected = tiny.tokenizer(ALL_TEXTS, truncation=True, max_length=tiny.max_tokens)["input_ids"]
    assert ids_of(tiny.folder, config, ALL_TEXTS) == expected


def test_padding_and_truncation_of_the_file_do_not_count(
    parsed: Any, tiny: TinyEncoder, config: EncoderConfig, tmp_path: Path
) -> None:
    parsed["truncation"] = {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Left"}
    parsed["padding"] = {
        "strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]",
    }  # fmt: skip
    assert ids_of(write(tmp_path, parsed), config, ALL_TEXTS) == ids_of(tiny.folder, config, ALL_TEXTS)


@pytest.mark.parametrize(
    "settings",
    [{}, {"do_lower_case": False}, {"strip_accents": True, "do_lower_case": False}, {"tokenize_chinese_chars": False}],
)
def test_a_vocabulary_alone_is_enough_for_bert(tmp_path: Path, settings: dict[str, bool]) -> None:
    tiny = build_tiny_encoder(tmp_path / "tiny")
    vocab = tiny.tokenizer.get_vocab()
    expected = BertTokenizer(vocab=vocab, **settings)(ALL_TEXTS, truncation=True, max_length=64)["input_ids"]
    (tiny.folder / "tokenizer.json").unlink()
    (tiny.folder / "vocab.txt").write_text("".join(f"{token}\n" for token in sorted(vocab, key=vocab.__getitem__)))
    (tiny.folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert ids_of(tiny.folder, read_encoder_config(tiny.folder), ALL_TEXTS) == expected


def test_lower_case_can_be_asked_for_by_sentence_transformers(tmp_path: Path) -> None:
    tiny = build_tiny_encoder(tmp_path / "tiny", "xlm-roberta")
    (tiny.folder / "sentence_bert_config.json").write_text('{"max_seq_length": 64, "do_lower_case": true}')
    upper, lower = ids_of(tiny.folder, read_encoder_config(tiny.folder), ["THE Bridge", "the bridge"])
    assert upper == lower


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("model", {"type": "BPE", "vocab": {}, "merges": []}, "the model is 'BPE'"),
        ("model", None, "must be an object"),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}, r"pattern '\(a\+\)\+\$'"),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Nmt"}]}, "the normalizer is 'Nmt'"),
        ("normalizer", {"type": "Sequence", "normalizers": {}}, "must be a list"),
        ("normalizer", [], "must be an object"),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(a+)+$"}}, "the pre_tokenizer is 'Split'"),
        ("post_processor", {"type": "ByteLevel"}, "the post_processor is 'ByteLevel'"),
        ("post_processor", None, "0 tokens"),
    ],
)
def test_parts_that_encoders_do_not_have_are_refused(
    parsed: Any, config: EncoderConfig, tmp_path: Path, section: str, value: Any, message: str
) -> None:
    parsed[section] = value
    with pytest.raises((ModelFileCorrupt, UnsupportedModel), match=message):
        load_encoder_tokenizer(write(tmp_path, parsed), config)


def test_a_pattern_that_is_known_runs(parsed: Any, config: EncoderConfig, tmp_path: Path) -> None:
    parsed["normalizer"] = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    one, many = ids_of(write(tmp_path, parsed), config, ["a b", "a     b"])
    assert one == many


def _special_id(parsed: Any) -> None:
    for token in parsed["post_processor"]["special_tokens"].values():
        token["ids"] = [2**31]


def _twice(parsed: Any) -> None:
    parsed["post_processor"]["single"] *= 2


def _long_frame(parsed: Any) -> None:
    parsed["post_processor"]["single"] += [parsed["post_processor"]["single"][0]] * 50


def _ids_beyond(parsed: Any) -> None:
    vocab = parsed["model"]["vocab"]
    if isinstance(vocab, dict):
        vocab["beyond"] = 10**6
    else:
        vocab += [[f"beyond{i}", -1.0] for i in range(1000)]


def _no_vocabulary(parsed: Any) -> None:
    parsed["model"]["vocab"] = 5


def _bad_charsmap(parsed: Any) -> None:
    parsed["normalizer"] = {
        "type": "Precompiled",
        "precompiled_charsmap": base64.b64encode((64).to_bytes(4, "little") + bytes(range(97, 161)) * 4).decode(),
    }


@pytest.mark.parametrize("damage", [_special_id, _twice, _long_frame, _ids_beyond, _no_vocabulary, _bad_charsmap])
def test_what_comes_out_is_checked_before_it_is_used(
    parsed: Any, config: EncoderConfig, tmp_path: Path, damage: Callable[[Any], None]
) -> None:
    damage(parsed)
    with pytest.raises((ModelFileCorrupt, UnsupportedModel)):
        load_encoder_tokenizer(write(tmp_path, parsed), config).encode(ALL_TEXTS)


def test_no_tokenizer_at_all_says_how_to_make_one(config: EncoderConfig, tmp_path: Path) -> None:
    with pytest.raises(ModelFileCorrupt, match=r"no tokenizer\.json") as caught:
        load_encoder_tokenizer(tmp_path, config)
    assert "save_pretrained" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[UNK]\n[CLS]\n[SEP]\na\na\n", "the same token twice"),
        (b"[UNK]\n[CLS]\n", r"no token \[SEP\]"),
        (b"\xff", "cannot be read"),
        (b"[UNK]\n[CLS]\n[SEP]\n" + b"".join(b"t%d\n" % i for i in range(600)), "ids up to 602"),
    ],
)
def test_a_vocabulary_that_makes_no_sense_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    tiny = build_tiny_encoder(tmp_path / "tiny")
    (tiny.folder / "tokenizer.json").unlink()
    (tiny.folder / "vocab.txt").write_bytes(content)
    with pytest.raises(ModelFileCorrupt, match=message):
        load_encoder_tokenizer(tiny.folder, read_encoder_config(tiny.folder))

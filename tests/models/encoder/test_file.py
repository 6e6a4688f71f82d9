"""An encoder's folder from a stranger: each claim of a file is checked against the others before anything is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from support.tiny_encoders import build_tiny_encoder
from synapse.errors import NotFound, SynapseError
from synapse.models.encoder.file import open_encoder_file
from synapse.models.encoder.names import WEIGHTS_FILE
from synapse.models.errors import ModelFileCorrupt, UnsupportedModel

QUERY = "encoder.layer.0.attention.self.query.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_encoder(tmp_path_factory.mktemp("encoders") / "sound").folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    target = tmp_path / "tiny"
    shutil.copytree(sound, target)
    return target


def change(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None takes one out."""
    value = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: each for key, each in value.items() if each is not None}))


def change_weights(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    weights = load_file(folder / WEIGHTS_FILE)
    edit(weights)
    save_file(weights, folder / WEIGHTS_FILE)


def test_a_sound_folder_is_opened(folder: Path) -> None:
    file = open_encoder_file(folder)
    config = file.config
    assert (config.architecture, config.blocks, config.hidden, config.heads, config.head_dim) == ("bert", 2, 48, 4, 12)
    assert (config.pooling, config.max_tokens, config.first_position) == ("mean", 64, 0)
    weight, bias = file.part(1, "up")
    assert weight.shape == (80, 48)
    assert bias.shape == (80,)
    assert file.embedding("word").shape == (config.vocab, 48)


def test_without_the_files_of_sentence_transformers_the_mean_is_taken(folder: Path) -> None:
    change(folder / "1_Pooling" / "config.json", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    assert open_encoder_file(folder).config.pooling == "cls"
    (folder / "modules.json").unlink()
    assert open_encoder_file(folder).config.pooling == "cls"
    shutil.rmtree(folder / "1_Pooling")
    assert open_encoder_file(folder).config.pooling == "mean"


def test_the_new_form_of_the_pooling_config_is_read(folder: Path) -> None:
    (folder / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 48, "pooling_mode": "cls"}')
    assert open_encoder_file(folder).config.pooling == "cls"


def test_the_longest_text_is_what_the_files_agree_on(folder: Path) -> None:
    change(folder / "tokenizer_config.json", model_max_length=10**30)
    assert open_encoder_file(folder).config.max_tokens == 64
    change(folder / "tokenizer_config.json", model_max_length=40)
    assert open_encoder_file(folder).config.max_tokens == 40
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": true}')
    assert open_encoder_file(folder).config.max_tokens == 20
    assert open_encoder_file(folder).config.lower_case
    change(folder / "sentence_bert_config.json", max_seq_length=1000)
    assert open_encoder_file(folder).config.max_tokens == 64


def test_weights_of_a_model_with_a_head_are_found(folder: Path) -> None:
    expected, _ = open_encoder_file(folder).part(0, "query")

    def add_head(weights: dict[str, Any]) -> None:
        for name in list(weights):
            weights[f"bert.{name}"] = weights.pop(name)
        weights["cls.predictions.bias"] = np.zeros(600, np.float32)
        weights["bert.embeddings.position_ids"] = np.arange(64)[None]

    change_weights(folder, add_head)
    found, _ = open_encoder_file(folder).part(0, "query")
    np.testing.assert_array_equal(found, expected)


CONFIG = "config.json"
POOLING = "1_Pooling/config.json"


@pytest.mark.parametrize(
    ("file", "fields", "error", "message"),
    [
        (CONFIG, {"model_type": "mpnet"}, UnsupportedModel, "'mpnet'"),
        (CONFIG, {"model_type": ["bert"]}, ModelFileCorrupt, "model_type"),
        (CONFIG, {"hidden_act": "gelu_new"}, UnsupportedModel, "hidden_act"),
        (CONFIG, {"position_embedding_type": "relative_key"}, UnsupportedModel, "position_embedding_type"),
        (CONFIG, {"is_decoder": True}, UnsupportedModel, "decoder"),
        (CONFIG, {"hidden_size": None}, ModelFileCorrupt, "does not say hidden_size"),
        (CONFIG, {"hidden_size": 96}, ModelFileCorrupt, "pooled width"),
        (CONFIG, {"hidden_size": 48.0}, ModelFileCorrupt, "hidden_size is 48.0"),
        (CONFIG, {"hidden_size": True}, ModelFileCorrupt, "hidden_size is True"),
        (CONFIG, {"hidden_size": 2**62}, ModelFileCorrupt, "hidden_size"),
        (CONFIG, {"num_attention_heads": 5}, ModelFileCorrupt, "5 heads do not divide"),
        (CONFIG, {"num_attention_heads": 0}, ModelFileCorrupt, "num_attention_heads"),
        (CONFIG, {"num_hidden_layers": 3}, ModelFileCorrupt, r"encoder\.layer\.2\..* is missing"),
        (CONFIG, {"num_hidden_layers": 1}, UnsupportedModel, r"have no tensor encoder\.layer\.1"),
        (CONFIG, {"num_hidden_layers": 10**6}, ModelFileCorrupt, "num_hidden_layers"),
        (CONFIG, {"intermediate_size": 81}, ModelFileCorrupt, "must have the shape"),
        (CONFIG, {"vocab_size": 599}, ModelFileCorrupt, "must have the shape"),
        (CONFIG, {"max_position_embeddings": 65}, ModelFileCorrupt, "must have the shape"),
        (CONFIG, {"max_position_embeddings": 4}, ModelFileCorrupt, "4 tokens"),
        (CONFIG, {"pad_token_id": 600}, ModelFileCorrupt, "pad_token_id"),
        (CONFIG, {"layer_norm_eps": 0}, ModelFileCorrupt, "layer_norm_eps"),
        (CONFIG, {"layer_norm_eps": float("nan")}, ModelFileCorrupt, "layer_norm_eps"),
        (POOLING, {"pooling_mode_cls_token": True}, UnsupportedModel, "cls_token and mean_tokens"),
        (POOLING, {"pooling_mode_mean_tokens": False}, UnsupportedModel, "nothing"),
        (POOLING, {"pooling_mode": "max"}, UnsupportedModel, "by max"),
        (POOLING, {"word_embedding_dimension": 47}, ModelFileCorrupt, "47"),
        ("tokenizer_config.json", {"model_max_length": -1}, ModelFileCorrupt, "model_max_length"),
    ],
)
def test_a_claim_that_cannot_be_is_named(
    folder: Path, file: str, fields: dict[str, Any], error: type[SynapseError], message: str
) -> None:
    change(folder / file, **fields)
    with pytest.raises(error, match=message) as caught:
        open_encoder_file(folder)
    assert caught.value.message.startswith("tiny: ")


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([{"type": "x.Transformer", "path": ""}, {"type": "x.Dense", "path": "2_Dense"}], "Transformer, Dense"),
        ([{"type": "x.Transformer", "path": "0"}, {"type": "x.Pooling", "path": "1_Pooling"}], "folder itself"),
        (
            [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "../other"}],
            "not the name of a folder",
        ),
        ([{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": None}], "not the name of a folder"),
        (["Transformer"], "list of modules"),
        ({"type": "x.Transformer"}, "list of modules"),
    ],
)
def test_modules_that_would_compute_something_else_are_refused(folder: Path, modules: Any, message: str) -> None:
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises((ModelFileCorrupt, UnsupportedModel), match=message):
        open_encoder_file(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "must hold a JSON object"),
        (b" " * (2**20 + 1), "more than 1048576 bytes"),
    ],
)
def test_a_config_that_is_no_config_is_named(folder: Path, content: bytes, message: str) -> None:
    (folder / CONFIG).write_bytes(content)
    with pytest.raises(ModelFileCorrupt, match=message):
        open_encoder_file(folder)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda w: w.pop(QUERY), ModelFileCorrupt, "is missing"),
        (lambda w: w.update({QUERY: w[QUERY][:, :40].copy()}), ModelFileCorrupt, r"must have the shape \[48, 48\]"),
        (lambda w: w.update({QUERY: w[QUERY].astype(np.int64)}), ModelFileCorrupt, "but is I64"),
        (lambda w: w.update({QUERY: w[QUERY].astype(np.float64)}), UnsupportedModel, "the type 'F64'"),
        (lambda w: w.update({"classifier.weight": w[QUERY]}), UnsupportedModel, r"no tensor classifier\.weight"),
        (lambda w: w.update({f"bert.{QUERY}": w[QUERY]}), UnsupportedModel, "no tensor bert"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(
    folder: Path, edit: Callable[[dict[str, Any]], Any], error: type[SynapseError], message: str
) -> None:
    change_weights(folder, edit)
    with pytest.raises(error, match=message):
        open_encoder_file(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_when_they_are_read(folder: Path, value: float) -> None:
    change_weights(folder, lambda weights: weights[QUERY].__setitem__((3, 5), value))
    file = open_encoder_file(folder)
    with pytest.raises(ModelFileCorrupt, match=r"query\.weight holds NaN"):
        file.part(0, "query")


def test_missing_files_are_named_and_pickles_are_never_opened(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no folder"):
        open_encoder_file(tmp_path / "nowhere")
    (folder / WEIGHTS_FILE).write_bytes(b"")
    with pytest.raises(ModelFileCorrupt, match="cannot be read"):
        open_encoder_file(folder)
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(ModelFileCorrupt, match="safetensors is missing"):
        open_encoder_file(folder)
    (folder / "pytest_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UnsupportedModel, match="pickle"):
        open_encoder_file(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(ModelFileCorrupt, match=r"config\.json is missing"):
        open_encoder_file(folder)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_read_or_refused(folder: Path, sound: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([CONFIG, POOLING, "modules.json", "tokenizer.json", WEIGHTS_FILE]))
    content = bytearray((sound / name).read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    for _ in range(data.draw(st.integers(1, 4))):
        if content:
            content[data.draw(st.integers(0, min(len(content), 4000) - 1))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(content)
    try:
        file = open_encoder_file(folder)
        for text in file.tokenizer.encode(["Which of these two phones has the better battery?"]):
            assert text.ids.max() < file.config.vocab
        file.embedding("word")
    except (ModelFileCorrupt, UnsupportedModel):
        pass
    finally:
        shutil.copyfile(sound / name, folder / name)

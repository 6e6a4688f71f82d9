"""The configuration read from metadata: its rotary embedding against transformers, and everything it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.small_gguf import HEADS, HIDDEN, write_small_gguf
from synapse.models.config import RopeConfig
from synapse.models.errors import ModelFileCorrupt, UnsupportedModel
from synapse.models.gguf_file import open_model_file

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.peer
@pytest.mark.parametrize("rope", [None, {"rope_type": "linear", "factor": 2.0}, YARN, LLAMA3])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_frequencies_equal_those_of_transformers(family: str, rope: dict[str, Any] | None, tmp_path: Path) -> None:
    from support.tiny_models import build_tiny_model

    tiny = build_tiny_model(tmp_path / "tiny.gguf", family, rope=rope, blocks=1, head_dim=32)
    config = open_model_file(tiny.path).config
    embedding = tiny.reference.model.rotary_emb
    assert config.rope.kind == (rope or {}).get("rope_type", "default")
    np.testing.assert_allclose(config.rope.inverse_frequencies(), embedding.inv_freq.numpy(), rtol=1e-6)
    assert config.rope.attention_scale() == pytest.approx(embedding.attention_scaling)


@pytest.mark.peer
@pytest.mark.parametrize("storage", ["F32", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_weight_of_every_family_equals_that_of_transformers(family: str, storage: str, tmp_path: Path) -> None:
    from support.tiny_models import build_tiny_model

    tiny = build_tiny_model(tmp_path / "tiny.gguf", family, storage=storage, bias=family == "llama", blocks=2)
    file, wanted = open_model_file(tiny.path), {k: v.numpy() for k, v in tiny.reference.state_dict().items()}
    assert file.config.qkv_bias == (family in ("llama", "qwen2"))
    assert file.config.qk_norm == (family == "qwen3")
    np.testing.assert_array_equal(file.embedding(), wanted["model.embed_tokens.weight"])
    np.testing.assert_array_equal(file.output_norm(), wanted["model.norm.weight"])
    np.testing.assert_array_equal(file.output(), wanted["lm_head.weight"])
    for block in range(2):
        prefix = f"model.layers.{block}."
        parts = {f"{p}_proj": f"self_attn.{p}_proj.weight" for p in "qkvo"}
        parts |= {f"{p}_proj": f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
        parts |= {"attention_norm": "input_layernorm.weight", "ffn_norm": "post_attention_layernorm.weight"}
        if file.config.qkv_bias:
            parts |= {f"{p}_bias": f"self_attn.{p}_proj.bias" for p in "qkv"}
        if file.config.qk_norm:
            parts |= {f"{p}_norm": f"self_attn.{p}_norm.weight" for p in "qk"}
        for part, name in parts.items():
            np.testing.assert_array_equal(file.weight(block, part), wanted[prefix + name], err_msg=part)


def test_an_old_file_says_linear_scaling_in_its_own_way(tmp_path: Path) -> None:
    path = write_small_gguf(tmp_path / "old.gguf", metadata={"llama.rope.scale_linear": 4.0})
    assert open_model_file(path).config.rope == RopeConfig(10000.0, HIDDEN // HEADS, "linear", factor=4.0)


def test_one_number_for_each_block_is_fine_when_they_agree(tmp_path: Path) -> None:
    path = write_small_gguf(tmp_path / "list.gguf", metadata={"llama.attention.head_count_kv": [2, 2]})
    assert open_model_file(path).config.kv_heads == 2
    path = write_small_gguf(tmp_path / "other.gguf", metadata={"llama.attention.head_count_kv": [2, 4]})
    with pytest.raises(ModelFileCorrupt, match="head_count_kv"):
        open_model_file(path)


def test_an_unknown_architecture_is_named_and_the_supported_ones_are_listed(tmp_path: Path) -> None:
    path = write_small_gguf(tmp_path / "bloom.gguf", architecture="bloom")
    with pytest.raises(UnsupportedModel, match="'bloom'") as caught:
        open_model_file(path)
    assert all(name in (caught.value.hint or "") for name in ("llama", "qwen2", "qwen3"))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "mixture-of-experts"),
        ({"llama.attention.sliding_window": 32}, "sliding-window"),
        ({"llama.rope.dimension_count": 4}, "rotating 4 of a head's 8"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"llama.attention.value_length": 4}, "different widths"),
        ({"split.count": 3}, "one part of 3"),
    ],
)
def test_what_no_engine_runs_is_refused_by_name(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        open_model_file(write_small_gguf(tmp_path / "no.gguf", metadata=metadata))


def test_a_sliding_window_as_long_as_the_context_changes_nothing(tmp_path: Path) -> None:
    path = write_small_gguf(tmp_path / "wide.gguf", metadata={"llama.attention.sliding_window": 64})
    assert open_model_file(path).config.context == 64


def test_frequency_factors_and_another_scaling_together_are_refused(tmp_path: Path) -> None:
    path = write_small_gguf(
        tmp_path / "both.gguf",
        metadata={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
        tensors={"rope_freqs.weight": np.ones(4, np.float32)},
    )
    with pytest.raises(UnsupportedModel, match="linear"):
        open_model_file(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", None),
        ("llama.block_count", 0),
        ("llama.block_count", 2**31),
        ("llama.block_count", "many"),
        ("llama.embedding_length", 2**30),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count", 2**20),
        ("llama.attention.head_count_kv", 3),
        ("llama.attention.layer_norm_rms_epsilon", float("nan")),
        ("llama.attention.layer_norm_rms_epsilon", True),
        ("llama.context_length", None),
        ("llama.rope.freq_base", float("inf")),
        ("llama.rope.freq_base", 0.0),
        ("llama.rope.scaling.type", "linear"),
        ("llama.rope.scaling.type", "yarn"),
        ("tokenizer.ggml.tokens", ["a", "b"]),
    ],
)
def test_keys_that_are_missing_or_impossible_are_corrupt(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelFileCorrupt):
        open_model_file(write_small_gguf(tmp_path / "bad.gguf", metadata={key: value}))

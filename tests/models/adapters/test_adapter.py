"""Reading PEFT folders: what is read, and each reason for refusing one."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.peft_layers import (
    BLOCKS,
    HIDDEN,
    copy_layer,
    edit_config,
    edit_weights,
    save_layer,
    tiny_config,
    tiny_llama,
)
from synapse.errors import Corrupt, InvalidInput, NotFound
from synapse.models.adapters.adapter import LayerCorrupt, LayerRefused, content_address, read_adapter
from synapse.models.config import PROJECTIONS

Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_layer(tmp_path_factory.mktemp("layers") / "sound")


@pytest.fixture
def layer(sound: Path, tmp_path: Path) -> Path:
    """A sound layer of its own for each test to damage."""
    return copy_layer(sound, tmp_path / "layer")


def refused(folder: Path, reason: str, **config: Any) -> LayerRefused:
    with pytest.raises(LayerRefused) as caught:
        read_adapter(folder, tiny_config(**config))
    assert caught.value.reason == reason, caught.value.message
    assert caught.value.message
    return caught.value


class TestReading:
    def test_a_peft_folder_is_read_as_it_was_trained(self, sound: Path) -> None:
        adapter = read_adapter(sound, tiny_config())

        assert (adapter.rank, adapter.alpha, adapter.rslora) == (4, 8.0, False)
        assert adapter.targets == ("q_proj", "v_proj")
        assert set(adapter.factors) == {(block, name) for block in range(BLOCKS) for name in ("q_proj", "v_proj")}
        assert adapter.factors[0, "q_proj"].A.shape == (4, HIDDEN)
        assert adapter.factors[0, "v_proj"].B.shape == (HIDDEN // 2, 4)
        assert adapter.factors[0, "q_proj"].scale == 2.0
        assert adapter.size_bytes == sum(
            (sound / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors")
        )

    def test_the_factors_are_the_numbers_in_the_file(self, sound: Path) -> None:
        from safetensors.numpy import load_file

        written = load_file(sound / "adapter_model.safetensors")
        factors = read_adapter(sound, tiny_config()).factors[0, "q_proj"]
        for found, name in ((factors.A, "A"), (factors.B, "B")):
            np.testing.assert_array_equal(found, written[Q0.format(name)])
            assert found.dtype == np.float32
            assert found.flags.c_contiguous

    def test_all_linear_projections_can_be_targets(self, tmp_path: Path) -> None:
        folder = save_layer(tmp_path / "all", target_modules="all-linear", r=8)
        adapter = read_adapter(folder, tiny_config())
        assert adapter.targets == PROJECTIONS
        assert len(adapter.factors) == BLOCKS * len(PROJECTIONS)

    def test_rslora_divides_by_the_root_of_the_rank(self, tmp_path: Path) -> None:
        adapter = read_adapter(save_layer(tmp_path / "rs", use_rslora=True, r=8), tiny_config())
        assert adapter.rslora
        assert adapter.factors[1, "v_proj"].scale == pytest.approx(8 / math.sqrt(8))

    def test_patterns_give_single_projections_their_own_rank_and_alpha(self, tmp_path: Path) -> None:
        folder = save_layer(
            tmp_path / "patterns",
            rank_pattern={"layers.0.self_attn.q_proj": 2, "^model.layers.1.self_attn.v_proj": 3},
            alpha_pattern={"v_proj": 5},
        )
        factors = read_adapter(folder, tiny_config()).factors
        assert {key: pair.A.shape[0] for key, pair in factors.items()} == {
            (0, "q_proj"): 2,
            (0, "v_proj"): 4,
            (1, "q_proj"): 4,
            (1, "v_proj"): 3,
        }
        assert factors[0, "q_proj"].scale == 8 / 2
        assert factors[0, "v_proj"].scale == 5 / 4
        assert factors[1, "v_proj"].scale == 5 / 3

    @pytest.mark.peer
    @pytest.mark.parametrize(
        "options",
        [
            {"r": 16, "lora_alpha": 3},
            {"use_rslora": True, "target_modules": "all-linear"},
            {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 9}, "use_rslora": True},
        ],
    )
    def test_the_update_of_every_projection_is_pefts(self, tmp_path: Path, options: dict[str, Any]) -> None:
        from peft import PeftModel

        folder = save_layer(tmp_path / "peer", **options)
        peft_model = PeftModel.from_pretrained(tiny_llama(), str(folder))
        for (block, projection), pair in read_adapter(folder, tiny_config()).factors.items():
            part = "mlp" if projection in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            module = getattr(getattr(peft_model.base_model.model.model.layers[block], part), projection)
            expected = module.get_delta_weight("default").detach().numpy()
            np.testing.assert_allclose(pair.scale * pair.B @ pair.A, expected, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 1e-2)])
    def test_float16_stays_and_bfloat16_becomes_float32(
        self, sound: Path, tmp_path: Path, dtype: str, tolerance: float
    ) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        folder = copy_layer(sound, tmp_path / dtype)
        path = folder / "adapter_model.safetensors"
        save_file({name: value.to(getattr(torch, dtype)) for name, value in load_file(path).items()}, path)
        exact, half = (read_adapter(place, tiny_config()).factors[0, "q_proj"].A for place in (sound, folder))
        assert half.dtype == (np.float16 if dtype == "float16" else np.float32)
        np.testing.assert_allclose(half, exact, rtol=tolerance, atol=1e-4)
        expected = load_file(path)[Q0.format("A")].float().numpy()
        np.testing.assert_array_equal(half, expected)

    def test_without_a_base_model_only_the_layer_itself_is_checked(self, sound: Path) -> None:
        assert read_adapter(sound, None).targets == ("q_proj", "v_proj")

    def test_the_address_depends_on_every_byte_of_both_files(self, layer: Path) -> None:
        before = read_adapter(layer, None).sha256
        assert before == content_address(
            (layer / "adapter_config.json").read_bytes(), (layer / "adapter_model.safetensors").read_bytes()
        )
        edit_config(layer, peft_version="another")
        assert read_adapter(layer, None).sha256 != before

    def test_a_missing_folder_is_not_found(self, tmp_path: Path) -> None:
        with pytest.raises(NotFound):
            read_adapter(tmp_path / "nowhere", tiny_config())


class TestVariantsAreRefused:
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"use_dora": True}, "dora"),
            ({"lora_bias": True}, "bias"),
            ({"bias": "lora_only"}, "bias"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
            ({"alora_invocation_tokens": [3, 4]}, "variant"),
            ({"layer_replication": [[0, 2], [1, 2]]}, "variant"),
            ({"init_lora_weights": "pissa"}, "initialisation"),
            ({"init_lora_weights": "olora"}, "initialisation"),
            ({"trainable_token_indices": [1, 2]}, "variant"),
        ],
    )
    def test_that_peft_itself_saved(self, tmp_path: Path, options: dict[str, Any], reason: str) -> None:
        refused(save_layer(tmp_path / "variant", **options), reason)

    def test_of_another_peft_type(self, tmp_path: Path) -> None:
        from peft import IA3Config, get_peft_model

        model = get_peft_model(tiny_llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
        model.save_pretrained(str(tmp_path / "ia3"))
        refused(tmp_path / "ia3", "peft_type")

    @pytest.mark.parametrize(
        ("field", "value", "reason"),
        [
            ("fan_in_fan_out", True, "fan_in_fan_out"),
            ("use_qalora", True, "variant"),
            ("target_parameters", ["experts.weight"], "variant"),
            ("arrow_config", {"top_k": 3}, "variant"),
            ("kasa_config", {"beta": 1}, "variant"),
            ("init_lora_weights", "pissa_niter_4", "initialisation"),
            ("something_new", {"alpha": 2}, "variant"),
        ],
    )
    def test_that_the_config_asks_for(self, layer: Path, field: str, value: object, reason: str) -> None:
        refused(edit_config(layer, **{field: value}), reason)

    def test_unless_the_unknown_field_is_empty(self, layer: Path) -> None:
        edit_config(layer, something_new=None, another=[], third=False)
        assert read_adapter(layer, tiny_config()).rank == 4

    def test_a_dora_vector_that_the_config_hides(self, tmp_path: Path) -> None:
        folder = edit_config(save_layer(tmp_path / "dora", use_dora=True), use_dora=False)
        refused(folder, "dora")


class TestPickleIsRefused:
    @pytest.mark.parametrize("name", ["adapter_model.bin", "adapter.pt", "adapter.pkl"])
    def test_and_never_opened(self, layer: Path, tmp_path: Path, name: str) -> None:
        opened = tmp_path / "opened"

        class Bomb:
            def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
                return Path.touch, (opened,)

        (layer / "adapter_model.safetensors").unlink()
        (layer / name).write_bytes(pickle.dumps(Bomb()))
        error = refused(layer, "pickle")
        assert "safetensors" in error.message
        assert not opened.exists()

    def test_also_under_the_name_of_a_safetensors_file(self, layer: Path) -> None:
        (layer / "adapter_model.safetensors").write_bytes(pickle.dumps({"a": 1}))
        with pytest.raises(LayerCorrupt):
            read_adapter(layer, tiny_config())

    def test_a_folder_without_weights_says_so(self, layer: Path) -> None:
        (layer / "adapter_model.safetensors").unlink()
        refused(layer, "missing_file")


class TestTargets:
    @pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
    def test_outside_the_seven_projections_are_refused(self, tmp_path: Path, target: str) -> None:
        refused(save_layer(tmp_path / target, target_modules=["q_proj", target]), "unknown_target")

    def test_that_no_llama_has_are_refused(self, layer: Path) -> None:
        def rename(tensors: dict[str, np.ndarray]) -> None:
            tensors[Q0.format("A").replace("q_proj", "w_proj")] = tensors.pop(Q0.format("A"))

        refused(edit_weights(layer, rename), "unknown_target")

    def test_in_the_wrong_part_of_a_block_are_refused(self, layer: Path) -> None:
        def rename(tensors: dict[str, np.ndarray]) -> None:
            tensors[Q0.format("A").replace("self_attn", "mlp")] = tensors.pop(Q0.format("A"))

        refused(edit_weights(layer, rename), "unknown_target")

    def test_that_the_config_does_not_list_are_refused(self, layer: Path) -> None:
        refused(edit_config(layer, target_modules=["v_proj"]), "unknown_target")

    def test_in_blocks_that_the_config_does_not_list_are_refused(self, layer: Path) -> None:
        refused(edit_config(layer, layers_to_transform=[1]), "unknown_target")

    def test_given_as_one_regular_expression_are_taken_from_the_weights(self, layer: Path) -> None:
        edit_config(layer, target_modules="(a|aa)*$")
        assert read_adapter(layer, tiny_config()).targets == ("q_proj", "v_proj")

    def test_written_twice_are_refused(self, layer: Path) -> None:
        def double(tensors: dict[str, np.ndarray]) -> None:
            tensors[Q0.format("A").replace("model.model.model", "model.model")] = tensors[Q0.format("A")].copy()

        refused(edit_weights(layer, double), "duplicate_tensor")


class TestShapes:
    def test_of_a_wider_model_are_refused(self, tmp_path: Path) -> None:
        folder = save_layer(tmp_path / "wide", model=tiny_llama(hidden_size=64))
        error = refused(folder, "shape_mismatch")
        assert "[4, 32]" in error.message
        assert "[4, 64]" in error.message

    def test_of_other_kv_heads_are_refused(self, sound: Path) -> None:
        refused(sound, "shape_mismatch", kv_heads=4)

    def test_a_block_the_base_does_not_have_is_refused(self, sound: Path) -> None:
        assert "block 1" in refused(sound, "shape_mismatch", blocks=1).message

    def test_a_without_b_is_refused(self, layer: Path) -> None:
        def drop(tensors: dict[str, np.ndarray]) -> None:
            del tensors[Q0.format("B")]

        error = refused(edit_weights(layer, drop), "unpaired")
        assert "lora_A without lora_B" in error.message

    def test_a_rank_other_than_the_configs_is_refused(self, layer: Path) -> None:
        refused(edit_config(layer, r=8), "rank_mismatch")

    def test_a_factor_that_is_not_a_matrix_is_refused(self, layer: Path) -> None:
        def flatten(tensors: dict[str, np.ndarray]) -> None:
            tensors[Q0.format("A")] = tensors[Q0.format("A")].reshape(-1)

        refused(edit_weights(layer, flatten), "rank_mismatch")

    @pytest.mark.parametrize("rank", [0, -1, 257, 4.0, True, "4", None])
    def test_a_rank_outside_1_to_256_is_refused(self, layer: Path, rank: object) -> None:
        refused(edit_config(layer, r=rank), "bad_rank")

    def test_a_layer_without_weights_is_refused(self, layer: Path) -> None:
        refused(edit_weights(layer, dict.clear), "empty")


class TestNumbers:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_weights_that_are_not_finite_are_refused(self, layer: Path, value: float) -> None:
        def spoil(tensors: dict[str, np.ndarray]) -> None:
            tensors[Q0.format("B")][3, 2] = value

        error = refused(edit_weights(layer, spoil), "not_finite")
        assert isinstance(error, Corrupt)

    @pytest.mark.parametrize("alpha", [0, -1, math.nan, math.inf, "8", True, None, 10**400])
    def test_an_alpha_that_is_not_positive_and_finite_is_refused(self, layer: Path, alpha: object) -> None:
        refused(edit_config(layer, lora_alpha=alpha), "bad_alpha")

    def test_a_bad_rank_or_alpha_in_a_pattern_is_refused(self, layer: Path) -> None:
        refused(edit_config(layer, rank_pattern={"q_proj": 300}), "bad_rank")
        refused(edit_config(layer, rank_pattern={}, alpha_pattern={"q_proj": 0}), "bad_alpha")

    def test_a_pattern_that_is_a_regular_expression_is_not_run(self, layer: Path) -> None:
        refused(edit_config(layer, rank_pattern={"(a+)+b": 4}), "bad_pattern")

    def test_other_number_types_are_refused(self, layer: Path) -> None:
        def widen(tensors: dict[str, np.ndarray]) -> None:
            tensors[Q0.format("B")] = tensors[Q0.format("B")].astype(np.float64)

        refused(edit_weights(layer, widen), "bad_dtype")


class TestConfigFile:
    @pytest.mark.parametrize("text", ["", "{", "[]", '{"r": 4, "r": 8}', "[" * 100_000, "\xff"])
    def test_that_is_not_a_json_object_is_refused(self, layer: Path, text: str) -> None:
        (layer / "adapter_config.json").write_bytes(text.encode("latin-1"))
        refused(layer, "bad_json")

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("target_modules", {"q_proj": 1}),
            ("target_modules", [1]),
            ("layers_to_transform", ["1"]),
            ("use_rslora", "yes"),
            ("base_model_name_or_path", 7),
            ("rank_pattern", ["q_proj"]),
        ],
    )
    def test_with_a_field_of_the_wrong_type_is_refused(self, layer: Path, field: str, value: object) -> None:
        refused(edit_config(layer, **{field: value}), "bad_config")

    def test_larger_than_a_mebibyte_is_refused(self, layer: Path) -> None:
        refused(edit_config(layer, peft_version="x" * 2**20), "too_large")


class TestBaseModel:
    @pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-1B", "Qwen2.5-0.5B-Instruct", "/data/SmolLM-135M"])
    def test_of_a_clearly_different_name_is_refused_even_when_shapes_fit(self, layer: Path, name: str) -> None:
        edit_config(layer, base_model_name_or_path=name)
        error = refused(layer, "base_mismatch", name="Smollm2 135M 8k Lc100K Mix1 Ep2")
        assert name in error.message
        assert error.hint

    @pytest.mark.parametrize(
        "name",
        [
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "unsloth/SmolLM2-135M",
            "/somewhere/models--HuggingFaceTB--SmolLM2-135M/snapshots/0123456789",
            "/work/out/base",
            "C:\\models\\out",
            "./checkpoint",
            "outputs/checkpoint-500",
            "runs/exp3",
            "out/my-sft-final",
            "checkpoints/epoch_2",
            "user/checkpoint-500",
            "results/llm_v2",
            "",
            None,
        ],
    )
    def test_of_the_same_name_or_of_none_is_taken(self, layer: Path, name: str | None) -> None:
        edit_config(layer, base_model_name_or_path=name)
        adapter = read_adapter(layer, tiny_config(name="Smollm2 135M 8k Lc100K Mix1 Ep2"))
        assert adapter.base_model == (name or None)

    def test_may_have_another_name_in_the_library(self, layer: Path) -> None:
        edit_config(layer, base_model_name_or_path="meta-llama/Llama-3.2-1B")
        assert read_adapter(layer, tiny_config(name="model"), names=["llama-3.2-1b"]).rank == 4
        refused(layer, "base_mismatch", name="Llama-3.1-1B")


class TestWeightsFile:
    def test_is_refused_wherever_it_is_cut_short(self, layer: Path) -> None:
        path = layer / "adapter_model.safetensors"
        whole = path.read_bytes()
        for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            error = refused(layer, "truncated")
            assert isinstance(error, Corrupt)

    def test_larger_than_the_limit_is_refused(self, layer: Path) -> None:
        with pytest.raises(LayerRefused, match="more than 1000 bytes"):
            read_adapter(layer, tiny_config(), max_bytes=1000)

    def test_that_cannot_be_read_is_refused(self, layer: Path) -> None:
        (layer / "adapter_model.safetensors").unlink()
        (layer / "adapter_model.safetensors").symlink_to("/proc/self/mem")
        refused(layer, "unreadable")

    def test_that_is_a_folder_is_refused(self, layer: Path) -> None:
        (layer / "adapter_model.safetensors").unlink()
        (layer / "adapter_model.safetensors").mkdir()
        refused(layer, "missing_file")


def test_a_refusal_is_invalid_input_with_a_reason_a_program_can_read(sound: Path) -> None:
    error = refused(sound, "shape_mismatch", blocks=1)
    assert isinstance(error, InvalidInput)
    assert error.code == "layer_refused"
    assert json.loads(json.dumps(error.details))["reason"] == "shape_mismatch"

"""LoRA layers change the logits exactly as PEFT's do, alone and as a weighted stack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from support.tiny_models import TinyModel, build_tiny_model, reference_logits
from synapse.engines import Engine, Limits
from synapse.engines.opening import open_engine_file
from synapse.models.config import PROJECTIONS

pytestmark = pytest.mark.peer

IDS = np.random.default_rng(0).integers(3, 259, 60).tolist()
TARGETS = {"q and v": ["q_proj", "v_proj"], "all linear": list(PROJECTIONS)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return build_tiny_model(tmp_path_factory.mktemp("base") / "tiny.gguf", "llama", hidden=128)


@pytest.fixture(scope="module")
def tiny_engine(tiny: TinyModel) -> Engine:
    return open_engine_file(tiny.path, "reference", Limits(max_context=256))


def save_random_layer(base: PreTrainedModel, folder: Path, seed: int, **config: Any) -> Path:
    """Train nothing: fill A and B with noise, so that the layer certainly changes something, and save as PEFT does."""
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    model.save_pretrained(str(folder))
    model.unload()
    return folder


@pytest.fixture
def peft_logits(tiny: TinyModel) -> Iterator[Any]:
    """A function from layers [(folder, weight)] to the logits PEFT computes."""

    def compute(layers: list[tuple[Path, float]]) -> np.ndarray:
        names = [f"layer{i}" for i in range(len(layers))]
        model = PeftModel.from_pretrained(tiny.reference, str(layers[0][0]), adapter_name=names[0])
        for name, (folder, _) in zip(names[1:], layers[1:], strict=True):
            model.load_adapter(str(folder), adapter_name=name)
        model.add_weighted_adapter(names, [weight for _, weight in layers], "stack", combination_type="cat")
        model.set_adapter("stack")
        logits = reference_logits(model.eval(), IDS)
        model.unload()
        return logits

    yield compute


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("rslora", [False, True], ids=["LoRA", "rsLoRA"])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("rank", [1, 4, 16, 64])
def test_one_layer(tiny: TinyModel, tiny_engine: Engine, tmp_path: Path, rank: int, targets: str, rslora: bool) -> None:
    config = {"r": rank, "lora_alpha": 10, "target_modules": TARGETS[targets], "use_rslora": rslora}
    folder = save_random_layer(tiny.reference, tmp_path / "layer", rank, **config)
    with_layer = PeftModel.from_pretrained(tiny.reference, str(folder))
    expected = reference_logits(with_layer.eval(), IDS)
    with_layer.unload()
    layer = tiny_engine.load_layer(folder)
    assert relative_error(tiny_engine.logits(IDS, [(layer, 1.0)]), expected) < 1e-4
    assert relative_error(tiny_engine.logits(IDS), expected) > 1e-2


def test_ranks_and_alphas_by_module(tiny: TinyModel, tiny_engine: Engine, tmp_path: Path) -> None:
    config = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 16},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 2},
    }
    folder = save_random_layer(tiny.reference, tmp_path / "layer", 3, **config)
    with_layer = PeftModel.from_pretrained(tiny.reference, str(folder))
    expected = reference_logits(with_layer.eval(), IDS)
    with_layer.unload()
    assert relative_error(tiny_engine.logits(IDS, [(tiny_engine.load_layer(folder), 1.0)]), expected) < 1e-4


def test_two_weighted_layers_at_once(tiny: TinyModel, tiny_engine: Engine, tmp_path: Path, peft_logits: Any) -> None:
    first = save_random_layer(tiny.reference, tmp_path / "a", 1, r=8, lora_alpha=16, target_modules=list(PROJECTIONS))
    second = save_random_layer(
        tiny.reference, tmp_path / "b", 2, r=4, lora_alpha=2, target_modules=list(PROJECTIONS), use_rslora=True
    )
    expected = peft_logits([(first, 0.7), (second, 0.4)])
    stack = [(tiny_engine.load_layer(first), 0.7), (tiny_engine.load_layer(second), 0.4)]
    assert relative_error(tiny_engine.logits(IDS, stack), expected) < 1e-4


@pytest.mark.slow
def test_two_weighted_layers_on_the_default_model(
    engine: Engine, transformers_model: PreTrainedModel, tmp_path: Path
) -> None:
    base = transformers_model
    first = save_random_layer(base, tmp_path / "a", 1, r=4, lora_alpha=9, target_modules=["q_proj", "v_proj"])
    second = save_random_layer(base, tmp_path / "b", 2, r=64, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = PeftModel.from_pretrained(base, str(first), adapter_name="a")
    model.load_adapter(str(second), adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.5, 0.3], "stack", combination_type="cat")
    model.set_adapter("stack")
    ids = engine.tokenizer.encode("The lighthouse keeper wrote in his log:")
    expected = reference_logits(model.eval(), ids)
    model.unload()
    found = engine.logits(ids, [(engine.load_layer(first), 0.5), (engine.load_layer(second), 0.3)])
    assert relative_error(found, expected) < 1e-3

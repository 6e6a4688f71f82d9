"""The reference engine is right: logits and greedy tokens as transformers computes them from the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

from support.engine_runs import run
from support.tiny_models import build_tiny_model, reference_logits
from synapse.engines import Engine, Limits, Request, Sampling
from synapse.engines.opening import open_engine_file

pytestmark = pytest.mark.peer

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Однажды утром капитан вышел на палубу",
    "今日はとても良い天気ですね。散歩に行きましょう 🌸",
    "مرحبا بالعالم! नमस्ते दुनिया — 42.5% 🦜🏴‍☠️",
]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits_of_the_default_model(engine: Engine, transformers_model: PreTrainedModel, prompt: str) -> None:
    ids = engine.tokenizer.encode(prompt)
    assert relative_error(engine.logits(ids), reference_logits(transformers_model, ids)) < 1e-3


@pytest.mark.slow
def test_sixty_four_greedy_tokens_of_the_default_model(engine: Engine, transformers_model: PreTrainedModel) -> None:
    """Each is what transformers finds likeliest after those before it: they are the greedy tokens of both."""
    ids = engine.tokenizer.encode(PROMPTS[0])
    (answer,) = run(engine, Request(tuple(ids), sampling=Sampling(temperature=0), max_tokens=64, ignore_eos=True))
    likeliest = reference_logits(transformers_model, [*ids, *answer.tokens[:-1]]).argmax(axis=1)
    assert answer.tokens == likeliest[len(ids) - 1 :].tolist()


ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tied": True}),
    "llama, biases": ("llama", {"bias": True}),
    "llama, no grouping": ("llama", {"kv_heads": 4}),
    "llama, one kv head": ("llama", {"kv_heads": 1}),
    "llama 3 rope": (
        "llama",
        {
            "rope": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "linear rope": ("llama", {"rope": {"rope_type": "linear", "factor": 2.0}}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2, yarn": (
        "qwen2",
        {"rope": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3, wide heads": ("qwen3", {"head_dim": 32, "tied": True}),
    "half precision": ("llama", {"storage": "F16"}),
    "bfloat16": ("llama", {"storage": "BF16"}),
    "8 bits": ("llama", {"storage": "Q8_0"}),
    "4 bits": ("llama", {"storage": "Q4_0"}),
    "4 bits with minimum": ("llama", {"storage": "Q4_1"}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_of_every_architecture(tmp_path: Path, name: str) -> None:
    family, options = ARCHITECTURES[name]
    tiny = build_tiny_model(tmp_path / "tiny.gguf", family, **options)
    engine = open_engine_file(tiny.path, "reference", Limits(max_context=256))
    ids = np.random.default_rng(0).integers(3, 259, 180).tolist()
    assert relative_error(engine.logits(ids), reference_logits(tiny.reference, ids)) < 1e-4


def test_prefill_in_chunks_and_decoding_give_the_logits_of_one_pass(tmp_path: Path) -> None:
    tiny = build_tiny_model(tmp_path / "tiny.gguf", "qwen3")
    engine = open_engine_file(tiny.path, "reference", Limits(max_context=256, step_tokens=7))
    ids = tuple(np.random.default_rng(1).integers(3, 259, 100).tolist())
    (answer,) = run(engine, Request(ids, sampling=Sampling(temperature=0), max_tokens=20, ignore_eos=True))
    expected = reference_logits(tiny.reference, [*ids, *answer.tokens])[len(ids) - 1 : -1].argmax(axis=1)
    assert answer.tokens == expected.tolist()

"""Prefixes are found nearly as often as if nothing were ever evicted, and the benchmark of it works."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import caches
from benchmarks.second_model import second_model_rows
from support.tiny_models import build_tiny_model
from synapse.engines import Limits
from synapse.engines.cache.blocks import BLOCK_TOKENS


@pytest.mark.parametrize(
    ("turns", "blocks"),
    [(1, 80), (3, 160)],
    ids=["a pool of twice the system prompts", "a pool of two thirds of everything"],
)
def test_sixty_four_conversations_over_eight_system_prompts_hit_as_with_an_unlimited_cache(
    tmp_path: Path, turns: int, blocks: int
) -> None:
    """The prompts end inside a block, and each conversation adds some tokens of its own in every turn."""
    tiny = build_tiny_model(tmp_path / "tiny.gguf", "llama", context=512).path
    limits = Limits(max_context=320, max_batch=4)
    pools = {
        "bounded": Limits(max_context=320, max_batch=4, kv_cache_tokens=blocks * BLOCK_TOKENS),
        "unlimited": Limits(max_context=320, max_batch=4, kv_cache_tokens=caches.UNLIMITED),
    }
    shape = {"count": 64, "turns": turns, "system": 150, "question": 12, "answer": 4}
    bounded, unlimited = caches.prefix_rows(tiny, "reference", pools, limits.max_batch, **shape)
    assert unlimited["evicted_blocks"] == 0
    assert bounded["evicted_blocks"] > 0
    assert unlimited["hit_rate"] > 0.75
    assert bounded["of_unlimited"] >= 0.9


def test_layers_that_come_and_go_are_measured(tmp_path: Path) -> None:
    tiny = build_tiny_model(tmp_path / "tiny.gguf", "llama").path
    engine = caches.open_engine_file(tiny, "reference", Limits(max_context=128, max_layers=4))
    folders = [caches.random_adapter(tmp_path / str(n), engine.config, rank=2, seed=n) for n in range(8)]
    layers = [engine.load_layer(each) for each in folders]
    row = caches.stream(engine, layers, 3, 16, 6)
    assert row["loads"] > 0
    assert row["widest_gap_steps"] == 1
    assert caches.choices_row(engine, 70)["computed_tokens"] == 70 + 7
    assert min(caches.load_seconds(engine, folders[0])) > 0
    engine.close()


async def test_a_second_model_that_is_opened_is_measured(tmp_path: Path) -> None:
    tiny = build_tiny_model(tmp_path / "tiny.gguf", "llama", context=512).path
    limits = {"backend": "reference", "threads": 1, "max_context": 512, "kv_cache_tokens": 1024}
    rows = await second_model_rows(tiny, tmp_path / "home", 1, idle_seconds=0.2, **limits)
    assert [row["opened meanwhile"] for row in rows] == [
        "nothing",
        "a model that is not packed",
        "a model that is packed",
    ]
    assert rows[0]["p99_of_idle"] == 1
    assert all(row["gaps"] > 0 and row["seconds"] > 0 for row in rows)

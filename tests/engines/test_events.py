"""What is published about the layers in an engine's memory."""

from __future__ import annotations

from pathlib import Path

from benchmarks.layers import random_adapter
from support.heard import listening
from support.tiny_models import build_tiny_model
from synapse.engines import EngineRunner, Limits
from synapse.engines.opening import open_engine_file


async def test_layers_are_told_when_they_come_into_memory_and_when_they_give_way(tmp_path: Path) -> None:
    tiny = build_tiny_model(tmp_path / "tiny.gguf", "llama")
    runner = EngineRunner(open_engine_file(tiny.path, "reference", Limits(max_context=64, max_layers=1), "tiny"))
    folders = [random_adapter(tmp_path / str(n), runner.engine.config, rank=4, seed=n) for n in range(2)]
    try:
        with listening() as heard:
            first = await runner.load_layer(folders[0])
            await runner.load_layer(folders[0])
            second = await runner.load_layer(folders[1])
    finally:
        await runner.close()
    assert [(message.topic, message.payload.layer) for message in heard] == [  # type: ignore[attr-defined]
        ("layer.loaded", first),
        ("layer.loaded", second),
        ("layer.evicted", first),
    ]
    assert {(news["model"], news["bytes"] > 0) for news in heard.about("layer.loaded")} == {("tiny", True)}

"""What is published about models."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.heard import listening
from support.small_gguf import write_small_gguf
from synapse.errors import NotFound
from synapse.models.library import ModelLibrary


async def test_a_model_is_told_when_it_comes_and_goes_and_not_when_it_was_here(tmp_path: Path) -> None:
    source = write_small_gguf(tmp_path / "source.gguf")
    library = ModelLibrary(tmp_path)
    with listening() as heard:
        await library.pull(str(source), name="mine")
        await library.pull(str(source), name="mine")
        with pytest.raises(NotFound):
            await library.pull(str(tmp_path / "nothing.gguf"))
        library.remove("mine")
    assert heard.topics == ["model.pulled", "model.removed"]
    (pulled,) = heard.about("model.pulled")
    assert (pulled["name"], pulled["kind"], pulled["size_bytes"]) == ("mine", "chat", source.stat().st_size)
    assert pulled["seconds"] > 0
    assert heard.about("model.removed") == [{"name": "mine", "freed_bytes": source.stat().st_size}]

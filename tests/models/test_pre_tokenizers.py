"""Vocabularies whose file does not say how words are cut: refused at pull unless somebody says it, told ever after."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from support.hub_server import hub_server
from support.tiny_tokenizers import byte_level_reference, write_byte_level
from synapse.commands import Context
from synapse.config import Settings
from synapse.errors import InvalidInput
from synapse.models.commands import ModelInfo, ModelName, PullModel, pull_model, show_model
from synapse.models.errors import UnsupportedModel
from synapse.models.gguf_file import open_model_file
from synapse.models.record import RECORD
from synapse.models.tokenizer import load_tokenizer

TEXT = "1234567 apples, and 89"


@pytest.fixture
async def context(tmp_path: Path) -> AsyncIterator[Context]:
    async with Context(Settings(home=tmp_path / "home")) as opened:
        yield opened


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama 3 vocabulary in a file that does not say so."""
    _, backend = byte_level_reference("llama-bpe")
    return write_byte_level(tmp_path_factory.mktemp("silent") / "silent.gguf", None, backend)


async def pull(context: Context, source: Path, pre_tokenizer: str | None = None) -> ModelInfo:
    return await pull_model(PullModel(source=str(source), name="mine", pre_tokenizer=pre_tokenizer), context)


def encoded(path: str | Path) -> tuple[list[int], list[str]]:
    """What `TEXT` becomes, and which warnings there were."""
    with capture_logs() as logs:
        ids = load_tokenizer(open_model_file(Path(path))).encode(TEXT)
    return ids, [entry["event"] for entry in logs]


async def test_a_pull_is_refused_until_somebody_says_it_and_then_it_is_recorded(
    context: Context, silent: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel, match="does not say how its text is cut") as refused:
        await pull(context, silent)
    assert "--pre-tokenizer NAME" in (refused.value.hint or "")
    with pytest.raises(InvalidInput, match="'Llama-bp'") as unknown:
        await pull(context, silent, "Llama-bp")
    assert "did you mean llama-bpe?" in (unknown.value.hint or "")
    pulled = await pull(context, silent, "llama-bpe")
    assert (pulled.pre_tokenizer, pulled.warning) == ("llama-bpe", None)
    assert await show_model(ModelName(name="mine"), context) == pulled

    _, backend = byte_level_reference("llama-bpe")
    told = encoded(write_byte_level(tmp_path / "told.gguf", "llama-bpe", backend))
    assert encoded(pulled.files[0].path) == told
    assert told[1] == []
    assert encoded(silent) != told
    assert encoded(silent)[1] == ["model.no_pre_tokenizer"]


async def test_one_that_is_here_already_is_warned_of_and_can_be_mended(context: Context, silent: Path) -> None:
    pulled = await pull(context, silent, "gpt-2")
    record = Path(pulled.files[0].path).with_name(RECORD)
    old = json.loads(record.read_text())
    del old["pre_tokenizer"]  # as older versions wrote it
    record.write_text(json.dumps(old))
    before = encoded(pulled.files[0].path)
    shown = await show_model(ModelName(name="mine"), context)
    assert shown.pre_tokenizer is None
    assert "--pre-tokenizer" in (shown.warning or "")
    assert (await pull(context, silent, "llama-bpe")).pre_tokenizer == "llama-bpe"
    assert (await show_model(ModelName(name="mine"), context)).warning is None
    assert encoded(pulled.files[0].path) != before


async def test_what_a_file_says_itself_is_not_said_otherwise(context: Context, tmp_path: Path) -> None:
    _, backend = byte_level_reference("qwen2")
    source = write_byte_level(tmp_path / "told.gguf", "qwen2", backend)
    unknown = write_byte_level(tmp_path / "unknown.gguf", "viking", backend)
    with pytest.raises(UnsupportedModel, match="'viking'"):
        await pull(context, unknown)
    with pytest.raises(InvalidInput, match="is qwen2, not llama-bpe"):
        await pull(context, source, "llama-bpe")
    assert (await pull(context, source)).pre_tokenizer == "qwen2"
    with pytest.raises(InvalidInput, match="is qwen2, not llama-bpe"):
        await pull(context, source, "llama-bpe")


async def test_what_came_from_the_hub_is_not_fetched_again_when_somebody_says_it(
    context: Context, silent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    with hub_server() as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        hub.files["org/repo/resolve/main/silent.gguf"] = silent.read_bytes()  # noqa: ASYNC240 (a small file)
        source = "hf:org/repo/silent.gguf"
        with pytest.raises(UnsupportedModel, match="does not say"):
            await pull_model(PullModel(source=source), context)
        with pytest.raises(InvalidInput, match="no pre-tokenizer"):
            await pull_model(PullModel(source=source, pre_tokenizer="llama"), context)
        await pull_model(PullModel(source=source, pre_tokenizer="llama-bpe"), context)
        gets = [path for method, path, _ in hub.requests if method == "GET"]
        assert gets.count("org/repo/resolve/main/silent.gguf") == 1

"""Encoders for asyncio, and the commands of the group `embedding` that use them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from benchmarks.texts import sample_texts
from support.tiny_encoders import build_tiny_encoder
from synapse.commands import Context, find_command, load_group
from synapse.config import Settings
from synapse.encoders import EncoderHost, open_encoders
from synapse.encoders.commands import CompareTexts, CreateEmbeddings, EmbeddingList, LikenessList
from synapse.encoders.encoder import open_encoder_folder
from synapse.errors import InvalidInput
from synapse.models.library import ModelNotFound, open_library


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_encoder(tmp_path_factory.mktemp("encoders") / "tiny").folder


@pytest_asyncio.fixture
async def context(folder: Path, tmp_path: Path) -> AsyncIterator[Context]:
    async with Context(Settings(home=tmp_path / "home", default_encoder="mine")) as context:
        await (await context.get(open_library)).pull(str(folder), name="mine")
        yield context


@pytest.fixture
async def host(context: Context) -> EncoderHost:
    return await context.get(open_encoders)


async def test_an_encoder_is_opened_once_and_shared(host: EncoderHost) -> None:
    async with host.use() as one, host.use("mine") as two, host.use() as three:
        assert one is two is three
    with pytest.raises(ModelNotFound, match="nobody"):
        async with host.use("nobody"):
            pass


async def test_a_path_is_no_name(host: EncoderHost, folder: Path) -> None:
    with pytest.raises(InvalidInput, match="not a name for a model"):
        async with host.use(str(folder)):
            pass


async def test_tasks_that_encode_at_once_get_their_own_vectors(host: EncoderHost, folder: Path) -> None:
    lists = [sample_texts(20, seed) for seed in range(4)]
    async with host.use() as runner:
        results = await asyncio.gather(*map(runner.encode, lists))
    encoder = open_encoder_folder(folder)
    for texts, result in zip(lists, results, strict=True):
        np.testing.assert_allclose(result.vectors, encoder.encode(texts), atol=1e-6)
        assert result.tokens == tuple(len(text.ids) for text in encoder.tokenize(texts))
    assert {cut for result in results for cut in result.truncated} == {True, False}


async def test_a_task_that_is_cancelled_stops_after_its_batch(
    host: EncoderHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with host.use() as runner:
        embed, began, calls = runner.encoder.embed, threading.Event(), []

        def slow(texts: object) -> object:
            calls.append(1)
            began.set()
            return embed(texts)  # type: ignore[arg-type]

        monkeypatch.setattr(runner.encoder, "embed", slow)
        task = asyncio.create_task(runner.encode(sample_texts(2000)))
        await asyncio.to_thread(began.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        done = len(calls)
        await runner.encode(["another"])
        assert len(calls) == done + 1 < 20


def test_the_group_has_two_commands_that_change_nothing() -> None:
    assert {c.name: c.permission for c in load_group("embedding")} == {
        "embedding/compare": "read",
        "embedding/create": "read",
    }


async def test_vectors_are_made_by_command(context: Context, folder: Path) -> None:
    texts = ["The ferry leaves.", "Bread rises. " * 60]
    made = await find_command("embedding/create").run(CreateEmbeddings(texts=texts), context)
    assert isinstance(made, EmbeddingList)
    assert (made.model, made.dimensions, [item.text for item in made.items]) == ("mine", 48, texts)
    assert [item.truncated for item in made.items] == [False, True]
    assert made.items[1].tokens == 64
    vectors = open_encoder_folder(folder).encode(texts)
    np.testing.assert_allclose([item.vector for item in made.items], vectors, atol=1e-6)


async def test_texts_are_compared_by_command(context: Context) -> None:
    params = CompareTexts(text="The ferry leaves.", others=["Wool keeps warm.", "The ferry leaves.", "Bread rises."])
    found = await find_command("embedding/compare").run(params, context)
    assert isinstance(found, LikenessList)
    cosines = [item.cosine for item in found.items]
    assert cosines == sorted(cosines, reverse=True)
    assert found.items[0].text == "The ferry leaves."
    assert cosines[0] == pytest.approx(1, abs=1e-5)
    assert cosines[1] < 0.99


async def test_no_texts_are_refused(host: EncoderHost) -> None:
    with pytest.raises(InvalidInput, match="no text"):
        async with host.use() as runner:
            await runner.encode([])

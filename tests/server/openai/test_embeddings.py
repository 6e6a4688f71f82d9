"""`POST /v1/embeddings` with OpenAI's own client, against a server that has an encoder and no chat model."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from support.live_server import Live, running
from support.tiny_encoders import build_tiny_encoder
from synapse.commands import Context
from synapse.config import Settings
from synapse.encoders.encoder import open_encoder_folder
from synapse.models.library import open_library

pytestmark = pytest.mark.peer

TEXTS = ["The ferry leaves at six.", "", "Wool keeps its warmth."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_encoder(tmp_path_factory.mktemp("encoders") / "tiny").folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    home = tmp_path_factory.mktemp("homes") / "home"

    async def fill() -> None:
        async with Context(Settings(home=home)) as context:
            await (await context.get(open_library)).pull(str(folder), name="tiny")

    asyncio.run(fill())
    with running(home) as live:
        yield live


def post(live: Live, **body: Any) -> httpx.Response:
    with live.http() as http:
        return http.post("/v1/embeddings", json={"model": "tiny", "input": TEXTS} | body)


def test_openais_client_gets_the_vectors_of_the_encoder(server: Live, folder: Path) -> None:
    expected = open_encoder_folder(folder).encode(TEXTS)
    made = server.openai().embeddings.create(model="tiny", input=TEXTS)
    assert [each.index for each in made.data] == [0, 1, 2]
    np.testing.assert_allclose([each.embedding for each in made.data], expected, atol=1e-6)
    tokens = sum(len(text.ids) for text in open_encoder_folder(folder).tokenize(TEXTS))
    assert (made.model, made.usage.prompt_tokens, made.usage.total_tokens) == ("tiny", tokens, tokens)
    one = server.openai().embeddings.create(model="tiny", input=TEXTS[2], encoding_format="float", dimensions=48)
    np.testing.assert_allclose(one.data[0].embedding, expected[2], atol=1e-6)


def test_both_encodings_are_the_same_numbers(server: Live) -> None:
    plain = post(server).json()["data"]
    packed = post(server, encoding_format="base64").json()["data"]
    for one, other in zip(plain, packed, strict=True):
        numbers = np.frombuffer(base64.b64decode(other["embedding"]), "<f4")
        np.testing.assert_array_equal(numbers, np.asarray(one["embedding"], np.float32))


def test_the_encoder_is_listed_and_cannot_chat(server: Live) -> None:
    client = server.openai()
    (model,) = client.models.list()
    assert (model.id, model.owned_by) == ("tiny", "encoder")
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hello"}])


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"model": "../tiny"}, 404, "model"),
        ({"input": []}, 400, "input"),
        ({"input": [1, 2, 3]}, 400, "input[0]"),
        ({"input": ["a", None]}, 400, "input[1]"),
        ({"input": ["a"] * 2049}, 400, "input"),
        ({"encoding_format": "hex"}, 400, "encoding_format"),
        ({"dimensions": 47}, 400, "dimensions"),
        ({"inputs": "a"}, 400, "inputs"),
    ],
)
def test_what_does_not_fit_is_named(server: Live, body: dict[str, Any], status: int, param: str) -> None:
    response = post(server, **body)
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param


def test_a_time_limit_ends_the_work(folder: Path, server: Live, tmp_path: Path) -> None:
    with running(server.home, request_timeout=0.001) as hasty:
        response = post(hasty, input=["a long text " * 50] * 50)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "timed_out"

"""What the rooms above see of an engine: values that pickle, and prompts made without its weights."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from benchmarks.layers import random_adapter
from support.tiny_models import build_tiny_model
from synapse.commands import Context
from synapse.config import Settings
from synapse.daemon.commands import GetEngineStats, engine_stats
from synapse.daemon.host import open_models
from synapse.engines import (
    BadGrammar,
    ContextOverflow,
    EngineClient,
    Event,
    Finished,
    Grammar,
    LayerNotLoaded,
    Request,
    Sampling,
    open_engines,
    open_front_end,
)
from synapse.errors import Corrupt, NotFound, SynapseError
from synapse.models.adapters.files import LAYERS_FOLDER, content_address
from synapse.models.chat_template import Message
from synapse.models.library import open_library

ENDLESS = Request((5, 6), max_tokens=400, ignore_eos=True, sampling=Sampling(temperature=0))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("client") / "home"


@pytest.fixture
async def client(home: Path) -> AsyncIterator[EngineClient]:
    settings = Settings(home=home, max_context=512, threads=1, backend="reference")
    async with Context(settings) as context:
        tiny = home.parent / "tiny.gguf"
        if not tiny.exists():
            build_tiny_model(tiny, "llama", context=1024)
            await (await context.get(open_library)).pull(str(tiny), name="tiny")
        yield await (await context.get(open_engines)).get("tiny")


def through(value: object) -> object:
    """The value as another process would have it."""
    return pickle.loads(pickle.dumps(value))  # noqa: S301 (our own)


async def test_requests_events_and_stats_pickle(client: EngineClient) -> None:
    request = Request((5, 6), max_tokens=3, logprobs=2, stop=("x",), sampling=Sampling(logit_bias={7: 1.0}))
    assert through(request) == request
    events: list[Event] = [event async for event in client.generate(request, "mine")]
    assert [through(event) for event in events] == events
    assert {event.request_id for event in events} == {"mine"}
    stats = await client.stats()
    assert through(stats) == stats
    assert stats.counters.requests == 1


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        (Request((1,) * 600), ContextOverflow),
        (Request((5,), grammar=Grammar("regex", "(")), BadGrammar),
        (Request((5,), (("0" * 64, 1.0),)), LayerNotLoaded),
    ],
)
async def test_what_is_refused_is_refused_with_an_error_that_pickles(
    client: EngineClient, request_: Request, kind: type[SynapseError]
) -> None:
    with pytest.raises(kind) as refused:
        async for _ in client.generate(request_):
            pass
    again = through(refused.value)
    assert isinstance(again, kind)
    assert (again.message, again.hint, again.details) == (
        refused.value.message,
        refused.value.hint,
        refused.value.details,
    )


async def test_a_request_is_cancelled_by_its_id_and_its_reader_is_told(client: EngineClient) -> None:
    async with aclosing(client.generate(ENDLESS, "long")) as events:
        await anext(events)
        await client.cancel("long")
        rest = [event async for event in events]
    assert isinstance(rest[-1], Finished)
    assert rest[-1].reason == "cancelled"
    await client.cancel("long")
    await client.cancel("never heard of")


async def test_layers_are_named_by_their_content(client: EngineClient, home: Path, tmp_path: Path) -> None:
    folder = random_adapter(tmp_path / "layer", client.front.config, rank=4, seed=0)
    sha256 = content_address(*(file.read_bytes() for file in sorted(folder.iterdir())[:2]))
    kept = home / LAYERS_FOLDER
    kept.mkdir(exist_ok=True)
    folder.rename(kept / sha256)
    await client.load_layer(sha256)
    assert list((await client.stats()).layers) == [sha256]
    plain, layered = [
        [event.tokens async for event in client.generate(each) if not isinstance(event, Finished)]
        for each in (
            Request((5,), max_tokens=8, ignore_eos=True, sampling=Sampling(temperature=0), layers=layers)
            for layers in ((), ((sha256, 20.0),))
        )
    ]
    assert plain != layered
    (kept / sha256).rename(kept / ("0" * 64))
    with pytest.raises(Corrupt, match="have the sha256"):
        await client.load_layer("0" * 64)
    with pytest.raises(NotFound):
        await client.load_layer("1" * 64)


async def test_a_front_end_needs_no_weights_and_says_what_the_engine_does(client: EngineClient, home: Path) -> None:
    source = home.parent / "tiny.gguf"
    front = await asyncio.to_thread(open_front_end, source, client.front.limits, "tiny")
    messages = [Message("user", "hello"), Message("assistant", "hi"), Message("user", "go on" * 40)]
    for each in (front, through(front), client.front):
        assert each.context == client.front.context == 512
        assert each.encode_chat(messages) == client.front.encode_chat(messages)
        assert each.encode_text("a text") == client.front.encode_text("a text")
        assert each.fit_chat(messages) == client.front.fit_chat(messages)


@pytest.mark.usefixtures("client")
async def test_stats_say_which_engine_answers_and_what_helps(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(home.parent / "tiny.gguf")
    monkeypatch.setenv("SYNAPSE_FORCE_PYTHON", "1")
    for backend, reason in (("reference", "the setting"), ("auto", "Python is forced")):
        async with Context(Settings(home=home, max_context=64, threads=1, backend=backend)) as context:
            client = await (await context.get(open_models)).get(model)
            (state,) = (await engine_stats(GetEngineStats(), context)).items
        assert (state.backend, client.front.name) == ("reference", state.model)
        assert reason in state.reason
        assert "synapse" in state.hint.lower()

"""`GET /v1/events`: what happens, as server-sent events that can be gone on from."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.heard import Heard
from support.heard import listening as heard_now
from support.live_server import Live, running, wait_until
from synapse.callosum.log.opening import open_log
from synapse.callosum.message import Message
from synapse.callosum.payloads import Untyped
from synapse.server import event_routes
from synapse.server.keys import KeyPermission, new_key
from synapse.store import open_store


@dataclass(frozen=True)
class Sent:
    """One server-sent event."""

    id: str
    event: str
    data: dict[str, Any]


class Stream:
    """An open stream; iterating gives events, and `comments` counts the others."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.comments = 0

    def __iter__(self) -> Iterator[Sent]:
        fields: dict[str, str] = {}
        for line in self.response.iter_lines():
            if line.startswith(":"):
                self.comments += 1
            elif line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif fields:
                yield Sent(fields.get("id", ""), fields.get("event", ""), json.loads(fields["data"]))
                fields = {}

    def until(self, topic: str) -> list[Sent]:
        """The events up to the first of this topic."""
        found = []
        for sent in self:
            found.append(sent)
            if sent.event == topic:
                return found
        raise AssertionError(f"the stream ended before {topic} came: {[sent.event for sent in found]}")


@contextmanager
def listening(live: Live, *, key: str = "", after: str | None = None, last: str | None = None, **params: str) -> Any:
    headers = {"Last-Event-ID": last} if last is not None else {}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    if after is not None:
        params["after"] = after
    with (
        live.http(headers=headers) as client,
        client.stream("GET", "/v1/events", params=params, timeout=20) as response,
    ):
        assert response.status_code == 200, response.read()
        yield Stream(response)


def make(live: Live, *names: str) -> None:
    for name in names:
        live.command("persona/create", name=name)


def test_what_happens_comes_as_an_event_with_its_place_its_topic_and_the_whole_message(empty: Live) -> None:
    with listening(empty, pattern="persona.*") as stream:
        assert stream.response.headers["content-type"].startswith("text/event-stream")
        make(empty, "captain")
        (sent,) = stream.until("persona.created")
    assert sent.id
    assert sent.data["topic"] == "persona.created"
    assert sent.data["payload"]["name"] == "captain"
    assert sent.data["tract"] == "internal"
    assert sent.data["evidence"] == "known"
    assert sent.data["priority"] == 4
    assert len(sent.data["id"]) == 36
    assert stream.comments >= 1, "the client heard at once that it is listening"


def test_a_stream_goes_on_behind_the_last_event_that_was_read(empty: Live) -> None:
    with listening(empty, pattern="persona.*") as stream:
        make(empty, "one", "two", "three")
        first = next(iter(stream))
    assert first.data["payload"]["name"] == "one"
    for place in ({"last": first.id}, {"after": first.id}, {"last": first.id, "after": "0"}):
        with listening(empty, pattern="persona.*", **place) as stream:
            events = iter(stream)
            assert [next(events).data["payload"]["name"] for _ in range(2)] == ["two", "three"]


def test_an_empty_place_is_the_beginning_of_what_is_kept_and_none_is_now(empty: Live) -> None:
    make(empty, "one")
    with listening(empty, pattern="persona.*", after="") as stream:
        assert stream.until("persona.created")[0].data["payload"]["name"] == "one"
    with listening(empty, pattern="persona.*") as stream:
        make(empty, "two")
        assert stream.until("persona.created")[0].data["payload"]["name"] == "two"


def test_requests_and_the_start_of_the_server_are_events_but_not_the_checks_of_its_health(empty: Live) -> None:
    empty.command("persona/list")
    httpx.get(f"{empty.url}/health")
    httpx.get(f"{empty.url}/v1/events?pattern=a..b&token=hidden")
    with listening(empty, after="") as stream:
        events = []
        for sent in stream:
            events.append(sent)
            if sent.data["payload"].get("path") == "/v1/events":
                break
    assert events[0].event == "server.started"
    requests = [sent.data for sent in events if sent.event == "server.request.finished"]
    assert [(each["payload"]["path"], each["payload"]["status"]) for each in requests] == [
        ("/v1/commands/persona/list", 200),
        ("/v1/events", 400),
    ]
    assert {(each["tract"], each["evidence"]) for each in requests} == {("external", "reported")}
    assert all(each["payload"]["seconds"] > 0 for each in requests)
    assert "hidden" not in json.dumps(requests)


def test_a_request_of_somebody_who_may_ask_nothing_is_no_event(empty: Live) -> None:
    secret = empty.command("key/create", name="somebody", permissions=["manage"])["key"]
    with empty.http() as client:
        for headers in ({}, {"Authorization": "Bearer syn-wrong"}):
            for path in ("/v1/models", "/v1/events", "/nowhere", "/v1/commands/persona/list", "/" + "x" * 300):
                assert client.get(path, headers=headers).status_code in (401, 404, 405)
            assert client.post("/v1/chat/completions", headers=headers, json={}).status_code == 401
    with httpx.Client(base_url=empty.url, headers={"Authorization": f"Bearer {secret}"}) as client:
        assert client.post("/v1/commands/persona/list", json={}).status_code == 200
        rows = client.post("/v1/commands/events/stats", json={}).json()
    topics = {row["topic"]: row["count"] for row in rows["topics"]}
    assert topics["server.request.finished"] <= 3, "those that were allowed: the key's, and those that came after"


@pytest.mark.parametrize("params", [{"pattern": "a..b"}, {"pattern": "**.a"}, {"pattern": ""}, {"after": "no place"}])
def test_a_pattern_or_a_place_that_is_none_is_refused_before_the_stream_begins(
    empty: Live, params: dict[str, str]
) -> None:
    with empty.http() as client:
        response = client.get("/v1/events", params=params)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_input"


def test_who_names_a_place_of_another_log_is_told_how_to_begin_anew(empty: Live) -> None:
    with empty.http(headers={"Last-Event-ID": "1042"}) as client:
        message = client.get("/v1/events").json()["error"]["message"]
    assert "'1042' is no position of this log" in message
    assert "begins now, with `?after=` at the oldest kept" in message


def test_it_needs_the_permission_to_read_once_there_are_keys(empty: Live) -> None:
    reader = empty.command("key/create", name="reader", permissions=["read"])["key"]
    manager = key_of(empty, "manager", "manage")
    chatter = key_of(empty, "chatter", "chat")
    with empty.http() as client:
        assert client.get("/v1/events").status_code == 401
        assert client.get("/v1/events", headers={"Authorization": f"Bearer {chatter}"}).status_code == 403
    for key in (reader, manager):
        with listening(empty, key=key, after="") as stream:
            assert next(iter(stream)).event == "server.started"


def key_of(live: Live, name: str, permission: KeyPermission) -> str:
    """A key made behind the server's back: over HTTP that needs one already."""
    secret, key = new_key(name, [permission])

    async def keep() -> None:
        await (await live.state.context.get(open_store)).create(key)

    asyncio.run_coroutine_threadsafe(keep(), live.loop).result(10)
    return secret


def test_comments_keep_a_silent_stream_alive(empty: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_routes, "KEEP_ALIVE_S", 0.05)
    with listening(empty, pattern="nothing.**") as stream:
        lines = stream.response.iter_lines()
        comments = 0
        while comments < 3:
            comments += next(lines).startswith(":")


@contextmanager
def stalled(live: Live) -> Iterator[None]:
    """A client that asks for much more than fits on the way to it, and reads nothing."""

    async def fill() -> None:
        log = await live.state.context.get(open_log)
        for number in range(32):
            await log.append([Message("bulk.one", Untyped({"number": number, "filling": "x" * 2**19}))])

    asyncio.run_coroutine_threadsafe(fill(), live.loop).result(30)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", live.port))
        client.sendall(b"GET /v1/events?after= HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: live.state.listeners == 1)
        yield


def test_a_client_that_does_not_read_delays_nobody(empty: Live) -> None:
    with stalled(empty), listening(empty, pattern="persona.*") as stream:
        make(empty, *(f"p{number}" for number in range(20)))
        events = iter(stream)
        assert [next(events).data["payload"]["name"] for _ in range(20)] == [f"p{n}" for n in range(20)]
        assert empty.state.listeners == 2


def test_streams_end_when_the_server_stops_even_those_that_nobody_reads(tmp_path: Path) -> None:
    ended = threading.Event()
    with running(tmp_path / "home") as live, stalled(live):

        def read() -> None:
            with listening(live) as stream:
                list(stream)
            ended.set()

        threading.Thread(target=read).start()
        wait_until(lambda: live.state.listeners == 2)
        live.loop.call_soon_threadsafe(live.server.stop)
        assert ended.wait(10), "who listens is told that there is no more"
        wait_until(lambda: live.state.listeners == 0, 15)


def test_a_client_that_hangs_up_is_forgotten(empty: Live) -> None:
    with listening(empty):
        wait_until(lambda: empty.state.listeners == 1)
    wait_until(lambda: empty.state.listeners == 0)


def test_there_are_only_so_many_streams(empty: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_routes, "MOST_LISTENERS", 1)
    with listening(empty):
        wait_until(lambda: empty.state.listeners == 1)
        response = httpx.get(f"{empty.url}/v1/events")
        assert response.status_code == 429
    wait_until(lambda: empty.state.listeners == 0)


def test_what_was_published_is_there_after_the_server_has_stopped_and_started_again(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with running(home) as live:
        make(live, "captain")
    with running(home) as live, listening(live, after="") as stream:
        topics = []
        for sent in stream:
            topics.append(sent.event)
            if topics.count("server.started") == 2:
                break
    assert [topic for topic in topics if not topic.startswith("server.request")] == [
        *("server.started", "persona.created", "server.stopped", "server.started")
    ]


@pytest.mark.parametrize("events", ["memory", "embedded"])
def test_stats_of_the_server_have_its_own_latencies(tmp_path: Path, events: str) -> None:
    with running(tmp_path / "home", events=events) as live:
        wait_until(lambda: any(row["topic"] == "server.started" for row in live.command("events/stats")["topics"]))
        make(live, "captain")
        wait_until(lambda: "persona.created" in latencies(live))
        stats = live.command("events/stats")
    assert stats["kept"] >= 2
    assert stats["internal"] >= 2
    assert 0 <= stats["integration"] <= min(stats["balance"], stats["coupling"]) <= 1


def latencies(live: Live) -> list[str]:
    return [row["topic"] for row in live.command("events/stats")["topics"] if row["latency_p50"] is not None]


def test_a_log_that_cannot_be_opened_stops_no_server_and_is_said_where_it_is_needed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "events.db").mkdir()  # where the file should be
    with running(home) as live:
        make(live, "captain")
        assert live.command("persona/list")["items"][0]["name"] == "captain"
        assert httpx.get(f"{live.url}/v1/events").status_code == 503
        (home / "events.db").rmdir()
        with listening(live, after="") as stream:
            stream.until("persona.created")  # it waited until there was a log


def turns(heard: Heard) -> list[str]:
    return [topic for topic in heard.topics if topic.startswith("persona.turn.")]


CHAT = {"model": "noisy", "messages": [{"role": "user", "content": "a secret question"}], "max_tokens": 4, "seed": 1}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_over_http_is_one_turn_of_its_persona(live: Live, stream: bool) -> None:
    with heard_now() as heard, live.http() as client:
        response = client.post("/v1/chat/completions", json={**CHAT, "stream": stream, "n": 2})
        assert response.status_code == 200, response.text
        wait_until(lambda: turns(heard) != [] and "server.request.finished" in heard.topics)
    assert turns(heard) == ["persona.turn.finished"]
    (turn,) = heard.about("persona.turn.finished")
    assert (turn["persona"], turn["model"], turn["conversation"]) == ("noisy", "smollm2-135m", None)
    assert turn["reason"] in ("length", "stop")
    assert 1 <= turn["tokens"] <= 8
    assert turn["prompt_tokens"] > 0
    assert turn["seconds"] > 0
    assert "secret" not in str([message.payload for message in heard])


def test_a_client_that_hangs_up_has_cancelled_its_turn(live: Live) -> None:
    body = {**CHAT, "max_tokens": 400, "stream": True, "logit_bias": {"2": -100}}
    with heard_now() as heard:
        with live.http() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
            next(response.iter_lines())
        wait_until(lambda: turns(heard) != [])
    assert turns(heard) == ["persona.turn.cancelled"]


def test_a_turn_that_is_refused_has_failed(live: Live) -> None:
    with heard_now() as heard, live.http() as client:
        for change in (
            {"messages": [{"role": "user", "content": "word " * 2000}]},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/no"}}}},
        ):
            assert client.post("/v1/chat/completions", json={**CHAT, **change}).status_code == 400
        assert client.post("/v1/completions", json={"model": "noisy", "prompt": "One", "max_tokens": 2}).is_success
    assert turns(heard) == ["persona.turn.failed"] * 2, "and a bare completion is no turn"
    assert [turn["error"] for turn in heard.about("persona.turn.failed")] == [
        *("context_length_exceeded", "bad_grammar")
    ]

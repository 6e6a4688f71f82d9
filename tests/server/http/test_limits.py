"""Limits: bytes, seconds and answers at once; and a client that hangs up."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from support.live_server import MAX_BODY, Live, is_ready, running, wait_until
from synapse.server.http.errors import BadField
from synapse.server.http.limits import Slots

QUESTION: Any = [{"role": "user", "content": "Count to a thousand."}]
LONG: dict[str, Any] = {
    "model": "smollm2-135m",
    "messages": QUESTION,
    "max_tokens": 400,
    "logit_bias": {"2": -100, "0": -100},  # never ends by itself
}


@pytest.fixture(scope="module")
def busy(make_model_home: Callable[[], Path]) -> Iterator[Live]:
    """A server that answers two at once, within a second and a half: the reference takes longer for a long one."""
    with running(make_model_home(), backend="reference", max_concurrent_requests=2, request_timeout=1.5) as server:
        wait_until(lambda: is_ready(server), 60)
        yield server


@pytest.fixture(scope="module")
def patient(make_model_home: Callable[[], Path]) -> Iterator[Live]:
    """A server that answers one at a time, for as long as it takes: with the reference that is long."""
    with running(make_model_home(), backend="reference", max_concurrent_requests=1) as server:
        wait_until(lambda: is_ready(server), 60)
        yield server


def send(live: Live, head: str, *parts: bytes, pause: float = 0) -> bytes:
    """Send raw bytes, the parts with pauses between them, and read the answer to its end."""
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n")
        for part in parts:
            time.sleep(pause)
            try:
                connection.sendall(part)
            except OSError:
                break  # the server has closed already, as it should
        answer = b""
        try:
            while data := connection.recv(65536):
                answer += data
        except ConnectionResetError:
            pass
    return answer


HEAD = "POST /v1/chat/completions HTTP/1.1\nHost: localhost\nContent-Type: application/json\nConnection: close"


def test_a_body_that_announces_too_much_is_refused_unread(empty: Live) -> None:
    answer = send(empty, f"{HEAD}\nContent-Length: {MAX_BODY + 1}")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"] == "too_large"


def test_a_body_that_announces_nothing_is_cut_off_at_the_limit(empty: Live) -> None:
    chunk = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    answer = send(empty, f"{HEAD}\nTransfer-Encoding: chunked", *[chunk] * (MAX_BODY // 0x4000 + 1))
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_body_at_the_limit_is_read(empty: Live) -> None:
    with empty.http() as client:
        body = json.dumps({"model": "nobody", "messages": QUESTION}).encode()
        response = client.post(
            "/v1/chat/completions",
            content=body + b" " * (MAX_BODY - len(body)),
            headers={"Content-Type": "application/json"},
        )
    assert response.status_code == 404  # the model is unknown, so the body was read


def test_the_openai_client_sees_a_body_that_is_too_large_as_413(empty: Live) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        empty.openai().chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * MAX_BODY}])
    assert caught.value.status_code == 413


def test_a_body_that_comes_too_slowly_is_given_up(tmp_path: Path) -> None:
    with running(tmp_path / "home", body_timeout=0.3) as live:
        answer = send(live, f"{HEAD}\nContent-Length: 100", b"{", b" ", b" ", pause=0.2)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"request_timeout" in answer


def test_headers_that_never_end_are_refused(empty: Live) -> None:
    with socket.create_connection(("127.0.0.1", empty.port), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * 100_000)
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({}, 415),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 404),
    ],
)
def test_only_plain_json_is_read(empty: Live, headers: dict[str, str], status: int) -> None:
    body = json.dumps({"model": "nobody", "messages": QUESTION}).encode()
    with empty.http() as client:
        response = client.post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == status


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}],
)
def test_without_keys_other_sites_are_kept_out(empty: Live, headers: dict[str, str]) -> None:
    with empty.http(headers=headers) as client:
        assert client.get("/v1/models").status_code == 403
        assert client.get("/v1/models").json()["error"]["code"] == "not_local"
        problem = client.post("/v1/commands/key/create", json={"name": "mine"})
        assert problem.json()["code"] == "not_local"
        assert client.get("/health").status_code == 200


def test_an_answer_that_takes_too_long_is_given_up(busy: Live) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        busy.openai().chat.completions.create(**LONG)
    assert caught.value.status_code == 504
    assert caught.value.code == "timed_out"
    wait_until(lambda: busy.stats().active == 0)


def test_a_stream_that_takes_too_long_ends_with_an_error(busy: Live) -> None:
    texts = []
    with pytest.raises(openai.APIError) as caught:
        for chunk in busy.openai().chat.completions.create(**LONG, stream=True):
            texts.append(chunk.choices[0].delta.content or "")
    assert caught.value.code == "timed_out"
    assert "".join(texts)
    wait_until(lambda: busy.stats().active == 0)


def test_more_answers_than_the_limit_are_refused_for_good(busy: Live) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        busy.openai().chat.completions.create(model="smollm2-135m", messages=QUESTION, n=3)
    assert caught.value.param == "n"


def test_an_overload_is_429_and_passes(patient: Live) -> None:
    client = patient.openai()
    first = client.chat.completions.create(**LONG, stream=True)
    next(iter(first))
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(**LONG)
    assert caught.value.code == "overloaded"
    assert caught.value.response.headers["retry-after"] == "1"
    first.close()
    wait_until(lambda: patient.state.slots.taken == 0)
    assert client.chat.completions.create(**LONG | {"max_tokens": 2}).choices


def test_a_client_that_hangs_up_on_a_stream_ends_its_answer(patient: Live) -> None:
    stream = patient.openai().chat.completions.create(**LONG, stream=True)
    next(iter(stream))
    assert patient.stats().active == 1
    stream.close()
    wait_until(lambda: patient.stats().active == 0 and patient.stats().running == 0, 5)
    steps = patient.stats().counters.steps
    time.sleep(0.3)
    assert patient.stats().counters.steps == steps
    assert patient.state.slots.taken == 0


def test_a_client_that_hangs_up_on_a_whole_answer_ends_it(patient: Live) -> None:
    with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=patient.url, timeout=1) as client:
        client.post("/v1/chat/completions", json=LONG)
    wait_until(lambda: patient.stats().active == 0 and patient.stats().running == 0, 5)
    assert patient.state.slots.taken == 0


def test_slots_are_given_back_whatever_happens() -> None:
    slots = Slots(4)
    with pytest.raises(RuntimeError), slots.take(3):
        assert slots.taken == 3
        raise RuntimeError
    assert slots.taken == 0
    with pytest.raises(BadField), slots.take(5):
        pass

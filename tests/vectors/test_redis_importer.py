"""Reading another program's patterns from Redis: all of them, nothing written, and nothing taken on trust."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import aclosing

import numpy as np
import pytest

from support.valkey import Server, valkey_server
from synapse.errors import Forbidden, InvalidInput, Unavailable
from synapse.vectors.importers.redis import Pattern, Report, fill_index, read_patterns
from synapse.vectors.index import PatternIndex

__all__ = ["valkey_server"]
READING = {"scan", "type", "hlen", "strlen", "memory|usage", "hgetall", "get", "auth"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def _empty(server: Server) -> None:
    with server.client() as client:
        client.flushall()


async def read(server: Server, match: str = "pattern:*", **options: object) -> dict[str, Pattern]:
    found = [pattern async for pattern in read_patterns(server.url, match, **options)]  # type: ignore[arg-type]
    assert len(found) == len({pattern.id for pattern in found})
    return {pattern.id: pattern for pattern in found}


async def test_a_vector_is_read_however_it_was_written(server: Server) -> None:
    vector = [0.5, -1.25, 3e-7, 0.0]
    with server.client() as client:
        client.hset("pattern:json", mapping={"embedding": json.dumps(vector), "text": "é", "raw": b"\xff\x00"})
        client.hset("pattern:commas", mapping={"vector": "0.5, -1.25,3e-7 ,0"})
        client.hset("pattern:bytes", mapping={"embedding": np.array(vector, "<f4").tobytes(), "vector": "other"})
        client.set("pattern:string", json.dumps({"embedding": vector, "text": "é", "tags": ["a", 1]}))
        client.set("pattern:both", json.dumps({"vector": "0.5,-1.25,3e-7,0"}))
        client.set("other:string", json.dumps({"embedding": vector}))
    found = await read(server)
    assert set(found) == {"pattern:json", "pattern:commas", "pattern:bytes", "pattern:string", "pattern:both"}
    for pattern in found.values():
        assert pattern.vector.dtype == np.float32
        np.testing.assert_array_equal(pattern.vector, np.array(vector, np.float32))
    assert found["pattern:json"].fields == {"text": "é", "raw": b"\xff\x00"}
    assert found["pattern:bytes"].fields == {"vector": "other"}
    assert found["pattern:string"].fields == {"text": "é", "tags": '["a", 1]'}
    assert set(await read(server, "other:*")) == {"other:string"}


async def test_the_vector_may_have_another_name(server: Server) -> None:
    with server.client() as client:
        client.hset("p:1", mapping={"weights": "1,2", "embedding": "3,4"})
    found = await read(server, "p:*", vector_fields=["weights"])
    assert found["p:1"].vector.tolist() == [1, 2]
    assert found["p:1"].fields == {"embedding": "3,4"}


async def test_many_patterns_are_read_a_few_at_a_time_and_each_once(server: Server) -> None:
    with server.client() as client, client.pipeline() as pipeline:
        for n in range(3000):
            pipeline.hset(f"pattern:{n}", mapping={"embedding": f"{n},1"})
        pipeline.execute()
    report = Report()
    found = await read(server, batch=50, report=report)
    assert {name: pattern.vector[0] for name, pattern in found.items()} == {f"pattern:{n}": n for n in range(3000)}
    assert (report.read, report.passed_over.total()) == (3000, 0)


async def test_whoever_stops_reading_early_leaves_no_connection_behind(server: Server) -> None:
    with server.client() as client:
        for n in range(10):
            client.hset(f"pattern:{n}", mapping={"embedding": "1,2"})
        before = client.info("clients")["connected_clients"]
        async with aclosing(read_patterns(server.url)) as patterns:
            async for _ in patterns:
                break
        async with asyncio.timeout(20):
            while client.info("clients")["connected_clients"] > before:
                await asyncio.sleep(0.01)


# --- nothing is written


async def test_a_user_who_may_only_read_is_enough_and_only_reading_commands_are_sent(valkey_server: Server) -> None:
    with valkey_server.client() as client:
        client.hset("pattern:1", mapping={"embedding": "1,2"})
        client.set("pattern:2", '{"vector": [3, 4]}')
        client.lpush("pattern:3", "1")
        client.execute_command("ACL", "SETUSER", "reader", "on", ">secret", "+@read", "-@write", "~*")
        client.config_resetstat()
        changes = client.info("persistence")["rdb_changes_since_last_save"]
        found = [p.id async for p in read_patterns(f"{valkey_server.url}?username=reader&password=secret")]
        assert sorted(found) == ["pattern:1", "pattern:2"]
        sent = {name.removeprefix("cmdstat_"): stats for name, stats in client.info("commandstats").items()}
        sent = {name: stats for name, stats in sent.items() if name not in ("info", "config|resetstat")}
        assert set(sent) == READING
        assert not any(stats["rejected_calls"] + stats["failed_calls"] for stats in sent.values())
        assert client.info("persistence")["rdb_changes_since_last_save"] == changes
        for name in sent.keys() - {"auth"}:
            flags = client.execute_command("COMMAND", "INFO", name)
            (flags,) = flags.values() if isinstance(flags, dict) else flags
            assert "readonly" in str(flags), name


async def test_a_user_who_may_not_read_is_told(valkey_server: Server) -> None:
    with valkey_server.client() as client:
        client.hset("pattern:1", mapping={"embedding": "1,2"})
        client.execute_command("ACL", "SETUSER", "scanner", "on", ">secret", "+scan", "~*")
    with pytest.raises(Forbidden):
        async for _ in read_patterns(f"{valkey_server.url}?username=scanner&password=secret"):
            pass


# --- nothing is taken on trust


async def test_what_is_no_pattern_is_passed_over_and_reported_with_its_reason(server: Server) -> None:
    hashes: dict[str, dict[str | bytes, str | bytes]] = {
        "nothing": {"text": "no vector"},
        "word": {"embedding": "hello"},
        "words": {"embedding": "[1, 'a']"},
        "true": {"embedding": "[true, false]"},
        "nested": {"embedding": "[[1, 2]]"},
        "deep": {"embedding": "[" * 100_000},
        "object": {"embedding": '{"a": 1}'},
        "nan": {"embedding": "[NaN, 1]"},
        "infinite": {"embedding": "1e999,1"},
        "huge": {"embedding": "[1e300, 1]"},
        "digits": {"embedding": f"[{'9' * 4000}, 1]"},
        "more digits": {"embedding": f"[{'9' * 9000}, 1]"},
        "nan bytes": {"embedding": np.array([np.nan, 1], "<f4").tobytes()},
        "odd bytes": {"embedding": b"\x00\x01\x02\xff\xfe"},
        "empty": {"embedding": ""},
        "empty list": {"embedding": "[]"},
        "commas": {"embedding": "1,,2"},
        "signs": {"embedding": "1,+-2"},
        "underscores": {"embedding": "1_0,2"},
        "three": {"embedding": "1,2,3"},
        "too long": {"embedding": ",".join(["1"] * 5000)},
        "too many fields": {"embedding": "1,2", **{str(n): "" for n in range(300)}},
        "too large": {"embedding": "1,2", "text": "x" * (2 << 20)},
        "a name": {"embedding": "1,2", b"\xff": "1"},
    }
    strings: dict[str, str | bytes] = {
        "no json": "hello",
        "json list": "[1, 2]",
        "deep json": "[" * 100_000,
        "half a character": '{"embedding": [1, 2], "text": "\\ud800"}',
        "unread": '{"embedding": "ééé"}',
        "large string": "x" * (2 << 20),
    }
    with server.client() as client:
        for name, found in hashes.items():
            client.hset(f"pattern:{name}", mapping=found)
        for name, value in strings.items():
            client.set(f"pattern:{name}", value)
        client.lpush("pattern:list", "1")
        client.xadd("pattern:stream", {"embedding": "1,2"})
        client.hset(b"pattern:\xff", mapping={"embedding": "1,2"})
        client.hset("pattern:" + "x" * 2000, mapping={"embedding": "1,2"})
        client.hset("pattern:right", mapping={"embedding": "1,2"})
    report = Report()
    assert set(await read(server, dim=2, report=report)) == {"pattern:right"}
    assert report.read == 1
    assert report.passed_over.total() == len(hashes) + len(strings) + 4
    by_key = {key: reason for reason, keys in report.examples.items() for key in keys}
    for key, reason in {
        "pattern:list": "a list, not a hash or a string",
        "pattern:stream": "a stream, not a hash or a string",
        "pattern:nothing": "there is no embedding or vector in it",
        "pattern:three": "the vector has not 2 components",
        "pattern:odd bytes": "the vector is neither text nor float32 numbers",
        "pattern:too many fields": "more than 256 fields",
        "pattern:a name": "the name of a field is not UTF-8 text",
        "pattern:half a character": "a string with half a character in it",
        r"pattern:\xff": "the key is not UTF-8 text",
    }.items():
        assert by_key[key] == reason
    assert "1 patterns read" in str(report)
    for reason, count in report.passed_over.items():
        assert f"{count}: {reason}, such as " in str(report)
    assert max(len(keys) for keys in report.examples.values()) == 3
    assert not any(char in str(report) for char in "\xff\0")


async def test_any_length_of_vectors_is_read_where_none_is_asked_for(server: Server) -> None:
    with server.client() as client:
        client.hset("pattern:2", mapping={"embedding": "1,2"})
        client.hset("pattern:3", mapping={"embedding": "1,2,3"})
    assert {name: len(pattern.vector) for name, pattern in (await read(server)).items()} == {
        "pattern:2": 2,
        "pattern:3": 3,
    }


async def test_a_batch_of_nothing_or_a_server_that_is_not_there_is_refused(server: Server) -> None:
    with pytest.raises(InvalidInput, match="batch"):
        await read(server, batch=0)
    with pytest.raises(InvalidInput, match="URL"):
        [pattern async for pattern in read_patterns("http://localhost")]
    with pytest.raises(Unavailable, match="does not answer"):
        [pattern async for pattern in read_patterns("unix:///nowhere/socket")]


# --- into an index


async def test_an_index_filled_from_redis_finds_what_is_near(server: Server) -> None:
    vectors = np.random.default_rng(3).standard_normal((2500, 24)).astype(np.float32)
    with server.client() as client, client.pipeline() as pipeline:
        for n, vector in enumerate(vectors):
            pipeline.hset(f"pattern:{n}", mapping={"embedding": vector.tobytes()})
        pipeline.hset("pattern:short", mapping={"embedding": "1,2"})
        pipeline.execute()
    index, report = PatternIndex(24), Report()
    names = await fill_index(index, read_patterns(server.url, dim=24, report=report), first=7)
    assert (len(index), report.read, report.passed_over.total()) == (2500, 2500, 1)
    assert sorted(names) == list(range(7, 2507))
    ids, _ = index.search(vectors[:50], 1)
    assert [names[int(one)] for one in ids[:, 0]] == [f"pattern:{n}" for n in range(50)]


async def test_vectors_of_another_length_are_not_put_into_an_index(server: Server) -> None:
    with server.client() as client:
        client.hset("pattern:3", mapping={"embedding": "1,2,3"})
    index = PatternIndex(2)
    with pytest.raises(InvalidInput) as refused:
        await fill_index(index, read_patterns(server.url))
    assert "dim=2" in str(refused.value.hint)
    assert len(index) == 0

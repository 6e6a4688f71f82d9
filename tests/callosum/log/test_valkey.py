"""What a log in Valkey does besides what every log promises: servers that stop, hang, are full, or will not do."""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter

import pytest

from callosum.log.log_backends import note, said
from callosum.log.valkey_places import open_valkey, valkey_address
from support.valkey import Server, new_prefix, shared_server, valkey_server
from synapse.callosum.log.contract import Delivery, Log
from synapse.callosum.log.valkey.log import ValkeyLog
from synapse.callosum.message import Message, Tract
from synapse.errors import Conflict, Forbidden, InvalidInput, Unauthorized, Unavailable

__all__ = ["valkey_server"]
SHORT = 0.3
INTERNAL = Tract.INTERNAL


async def connect(server: Server, *, prefix: str = "synapse:", keep: int = 1000, timeout_s: float = 5.0) -> ValkeyLog:
    return await ValkeyLog.connect(server.url, prefix=prefix, keep=keep, timeout_s=timeout_s)


async def claim(log: Log, group: str = "g", limit: int = 1000) -> list[Delivery]:
    return await log.claim(group, "somebody", limit, INTERNAL)


# --- a server that stops, is killed, or hangs


async def test_a_server_that_stops_is_unavailable_and_comes_back_with_everything(valkey_server: Server) -> None:
    log = await connect(valkey_server)
    await log.join("g", "**", lease_s=60)
    await log.append([note("1", key="a"), note("2")])
    (first,) = await claim(log, limit=1)
    for end in (valkey_server.stop, valkey_server.kill):
        before = await log.stats()
        end()
        attempts = log.append([note("lost")]), claim(log), log.stats(), log.changed(1), log.acknowledge("g", [first])
        for attempt in attempts:
            with pytest.raises(Unavailable, match="does not answer"):
                await attempt
        valkey_server.start()
        assert await log.stats() == before
    assert await log.append([note("3"), note("again", key="a")]) == [True, False]
    assert said(await claim(log)) == ["2", "3"]
    await log.acknowledge("g", [first])
    assert (await log.stats()).groups[0].handled == 1
    await log.close()


async def test_a_server_that_hangs_is_unavailable_and_what_was_sent_meanwhile_is_accepted_once(
    valkey_server: Server,
) -> None:
    log, patient = await connect(valkey_server, timeout_s=SHORT), await connect(valkey_server)
    await patient.join("g", "**")
    message = note("1")
    with valkey_server.paused():
        with pytest.raises(Unavailable, match="does not answer"):
            await log.append([message])
        with pytest.raises(Unavailable, match="does not answer"):
            await log.changed(60)
    assert [await patient.append([message]) for _ in range(2)][1] == [False]
    assert said(await claim(patient)) == ["1"]
    assert (await patient.stats()).accepted == 1
    for one in (log, patient):
        await one.close()


async def test_nothing_accepted_is_lost_while_the_server_is_killed_and_paused(valkey_server: Server) -> None:
    """Producers and consumers go on as the bus does: what is unavailable is tried again."""
    total, chance = 3000, random.Random(5)  # noqa: S311 - to do the same again
    log, patient = await connect(valkey_server, timeout_s=SHORT), await connect(valkey_server)
    await patient.join("g", "**", lease_s=1.0)
    done, handled = asyncio.Event(), Counter[str]()

    async def produce(first: int) -> None:
        for start in range(first, first + total // 3, 20):
            messages = [note(str(n), key=str(n)) for n in range(start, start + 20)]
            while True:
                try:
                    await log.append(messages)
                    break
                except Unavailable:
                    await asyncio.sleep(0.02)
            await asyncio.sleep(0.01)

    async def consume() -> None:
        while not done.is_set():
            try:
                found = await claim(log, limit=50)
                handled.update(said(found))
                await log.acknowledge("g", found)
                if not found:
                    await log.changed(0.1)
            except Unavailable:
                await asyncio.sleep(0.02)

    consumers = [asyncio.create_task(consume()) for _ in range(3)]
    producers = [asyncio.create_task(produce(first)) for first in range(0, total, total // 3)]
    for harm in ("kill", "pause", "kill", "pause", "kill"):
        await asyncio.sleep(chance.uniform(0.05, 0.15))
        if harm == "pause":
            with valkey_server.paused():
                await asyncio.sleep(SHORT * 1.5)
        else:
            await asyncio.to_thread(valkey_server.kill)
            await asyncio.to_thread(valkey_server.start)
    await asyncio.gather(*producers)
    async with asyncio.timeout(30):
        while (await patient.stats()).groups[0].handled < total:
            await asyncio.sleep(0.05)
    done.set()
    await asyncio.gather(*consumers)
    assert set(handled) == {str(n) for n in range(total)}
    stats = await patient.stats()
    assert stats.accepted == total
    (group,) = stats.groups
    assert (group.handled, group.pending) == (total, 0)
    assert handled.total() - total <= group.redelivered, "what was handled twice was delivered twice, and counted"
    for one in (log, patient):
        await one.close()


# --- servers that will not do


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"appendonly": "no"}, "appendonly yes"),
        ({"maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"}, "noeviction"),
    ],
)
async def test_a_server_that_forgets_is_refused(settings: dict[str, str], hint: str) -> None:
    server = Server(**settings)
    with pytest.raises(Unavailable) as refused:
        await connect(server)
    assert hint in str(refused.value.hint)
    server.kill()


async def test_a_message_that_is_not_on_the_disk_yet_is_not_accepted(valkey_server: Server) -> None:
    log = await connect(valkey_server, timeout_s=2.0)
    with valkey_server.client() as client:
        client.config_set("appendfsync", "no")
        with pytest.raises(Unavailable, match="disk"):
            await log.append([note("1")])
        client.config_set("appendfsync", "always")
    assert await log.append([note("2")]) == [True]
    await log.close()


async def test_a_full_server_refuses_whole_appends_and_still_lets_messages_be_handled(valkey_server: Server) -> None:
    log = await connect(valkey_server, keep=0)
    await log.join("g", "**")
    await log.append([note(str(n)) for n in range(100)])
    with valkey_server.client() as client:
        client.config_set("maxmemory", 1)
        with pytest.raises(Unavailable, match="memory"):
            await log.append([note("100"), note("101")])
        found = await claim(log)
        assert said(found) == [str(n) for n in range(100)]
        await log.acknowledge("g", found)
        assert (await log.stats()).groups[0].handled == 100
        client.config_set("maxmemory", 0)
    await log.append([note("102")])
    assert said(await claim(log)) == ["102"]
    await log.close()


@pytest.mark.parametrize("url", ["", "http://localhost", "valkey://host:port", "valkey://host?colour=red", "unix:"])
async def test_a_url_of_something_else_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="URL"):
        await ValkeyLog.connect(url)


async def test_where_nobody_answers_the_log_is_unavailable() -> None:
    for url in ("valkey://127.0.0.1:1", "unix:///nowhere/socket"):
        with pytest.raises(Unavailable, match="does not answer"):
            await ValkeyLog.connect(url)


async def test_a_wrong_password_or_a_user_without_rights_is_told(valkey_server: Server) -> None:
    with valkey_server.client() as client:
        client.execute_command("ACL", "SETUSER", "reader", "on", ">right", "+@read", "+info", "-@write", "~*")
    with pytest.raises(Unauthorized):
        await ValkeyLog.connect(f"{valkey_server.url}?username=reader&password=wrong")
    with pytest.raises(Forbidden):
        await ValkeyLog.connect(f"{valkey_server.url}?username=reader&password=right")


async def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkey.asyncio", None)
    with pytest.raises(Unavailable) as refused:
        await ValkeyLog.connect("valkey://localhost")
    assert "synapse[valkey]" in str(refused.value.hint)


# --- what is in the server


async def test_keys_of_something_else_or_of_a_newer_version_are_left_alone() -> None:
    server, other, newer = shared_server(), new_prefix(), new_prefix()
    with server.client() as client:
        client.set(f"{other}meta", "mine")
        client.hset(f"{newer}meta", "layout", "2")
        for prefix, message in ((other, "something else"), (newer, "layout 2")):
            with pytest.raises(Conflict, match=message):
                await connect(server, prefix=prefix)
        assert client.get(f"{other}meta") == b"mine"
        assert client.hgetall(f"{newer}meta") == {b"layout": b"2"}


async def test_logs_with_two_prefixes_know_nothing_of_each_other() -> None:
    server = shared_server()
    one, other = await connect(server, prefix=new_prefix()), await connect(server, prefix=new_prefix())
    await one.append([note("1", key="a")])
    assert await other.append([note("2", key="a")]) == [True]
    assert said(await one.read(None, 10)) == ["1"]
    for log in (one, other):
        await log.close()


async def test_what_cannot_be_read_is_a_dead_letter_and_holds_up_nothing() -> None:
    server, prefix = shared_server(), new_prefix()
    log = await connect(server, prefix=prefix)
    await log.join("g", "**")
    await log.append([note("1")])
    with server.client() as client:
        client.xadd(f"{prefix}internal", {"t": "a.b", "k": "x", "m": b"\xff no message"}, "2-0")
        client.xadd(f"{prefix}internal", {"neither": "topic nor message"}, "3-0")
        client.hincrby(f"{prefix}meta", "seq", 2)
    await log.append([note("2")])
    assert said(await claim(log)) == ["1", "2"]
    (letter,) = await log.dead()
    assert (letter.reason, letter.message.topic) == ("unreadable", "callosum.unreadable")
    assert [entry.message.topic for entry in await log.read(None, 10)] == [
        "test.noted",
        "callosum.unreadable",
        "test.noted",
    ]
    await log.close()


async def test_a_group_that_wants_nothing_of_it_does_not_keep_the_log_from_being_trimmed() -> None:
    log = await connect(shared_server(), prefix=new_prefix(), keep=10)
    await log.join("idle", "other.**")
    for start in range(0, 6000, 500):
        await log.append([note(str(n), tract=Tract(n % 2)) for n in range(start, start + 500)])
    stats = await log.stats()
    assert stats.kept < 1000
    assert (stats.groups[0].waiting, stats.accepted) == (0, 6000)
    await log.append([note("wanted", "other.topic")])
    assert said(await claim(log, "idle")) == ["wanted"]
    await log.close()


async def test_a_few_wanted_messages_are_found_among_many() -> None:
    log = await connect(shared_server(), prefix=new_prefix(), keep=20_000)
    await log.join("g", "rare.**")
    for start in range(0, 9000, 1500):
        messages = [Message("often.seen", note("x").payload) for _ in range(1500)]
        await log.append([*messages, note(str(start), "rare.bird")])
    assert [group.waiting for group in (await log.stats()).groups] == [6]
    wanted = [str(start) for start in range(0, 9000, 1500)]
    assert said(await log.read(None, 100, "rare.*")) == wanted
    found: list[str] = []
    for _ in wanted:
        found += said(await claim(log, limit=2))
    assert found == wanted
    assert await claim(log) == []
    await log.close()


async def test_what_is_handled_leaves_nothing_behind() -> None:
    server, prefix = shared_server(), new_prefix()
    log = await connect(server, prefix=prefix, keep=0)
    for group in ("g", "h"):
        await log.join(group, "**")
    for n in range(10):
        await log.append([note(f"{n} {m}") for m in range(100)])
        for group in ("g", "h"):
            found = await claim(log, group)
            await log.retry(group, found[0], 0)
            await log.bury(group, found[1], "failed", "no")
            await log.acknowledge(group, found[2:] + await claim(log, group))
    await log.drop()
    await log.leave("h")
    with server.client() as client:
        sizes = {
            key.decode().removeprefix(prefix): client.execute_command("MEMORY", "USAGE", key, "SAMPLES", 0)
            for key in client.scan_iter(f"{prefix}*", count=1000)
        }
    assert sum(sizes.values()) < 20_000, sizes
    assert len(sizes) < 12, sizes
    await log.close()


async def test_many_dead_letters_are_listed_and_given_back_whole() -> None:
    log = await connect(shared_server(), prefix=new_prefix())
    await log.join("g", "**")
    texts = [str(n) for n in range(300)]
    await log.append([note(text) for text in texts])
    await asyncio.gather(*(log.bury("g", one, "failed", "no") for one in await claim(log)))
    letters = await log.dead(limit=1000)
    assert sorted(said([one])[0] for one in letters) == sorted(texts)
    assert [one.id for one in await log.dead(limit=250)] == [one.id for one in letters[:250]]
    assert await log.replay() == 300
    assert sorted(said(await claim(log))) == sorted(texts)
    await log.close()


async def test_the_largest_messages_are_claimed_a_few_at_a_time() -> None:
    log = await connect(shared_server(), prefix=new_prefix())
    await log.join("g", "**")
    for n in range(12):
        await log.append([note(str(n) + "x" * 1_000_000)])
    shares = [[text.rstrip("x") for text in said(await claim(log))] for _ in range(3)]
    assert [text for share in shares for text in share] == [str(n) for n in range(12)]
    assert len(shares[0]) < 12
    await log.close()


async def test_a_wait_for_a_change_ends_whenever_it_is_cancelled() -> None:
    """The client takes a cancellation that comes while it connects for something else."""
    log = await connect(shared_server(), prefix=new_prefix())
    for moment in range(50):
        waiting = asyncio.create_task(log.changed(30))
        await asyncio.sleep(moment / 5000)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    await log.close()


async def test_waiting_for_a_change_survives_more_than_one_look_at_the_server() -> None:
    log = await connect(shared_server(), prefix=new_prefix(), timeout_s=1.0)
    waiting = asyncio.create_task(log.changed(60))
    await asyncio.sleep(1.3)
    assert not waiting.done()
    await log.append([note("1")])
    async with asyncio.timeout(20):
        await waiting
    await log.close()


async def test_what_a_task_has_looked_at_does_not_end_its_wait() -> None:
    log = await connect(shared_server(), prefix=new_prefix())
    await log.join("g", "**")

    async def consume() -> int:
        looks = handled = 0
        while handled < 301:
            found = await claim(log)
            looks, handled = looks + 1, handled + len(found)
            await log.acknowledge("g", found)
            if not found:
                await log.changed(60)
        return looks

    consumer = asyncio.create_task(consume())
    for messages in ([note(str(n)) for n in range(300)], [note("last")]):
        await asyncio.sleep(0.3)
        await log.append(messages)
    async with asyncio.timeout(20):
        assert await consumer < 20
    await log.close()


async def test_an_address_names_a_server_and_a_prefix() -> None:
    address = valkey_address(shared_server().url, new_prefix())
    log = await open_valkey(address, keep=5, most_dead=5)
    await log.append([note("1")])
    await log.close()
    log = await open_valkey(address, keep=5, most_dead=5)
    assert said(await log.read(None, 5)) == ["1"]
    await log.close()

"""What the store promises, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synapse.errors import Conflict, InvalidInput, NotFound
from synapse.genome.entities import Genome, GenomeLayer, TraitType
from synapse.personas.entities import Conversation, Message, Persona
from synapse.server.keys import ApiKey
from synapse.store import Contention, Duplicate, InUse, Store, connect


def layer(name: str = "captain", **fields: Any) -> GenomeLayer:
    return GenomeLayer(name=name, **fields)


async def persona(store: Store, name: str = "ada", **fields: Any) -> Persona:
    return await store.create(Persona(name=name, base_model="tiny", **fields))


class TestKeeping:
    async def test_what_was_created_is_read_back_equal(self, store: Store) -> None:
        made = layer(
            trait_type=TraitType.tone_and_voice,
            size_mb=1.5,
            rank=8,
            alpha=16.0,
            rslora=True,
            targets=("q_proj", "v_proj"),
            embedding=(0.25, -1e-300, 1.7976931348623157e308),
            tags=("été", "🏴‍☠️", 'quo"te', "日本語"),
            training_metrics={"loss": 0.125},
            share_permission={"public": True, "license": "apache-2.0"},
        )
        created = await store.create(made)
        assert created == made
        assert await store.get(GenomeLayer, made.id) == made
        assert await store.find(GenomeLayer, name="captain") == made

    @settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        text=st.text(st.characters(exclude_characters="\x00", exclude_categories=("Cs",)), max_size=50),
        numbers=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=5),
    )
    def test_any_text_and_any_finite_numbers_survive(self, database_url: str, text: str, numbers: list[float]) -> None:
        async def there_and_back() -> None:
            store = await connect(database_url)
            try:
                made = await store.create(layer(f"n{id(text)}", description=text, embedding=tuple(numbers)))
                assert await store.get(GenomeLayer, made.id) == made
                await store.delete(GenomeLayer, made.id)
            finally:
                await store.close()

        asyncio.run(there_and_back())

    async def test_times_come_back_in_utc_whatever_zone_they_had(self, store: Store) -> None:
        noon = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=5, minutes=30)))
        key = await store.create(ApiKey(name="k", prefix="p", digest="d", permissions=[], revoked_at=noon))
        found = await store.get(ApiKey, key.id)
        assert found.revoked_at == noon
        assert found.revoked_at is not None and found.revoked_at.tzinfo is UTC
        assert found.last_used_at is None

    async def test_ids_are_uuids_of_version_7_and_sort_by_age(self, store: Store) -> None:
        first = await store.create(layer("a"))
        await asyncio.sleep(0.002)
        second = await store.create(layer("b"))
        assert first.id[14] == second.id[14] == "7"
        assert first.id < second.id

    async def test_a_missing_id_is_not_found(self, store: Store) -> None:
        for attempt in (
            store.get(GenomeLayer, "nobody"),
            store.update(GenomeLayer, "nobody", {"size_mb": 1.0}),
            store.delete(GenomeLayer, "nobody"),
        ):
            with pytest.raises(NotFound, match="nobody"):
                await attempt
        assert await store.find(GenomeLayer, name="nobody") is None

    async def test_text_that_a_database_would_not_take_is_refused(self, store: Store) -> None:
        for field, value in (("description", "half\x00"), ("tags", ("half\x00",)), ("base_model", "\ud800")):
            with pytest.raises(InvalidInput, match=rf"GenomeLayer\.{field}"):
                await store.create(layer().model_copy(update={field: value}))
        assert await store.count(GenomeLayer) == 0


class TestChanging:
    async def test_an_update_changes_what_it_names_and_the_time(self, store: Store) -> None:
        made = await store.create(layer(size_mb=1.0, tags=("x",)))
        changed = await store.update(GenomeLayer, made.id, {"tags": ["y"]})
        assert changed.tags == ("y",)
        assert (changed.name, changed.size_mb, changed.created_at) == (made.name, made.size_mb, made.created_at)
        assert changed.updated_at > made.updated_at
        assert await store.get(GenomeLayer, made.id) == changed

    async def test_an_update_without_changes_still_counts_as_one(self, store: Store) -> None:
        made = await store.create(layer())
        assert (await store.update(GenomeLayer, made.id, {})).updated_at > made.updated_at

    async def test_a_wrong_change_is_refused_and_nothing_is_written(self, store: Store) -> None:
        made = await store.create(layer())
        with pytest.raises(InvalidInput, match=r"GenomeLayer\.rank must be a valid integer, not '8' \(str\)"):
            await store.update(GenomeLayer, made.id, {"size_mb": 2.0, "rank": "8"})
        assert await store.get(GenomeLayer, made.id) == made

    async def test_a_deleted_entity_is_gone_and_returned(self, store: Store) -> None:
        made = await store.create(layer())
        assert await store.delete(GenomeLayer, made.id) == made
        assert await store.count(GenomeLayer) == 0


class TestUniqueness:
    async def test_a_second_of_the_same_name_is_refused_naming_it(self, store: Store) -> None:
        first = await store.create(layer("captain"))
        with pytest.raises(Duplicate, match="captain") as caught:
            await store.create(layer("captain"))
        assert caught.value.details["id"] == first.id

    async def test_the_same_id_twice_is_refused(self, store: Store) -> None:
        first = await store.create(layer("a"))
        with pytest.raises(Duplicate, match=first.id):
            await store.create(layer("b", id=first.id))

    async def test_taking_anothers_name_by_an_update_is_refused(self, store: Store) -> None:
        await store.create(layer("a"))
        second = await store.create(layer("b"))
        with pytest.raises(Duplicate):
            await store.update(GenomeLayer, second.id, {"name": "a"})
        assert (await store.update(GenomeLayer, second.id, {"name": "b"})).name == "b"

    async def test_no_value_equals_another_no_value(self, store: Store) -> None:
        await store.create(Genome(base_model="tiny"))
        await store.create(Genome(base_model="tiny"))
        assert await store.count(Genome) == 2

    async def test_a_group_of_fields_can_be_unique_together(self, store: Store) -> None:
        ada = await persona(store)
        talk = await store.create(Conversation(persona_id=ada.id))
        await store.create(Message(conversation_id=talk.id, position=0, role="user", content="hi"))
        await store.create(Message(conversation_id=talk.id, position=1, role="user", content="hi"))
        with pytest.raises(Duplicate, match="position 1"):
            await store.create(Message(conversation_id=talk.id, position=1, role="user", content="hi"))

    async def test_of_many_that_create_the_same_name_at_once_one_wins(self, store: Store) -> None:
        outcomes = await asyncio.gather(
            *(store.create(layer("captain", size_mb=float(i))) for i in range(6)), return_exceptions=True
        )
        winners = [outcome for outcome in outcomes if isinstance(outcome, GenomeLayer)]
        assert len(winners) == 1
        assert all(isinstance(outcome, Conflict) for outcome in outcomes if outcome is not winners[0])
        assert await store.list(GenomeLayer) == winners


class TestReferences:
    async def test_to_nothing_are_refused(self, store: Store) -> None:
        with pytest.raises(InvalidInput, match=r"Conversation\.persona_id must be the id of a Persona"):
            await store.create(Conversation(persona_id="nobody"))

    async def test_keep_what_they_refer_to_from_being_deleted(self, store: Store) -> None:
        genome = await store.create(Genome(name="salty", base_model="tiny"))
        ada = await persona(store, genome_id=genome.id)
        with pytest.raises(InUse, match="Genome salty is used by Persona ada"):
            await store.delete(Genome, genome.id)
        await store.update(Persona, ada.id, {"genome_id": None})
        await store.delete(Genome, genome.id)

    async def test_that_cascade_go_with_what_they_refer_to(self, store: Store) -> None:
        ada = await persona(store)
        talk = await store.create(Conversation(persona_id=ada.id))
        await store.create(Message(conversation_id=talk.id, position=0, role="user", content="hi"))
        await store.delete(Conversation, talk.id)
        assert await store.count(Message) == 0


class TestFinding:
    async def test_conditions_order_and_pages(self, store: Store) -> None:
        for name, size in (("a", 2.0), ("b", 1.0), ("c", 2.0), ("d", 3.0)):
            await store.create(layer(name, size_mb=size))

        async def names(*args: Any, **options: Any) -> str:
            return "".join(found.name for found in await store.list(GenomeLayer, *args, **options))

        assert await names() == "abcd"
        assert await names(order_by="-name") == "dcba"
        assert await names(order_by="-size_mb", limit=1) == "d"
        assert await names({"size_mb": 2.0}) == "ac"
        assert await names({"sizeMB": 2}) == "ac"
        assert await names({"rank": None}, limit=2, offset=1) == "bc"
        assert await names({"rslora": True}) == ""
        assert await names(limit=0) == ""
        assert await store.count(GenomeLayer, {"size_mb": 2.0}) == 2

    async def test_nonsense_is_invalid_input(self, store: Store) -> None:
        conditions: list[dict[str, Any]] = [
            {"nome": "a"},
            {"name": 5},
            {"size_mb": "2"},
            {"rank": 2**80},
            {"name": "a\x00"},
            {"tags": ["x"]},
        ]
        options: list[dict[str, Any]] = [
            {"order_by": "name; DROP TABLE genome_layers"},
            {"order_by": "tags"},
            {"limit": -1},
            {"offset": -1},
        ]
        for where in conditions:
            with pytest.raises(InvalidInput):
                await store.list(GenomeLayer, where)
        for option in options:
            with pytest.raises(InvalidInput):
                await store.list(GenomeLayer, **option)


class TestTransactions:
    async def test_happen_as_a_whole(self, store: Store) -> None:
        async with store.transaction():
            await store.create(layer("a"))
            await store.create(layer("b"))
        assert await store.count(GenomeLayer) == 2

    async def test_that_fail_leave_nothing(self, store: Store) -> None:
        with pytest.raises(RuntimeError):
            async with store.transaction():
                await store.create(layer("a"))
                assert await store.count(GenomeLayer) == 1
                raise RuntimeError
        assert await store.count(GenomeLayer) == 0

    async def test_that_are_cancelled_leave_nothing(self, store: Store) -> None:
        inside = asyncio.Event()

        async def work() -> None:
            async with store.transaction():
                await store.create(layer("a"))
                inside.set()
                await asyncio.sleep(60)

        task = asyncio.create_task(work())
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await store.count(GenomeLayer) == 0
        await store.create(layer("a"))

    async def test_nested_ones_are_part_of_the_outer_one(self, store: Store) -> None:
        with pytest.raises(RuntimeError):
            async with store.transaction():
                async with store.transaction():
                    await store.create(layer("a"))
                raise RuntimeError
        assert await store.count(GenomeLayer) == 0

    async def test_what_others_do_meanwhile_is_not_part_of_it(self, store: Store) -> None:
        seen: list[int] = []

        async def look() -> None:
            seen.append(await store.count(GenomeLayer))

        async with store.transaction():
            await store.create(layer("a"))
            await asyncio.create_task(look())
        assert seen == [0]
        assert await store.count(GenomeLayer) == 1

    async def test_counting_up_from_many_tasks_loses_no_count(self, store: Store) -> None:
        made = await store.create(layer(size_mb=0.0))

        async def add_one() -> None:
            async def work() -> None:
                found = await store.get(GenomeLayer, made.id)
                await store.update(GenomeLayer, made.id, {"size_mb": found.size_mb + 1})

            while True:
                try:
                    return await store.atomically(work)
                except Contention:
                    continue

        await asyncio.gather(*(add_one() for _ in range(8)))
        assert (await store.get(GenomeLayer, made.id)).size_mb == 8


async def test_an_entity_may_refuse_to_be_written_or_deleted(store: Store) -> None:
    made = await store.create(layer())
    entry = {"layer_id": made.id, "trait_type": "domain_expertise", "order_index": 0}
    with pytest.raises(InvalidInput, match="there is no layer"):
        await store.create(Genome(base_model="tiny", layers=[entry | {"layer_id": "nobody"}]))
    genome = await store.create(Genome(name="salty", base_model="tiny", layers=[entry]))
    with pytest.raises(InUse, match="salty"):
        await store.delete(GenomeLayer, made.id)
    await store.delete(Genome, genome.id)
    await store.delete(GenomeLayer, made.id)

"""`synapse layer` and `synapse genome`, as every surface runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from synapse.commands import Context, find_command
from synapse.errors import InvalidInput, NotFound
from synapse.genome import commands, sources
from synapse.genome.entities import Genome, GenomeLayer
from synapse.personas.entities import Persona
from synapse.store import Duplicate, InUse, Store
from tests.genome.conftest import Bench


async def run(context: Context, command_name: str, /, **params: Any) -> dict[str, Any]:
    command = find_command(command_name)
    return (await command.run(command.params(**params), context)).model_dump(mode="json")


async def add_both(context: Context, bench: Bench) -> None:
    for folder in (bench.layer, bench.other):
        await run(context, "layer/add", source=str(folder))


class TestLayers:
    async def test_are_added_listed_shown_exported_and_removed(
        self, context: Context, bench: Bench, tmp_path: Path
    ) -> None:
        added = await run(context, "layer/add", source=str(bench.layer), description="Arr.", tags=["sea"])
        assert (added["name"], added["rank"], added["targets"]) == ("captain", 4, ["q_proj", "v_proj"])
        assert (added["description"], added["tags"], added["genomes"]) == ("Arr.", ["sea"], [])
        assert Path(added["path"]).name == added["sha256"]
        assert await run(context, "layer/show", name="captain") == added
        assert await run(context, "layer/show", name=added["id"]) == added
        rows = (await run(context, "layer/list"))["items"]
        assert [(row["name"], row["base_model"]) for row in rows] == [("captain", "tiny")]

        exported = await run(context, "layer/export", name="captain", folder=str(tmp_path / "out"))
        weights = Path(exported["folder"]) / "adapter_model.safetensors"
        assert weights.read_bytes() == (bench.layer / "adapter_model.safetensors").read_bytes()

        assert (await run(context, "layer/rm", name="captain")) == {"name": "captain"}
        assert (await run(context, "layer/list"))["items"] == []
        assert not Path(added["path"]).exists()  # noqa: ASYNC240
        with pytest.raises(NotFound):
            await run(context, "layer/show", name="captain")

    async def test_that_are_only_described_are_shown_without_a_path(self, context: Context, store: Store) -> None:
        await store.create(GenomeLayer(name="Math Expert", size_mb=50))
        assert (await run(context, "layer/show", name="Math Expert"))["path"] == ""


class TestGenomes:
    async def test_keep_the_order_and_the_weights_that_were_typed(self, context: Context, bench: Bench) -> None:
        await add_both(context, bench)
        made = await run(context, "genome/create", name="salty", layers="dates, captain:0.5")
        assert made["base_model"] == "tiny"
        assert [(row["name"], row["weight"]) for row in made["layers"]] == [("dates", 1.0), ("captain", 0.5)]
        assert (await run(context, "genome/show", name="salty")) == made
        (row,) = (await run(context, "genome/list"))["items"]
        assert (row["id"], row["name"], row["layers"]) == (made["id"], "salty", ["dates", "captain:0.5"])
        assert (await run(context, "layer/show", name="dates"))["genomes"] == ["salty"]

    async def test_are_edited_and_deleted(self, context: Context, bench: Bench, store: Store) -> None:
        await add_both(context, bench)
        await run(context, "genome/create", name="salty", layers="captain")
        edited = await run(context, "genome/edit", name="salty", layers="captain:0.25,dates:0", rename="fresh")
        assert edited["name"] == "fresh"
        assert [(row["name"], row["weight"]) for row in edited["layers"]] == [("captain", 0.25), ("dates", 0.0)]
        assert (await run(context, "genome/edit", name="fresh", layers=""))["layers"] == []
        with pytest.raises(InvalidInput, match="nothing to change"):
            await run(context, "genome/edit", name="fresh")
        await run(context, "genome/delete", name="fresh")
        assert await store.count(Genome) == 0
        with pytest.raises(NotFound):
            await run(context, "genome/show", name="fresh")

    async def test_of_nothing_are_for_the_default_model(self, context: Context) -> None:
        made = await run(context, "genome/create", name="plain")
        assert (made["base_model"], made["layers"]) == ("tiny", [])

    async def test_that_make_no_sense_are_refused(self, context: Context, bench: Bench) -> None:
        await add_both(context, bench)
        for layers, error, message in (
            ("captain:1.5", InvalidInput, "weight from 0 to 1"),
            ("captain:nan", InvalidInput, "weight from 0 to 1"),
            ("captain:much", InvalidInput, "weight from 0 to 1"),
            (":1", InvalidInput, "NAME:WEIGHT"),
            ("captain,captain", InvalidInput, "is in the genome twice"),
            ("nobody", NotFound, "nobody"),
        ):
            with pytest.raises(error, match=message):
                await run(context, "genome/create", name="odd", layers=layers)
        with pytest.raises(InvalidInput, match="made for tiny, the genome for other"):
            await run(context, "genome/create", name="odd", layers="captain", base_model="other")
        with pytest.raises(InvalidInput, match="a name has"):
            await run(context, "genome/create", name="a:b")
        await run(context, "genome/create", name="odd")
        with pytest.raises(Duplicate):
            await run(context, "genome/create", name="odd")

    async def test_that_a_persona_has_are_not_deleted(self, context: Context, store: Store) -> None:
        made = await run(context, "genome/create", name="salty")
        await store.create(Persona(name="ada", base_model="tiny", genome_id=made["id"]))
        with pytest.raises(InUse, match="Persona ada"):
            await run(context, "genome/delete", name="salty")

    async def test_need_a_place_of_its_own_for_each_layer(self, context: Context, bench: Bench, store: Store) -> None:
        await add_both(context, bench)
        layers = await store.list(GenomeLayer)
        places = [{"layer_id": layer.id, "trait_type": layer.trait_type, "order_index": 3} for layer in layers]
        with pytest.raises(InvalidInput, match="cannot both have the place 3"):
            await store.create(Genome(base_model="tiny", layers=places))


class TestStarters:
    @pytest.fixture(autouse=True)
    def starters(self, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A starter layer for the tiny model, in place of those for the real one."""
        folder = tmp_path / "starters" / "captain"
        folder.mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / name).write_bytes((bench.layer / name).read_bytes())
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# captain\n\nSpeaks of the sea.\n")
        (folder / "metrics.json").write_text('{"final_loss": 0.5, "score_before": 0.1, "score_after": 0.9}')
        for module in (sources, commands):
            monkeypatch.setattr(module, "STARTERS", folder.parent)

    async def test_are_listed_and_added_by_name(self, context: Context, store: Store) -> None:
        (row,) = (await run(context, "layer/starters"))["items"]
        assert (row["name"], row["source"], row["summary"]) == ("captain", "starter:captain", "Speaks of the sea.")
        added = await run(context, "layer/add", source=row["source"])
        assert (added["name"], added["performance"], added["license"]) == ("captain", 0.9, "apache-2.0")
        layer = await store.find(GenomeLayer, name="captain")
        assert layer is not None and layer.training_metrics is not None
        assert layer.training_metrics.loss == 0.5
        assert layer.creator == "synapse"

    async def test_of_another_name_are_not_found(self, context: Context) -> None:
        for name in ("nobody", "../captain", ""):
            with pytest.raises(NotFound, match="there is no starter layer"):
                await run(context, "layer/add", source=f"starter:{name}")

"""Layers on disk: kept by content, whole or not at all, given back byte for byte."""

from __future__ import annotations

import asyncio
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from support.peft_layers import copy_layer, edit_config, edit_weights, save_layer
from synapse.commands import Context
from synapse.errors import Conflict, Corrupt, InvalidInput, NotFound, Unavailable
from synapse.genome.entities import Genome, GenomeLayer, TraitType
from synapse.genome.registry import LayerRegistry, suggested_name
from synapse.genome.stack import stack
from synapse.models.adapters.adapter import LayerRefused, read_adapter
from synapse.store import Duplicate, InUse, Store
from tests.genome.conftest import Bench

FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kept(context: Context) -> list[str]:
    """The folders under `layers`, without the lock."""
    return sorted(path.name for path in (context.settings.home / "layers").iterdir() if path.name != ".lock")


class TestAdding:
    async def test_reads_everything_about_the_layer_from_its_files(self, registry: LayerRegistry, bench: Bench) -> None:
        layer = await registry.add(str(bench.layer), trait_type=TraitType.tone_and_voice, tags=["sea"])
        assert (layer.name, layer.base_model, layer.trait_type) == ("captain", "tiny", "tone_and_voice")
        assert (layer.rank, layer.alpha, layer.rslora, layer.targets) == (4, 8.0, False, ("q_proj", "v_proj"))
        assert layer.size_mb == sum((bench.layer / name).stat().st_size for name in FILES[:2]) / 1e6
        assert layer.sha256 == read_adapter(bench.layer, None).sha256
        assert layer.tags == ("sea",)
        assert await registry.list() == [layer]
        assert await registry.find("captain") == await registry.find(layer.id) == layer

    async def test_keeps_the_files_by_content_and_private(
        self, registry: LayerRegistry, context: Context, bench: Bench
    ) -> None:
        layer = await registry.add(str(bench.layer))
        folder = registry.path(layer)
        assert folder == context.settings.home / "layers" / str(layer.sha256)
        assert contents(folder) == {name: (bench.layer / name).read_bytes() for name in FILES}
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}

    async def test_the_same_again_changes_nothing(
        self, registry: LayerRegistry, context: Context, bench: Bench, tmp_path: Path
    ) -> None:
        first = await registry.add(str(bench.layer))
        assert await registry.add(str(copy_layer(bench.layer, tmp_path / "captain"))) == first
        assert await registry.list() == [first]
        assert kept(context) == [first.sha256]

    async def test_the_same_content_under_two_names_is_kept_once(
        self, registry: LayerRegistry, context: Context, bench: Bench
    ) -> None:
        first = await registry.add(str(bench.layer))
        second = await registry.add(str(bench.layer), name="bosun")
        assert first.id != second.id
        assert kept(context) == [first.sha256]

        await registry.remove(first)
        assert contents(registry.path(second))
        await registry.remove(second)
        assert kept(context) == []

    async def test_another_layer_under_a_taken_name_is_refused(
        self, registry: LayerRegistry, context: Context, bench: Bench
    ) -> None:
        first = await registry.add(str(bench.layer))
        with pytest.raises(Duplicate, match="captain") as caught:
            await registry.add(str(bench.other), name="captain")
        assert "--name" in str(caught.value.hint)
        assert kept(context) == [first.sha256]

    async def test_many_at_once_keep_it_once(self, registry: LayerRegistry, context: Context, bench: Bench) -> None:
        found = await asyncio.gather(*(registry.add(str(bench.layer)) for _ in range(4)))
        assert len({layer.id for layer in found}) == 1
        assert kept(context) == [found[0].sha256]

    async def test_mends_files_that_were_damaged_since(self, registry: LayerRegistry, bench: Bench) -> None:
        layer = await registry.add(str(bench.layer))
        (registry.path(layer) / FILES[1]).write_bytes(b"rubbish")
        await registry.add(str(bench.layer))
        assert await registry.verified_path(layer)

    async def test_a_layer_for_another_model_is_refused_and_nothing_kept(
        self, registry: LayerRegistry, context: Context, tmp_path: Path
    ) -> None:
        with pytest.raises(LayerRefused) as caught:
            await registry.add(str(save_layer(tmp_path / "narrow")))  # trained on 32 wide, the base is 64 wide
        assert caught.value.reason == "shape_mismatch"
        assert kept(context) == []
        assert await registry.list() == []

    async def test_damaged_layers_are_refused_and_nothing_kept(
        self, registry: LayerRegistry, context: Context, bench: Bench, tmp_path: Path
    ) -> None:
        nan = edit_weights(
            copy_layer(bench.layer, tmp_path / "nan"), lambda t: next(iter(t.values())).fill(float("nan"))
        )
        named = edit_config(copy_layer(bench.layer, tmp_path / "b"), base_model_name_or_path="meta-llama/Llama-3.2-1B")
        cut = copy_layer(bench.layer, tmp_path / "cut")
        (cut / FILES[1]).write_bytes((cut / FILES[1]).read_bytes()[:-1])
        for folder, reason in ((nan, "not_finite"), (named, "base_mismatch"), (cut, "truncated")):
            with pytest.raises(LayerRefused) as caught:
                await registry.add(str(folder))
            assert caught.value.reason == reason
        assert kept(context) == []

    async def test_a_base_model_that_is_not_here_is_not_found(self, registry: LayerRegistry, bench: Bench) -> None:
        with pytest.raises(NotFound, match="nowhere"):
            await registry.add(str(bench.layer), base_model="nowhere")

    async def test_a_folder_that_is_not_there_is_not_found(self, registry: LayerRegistry, tmp_path: Path) -> None:
        with pytest.raises(NotFound, match="nothing"):
            await registry.add(str(tmp_path / "nothing"))

    async def test_a_name_no_layer_can_have_is_invalid(
        self, registry: LayerRegistry, context: Context, bench: Bench
    ) -> None:
        for name in ("a:b", "a,b", "../up", "", " a"):
            with pytest.raises(InvalidInput, match="a name has 1 to 100 characters"):
                await registry.add(str(bench.layer), name=name)
        assert kept(context) == []

    async def test_a_model_card_gives_description_and_licence(
        self, registry: LayerRegistry, bench: Bench, tmp_path: Path
    ) -> None:
        folder = copy_layer(bench.layer, tmp_path / "carded")
        (folder / "README.md").write_text(
            "---\nlicense: mit\ntags: [x]\n---\n\n# Title\n\nTalks like\na sailor.\n\nMore.\n"
        )
        layer = await registry.add(str(folder))
        assert layer.description == "Talks like a sailor."
        assert layer.share_permission.license == "mit"
        assert not layer.share_permission.public


class TestGivingBack:
    async def test_peft_gets_back_what_it_saved_byte_for_byte(
        self, registry: LayerRegistry, bench: Bench, tmp_path: Path
    ) -> None:
        layer = await registry.add(str(bench.layer))
        target = await registry.export(layer, tmp_path / "new" / "folder")
        assert contents(target) == contents(bench.layer)

    async def test_and_can_load_it(self, registry: LayerRegistry, bench: Bench, tmp_path: Path) -> None:
        import torch
        from peft import PeftModel

        from support.tiny_models import build_tiny_model

        layer = await registry.add(str(bench.layer))
        exported = await registry.export(layer, tmp_path / "exported")
        logits = []
        for folder in (bench.layer, exported):
            base = build_tiny_model(tmp_path / "base.gguf").reference
            model = PeftModel.from_pretrained(base, str(folder))
            with torch.no_grad():
                logits.append(model(torch.arange(12)[None]).logits)
        assert torch.equal(*logits)

    async def test_a_folder_with_something_in_it_is_left_alone(
        self, registry: LayerRegistry, bench: Bench, tmp_path: Path
    ) -> None:
        layer = await registry.add(str(bench.layer))
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine").write_text("keep me")
        with pytest.raises(Conflict, match="not empty"):
            await registry.export(layer, tmp_path / "full")
        assert contents(tmp_path / "full") == {"mine": b"keep me"}
        with pytest.raises(Unavailable):
            await registry.export(layer, tmp_path / "full" / "mine")


class TestOpening:
    async def test_files_that_are_gone_or_of_another_size_are_damage(
        self, registry: LayerRegistry, bench: Bench
    ) -> None:
        layer = await registry.add(str(bench.layer))
        weights = registry.path(layer) / FILES[1]
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-1])
        with pytest.raises(Corrupt, match="captain"):
            registry.path(layer)
        weights.unlink()
        with pytest.raises(Corrupt, match="missing"):
            registry.path(layer)

    async def test_files_of_the_same_size_with_other_bytes_are_damage(
        self, registry: LayerRegistry, bench: Bench, tmp_path: Path
    ) -> None:
        layer = await registry.add(str(bench.layer))
        assert await registry.verified_path(layer) == registry.path(layer)
        weights = registry.path(layer) / FILES[1]
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
        with pytest.raises(Corrupt, match="not the ones that were added"):
            await registry.verified_path(layer)
        with pytest.raises(Corrupt):
            await registry.export(layer, tmp_path / "out")

    async def test_a_layer_that_is_only_described_has_no_files(self, registry: LayerRegistry, store: Store) -> None:
        layer = await store.create(GenomeLayer(name="Math Expert", size_mb=50))
        with pytest.raises(InvalidInput, match="only described"):
            registry.path(layer)
        await registry.remove(layer)


class TestRemoving:
    async def test_a_layer_of_a_genome_is_refused_naming_the_genome(
        self, registry: LayerRegistry, store: Store, context: Context, bench: Bench
    ) -> None:
        layer = await registry.add(str(bench.layer))
        place = {"layer_id": layer.id, "trait_type": layer.trait_type, "order_index": 0}
        genome = await store.create(Genome(name="salty", base_model="tiny", layers=[place]))
        with pytest.raises(InUse, match="salty"):
            await registry.remove(layer)
        assert kept(context) == [layer.sha256]
        await store.delete(Genome, genome.id)
        await registry.remove(layer)
        assert kept(context) == []
        with pytest.raises(NotFound):
            await registry.find("captain")


async def test_a_genome_becomes_folders_and_weights_in_its_own_order(
    registry: LayerRegistry, store: Store, bench: Bench
) -> None:
    captain, dates = [await registry.add(str(folder)) for folder in (bench.layer, bench.other)]
    genome = await store.create(
        Genome(
            base_model="tiny",
            layers=[
                {"layer_id": captain.id, "trait_type": "tone_and_voice", "order_index": 7, "weight": 0.25},
                {"layer_id": dates.id, "trait_type": "domain_expertise", "order_index": 2},
            ],
        )
    )
    assert await stack(store, registry, genome) == [(dates.sha256, 1.0), (captain.sha256, 0.25)]


ADD = """
import asyncio, os, resource, signal, sys
from pathlib import Path
from synapse.commands import Context
from synapse.config import Settings
from synapse.errors import SynapseError
from synapse.genome.opening import open_layers

home, layer, kill_at, most_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
calls, fsync = 0, os.fsync

def fsync_until_killed(descriptor):
    global calls
    calls += 1
    if calls == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)

async def main():
    async with Context(Settings(home=Path(home), default_model="tiny")) as context:
        registry = await context.get(open_layers)
        os.fsync = fsync_until_killed
        if most_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
        try:
            await registry.add(layer)
        except SynapseError as error:
            print(type(error).__name__, error.message)

asyncio.run(main())
"""


def add_in_a_process(context: Context, bench: Bench, kill_at: int = 0, most_bytes: int = 0) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", ADD, context.settings.home, bench.layer, str(kill_at), str(most_bytes)],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_process_killed_while_adding_leaves_nothing_half_written(
    registry: LayerRegistry, store: Store, context: Context, bench: Bench
) -> None:
    # The points at which the process makes sure of what it wrote: one file, all files, and after the last step.
    for kill_at in (1, 2, 5):
        code, output = add_in_a_process(context, bench, kill_at)
        assert code == -9, output
        for name in kept(context):
            if not name.startswith("."):
                assert read_adapter(context.settings.home / "layers" / name, None).sha256 == name
        assert await store.count(GenomeLayer) == 0

    layer = await registry.add(str(bench.layer))
    assert kept(context) == [layer.sha256]
    assert await registry.verified_path(layer)


@pytest.mark.slow
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_full_disk_leaves_nothing_behind(store: Store, context: Context, bench: Bench) -> None:
    code, output = add_in_a_process(context, bench, most_bytes=4096)
    assert code == 0, output
    assert output.startswith("Unavailable the layer cannot be written"), output
    assert kept(context) == []
    assert await store.count(GenomeLayer) == 0


@pytest.mark.parametrize(
    ("text", "name"), [("captain", "captain"), ("a b/c:d,e", "a-b-c-d-e"), ("", "layer"), ("::", "layer")]
)
def test_a_name_is_made_of_the_source(text: str, name: str) -> None:
    assert suggested_name(text) == name

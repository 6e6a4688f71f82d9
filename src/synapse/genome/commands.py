"""Commands for layers and genomes."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, Field

from synapse.commands import IN_PROCESS, Argument, Call, Context, LocalPath, command, looks_like_path
from synapse.errors import InvalidInput
from synapse.genome.cards import parse_card
from synapse.genome.entities import Genome, GenomeLayer, GenomeLayerReference, TraitType, genomes_with
from synapse.genome.events import publish_genome
from synapse.genome.notation import NOTATION, parse_layers
from synapse.genome.opening import open_layers
from synapse.genome.sources import STARTER, STARTERS, is_folder, starter_names
from synapse.genome.views import GenomeInfo, find_genome, genome_info
from synapse.models.adapters.files import LAYER_FILES
from synapse.store import build, open_store

if TYPE_CHECKING:
    from synapse.genome.registry import LayerRegistry


class AddLayer(BaseModel):
    """Where a layer comes from, and what it is called here."""

    source: Annotated[str, Argument(), LocalPath(is_folder)] = Field(
        description="a folder that PEFT saved, hf:ORG/REPO[@REVISION], or starter:NAME"
    )
    name: str | None = Field(None, description="what to call it; by default the last part of the source")
    base_model: Annotated[str | None, LocalPath(looks_like_path)] = Field(
        None, description="the model it was trained on; by default the default model"
    )
    trait: TraitType = Field(TraitType.domain_expertise, description="which side of a persona it shapes")
    description: str | None = Field(None, description="what it does; by default the first words of its model card")
    tags: list[str] = Field(default_factory=list, description="words to find it by")


class OneLayer(BaseModel):
    """Which layer."""

    name: Annotated[str, Argument()] = Field(description="name or id of the layer")


class ExportLayer(OneLayer):
    """Which layer, and where to."""

    folder: Annotated[Path, Argument(), LocalPath()] = Field(
        description="a folder that does not exist yet, or is empty"
    )


class Nothing(BaseModel):
    """Nothing to choose."""


class LayerRow(BaseModel):
    """A layer in a list."""

    name: str
    base_model: str
    trait_type: TraitType
    rank: int | None
    targets: list[str]
    size_mb: float
    description: str


class LayerList(BaseModel):
    """Layers, by name."""

    items: list[LayerRow]


class LayerInfo(LayerRow):
    """Everything about a layer. `path` is empty while it has no files."""

    id: str
    alpha: float | None
    rslora: bool
    sha256: str | None
    path: str
    tags: list[str]
    creator: str
    license: str
    performance: float | None
    genomes: list[str]
    created_at: datetime


class ExportedLayer(BaseModel):
    """Where a layer was written to."""

    name: str
    folder: Path


class RemovedLayer(BaseModel):
    """A layer that is gone."""

    name: str


class StarterRow(BaseModel):
    """A layer that ships with Synapse."""

    name: str
    source: str
    size_bytes: int
    summary: str


class StarterList(BaseModel):
    """The layers that ship with Synapse; `synapse layer add SOURCE` adds one."""

    items: list[StarterRow]


class CreateGenome(BaseModel):
    """A new stack of layers."""

    name: Annotated[str, Argument()] = Field(description="what to call it")
    layers: str = Field("", description=NOTATION)
    base_model: Annotated[str | None, LocalPath(looks_like_path)] = Field(
        None, description="the model it is for; by default that of its layers"
    )


class OneGenome(BaseModel):
    """Which genome."""

    name: Annotated[str, Argument()] = Field(description="name or id of the genome")


class EditGenome(OneGenome):
    """Which genome, and what to change."""

    layers: str | None = Field(None, description=f"the new stack: {NOTATION}")
    rename: str | None = Field(None, description="its new name")


class GenomeRow(BaseModel):
    """A genome in a list, its layers as they are typed."""

    id: str
    name: str | None
    base_model: str
    layers: list[str]
    updated_at: datetime


class GenomeList(BaseModel):
    """Genomes, by age."""

    items: list[GenomeRow]


@command("layer/add", permission="manage")
async def add_layer(params: AddLayer, context: Context, call: Call = IN_PROCESS) -> LayerInfo:
    """Add a LoRA layer from a folder, from the Hugging Face hub, or of those that ship with Synapse.

    The layer is checked first: only plain LoRA in safetensors whose shapes fit the base model is taken.
    Adding the same layer again changes nothing.
    """
    registry = await context.get(open_layers)
    layer = await registry.add(
        params.source,
        name=params.name,
        base_model=params.base_model,
        trait_type=params.trait,
        description=params.description,
        tags=params.tags,
        progress=call.progress,
    )
    return await _layer_info(context, layer)


@command("layer/list", permission="read")
async def list_layers(params: Nothing, context: Context) -> LayerList:
    """List the layers."""
    registry = await context.get(open_layers)
    return LayerList(items=[LayerRow(**_row(layer)) for layer in await registry.list()])


@command("layer/show", permission="read")
async def show_layer(params: OneLayer, context: Context) -> LayerInfo:
    """Show everything about a layer."""
    registry = await context.get(open_layers)
    return await _layer_info(context, await registry.find(params.name))


@command("layer/export", permission="manage")
async def export_layer(params: ExportLayer, context: Context) -> ExportedLayer:
    """Write a layer as a PEFT adapter, byte for byte as it was added."""
    registry = await context.get(open_layers)
    layer = await registry.find(params.name)
    folder = await registry.export(layer, params.folder.expanduser().absolute())
    return ExportedLayer(name=layer.name, folder=folder)


@command("layer/rm", permission="manage")
async def remove_layer(params: OneLayer, context: Context) -> RemovedLayer:
    """Remove a layer and its files; refused while a genome has it."""
    registry = await context.get(open_layers)
    layer = await registry.find(params.name)
    await registry.remove(layer)
    return RemovedLayer(name=layer.name)


@command("layer/starters", permission="read")
async def list_starters(params: Nothing, context: Context) -> StarterList:
    """List the layers that ship with Synapse."""
    return StarterList(items=[_starter(name) for name in starter_names()])


@command("genome/create", permission="manage")
async def create_genome(params: CreateGenome, context: Context) -> GenomeInfo:
    """Make a genome: a stack of weighted layers on one base model."""
    store = await context.get(open_store)
    registry = await context.get(open_layers)
    stacked = await _find_layers(registry, params.layers)
    base = params.base_model or next((layer.base_model for layer, _ in stacked if layer.base_model), None)
    fields = {
        "name": params.name,
        "base_model": base or context.settings.default_model,
        "layers": _references(stacked),
    }
    genome = await store.create(build(Genome, fields))
    publish_genome("genome.created", genome)
    return await genome_info(store, genome)


@command("genome/list", permission="read")
async def list_genomes(params: Nothing, context: Context) -> GenomeList:
    """List the genomes."""
    store = await context.get(open_store)
    infos = [await genome_info(store, genome) for genome in await store.list(Genome)]
    return GenomeList(items=[_genome_row(info) for info in infos])


@command("genome/show", permission="read")
async def show_genome(params: OneGenome, context: Context) -> GenomeInfo:
    """Show a genome and its layers."""
    store = await context.get(open_store)
    return await genome_info(store, await find_genome(store, params.name))


@command("genome/edit", permission="manage")
async def edit_genome(params: EditGenome, context: Context) -> GenomeInfo:
    """Change the layers, their weights and order, or the name of a genome."""
    store = await context.get(open_store)
    genome = await find_genome(store, params.name)
    changes: dict[str, object] = {}
    if params.layers is not None:
        changes["layers"] = _references(await _find_layers(await context.get(open_layers), params.layers))
    if params.rename is not None:
        changes["name"] = params.rename
    if not changes:
        raise InvalidInput("there is nothing to change", hint="give --layers or --rename")
    genome = await store.update(Genome, genome.id, changes)
    publish_genome("genome.changed", genome)
    return await genome_info(store, genome)


@command("genome/delete", permission="manage")
async def delete_genome(params: OneGenome, context: Context) -> GenomeInfo:
    """Delete a genome; refused while a persona has it. Its layers stay."""
    store = await context.get(open_store)
    genome = await find_genome(store, params.name)
    info = await genome_info(store, genome)
    await store.delete(Genome, genome.id)
    publish_genome("genome.deleted", genome)
    return info


async def _find_layers(registry: LayerRegistry, text: str) -> list[tuple[GenomeLayer, float]]:
    """``captain:0.8,dates`` as layers with weights."""
    return [(await registry.find(name), weight) for name, weight in parse_layers(text)]


def _references(stacked: list[tuple[GenomeLayer, float]]) -> tuple[GenomeLayerReference, ...]:
    return tuple(
        GenomeLayerReference(layer_id=layer.id, trait_type=layer.trait_type, order_index=index, weight=weight)
        for index, (layer, weight) in enumerate(stacked)
    )


def _row(layer: GenomeLayer) -> dict[str, object]:
    return {name: getattr(layer, name) for name in LayerRow.model_fields} | {"targets": list(layer.targets)}


async def _layer_info(context: Context, layer: GenomeLayer) -> LayerInfo:
    registry = await context.get(open_layers)
    genomes = await genomes_with(await context.get(open_store), layer)
    return LayerInfo(
        **_row(layer),
        id=layer.id,
        alpha=layer.alpha,
        rslora=layer.rslora,
        sha256=layer.sha256,
        path=str(registry.path(layer)) if layer.sha256 else "",
        tags=list(layer.tags),
        creator=layer.creator,
        license=layer.share_permission.license,
        performance=layer.training_metrics.performance if layer.training_metrics else None,
        genomes=[genome.name or genome.id for genome in genomes],
        created_at=layer.created_at,
    )


def _starter(name: str) -> StarterRow:
    folder = STARTERS / name
    size = sum((folder / file).stat().st_size for file in LAYER_FILES)
    card = parse_card((folder / "README.md").read_bytes())
    return StarterRow(name=name, source=f"{STARTER}{name}", size_bytes=size, summary=card.summary)


def _genome_row(info: GenomeInfo) -> GenomeRow:
    layers = [layer.name if layer.weight == 1 else f"{layer.name}:{layer.weight:g}" for layer in info.layers]
    return GenomeRow(id=info.id, name=info.name, base_model=info.base_model, layers=layers, updated_at=info.updated_at)

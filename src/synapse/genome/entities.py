"""What the store keeps of layers and genomes."""

from __future__ import annotations

import re
from collections import Counter
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints

from synapse.errors import InvalidInput
from synapse.store import Entity, InUse, Store, Value, entity

FORBIDDEN_IN_NAMES = re.compile(r"[:,/\\\x00-\x1f\x7f]")


def check_name(name: str) -> str:
    """A name is typed in lists such as ``captain:0.8,dates``, so it has no colon and no comma."""
    if not 0 < len(name) <= 100 or name != name.strip() or FORBIDDEN_IN_NAMES.search(name):
        raise ValueError("a name has 1 to 100 characters, none of : , / \\ and no space at either end")
    return name


Name = Annotated[str, AfterValidator(check_name)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Tag = Annotated[str, StringConstraints(min_length=1, max_length=64)]


class TraitType(StrEnum):
    """Which side of a persona a layer shapes."""

    general_reasoning = "general_reasoning"
    tone_and_voice = "tone_and_voice"
    ethical_reasoning = "ethical_reasoning"
    domain_expertise = "domain_expertise"
    cultural_knowledge = "cultural_knowledge"
    memory_integration = "memory_integration"


class TrainingMetrics(Value):
    """How the training of a layer went."""

    loss: float | None = None
    epochs: float | None = Field(None, ge=0)
    performance: float | None = Field(None, description="score on held-out items, 0 to 1 unless the card says else")


class SharePermission(Value):
    """Whether others may have the layer, and under which licence."""

    public: bool = False
    license: str = ""


@entity("GenomeLayer", unique=("name",), indexes=("sha256",))
class GenomeLayer(Entity):
    """A LoRA layer. Without a `sha256` it is only described: there are no files yet that a model could load."""

    name: Name
    trait_type: TraitType = TraitType.domain_expertise
    model_path: str = Field("", description="where its files are, below the home folder")
    size_mb: float = Field(0.0, ge=0, alias="sizeMB", description="config and weights together, in 10^6 bytes")
    rank: int | None = Field(None, ge=1, le=256)
    alpha: float | None = Field(None, gt=0)
    rslora: bool = False
    targets: tuple[str, ...] = Field((), description="linear projections it adapts")
    base_model: str = Field("", description="name of the model it fits, as the model library knows it")
    sha256: Sha256 | None = Field(None, description="content address of its files")
    embedding: tuple[float, ...] | None = Field(None, max_length=4096, description="for search by similarity")
    tags: tuple[Tag, ...] = Field((), max_length=64)
    creator: str = ""
    description: str = ""
    training_metrics: TrainingMetrics | None = None
    share_permission: SharePermission = Field(default_factory=SharePermission)

    async def before_delete(self, store: Store) -> None:
        """Raises InUse, naming the genomes that have this layer."""
        users = await genomes_with(store, self)
        if users:
            names = [genome.name or genome.id for genome in users]
            raise InUse(
                f"the layer {self.name} is part of {'the genome' if len(names) == 1 else 'the genomes'} "
                f"{', '.join(names)}",
                hint="take it out of them first: synapse genome edit NAME --layers …",
                used_by=names,
            )


class GenomeLayerReference(Value):
    """A layer's place in a genome."""

    layer_id: str
    trait_type: TraitType
    order_index: int = Field(ge=0, le=10_000, description="0 is applied first")
    weight: float = Field(1.0, ge=0, le=1, description="how much the layer counts")


class GenomeMetadata(Value):
    """Where a genome comes from. When it was made and changed is in the entity itself."""

    generation: int = Field(1, ge=0)
    parent_genomes: tuple[str, ...] = Field((), max_length=64)


@entity("Genome", unique=("name",))
class Genome(Entity):
    """A stack of weighted layers on one base model."""

    name: Name | None = None
    persona_id: str | None = Field(None, description="whom it was made for; the persona itself says what it uses")
    base_model: str = Field(min_length=1, max_length=200)
    layers: tuple[GenomeLayerReference, ...] = Field((), max_length=64)
    metadata: GenomeMetadata = Field(default_factory=GenomeMetadata)

    async def check(self, store: Store) -> None:
        """Raises InvalidInput unless the layers exist, fit the base model, and each has a place of its own."""
        places = Counter(layer.order_index for layer in self.layers)
        if len(places) < len(self.layers):
            raise InvalidInput(
                f"Genome.layers: two layers have the order_index {places.most_common(1)[0][0]}",
                field="layers.order_index",
            )
        uses = Counter(layer.layer_id for layer in self.layers)
        if len(uses) < len(self.layers):
            twice = uses.most_common(1)[0][0]
            layer = await store.find(GenomeLayer, id=twice)
            raise InvalidInput(
                f"the layer {layer.name if layer else twice} stands in the stack twice",
                hint="name it once, and add the two weights up",
                field="layers.layer_id",
            )
        for reference in self.layers:
            layer = await store.find(GenomeLayer, id=reference.layer_id)
            if layer is None:
                raise InvalidInput(
                    f"Genome.layers: there is no layer with the id {reference.layer_id!r:.70}",
                    hint="synapse layer list",
                    field="layers.layer_id",
                )
            if layer.base_model and layer.base_model != self.base_model:
                raise InvalidInput(
                    f"the layer {layer.name} is made for {layer.base_model}, the genome for {self.base_model}",
                    hint="layers only fit the base model they were trained on",
                    field="layers",
                )


async def genomes_with(store: Store, layer: GenomeLayer) -> list[Genome]:
    """The genomes that have this layer, by age."""
    return [
        genome
        for genome in await store.list(Genome)
        if any(reference.layer_id == layer.id for reference in genome.layers)
    ]

"""A genome as people are shown it, for the commands of genomes and of personas."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel

from synapse.errors import NotFound
from synapse.genome.entities import Genome, GenomeLayer, TraitType
from synapse.store import Store


class StackedLayer(BaseModel):
    """A layer's place in a genome."""

    name: str
    weight: float
    trait_type: TraitType


class GenomeInfo(BaseModel):
    """A genome and its layers, the first one applied first."""

    id: str
    name: str | None
    base_model: str
    generation: int
    layers: list[StackedLayer]
    updated_at: datetime


async def find_genome(store: Store, name: str) -> Genome:
    """The genome of this name or id.

    Raises:
        NotFound: there is none.
    """
    found = await store.find(Genome, name=name) or await store.find(Genome, id=name)
    if found is None:
        raise NotFound(f"there is no genome {name!r:.70}", hint="`synapse genome list` shows those there are")
    return found


async def genome_info(store: Store, genome: Genome) -> GenomeInfo:
    """A genome with the names of its layers.

    Raises:
        NotFound: one of them is gone.
    """
    stacked = [
        StackedLayer(
            name=(await store.get(GenomeLayer, reference.layer_id)).name,
            weight=reference.weight,
            trait_type=reference.trait_type,
        )
        for reference in sorted(genome.layers, key=lambda reference: reference.order_index)
    ]
    return GenomeInfo(
        id=genome.id,
        name=genome.name,
        base_model=genome.base_model,
        generation=genome.metadata.generation,
        layers=stacked,
        updated_at=genome.updated_at,
    )

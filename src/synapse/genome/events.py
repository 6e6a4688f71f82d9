"""What is published about layers and genomes."""

from __future__ import annotations

from synapse.callosum.payloads import Payload, event
from synapse.callosum.publish.publishing import publish
from synapse.genome.entities import Genome, GenomeLayer


@event("layer.added")
@event("layer.removed")
class LayerNews(Payload):
    """A layer of the home was added or removed."""

    id: str
    name: str
    base_model: str | None


@event("genome.created")
@event("genome.changed")
@event("genome.deleted")
class GenomeNews(Payload):
    """A genome was created, changed or deleted. One that was made for a persona has no name."""

    id: str
    name: str | None
    base_model: str
    layers: int


def publish_layer(topic: str, layer: GenomeLayer) -> None:
    """Publish what happened to a layer."""
    publish(topic, LayerNews(id=layer.id, name=layer.name, base_model=layer.base_model))


def publish_genome(topic: str, genome: Genome) -> None:
    """Publish what happened to a genome. Call it when the transaction is over."""
    news = GenomeNews(id=genome.id, name=genome.name, base_model=genome.base_model, layers=len(genome.layers))
    publish(topic, news)

"""From a genome to what an engine loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from synapse.genome.entities import Genome, GenomeLayer
from synapse.store import Store

if TYPE_CHECKING:
    from synapse.genome.registry import LayerRegistry


async def stack(store: Store, registry: LayerRegistry, genome: Genome) -> list[tuple[str, float]]:
    """The sha256 and the weight of each layer, in the genome's order. The files were checked against their hash.

    Raises:
        NotFound: a layer of the genome is gone.
        InvalidInput: a layer has no files.
        Corrupt: the files of a layer are missing or changed.
    """
    pairs: list[tuple[str, float]] = []
    for reference in sorted(genome.layers, key=lambda reference: reference.order_index):
        layer = await store.get(GenomeLayer, reference.layer_id)
        folder = await registry.verified_path(layer)
        pairs.append((folder.name, reference.weight))
    return pairs

"""What a persona wears: its genome, as text, as an entity, and as what the engine loads."""

from __future__ import annotations

from collections.abc import Sequence

from synapse.callosum.kept import open_kept
from synapse.commands import Context
from synapse.engines import LayersOverflow, layers_overflow
from synapse.genome.entities import Genome, GenomeLayer, GenomeLayerReference
from synapse.genome.opening import open_layers
from synapse.genome.stack import stack
from synapse.personas.entities import Persona
from synapse.store import Store, open_store


async def persona_stack(context: Context, persona: Persona) -> tuple[tuple[str, float], ...]:
    """The sha256 and weight of each layer the persona wears, in order. Layers of weight 0 are left out.

    Raises:
        NotFound: the genome or one of its layers is gone.
        InvalidInput, Corrupt: a layer has no files, or they are damaged.
    """
    genome_id = persona.genome_id
    if genome_id is None:
        return ()

    async def read() -> tuple[tuple[str, float], ...]:
        store = await context.get(open_store)
        pairs = await stack(store, await context.get(open_layers), await store.get(Genome, genome_id))
        return tuple((sha256, weight) for sha256, weight in pairs if weight)

    return await (await context.get(open_kept)).get(("stack", genome_id), read)


async def named(context: Context, error: Exception) -> Exception:
    """The same error in words a person uses: what engines know by sha256 has a name here."""
    if not isinstance(error, LayersOverflow):
        return error
    store = await context.get(open_store)
    names = {}
    for sha256, _ in error.details["layers"]:
        layer = await store.find(GenomeLayer, sha256=sha256)
        if layer is not None:
            names[sha256] = layer.name
    found = layers_overflow(error.details["layers"], names)
    found.hint = f"{found.hint} (`synapse persona edit NAME --layers LAYER:0.5,…`)"
    return found


async def make_genome(context: Context, persona: Persona, layers: Sequence[tuple[str, float]]) -> Genome:
    """Keep a genome of these layers, by name or id, and weights, made for the persona.

    Raises:
        NotFound: there is no such layer.
        InvalidInput: a layer does not fit the persona's base model, or is named twice.
    """
    store = await context.get(open_store)
    registry = await context.get(open_layers)
    references = []
    for index, (name, weight) in enumerate(layers):
        layer = await registry.find(name)
        references.append(
            GenomeLayerReference(layer_id=layer.id, trait_type=layer.trait_type, order_index=index, weight=weight)
        )
    genome = Genome(persona_id=persona.id, base_model=persona.base_model, layers=tuple(references))
    return await store.create(genome)


async def genome_text(store: Store, genome_id: str | None) -> str:
    """A genome as one types it: ``captain:0.8,dates``."""
    if genome_id is None:
        return ""
    genome = await store.get(Genome, genome_id)
    parts = []
    for reference in sorted(genome.layers, key=lambda reference: reference.order_index):
        layer = await store.find(GenomeLayer, id=reference.layer_id)
        name = layer.name if layer else reference.layer_id
        parts.append(name if reference.weight == 1 else f"{name}:{reference.weight:g}")
    return ",".join(parts)

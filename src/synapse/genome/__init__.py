"""Layers and genomes: LoRA adapters kept by their content, and the weighted stacks that personas are made of."""

from synapse.genome.entities import Genome, GenomeLayer, GenomeLayerReference, TraitType
from synapse.genome.registry import LayerRegistry, open_layers
from synapse.genome.stack import stack

__all__ = ["Genome", "GenomeLayer", "GenomeLayerReference", "LayerRegistry", "TraitType", "open_layers", "stack"]

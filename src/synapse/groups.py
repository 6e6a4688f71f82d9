"""The command groups: the module that registers each, and its summary.

It imports nothing, so that `synapse --help` can list the groups without importing a room, or even pydantic.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Group:
    """Commands that share the part of their name before the slash."""

    module: str
    summary: str
    terminal: str = ""
    """What the terminal calls it, where that is shorter."""


GROUPS: dict[str, Group] = {
    "model": Group("synapse.models.commands", "Model files: pull, list, show, remove."),
    "engine": Group("synapse.daemon.commands", "Engines that are open, and how busy they are."),
    "ai-daemon": Group("synapse.daemon.commands", "The running server: its models and workers.", "daemon"),
    "embedding": Group("synapse.encoders.commands", "Embeddings: texts as vectors, and how near they are."),
    "layer": Group("synapse.genome.commands", "LoRA layers: add, list, show, export, remove."),
    "genome": Group("synapse.genome.commands", "Genomes: weighted stacks of layers."),
    "persona": Group("synapse.personas.commands", "Personas: create, list, show, edit, delete."),
    "conversation": Group("synapse.personas.commands", "Conversations that personas have had."),
    "data": Group("synapse.store.commands", "Entities of the store, by collection name."),
    "hotpath": Group("synapse.hotpath.commands", "Hot paths: status, rollout, ranking."),
    "kernels": Group("synapse.kernels.commands", "Native kernels: build, list, verify."),
    "events": Group("synapse.callosum.commands", "Events: follow them, count them, dead letters."),
    "key": Group("synapse.server.commands", "API keys of the server."),
}

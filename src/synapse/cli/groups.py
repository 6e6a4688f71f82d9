"""The command groups and their one-line summaries, known without importing a room.

`synapse --help` must answer in a blink, and importing `synapse.commands` alone brings pydantic and asyncio with it,
which cost more than everything else that the help needs. So the names stand here once more;
`tests/cli/test_groups.py` holds them equal to `synapse.commands.GROUPS`.
"""

from __future__ import annotations

SUMMARIES: dict[str, str] = {
    "model": "Model files: pull, list, show, remove.",
    "layer": "LoRA layers: add, list, show, export, remove.",
    "genome": "Genomes: weighted stacks of layers.",
    "persona": "Personas: create, list, show, edit, delete.",
    "conversation": "Conversations that personas have had.",
    "data": "Entities of the store, by collection name.",
    "key": "API keys of the server.",
}

"""What is published about layers and genomes."""

from __future__ import annotations

import pytest

from support.heard import listening
from synapse.commands import Context, find_command
from synapse.errors import InvalidInput
from synapse.store import InUse
from tests.genome.conftest import Bench


async def run(context: Context, command_name: str, /, **params: object) -> None:
    command = find_command(command_name)
    await command.run(command.params.model_validate(params), context)


async def test_layers_and_genomes_are_told_when_they_come_change_and_go(context: Context, bench: Bench) -> None:
    with listening() as heard:
        await run(context, "layer/add", source=str(bench.layer))
        await run(context, "layer/add", source=str(bench.layer))  # the same again changes nothing
        await run(context, "genome/create", name="salty", layers="captain")
        await run(context, "genome/edit", name="salty", rename="saltier")
        with pytest.raises(InUse):
            await run(context, "layer/rm", name="captain")
        await run(context, "genome/delete", name="saltier")
        await run(context, "layer/rm", name="captain")
        with pytest.raises(InvalidInput):
            await run(context, "genome/create", name="odd", layers="captain:captain")
    assert heard.topics == [
        *("layer.added", "genome.created", "genome.changed", "genome.deleted", "layer.removed"),
    ]
    assert [(news["name"], news["layers"]) for news in heard.about("genome.created", "genome.changed")] == [
        ("salty", 1),
        ("saltier", 1),
    ]
    assert heard.about("layer.added")[0]["name"] == "captain"

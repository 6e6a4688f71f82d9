from __future__ import annotations

from synapse.cli.groups import SUMMARIES
from synapse.commands import GROUPS


def test_the_help_knows_every_group_of_the_registry_with_its_summary() -> None:
    assert {name: group.summary for name, group in GROUPS.items()} == SUMMARIES

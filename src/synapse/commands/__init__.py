"""A command is defined once and appears on every surface: terminal, HTTP, and later recipes, MCP and Sigil."""

from synapse.commands.context import Context, Progress
from synapse.commands.registry import (
    Argument,
    Command,
    Permission,
    all_commands,
    command,
    find_command,
    load_group,
)
from synapse.groups import GROUPS, Group

__all__ = [
    "GROUPS",
    "Argument",
    "Command",
    "Context",
    "Group",
    "Permission",
    "Progress",
    "all_commands",
    "command",
    "find_command",
    "load_group",
]

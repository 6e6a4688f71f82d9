"""A command is defined once and appears on every surface: terminal, HTTP, and later recipes, MCP and Sigil."""

from synapse.commands.context import Context, Progress
from synapse.commands.registry import (
    GROUPS,
    Argument,
    Command,
    Group,
    Permission,
    all_commands,
    command,
    find_command,
    load_group,
)

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

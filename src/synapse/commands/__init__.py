"""A command is defined once and appears on every surface: terminal, HTTP, and later recipes, MCP and Sigil."""

from synapse.commands.call import (
    IN_PROCESS,
    Call,
    LacksPermission,
    Permission,
    Progress,
    Surface,
    current_call,
    holds,
    no_progress,
    require,
)
from synapse.commands.context import Context
from synapse.commands.registry import (
    Argument,
    Command,
    LocalPath,
    OnlyOnThisMachine,
    all_commands,
    command,
    find_command,
    load_group,
    looks_like_path,
)
from synapse.groups import GROUPS, Group

__all__ = [
    "GROUPS",
    "IN_PROCESS",
    "Argument",
    "Call",
    "Command",
    "Context",
    "Group",
    "LacksPermission",
    "LocalPath",
    "OnlyOnThisMachine",
    "Permission",
    "Progress",
    "Surface",
    "all_commands",
    "command",
    "current_call",
    "find_command",
    "holds",
    "load_group",
    "looks_like_path",
    "no_progress",
    "require",
]

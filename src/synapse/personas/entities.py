"""What is kept of personas: who they are, the conversations they have, and what was said."""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from synapse.personas.sampling import SamplingDefaults
from synapse.store import Entity, Reference, entity

PERSONA_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
LONGEST_NAME = 64
MAX_PROMPT_LENGTH = 2**16
MAX_MESSAGE_LENGTH = 2**20

Role = Literal["user", "assistant"]


def suggested_name(text: str) -> str:
    """The nearest name that a persona can have; empty when nothing of the text can be in one."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9._-]+", "-", plain).strip("-._")[:LONGEST_NAME]


def check_persona_name(name: str) -> str:
    """The name itself. A ValueError says in words what a name is made of, and suggests one."""
    if re.fullmatch(PERSONA_NAME, name):
        return name
    rule = f"a name is up to {LONGEST_NAME} lower case letters, digits and . _ -, the first a letter or digit"
    near = suggested_name(name)
    raise ValueError(f"{rule}; how about {near}?" if near else rule)


PersonaName = Annotated[str, AfterValidator(check_persona_name), Field(json_schema_extra={"pattern": PERSONA_NAME})]


@entity("Persona", unique=("name",), references={"genome_id": Reference("Genome")})
class Persona(Entity):
    """A base model with a genome, a character and habits."""

    name: PersonaName = Field(description="lower case; what chats and the API call it")
    description: str = Field("", max_length=500, description="who it is, in a sentence")
    system_prompt: str = Field("", max_length=MAX_PROMPT_LENGTH, description="what it is told before it answers")
    base_model: str = Field(min_length=1, max_length=256, description="name of the base model")
    genome_id: str | None = Field(None, description="the genome whose layers it wears")
    sampling: SamplingDefaults = Field(default_factory=SamplingDefaults, description="how it samples by default")


@entity("Conversation", references={"persona_id": Reference("Persona", on_delete="cascade")}, indexes=("persona_id",))
class Conversation(Entity):
    """What a person and a persona said to each other."""

    persona_id: str = Field(description="the persona")
    title: str = Field("", max_length=200, description="its first words")


@entity(
    "Message",
    unique=(("conversation_id", "position"),),
    references={"conversation_id": Reference("Conversation", on_delete="cascade")},
)
class Message(Entity):
    """One message. An answer without a finish reason is still being written, or its writer died."""

    conversation_id: str = Field(description="the conversation")
    position: int = Field(ge=0, description="0 for the first message")
    role: Role = Field(description="who said it")
    content: str = Field(max_length=2 * MAX_MESSAGE_LENGTH, description="what was said")
    finish_reason: str | None = Field(None, description="why an answer ended: stop, length, cancelled or error")

"""The first tables: genomes and their layers, personas and their conversations, API keys."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None


def _structure() -> sa.types.TypeEngine[Any]:
    return sa.JSON().with_variant(JSONB(), "postgresql")


def _time(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def _text(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.Text(), nullable=nullable)


def _common(table: str) -> list[Any]:
    return [
        _text("id"),
        _time("created_at"),
        _time("updated_at"),
        sa.PrimaryKeyConstraint("id", name=f"pk_{table}"),
    ]


def upgrade() -> None:
    op.create_table(
        "genome_layers",
        *_common("genome_layers"),
        _text("name"),
        _text("trait_type"),
        _text("model_path"),
        sa.Column("size_mb", sa.Double(), nullable=False),
        sa.Column("rank", sa.BigInteger(), nullable=True),
        sa.Column("alpha", sa.Double(), nullable=True),
        sa.Column("rslora", sa.Boolean(), nullable=False),
        sa.Column("targets", _structure(), nullable=False),
        _text("base_model"),
        _text("sha256", nullable=True),
        sa.Column("embedding", _structure(), nullable=True),
        sa.Column("tags", _structure(), nullable=False),
        _text("creator"),
        _text("description"),
        sa.Column("training_metrics", _structure(), nullable=True),
        sa.Column("share_permission", _structure(), nullable=False),
        sa.UniqueConstraint("name", name="uq_genome_layers_name"),
    )
    op.create_index("ix_genome_layers_sha256", "genome_layers", ["sha256"])
    op.create_table(
        "genomes",
        *_common("genomes"),
        _text("name", nullable=True),
        _text("persona_id", nullable=True),
        _text("base_model"),
        sa.Column("layers", _structure(), nullable=False),
        sa.Column("metadata", _structure(), nullable=False),
        sa.UniqueConstraint("name", name="uq_genomes_name"),
    )
    op.create_table(
        "personas",
        *_common("personas"),
        _text("name"),
        _text("description"),
        _text("system_prompt"),
        _text("base_model"),
        _text("genome_id", nullable=True),
        sa.Column("sampling", _structure(), nullable=False),
        sa.UniqueConstraint("name", name="uq_personas_name"),
        sa.ForeignKeyConstraint(["genome_id"], ["genomes.id"], name="fk_personas_genome_id", ondelete="RESTRICT"),
    )
    op.create_table(
        "conversations",
        *_common("conversations"),
        _text("persona_id"),
        _text("title"),
        sa.ForeignKeyConstraint(
            ["persona_id"], ["personas.id"], name="fk_conversations_persona_id", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_conversations_persona_id", "conversations", ["persona_id"])
    op.create_table(
        "messages",
        *_common("messages"),
        _text("conversation_id"),
        sa.Column("position", sa.BigInteger(), nullable=False),
        _text("role"),
        _text("content"),
        _text("finish_reason", nullable=True),
        sa.UniqueConstraint("conversation_id", "position", name="uq_messages_conversation_id_position"),
        sa.ForeignKeyConstraint(
            ["conversation_id"], ["conversations.id"], name="fk_messages_conversation_id", ondelete="CASCADE"
        ),
    )
    op.create_table(
        "api_keys",
        *_common("api_keys"),
        _text("name"),
        _text("prefix"),
        _text("digest"),
        sa.Column("permissions", _structure(), nullable=False),
        _time("revoked_at", nullable=True),
        _time("last_used_at", nullable=True),
        sa.UniqueConstraint("name", name="uq_api_keys_name"),
    )
    op.create_index("ix_api_keys_prefix", "api_keys", ["prefix"])


def downgrade() -> None:
    for table in ("api_keys", "messages", "conversations", "personas", "genomes", "genome_layers"):
        op.drop_table(table)

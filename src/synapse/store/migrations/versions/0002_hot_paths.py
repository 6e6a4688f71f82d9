"""Rollouts of the hot paths, and their history."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"


def _structure(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.JSON().with_variant(JSONB(), "postgresql"), nullable=False)


def _time(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False)


def _text(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.Text(), nullable=False)


def _number(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.BigInteger(), nullable=False)


def upgrade() -> None:
    op.create_table(
        "hot_path_states",
        *(_text("id"), _time("created_at"), _time("updated_at")),
        *(_text("name"), _text("build"), _number("stage"), _text("mode")),
        *(_time("entered_at"), _time("began_at"), _number("samples"), _number("burn_in")),
        *(_text("reason"), _text("problem")),
        *(_structure("window"), _structure("totals")),
        sa.PrimaryKeyConstraint("id", name="pk_hot_path_states"),
        sa.UniqueConstraint("name", "build", name="uq_hot_path_states_name_build"),
    )
    op.create_table(
        "hot_path_events",
        *(_text("id"), _time("created_at"), _time("updated_at")),
        *(_text("name"), _text("build"), _text("kind")),
        *(_text("from_stage"), _text("to_stage"), _text("reason"), _text("by")),
        sa.PrimaryKeyConstraint("id", name="pk_hot_path_events"),
    )
    op.create_index("ix_hot_path_events_name", "hot_path_events", ["name"])


def downgrade() -> None:
    op.drop_table("hot_path_events")
    op.drop_table("hot_path_states")

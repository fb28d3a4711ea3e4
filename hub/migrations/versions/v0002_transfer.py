"""Measured transfer: tasks, and how good each adapter is for each of them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Create both tables."""
    text = sa.Text()
    op.create_table(
        "task",
        sa.Column("row", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("base", text, nullable=False),
        sa.Column("measure", text, nullable=False),
        sa.Column("name", text, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("texts", text, nullable=False),
        sa.Column("bare", sa.Float()),
        sa.Column("expert", sa.String(16), sa.ForeignKey("adapter.id", ondelete="SET NULL")),
        sa.UniqueConstraint("base", "measure", "name"),
    )
    op.create_table(
        "transfer",
        sa.Column("task_row", sa.Integer(), sa.ForeignKey("task.row", ondelete="CASCADE"), primary_key=True),
        sa.Column("adapter_id", sa.String(16), sa.ForeignKey("adapter.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("score", sa.Float(), nullable=False),
    )
    op.create_index("ix_transfer_adapter_id", "transfer", ["adapter_id"])

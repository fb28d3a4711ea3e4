"""Adapters, their locations, tags, lineage and vectors; what was rejected; full text."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create everything."""
    _create_adapter()
    _create_files()
    _create_lineage()
    _create_vector()
    if op.get_bind().dialect.name == "sqlite":
        op.execute(
            "CREATE VIRTUAL TABLE adapter_text USING fts5("
            "name, title, description, triggers, tags, words, tokenize='porter unicode61 remove_diacritics 2')"
        )
    else:
        _create_text()


def _create_adapter() -> None:
    text, short = sa.Text(), sa.String(64)
    op.create_table(
        "adapter",
        sa.Column("row", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(16), nullable=False, unique=True),
        sa.Column("digest", short, nullable=False, unique=True),
        sa.Column("name", text, nullable=False, unique=True),
        sa.Column("base", text),
        sa.Column("base_from", text),
        sa.Column("format", text, nullable=False),
        sa.Column("rank_min", sa.Integer(), nullable=False),
        sa.Column("rank_max", sa.Integer(), nullable=False),
        sa.Column("modules", sa.Integer(), nullable=False),
        sa.Column("parameters", sa.BigInteger(), nullable=False),
        sa.Column("mergeable", sa.Boolean(), nullable=False),
        sa.Column("reason", text),
        sa.Column("title", text),
        *(sa.Column(name, text, nullable=False) for name in ("description", "triggers", "extras", "warnings", "given")),
        sa.Column("text_digest", short, nullable=False),
        sa.Column("blob", short),
        sa.Column("created", sa.String(32), nullable=False),
    )
    op.create_index("ix_adapter_base", "adapter", ["base"])
    op.create_table("header", _owner(primary_key=True), sa.Column("metadata", text, nullable=False))


def _owner(**options: Any) -> sa.Column[str]:
    link = sa.ForeignKey("adapter.id", ondelete="CASCADE")
    return sa.Column("adapter_id", sa.String(16), link, nullable=False, **options)


def _create_files() -> None:
    op.create_table(
        "location",
        sa.Column("path", sa.Text(), primary_key=True),
        _owner(),
        sa.Column("format", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("mtime", sa.Float(), nullable=False),
        sa.Column("stamp", sa.Text(), nullable=False),
    )
    op.create_index("ix_location_adapter_id", "location", ["adapter_id"])
    op.create_table(
        "rejected",
        sa.Column("path", sa.Text(), primary_key=True),
        sa.Column("stamp", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("unsafe", sa.Boolean(), nullable=False),
    )
    op.create_table("tag", _owner(primary_key=True), sa.Column("tag", sa.Text(), primary_key=True))
    op.create_index("ix_tag_tag", "tag", ["tag"])


def _create_lineage() -> None:
    op.create_table(
        "lineage",
        sa.Column("child", sa.String(16), primary_key=True),
        sa.Column("position", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("parent", sa.String(16), nullable=False),
        sa.Column("parent_name", sa.Text(), nullable=False),
        sa.Column("parent_digest", sa.String(64), nullable=False),
        sa.Column("weight", sa.Float(), nullable=False),
        sa.Column("operation", sa.Text(), nullable=False),
        sa.Column("options", sa.Text(), nullable=False),
        sa.Column("seed", sa.BigInteger()),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
    )
    op.create_index("ix_lineage_parent", "lineage", ["parent"])


def _create_vector() -> None:
    op.create_table(
        "vector",
        sa.Column("row", sa.Integer(), primary_key=True, autoincrement=True),
        _owner(),
        sa.Column("space", sa.Text(), nullable=False),
        sa.Column("dim", sa.Integer(), nullable=False),
        sa.Column("input_digest", sa.String(64), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.UniqueConstraint("adapter_id", "space"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_vector_space", "vector", ["space"])


def _create_text() -> None:
    """PostgreSQL's twin of the FTS5 table: the same columns, and a weighted tsvector that follows them."""
    searched = {"name": "A", "title": "A", "triggers": "B", "tags": "B", "description": "C", "words": "D"}
    document = " || ".join(
        f"setweight(to_tsvector('english', {name}), '{weight}')" for name, weight in searched.items()
    )
    columns = ", ".join(f"{name} text NOT NULL" for name in searched)
    op.execute(
        "CREATE TABLE adapter_text (adapter_id varchar(16) PRIMARY KEY REFERENCES adapter(id) ON DELETE CASCADE, "
        f"{columns}, document tsvector GENERATED ALWAYS AS ({document}) STORED)"
    )
    op.execute("CREATE INDEX ix_adapter_text_document ON adapter_text USING gin (document)")

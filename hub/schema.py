"""The tables of the catalogue, as SQLAlchemy Core sees them; `migrations` is what creates them.

An adapter is its content: `digest` is the hash of its canonical tensors and `id` its first 16 hex digits, so one
content is one row whoever adds it and however often. `location` says where files with that content lie. Lists and
mappings are JSON in text columns, written in ASCII, because both databases keep any string in that form unharmed.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

NEWEST = "0002"
"""The migration that these tables are the result of."""

metadata = MetaData()


def _owner(**options: Any) -> Column[str]:
    return Column("adapter_id", String(16), ForeignKey("adapter.id", ondelete="CASCADE"), nullable=False, **options)


adapter = Table(
    "adapter",
    metadata,
    Column("row", Integer, primary_key=True, autoincrement=True),  # SQLite's full text needs an integer key
    Column("id", String(16), nullable=False, unique=True),
    Column("digest", String(64), nullable=False, unique=True),
    Column("name", Text, nullable=False, unique=True),
    Column("base", Text, index=True),
    Column("base_from", Text),
    Column("format", Text, nullable=False),
    Column("rank_min", Integer, nullable=False),
    Column("rank_max", Integer, nullable=False),
    Column("modules", Integer, nullable=False),
    Column("parameters", BigInteger, nullable=False),
    Column("mergeable", Boolean, nullable=False),
    Column("reason", Text),
    Column("title", Text),
    Column("description", Text, nullable=False),
    Column("triggers", Text, nullable=False),  # JSON list
    Column("extras", Text, nullable=False),  # JSON list
    Column("warnings", Text, nullable=False),  # JSON list
    Column("given", Text, nullable=False),  # JSON list: the columns that the user wrote; a file never overwrites them
    Column("text_digest", String(64), nullable=False),  # of Entry.text(), to know which text vectors are out of date
    Column("blob", String(64)),
    Column("created", String(32), nullable=False),  # ISO 8601, UTC
)

# Long, and rarely asked for: in a table of its own it does not slow down reading the others.
header = Table(
    "header",
    metadata,
    _owner(primary_key=True),
    Column("metadata", Text, nullable=False),  # JSON object
)

location = Table(
    "location",
    metadata,
    Column("path", Text, primary_key=True),
    _owner(index=True),
    Column("format", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("mtime", Float, nullable=False),
    Column("stamp", Text, nullable=False),
)

rejected = Table(
    "rejected",
    metadata,
    Column("path", Text, primary_key=True),
    Column("stamp", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("unsafe", Boolean, nullable=False),
)

tag = Table(
    "tag",
    metadata,
    _owner(primary_key=True),
    Column("tag", Text, primary_key=True, index=True),
)

# No foreign keys: what a merge was made from stays true, and stays known, after its parents are removed. A child is an
# adapter, or a picture (by the beginning of its file's hash) that was painted with its parents.
lineage = Table(
    "lineage",
    metadata,
    Column("child", String(16), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("parent", String(16), nullable=False, index=True),
    Column("parent_name", Text, nullable=False),
    Column("parent_digest", String(64), nullable=False),
    Column("weight", Float, nullable=False),
    Column("operation", Text, nullable=False),
    Column("options", Text, nullable=False),  # JSON object
    Column("seed", BigInteger),
    Column("version", Text, nullable=False),
    Column("created", String(32), nullable=False),
)

# A replaced vector gets a new `row`, never an old one again: (count, largest row) then tells whether an index is stale.
vector = Table(
    "vector",
    metadata,
    Column("row", Integer, primary_key=True, autoincrement=True),
    _owner(),
    Column("space", Text, nullable=False, index=True),
    Column("dim", Integer, nullable=False),
    Column("input_digest", String(64), nullable=False),
    Column("data", LargeBinary, nullable=False),  # little-endian float32
    UniqueConstraint("adapter_id", "space"),
    sqlite_autoincrement=True,
)

# A task on which adapters of a base were measured. `digest` is of what a score depends on besides the adapter: when it
# changes, the scores go.
task = Table(
    "task",
    metadata,
    Column("row", Integer, primary_key=True, autoincrement=True),
    Column("base", Text, nullable=False),  # its family, so that all names of a base are one
    Column("measure", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("texts", Text, nullable=False),  # JSON list: ways to ask for it
    Column("bare", Float),  # the score of the base without an adapter
    Column("expert", String(16), ForeignKey("adapter.id", ondelete="SET NULL")),  # the adapter that is made for it
    UniqueConstraint("base", "measure", "name"),
)

transfer = Table(
    "transfer",
    metadata,
    Column("task_row", Integer, ForeignKey("task.row", ondelete="CASCADE"), primary_key=True),
    Column("adapter_id", String(16), ForeignKey("adapter.id", ondelete="CASCADE"), primary_key=True, index=True),
    Column("score", Float, nullable=False),
)

SEARCHED = ("name", "title", "description", "triggers", "tags", "words")
"""Columns of the full-text table `adapter_text`, which is a virtual table on SQLite and so not described here."""

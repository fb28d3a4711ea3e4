"""Is the catalogue sound? The database by its own checks, blobs by their hashes, files by being there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Connection, func, select, text

from .blobs import Blobs
from .database import Database
from .errors import CorruptBlob
from .rows import entries
from .schema import adapter, location


def problems(database: Database, blobs: Blobs) -> list[str]:
    """Everything that is wrong, one line each; empty for a sound catalogue. Reads every blob."""
    with database.read() as connection:
        found = [*_database_problems(connection), *_file_problems(connection, blobs)]
        kept = list(connection.scalars(select(adapter.c.blob).where(adapter.c.blob.is_not(None)).distinct()))
    for digest in sorted(kept):
        try:
            blobs.verify(digest)
        except CorruptBlob as error:
            found.append(str(error))
    return found


def _database_problems(connection: Connection) -> Iterator[str]:
    if connection.dialect.name == "sqlite":
        for (line,) in connection.execute(text("PRAGMA integrity_check")):
            if line != "ok":
                yield f"the database is damaged: {line}"
        for row in connection.execute(text("PRAGMA foreign_key_check")):
            yield f"the database is damaged: row {row[1]} of {row[0]} refers to a {row[2]} that does not exist"
    adapters = connection.scalar(select(func.count()).select_from(adapter))
    indexed = connection.scalar(text("SELECT count(*) FROM adapter_text"))
    if adapters != indexed:
        yield f"full text covers {indexed} adapters of {adapters}; `describe` or `tag` those that search does not find"


def _file_problems(connection: Connection, blobs: Blobs) -> Iterator[str]:
    gone = {path for path in connection.scalars(select(location.c.path)) if not Path(path).exists()}
    for entry in entries(connection):
        missing = [path for path in entry.locations if path in gone]
        kept = entry.blob is not None and blobs.path(entry.blob).exists()
        if not kept and len(missing) == len(entry.locations):
            yield f"{entry.name} ({entry.id}): none of its files exists: {', '.join(missing) or 'none is known'}"
        else:
            yield from (f"{entry.name} ({entry.id}): {path} is gone; other copies exist" for path in missing)

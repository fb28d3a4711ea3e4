"""Rows of the catalogue as values: entries out of tables, filters, and the search text that follows from a row."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, bindparam, select, update

from . import fulltext
from .bases import same_base
from .entries import Entry, sentences, storable, text_digest
from .errors import CatalogError, UnknownAdapter
from .scan import placed, scan
from .schema import adapter, header, location, tag

_MANY = 500  # ids in one query
_SHORTEST_ID = 4  # hex digits that may stand for an id

_COLUMNS = [column for column in adapter.c if column.name not in ("row", "given", "text_digest")]
_LISTS = ("triggers", "extras", "warnings")


def entries(connection: Connection, *conditions: ColumnElement[bool]) -> list[Entry]:
    """The adapters that meet the conditions (on the adapter table), by name."""
    rows = sorted(connection.execute(select(*_COLUMNS).where(*conditions)).all(), key=attrgetter("name"))
    ids = [row.id for row in rows]
    tags = _owned(connection, tag.c.adapter_id, tag.c.tag, ids)
    paths = _owned(connection, location.c.adapter_id, location.c.path, ids)
    return [_entry(row, tags[row.id], paths[row.id]) for row in rows]


def entries_by_id(connection: Connection, ids: Sequence[str], *conditions: ColumnElement[bool]) -> list[Entry]:
    """Those of the named adapters that meet the conditions, in the order of `ids`; unknown ids are passed over."""
    known = {
        entry.id: entry for some in pieces(ids) for entry in entries(connection, adapter.c.id.in_(some), *conditions)
    }
    return [known[id_] for id_ in ids if id_ in known]


def find(connection: Connection, ref: str) -> Entry:
    """The adapter that a name, an id or the beginning of one, or a path means.

    Raises UnknownAdapter with the names that come close, or CatalogError if several ids begin so.
    """
    ref = storable(ref)
    for condition in (adapter.c.name == ref, adapter.c.id == ref, adapter.c.digest == ref):
        named = entries(connection, condition)
        if named:
            return named[0]
    if re.fullmatch(rf"[0-9a-f]{{{_SHORTEST_ID},}}", ref):
        alike = entries(connection, adapter.c.id.startswith(ref))
        if len(alike) > 1:
            listed = ", ".join(f"{entry.id} ({entry.name})" for entry in alike[:5])
            raise CatalogError(f"{len(alike)} ids begin with {ref!r}: {listed}; give more digits or a name")
        if alike:
            return alike[0]
    if os.sep in ref or os.path.lexists(ref):
        places = [candidate.path for candidate in scan([ref])] if Path(ref).is_file() else [placed(ref)]
        holder = select(location.c.adapter_id).where(location.c.path.in_(places))
        held = entries(connection, adapter.c.id.in_(holder))
        if held:
            return held[0]
    raise UnknownAdapter(_unknown(connection, ref))


def _unknown(connection: Connection, ref: str) -> str:
    names = list(connection.scalars(select(adapter.c.name)))
    close = difflib.get_close_matches(ref, names, n=3, cutoff=0.5)
    if not names:
        return f"no adapter {ref!r}: the catalogue is empty; `add` a file or folder first"
    hint = f"close to it: {', '.join(close)}" if close else "see `list` for what there is"
    return f"no adapter {ref!r} among {len(names)}; {hint}"


def narrowed(connection: Connection, base: str | None, tags: Iterable[str]) -> list[ColumnElement[bool]]:
    """Conditions for being on a base, by whatever name files give it, and for having all the tags."""
    conditions: list[ColumnElement[bool]] = []
    if base is not None:
        named = connection.scalars(select(adapter.c.base).where(adapter.c.base.is_not(None)).distinct())
        conditions.append(adapter.c.base.in_([name for name in named if same_base(name, base)]))
    conditions += [
        adapter.c.id.in_(select(tag.c.adapter_id).where(tag.c.tag == wanted))
        for wanted in tidy_tags(map(storable, tags))
    ]
    return conditions


def tidy_tags(tags: Iterable[str]) -> list[str]:
    """Tags as they are kept: lower case, single spaces, no empty ones, none twice."""
    return list(dict.fromkeys(word for word in (" ".join(tag.split()).casefold() for tag in tags) if word))


def reindex(connection: Connection, ids: Iterable[str]) -> None:
    """Bring full text and text digest of adapters in line with their rows and tags."""
    for some in pieces(list(ids)):
        joined = adapter.join(header, header.c.adapter_id == adapter.c.id)
        rows = connection.execute(
            select(adapter, header.c.metadata.label("header")).select_from(joined).where(adapter.c.id.in_(some))
        ).all()
        tags = _owned(connection, tag.c.adapter_id, tag.c.tag, some)
        fulltext.store(connection, [_document(row, tags[row.id]) for row in rows])
        digests = [(row.id, row.text_digest, _text_digest(row, tags[row.id])) for row in rows]
        changed = [{"which": id_, "now": new} for id_, old, new in digests if old != new]
        if changed:
            connection.execute(
                update(adapter).where(adapter.c.id == bindparam("which")).values(text_digest=bindparam("now")),
                changed,
            )


def _document(row: Row[Any], tags: Sequence[str]) -> dict[str, str]:
    return {
        "adapter_id": row.id,
        "name": row.name,
        "title": row.title or "",
        "description": row.description,
        "triggers": ", ".join(json.loads(row.triggers)),
        "tags": ", ".join(tags),
        "words": f"{row.base or ''} {row.format} {fulltext.metadata_words(json.loads(row.header))}",
    }


def _text_digest(row: Row[Any], tags: Sequence[str]) -> str:
    return text_digest(sentences(row.name, row.title, row.description, json.loads(row.triggers), tags))


def _entry(row: Row[Any], tags: Sequence[str], paths: Sequence[str]) -> Entry:
    values = dict(row._mapping)
    for name in _LISTS:
        values[name] = tuple(json.loads(values[name]))
    return Entry(**values, tags=tuple(tags), locations=tuple(paths))


def _owned(
    connection: Connection, owner: ColumnElement[str], value: ColumnElement[str], ids: Sequence[str]
) -> defaultdict[str, list[str]]:
    """What each adapter owns in a table of one value a row, sorted."""
    query = select(owner, value)
    if len(ids) <= _MANY:
        query = query.where(owner.in_(ids))
    found: defaultdict[str, list[str]] = defaultdict(list)
    for id_, item in connection.execute(query):
        found[id_].append(item)
    for items in found.values():
        items.sort()  # here, because databases order text each in its own way
    return found


def pieces(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """The ids in portions that one query can take."""
    for start in range(0, len(ids), _MANY):
        yield ids[start : start + _MANY]

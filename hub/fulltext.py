"""Search by words: FTS5 on SQLite, tsvector on PostgreSQL, one behaviour.

A query is a few words in any script, any of which may match (stemmed, the last one also as a beginning); rarer words
and words in the name, title, triggers and tags count more. Nothing in a query is an operator.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Float,
    Row,
    Text,
    bindparam,
    cast,
    column,
    delete,
    func,
    literal_column,
    select,
    table,
    text,
    type_coerce,
)

from .entries import storable
from .schema import SEARCHED, adapter

_FTS = table("adapter_text", column("rowid"), column("adapter_id"), column("document"), *map(column, SEARCHED))
_WEIGHTS = {"name": 8.0, "title": 8.0, "description": 4.0, "triggers": 6.0, "tags": 6.0, "words": 1.0}
_SHOWN = {"words": "metadata"}
# Left out of a query that has other words: they would match nearly every description.
_COMMON = {
    "a",
    "an",
    "and",
    "are",
    "as",
    "at",
    "by",
    "for",
    "from",
    "in",
    "is",
    "it",
    "of",
    "on",
    "or",
    "the",
    "to",
    "with",
}
_WORDS_KEPT = 300
_MARK, _UNMARK = "\x01", "\x02"
_UNMARKED = str.maketrans({_MARK: " ", _UNMARK: " "})
_APART = str.maketrans(dict.fromkeys(f"_-./\\{_MARK}{_UNMARK}", " "))


def store(connection: Connection, documents: Iterable[Mapping[str, str]]) -> None:
    """Index adapters anew: one mapping each, with `adapter_id` and the columns of SEARCHED."""
    rows = [
        {"adapter_id": document["adapter_id"], **{key: _spaced(document, key) for key in SEARCHED}}
        for document in documents
    ]
    if not rows:
        return
    names, values = ", ".join(SEARCHED), ", ".join(f":{key}" for key in SEARCHED)
    forget(connection, [row["adapter_id"] for row in rows])
    if connection.dialect.name == "sqlite":
        statement = (
            f"INSERT INTO adapter_text (rowid, {names}) SELECT row, {values} FROM adapter WHERE id = :adapter_id"
        )
    else:
        statement = f"INSERT INTO adapter_text (adapter_id, {names}) VALUES (:adapter_id, {values})"
    connection.execute(text(statement), rows)


def forget(connection: Connection, ids: Sequence[str]) -> None:
    """Take adapters out of the index, while their rows still exist."""
    if connection.dialect.name == "sqlite":
        condition = _FTS.c.rowid.in_(select(adapter.c.row).where(adapter.c.id.in_(ids)))
    else:
        condition = _FTS.c.adapter_id.in_(ids)
    connection.execute(delete(_FTS).where(condition))


def matches(
    connection: Connection, query: str, limit: int, conditions: Sequence[ColumnElement[bool]] = ()
) -> list[tuple[str, float, str]]:
    """The best `limit` adapters as (id, score, why), best first; scores are positive, their scale means nothing.

    `conditions` on the adapter table narrow the search. `why` names the fields and the words in them that matched.
    A query without a word matches nothing.
    """
    terms = _terms(query)
    if not terms or limit < 1:
        return []
    if connection.dialect.name == "sqlite":
        return _sqlite_matches(connection, terms, limit, conditions)
    return _postgresql_matches(connection, terms, limit, conditions)


def metadata_words(metadata: Mapping[str, str]) -> str:
    """What is worth searching in a file's header: training tags by frequency, author, output name, architecture."""
    kept = [metadata.get(key, "") for key in ("modelspec.author", "modelspec.architecture", "ss_output_name")]
    counts: dict[str, float] = {}
    for tags in _tag_tables(metadata.get("ss_tag_frequency", "")):
        for tag, count in tags.items():
            counts[tag] = counts.get(tag, 0) + (count if isinstance(count, int | float) else 0)
    frequent = sorted(counts, key=lambda tag: -counts[tag])[:_WORDS_KEPT]
    return " ".join((*kept, *frequent)).strip()


def _tag_tables(frequency: str) -> list[dict[str, Any]]:
    try:
        folders = json.loads(frequency) if frequency else {}
    except (ValueError, RecursionError):
        return []
    return [tags for tags in folders.values() if isinstance(tags, dict)] if isinstance(folders, dict) else []


def _spaced(document: Mapping[str, str], key: str) -> str:
    """The text without the marks that we put around matches; a name as words, since PostgreSQL takes "a_b" for one."""
    return storable(document[key]).translate(_APART if key == "name" else _UNMARKED)


def _terms(query: str) -> list[str]:
    """The words of a query, without NUL and without the commonest, unless there are no others."""
    found = [term for term in re.split(r"[\s_/\\,;]+", storable(query)) if any(map(str.isalnum, term))]
    telling = [term for term in found if term.lower() not in _COMMON]
    return list(dict.fromkeys(telling or found))[:50]


def _unfinished(terms: Sequence[str]) -> bool:
    """Whether the last word may be the beginning of one; of two letters, too much would be."""
    return len(terms[-1]) > 2


def _sqlite_matches(
    connection: Connection, terms: Sequence[str], limit: int, conditions: Sequence[ColumnElement[bool]]
) -> list[tuple[str, float, str]]:
    quoted = ['"' + term.replace('"', '""') + '"' for term in terms]
    asked = {"query": " OR ".join(quoted) + ("*" if _unfinished(terms) else "")}
    weights = [_WEIGHTS[key] for key in SEARCHED]
    score = func.bm25(literal_column("adapter_text"), *map(literal_column, map(str, weights)), type_=Float)
    found = connection.execute(
        select(adapter.c.id, adapter.c.row, score.label("score"))
        .select_from(_FTS.join(adapter, adapter.c.row == _FTS.c.rowid))
        .where(text("adapter_text MATCH :query"), *conditions)
        .order_by(text("score"), adapter.c.name)
        .limit(limit),
        asked,
    ).all()
    marked = {
        row.rowid: row
        for row in connection.execute(
            select(
                _FTS.c.rowid,
                *(
                    func.highlight(literal_column("adapter_text"), number, _MARK, _UNMARK, type_=Text).label(key)
                    for number, key in enumerate(SEARCHED)
                ),
            ).where(text("adapter_text MATCH :query"), _FTS.c.rowid.in_([row.row for row in found])),
            asked,
        )
    }
    return [(row.id, -row.score, _why(marked[row.row])) for row in found]


def _postgresql_matches(
    connection: Connection, terms: Sequence[str], limit: int, conditions: Sequence[ColumnElement[bool]]
) -> list[tuple[str, float, str]]:
    quoted = ["'" + term.replace("\\", "\\\\").replace("'", "''") + "'" for term in terms]
    query = func.to_tsquery(literal_column("'english'"), bindparam("query"))
    score = func.ts_rank(_FTS.c.document, query, type_=Float)
    options = f"StartSel={_MARK}, StopSel={_UNMARK}, HighlightAll=true"
    best = (
        select(adapter.c.id, adapter.c.name.label("called"), score.label("score"), *(_FTS.c[key] for key in SEARCHED))
        .select_from(_FTS.join(adapter, adapter.c.id == _FTS.c.adapter_id))
        .where(_FTS.c.document.op("@@")(query), *conditions)
        .order_by(text("score DESC"), adapter.c.name)
        .limit(limit)
        .subquery()
    )
    marks = (
        func.ts_headline(literal_column("'english'"), cast(best.c[key], Text), query, options).label(key)
        for key in SEARCHED
    )
    found = connection.execute(
        select(best.c.id, type_coerce(best.c.score, Float).label("score"), *marks).order_by(
            best.c.score.desc(), best.c.called
        ),
        {"query": " | ".join(quoted) + (":*" if _unfinished(terms) else "")},
    )
    return [(row.id, row.score, _why(row)) for row in found]


def _why(row: Row[Any]) -> str:
    """Fields and matched words, e.g. "tags: watercolor; description: watercolor, painted"."""
    reasons = []
    for key in SEARCHED:
        hits = re.findall(f"{_MARK}(.+?){_UNMARK}", row._mapping[key] or "", re.DOTALL)
        if hits:
            distinct = list(dict.fromkeys(hit.lower() for hit in hits))[:5]
            reasons.append(f"{_SHOWN.get(key, key)}: {', '.join(distinct)}")
    return "; ".join(reasons)

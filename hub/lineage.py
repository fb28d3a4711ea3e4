"""Where made adapters come from: parents, weights, and how they were combined; true for ever, like content is.

Pictures are children too, under the beginning of their file's hash: their adapters are what they were made from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select

from .entries import Entry, Link, storable
from .schema import lineage


def record(
    connection: Connection,
    child: str,
    parents: Sequence[tuple[Entry, float]],
    operation: str,
    options: Mapping[str, Any],
    seed: int | None,
    version: str,
) -> None:
    """Say how the child was made, in place of what was said before."""
    connection.execute(delete(lineage).where(lineage.c.child == child))
    created = datetime.now(UTC).isoformat(timespec="seconds")
    rows = [
        {
            "child": child,
            "position": position,
            "parent": parent.id,
            "parent_name": parent.name,
            "parent_digest": parent.digest,
            "weight": float(weight),
            "operation": storable(operation),
            "options": json.dumps(dict(options), sort_keys=True, default=str),
            "seed": seed,
            "version": storable(version),
            "created": created,
        }
        for position, (parent, weight) in enumerate(parents)
    ]
    if rows:
        connection.execute(insert(lineage), rows)


def ancestry(connection: Connection, child: str) -> list[Link]:
    """The child's parents in the order of the merge, then their parents, and so on; every adapter's once."""
    links: list[Link] = []
    seen, generation = {child}, [child]
    while generation:
        rows = connection.execute(
            select(lineage).where(lineage.c.child.in_(generation)).order_by(lineage.c.child, lineage.c.position)
        ).all()
        order = {id_: number for number, id_ in enumerate(generation)}
        rows = sorted(rows, key=lambda row: (order[row.child], row.position))
        links += map(_link, rows)
        generation = list(dict.fromkeys(row.parent for row in rows if row.parent not in seen))
        seen.update(generation)
    return links


def uses(connection: Connection, parent: str, operation: str) -> list[Link]:
    """What was made directly from an adapter by `operation`, the newest first."""
    newest = select(lineage).where(lineage.c.parent == parent, lineage.c.operation == operation)
    rows = connection.execute(newest.order_by(lineage.c.created.desc(), lineage.c.child)).all()
    return list(map(_link, rows))


def _link(row: Row[Any]) -> Link:
    values = {key: value for key, value in row._mapping.items() if key not in ("position", "options")}
    return Link(**values, options=json.loads(row.options))


def made_by(connection: Connection, operation: str) -> set[str]:
    """Ids of what was made by operations whose names begin so."""
    begins = lineage.c.operation.startswith(operation, autoescape=True)
    return set(connection.scalars(select(lineage.c.child).where(begins).distinct()))


def descendants(connection: Connection, parent: str) -> list[str]:
    """Ids of the adapters that were made directly from this one."""
    return list(connection.scalars(select(lineage.c.child).where(lineage.c.parent == parent).distinct()))


def forget(connection: Connection, child: str) -> None:
    """Drop how an adapter was made, unless another one's ancestry runs through it."""
    if not descendants(connection, child):
        connection.execute(delete(lineage).where(lineage.c.child == child))

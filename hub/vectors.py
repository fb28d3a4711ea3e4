"""Vectors of adapters, one an adapter in each space, kept in the database; an index over them is only a cache.

A vector remembers the digest of what it was computed from: an adapter's text (`Entry.text_digest`) in a space of words,
its content (`Entry.digest`) in a space of weights. When that changes, the vector counts as missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from sqlalchemy import ColumnElement, Connection, and_, delete, func, insert, or_, select

from .entries import Entry
from .errors import CatalogError
from .rows import entries_by_id, pieces
from .schema import adapter, vector

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def load(
    connection: Connection, space: str, after: int = 0
) -> tuple[NDArray[np.int64], list[str], NDArray[np.float32]]:
    """The vectors of a space with row ids above `after`, by row id: row ids (n,), adapter ids, and vectors (n, dim).

    Raises CatalogError if they differ in length.
    """
    query = select(vector.c.row, vector.c.adapter_id, vector.c.data).where(
        vector.c.space == space, vector.c.row > after
    )
    found = connection.execute(query.order_by(vector.c.row)).all()
    if len({len(row.data) for row in found}) > 1:
        raise CatalogError(f"the vectors of {space!r} differ in length; compute them anew")
    matrix = np.frombuffer(b"".join(row.data for row in found), "<f4").astype(np.float32, copy=False)
    return (
        np.array([row.row for row in found], np.int64),
        [row.adapter_id for row in found],
        matrix.reshape(len(found), -1) if found else matrix.reshape(0, 0),
    )


def state(connection: Connection, space: str) -> tuple[int, int]:
    """How many vectors a space has, and the largest row id: it differs whenever the vectors do."""
    count, last = connection.execute(
        select(func.count(), func.coalesce(func.max(vector.c.row), 0)).where(vector.c.space == space)
    ).one()
    return int(count), int(last)


def spaces(connection: Connection) -> list[str]:
    """The spaces that have vectors, by name."""
    return sorted(connection.scalars(select(vector.c.space).distinct()))


def drop(connection: Connection, space: str) -> int:
    """Forget the vectors of a space; returns how many there were."""
    return connection.execute(delete(vector).where(vector.c.space == space)).rowcount


def missing(connection: Connection, space: str, *conditions: ColumnElement[bool]) -> list[Entry]:
    """The adapters that meet the conditions without a vector in the space for what they are now, by name."""
    mine = and_(vector.c.adapter_id == adapter.c.id, vector.c.space == space)
    outdated = vector.c.input_digest.not_in([adapter.c.text_digest, adapter.c.digest])
    lacking = or_(vector.c.row.is_(None), outdated)
    found = connection.scalars(
        select(adapter.c.id).select_from(adapter.outerjoin(vector, mine)).where(lacking, *conditions)
    )
    return sorted(entries_by_id(connection, list(found)), key=lambda entry: entry.name)


def store(connection: Connection, space: str, vectors: Iterable[tuple[str, str, ArrayLike]]) -> None:
    """Store (adapter id, input digest, vector) for a space; what is stored already is left alone.

    Vectors of adapters that were removed meanwhile are dropped. Raises CatalogError for an empty or non-finite one.
    """
    offered = {id_: (digest, _checked(space, id_, values)) for id_, digest, values in vectors}
    ids = list(offered)
    mine = and_(vector.c.adapter_id == adapter.c.id, vector.c.space == space)
    query = select(adapter.c.id, vector.c.input_digest, vector.c.dim).select_from(adapter.outerjoin(vector, mine))
    stored = {
        row.id: (row.input_digest, row.dim)
        for some in pieces(ids)
        for row in connection.execute(query.where(adapter.c.id.in_(some)))
    }
    rows = [
        {"adapter_id": id_, "space": space, "dim": len(data), "input_digest": digest, "data": data.tobytes()}
        for id_, (digest, data) in offered.items()
        if id_ in stored and stored[id_] != (digest, len(data))
    ]
    if not rows:
        return
    for some in pieces([str(row["adapter_id"]) for row in rows]):
        connection.execute(delete(vector).where(vector.c.space == space, vector.c.adapter_id.in_(some)))
    connection.execute(insert(vector), rows)


def _checked(space: str, id_: str, values: ArrayLike) -> NDArray[np.float32]:
    data = np.ascontiguousarray(values, dtype="<f4").reshape(-1)
    if not len(data) or not np.isfinite(data).all():
        raise CatalogError(f"the vector of adapter {id_} for {space!r} is empty or not finite; expected numbers")
    return data

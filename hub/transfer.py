"""Measured transfer: how good each adapter of a base is for each of its tasks, and the bare base beside them.

A score belongs to an adapter's content, so it stays true as long as the task does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Connection, delete, func, insert, select

from .bases import family
from .entries import storable
from .errors import CatalogError
from .rows import pieces
from .schema import adapter, task, transfer


@dataclass(frozen=True)
class Measured:
    """A task, and the scores on it: higher is better.

    measure: what is measured, in words; scores of different measures do not compare. digest: of what a score depends on
    besides the adapter. texts: ways to ask for the task. bare: the score of the base without an adapter. expert: id of
    the adapter that was made for the task. scores: by adapter id.
    """

    name: str
    measure: str
    digest: str
    texts: tuple[str, ...] = ()
    bare: float | None = None
    expert: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)


def record(connection: Connection, base: str, tasks: Iterable[Measured]) -> None:
    """Keep tasks of a base, and the scores on them.

    Scores of another digest go; the rest stays, unless it is given anew. Scores of adapters that are no longer in the
    catalogue are dropped. Raises CatalogError for a score that is not finite.
    """
    for one in tasks:
        wrong = next(
            (score for score in (*one.scores.values(), one.bare or 0.0) if not abs(score) < float("inf")), None
        )
        if wrong is not None:
            raise CatalogError(f"a score of {one.name} is {wrong}; expected a finite number")
        there = _known(connection, [*one.scores, *filter(None, [one.expert])])
        row = _task_row(connection, family(base), one, one.expert if one.expert in there else None)
        scores = [
            {"task_row": row, "adapter_id": id_, "score": float(score)}
            for id_, score in one.scores.items()
            if id_ in there
        ]
        for some in pieces(list(one.scores)):
            connection.execute(delete(transfer).where(transfer.c.task_row == row, transfer.c.adapter_id.in_(some)))
        if scores:
            connection.execute(insert(transfer), scores)


def load(connection: Connection, base: str, measure: str | None = None) -> list[Measured]:
    """The tasks of a base by one measure, with their scores, by name.

    measure: None for the one with the most scores.
    """
    counts = (
        select(task.c.measure, func.count(transfer.c.adapter_id).label("scores"))
        .select_from(task.outerjoin(transfer))
        .where(task.c.base == family(base))
        .group_by(task.c.measure)
    )
    if measure is None:
        found = sorted(connection.execute(counts).all(), key=lambda row: (-row.scores, row.measure))
        if not found:
            return []
        measure = found[0].measure
    mine = (task.c.base == family(base), task.c.measure == measure)
    scores: dict[int, dict[str, float]] = {}
    pairs = select(transfer).select_from(transfer.join(task)).where(*mine).order_by(transfer.c.adapter_id)
    for row in connection.execute(pairs):
        scores.setdefault(row.task_row, {})[row.adapter_id] = row.score
    return [
        Measured(
            row.name, row.measure, row.digest, tuple(json.loads(row.texts)), row.bare, row.expert,
            scores.get(row.row, {}),
        )
        for row in sorted(connection.execute(select(task).where(*mine)), key=lambda row: str(row.name))
    ]  # fmt: skip


def _known(connection: Connection, ids: Sequence[str]) -> set[str]:
    return {
        id_ for some in pieces(ids) for id_ in connection.scalars(select(adapter.c.id).where(adapter.c.id.in_(some)))
    }


def _task_row(connection: Connection, base: str, one: Measured, expert: str | None) -> int:
    """The row of a task, with what is now said of it; without scores where what they depend on has changed."""
    mine = (task.c.base == base, task.c.measure == storable(one.measure), task.c.name == storable(one.name))
    known = connection.execute(select(task.c.row, task.c.digest).where(*mine)).one_or_none()
    said = {"digest": one.digest, "texts": json.dumps(list(one.texts)), "bare": one.bare, "expert": expert}
    if known is None:
        names = {"base": base, "measure": storable(one.measure), "name": storable(one.name)}
        [row] = connection.execute(insert(task).values(**names, **said)).inserted_primary_key or (0,)
        return int(row)
    if known.digest != one.digest:
        connection.execute(delete(transfer).where(transfer.c.task_row == known.row))
    connection.execute(task.update().where(task.c.row == known.row).values(**said))
    return int(known.row)

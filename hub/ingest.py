"""Adding files to the catalogue: what is known costs a stat, the rest is examined, and batches are recorded whole.

A kill loses at most one batch, half a second's work; running again completes it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from sqlalchemy import Row, literal, select

from .blobs import Blobs
from .database import Database
from .entries import Added, identity, rejection
from .errors import BadOption, FormatError, UnsafeFile
from .naming import checked
from .reading import canonical, examine
from .recording import Finding, Wish, forget, record
from .scan import Candidate, roots, scan
from .schema import adapter, location, rejected

_BATCH = 200  # files
_PERIOD = 0.5  # seconds
_SHOWN = (
    adapter.c.id, adapter.c.name, location.c.path, adapter.c.format, adapter.c.base, adapter.c.rank_max,
    adapter.c.modules, adapter.c.mergeable, literal("unchanged").label("status"), adapter.c.reason,
)  # the fields of Added, in their order # fmt: skip
_FEW = 20  # roots; for more, all that is remembered is loaded at once


def ingest(database: Database, blobs: Blobs, paths: Iterable[Path | str], wish: Wish) -> Iterator[Added]:
    """Add all candidates under `paths`; yields what became of each, in order, once it is recorded.

    Raises CatalogError for a path that does not exist, BadOption if one name is wished for several adapters, and
    NameTaken if it belongs to another.
    """
    places = roots(paths)
    if wish.copy:
        blobs.sweep()
    if wish.name is not None:
        wish = replace(wish, named=_named(checked(wish.name), places, blobs))
    memory = _Memory(database, everything=len(places) > _FEW)
    present: set[str] = set()
    for outcome in _outcomes(database, blobs, scan(places, skip=blobs.folder, entering=memory.enter), memory, wish):
        memory.seen.add(outcome.path)
        if outcome.id:
            present.add(outcome.id)
        yield outcome
    _forget_vanished(database, memory, present)


@dataclass
class _Memory:
    """What the catalogue remembers of files under the roots, by path: rows of locations and of rejections."""

    database: Database
    everything: bool
    locations: dict[str, Row[Any]] = field(default_factory=dict)
    rejections: dict[str, Row[Any]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    copied: dict[str, str] = field(default_factory=dict)  # blobs of this run by adapter id
    loaded: bool = False

    def enter(self, root: str) -> None:
        """Load what is remembered of the files under a root."""
        if self.everything and self.loaded:
            return
        self.loaded = True
        found = select(*_SHOWN, location.c.stamp, adapter.c.digest, adapter.c.blob).join_from(location, adapter)
        refused = select(rejected)
        if not self.everything:
            below = root.rstrip(os.sep) + os.sep
            found, refused = (
                query.where((table.c.path == root) | table.c.path.startswith(below, autoescape=True))
                for query, table in ((found, location), (refused, rejected))
            )
        with self.database.read() as connection:
            self.locations.update({row.path: row for row in connection.execute(found).all()})
            self.rejections.update({row.path: row for row in connection.execute(refused).all()})


def _outcomes(
    database: Database, blobs: Blobs, candidates: Iterable[Candidate], memory: _Memory, wish: Wish
) -> Iterator[Added]:
    batch: list[Added | Finding] = []
    began = time.monotonic()
    for candidate in candidates:
        settled = _settle(candidate, memory, blobs, wish)
        if not batch:
            if isinstance(settled, Added):
                yield settled
                continue
            began = time.monotonic()
        batch.append(settled)
        if len(batch) >= _BATCH or time.monotonic() - began > _PERIOD:
            yield from _recorded(database, blobs, batch, wish)
            batch = []
    if batch:
        yield from _recorded(database, blobs, batch, wish)


def _recorded(database: Database, blobs: Blobs, batch: Sequence[Added | Finding], wish: Wish) -> Iterator[Added]:
    """Record the batch's findings, then give all its outcomes in their order."""
    findings = [item for item in batch if isinstance(item, Finding)]
    with database.write() as connection:
        for finding in findings:
            if finding.blob and not blobs.path(finding.blob).exists():  # removed by another process since it was put
                _copied(Path(finding.candidate.path), blobs, wish)
        recorded = iter(record(connection, database, findings, wish))
    for item in batch:
        yield next(recorded) if isinstance(item, Finding) else item


def _settle(candidate: Candidate, memory: _Memory, blobs: Blobs, wish: Wish) -> Added | Finding:
    """The outcome for a file that is as it was, or else what reading it gives."""
    path = candidate.path
    if candidate.refusal is not None:
        return rejection(path, candidate.refusal)
    known, refused = memory.locations.get(path), memory.rejections.get(path)
    if known is not None and known.stamp == candidate.stamp:
        return _reviewed(candidate, known, blobs, wish)
    if refused is not None and refused.stamp == candidate.stamp and not (refused.unsafe and wish.allow_pickle):
        return rejection(path, refused.reason)
    try:
        inspection, digest = examine(Path(path), allow_pickle=wish.allow_pickle)
        blob = _kept(path, identity(digest), memory, blobs, wish) if wish.copy else None
        return Finding(candidate, digest, inspection, blob)
    except FormatError as error:
        return Finding(candidate, refusal=str(error), unsafe=isinstance(error, UnsafeFile))
    except OSError as error:
        return rejection(path, f"cannot be read: {error.strerror or error}")  # it may be readable next time


def _reviewed(candidate: Candidate, known: Row[Any], blobs: Blobs, wish: Wish) -> Added | Finding:
    """An unchanged file is only touched where the caller wishes for something that its adapter lacks."""
    lacks_copy = wish.copy and not (known.blob and blobs.path(known.blob).exists())
    renamed = (wish.named == candidate.path and wish.name != known.name) or wish.base not in (None, known.base)
    if not (lacks_copy or renamed or wish.tags):
        return Added(*known[: len(_SHOWN)])
    blob = _copied(Path(candidate.path), blobs, wish) if lacks_copy else None
    return Finding(candidate, known.digest, blob=blob)


def _kept(path: str, id_: str, memory: _Memory, blobs: Blobs, wish: Wish) -> str:
    """The blob of a content: the one it has already, or a new one."""
    blob = memory.copied.get(id_)
    if blob is None:
        with memory.database.read() as connection:
            blob = connection.scalar(select(adapter.c.blob).where(adapter.c.id == id_))
    if blob is None or not blobs.path(blob).exists():
        blob = _copied(Path(path), blobs, wish)
    memory.copied[id_] = blob
    return blob


def _copied(path: Path, blobs: Blobs, wish: Wish) -> str:
    first, pieces = canonical(path, allow_pickle=wish.allow_pickle)
    return blobs.put(chain([first], pieces))


def _named(name: str, places: Sequence[str], blobs: Blobs) -> str | None:
    """The path that a name is for: the one file or PEFT folder that was asked for, or the only candidate there is."""
    paths = [candidate.path for candidate in scan(places, skip=blobs.folder) if candidate.refusal is None]
    asked = [path for path in paths if path in places] or paths
    if len(asked) > 1:
        raise BadOption(f"one name, {name!r}, for {len(asked)} files ({asked[0]}, …); add one file at a time")
    return asked[0] if asked else None


def _forget_vanished(database: Database, memory: _Memory, present: set[str]) -> None:
    """Drop files that are gone: rejected ones, and those whose adapter was found elsewhere (they were moved)."""
    if memory.everything:
        return
    moved = [path for path, row in memory.locations.items() if path not in memory.seen and row.id in present]
    refused = [path for path in memory.rejections if path not in memory.seen]
    moved, refused = ([path for path in paths if not os.path.lexists(path)] for paths in (moved, refused))
    if moved or refused:
        with database.write() as connection:
            forget(connection, location, moved)
            forget(connection, rejected, refused)

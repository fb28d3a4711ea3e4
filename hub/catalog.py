"""Catalog: what lorahub knows of adapters. The one object through which everything else asks the database.

    with Catalog(home) as catalog:
        for outcome in catalog.add([folder]): ...
        entry = catalog.entry("watercolor")

It can be used from several threads, and any number of processes may use the same home folder at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from sqlalchemy import delete, or_, select, update

from . import fulltext, lineage, rows
from .blobs import Blobs
from .database import Database
from .entries import Added, Entry, Link, identity, storable
from .errors import CatalogError, FormatError, NameTaken
from .naming import checked
from .schema import adapter, header, location, tag

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from .adapter import Adapter
    from .transfer import Measured

PAINTED = "imagine"
"""The operation that makes a picture from adapters."""


class Catalog:
    """The catalogue in the folder `home` (made if missing), its tables there or in the PostgreSQL database at `url`.

    Raises CatalogError if the folder or the database cannot be opened.
    """

    def __init__(self, home: Path, url: str | None = None) -> None:
        self.home = Path(home)
        self.blobs = Blobs(self.home / "blobs")
        self._database = Database(self.home, url)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the database; the catalogue cannot be used afterwards."""
        self._database.close()

    def add(
        self,
        paths: Iterable[Path | str],
        *,
        base: str | None = None,
        name: str | None = None,
        tags: Iterable[str] = (),
        copy: bool = False,
        allow_pickle: bool = False,
    ) -> Iterator[Added]:
        """Add files, PEFT folders and everything under other folders; yields what became of each, once recorded.

        `base` and `tags` are given to every adapter found, `name` to the only one. `copy` keeps canonical bytes as a
        blob. Unchanged files cost a stat. Raises CatalogError for a path that does not exist or a disk that is full,
        BadOption for one name for several adapters, NameTaken if another adapter has it.
        """
        from .ingest import ingest
        from .recording import Wish

        wish = Wish(base=base, name=name, tags=tuple(tags), copy=copy, allow_pickle=allow_pickle)
        return ingest(self._database, self.blobs, paths, wish)

    def entry(self, ref: str) -> Entry:
        """The adapter with that name, id (or at least its first four digits) or path.

        Raises UnknownAdapter, with the names that come close, or CatalogError if several ids begin so.
        """
        with self._database.read() as connection:
            return rows.find(connection, ref)

    def entries(
        self, base: str | None = None, tags: Iterable[str] = (), ids: Sequence[str] | None = None
    ) -> list[Entry]:
        """The adapters on a base (by any of its names), with all the tags: by name, or in the order of `ids`."""
        with self._database.read() as connection:
            conditions = rows.narrowed(connection, base, tags)
            if ids is None:
                return rows.entries(connection, *conditions)
            return rows.entries_by_id(connection, ids, *conditions)

    def ids(self, base: str | None = None, tags: Iterable[str] = ()) -> set[str]:
        """The ids of the adapters on a base (by any of its names), with all the tags."""
        with self._database.read() as connection:
            return set(connection.scalars(select(adapter.c.id).where(*rows.narrowed(connection, base, tags))))

    def bases(self) -> list[str | None]:
        """The names of the bases that its adapters are for, sorted; None first if some are for an unknown one."""
        with self._database.read() as connection:
            return sorted(connection.scalars(select(adapter.c.base).distinct()), key=lambda base: base or "")

    def metadata(self, ref: str) -> dict[str, str]:
        """All that the adapter's files said in their headers."""
        with self._database.read() as connection:
            id_ = rows.find(connection, ref).id
            stored = connection.scalar(select(header.c.metadata).where(header.c.adapter_id == id_))
        return dict(json.loads(stored or "{}"))

    def path(self, entry: Entry) -> Path:
        """A file or PEFT folder that holds the adapter: one that has not changed since it was added, or the blob.

        Raises CatalogError, naming the files, if there is none.
        """
        from .scan import stamp

        with self._database.read() as connection:
            places = connection.execute(
                select(location.c.path, location.c.stamp).where(location.c.adapter_id == entry.id)
            ).all()
            blob = connection.scalar(select(adapter.c.blob).where(adapter.c.id == entry.id))
        now = {place.path: stamp(place.path) for place in places}
        for place in places:
            if now[place.path] == place.stamp:
                return Path(place.path)
        if blob and self.blobs.path(blob).exists():
            return self.blobs.path(blob)
        for path in filter(now.get, now):
            if _still_holds(Path(path), entry.digest):
                return Path(path)
        raise CatalogError(f"{entry.name}: {_what_became(now)}; put a file back or `add` it from where it is now")

    def read(self, entry: Entry) -> Adapter:
        """The adapter, its modules lazy. A pickle is read, weights only: whoever added it consented.

        Raises CatalogError if no file of it is left, IncompatibleAdapters if it has no low-rank delta.
        """
        from .reading import read

        return read(self.path(entry), allow_pickle=True)

    def remove(self, ref: str) -> Entry:
        """Forget an adapter: its rows, and its blob; the user's files stay. What was made from it keeps its name."""
        with self._database.write() as connection:
            entry = rows.find(connection, ref)
            fulltext.forget(connection, [entry.id])
            lineage.forget(connection, entry.id)
            connection.execute(delete(adapter).where(adapter.c.id == entry.id))
        if entry.blob:
            # In a second transaction: a kill between the two leaves a spare file, not an adapter without its bytes.
            with self._database.write() as connection:
                if connection.scalar(select(adapter.c.id).where(adapter.c.blob == entry.blob)) is None:
                    self.blobs.remove(entry.blob)
        return entry

    def tag(self, ref: str, tags: Iterable[str], *, remove: Iterable[str] = ()) -> Entry:
        """Give an adapter tags, take others away; returns it as it is then."""
        with self._database.write() as connection:
            id_ = rows.find(connection, ref).id
            added = [{"adapter_id": id_, "tag": word} for word in rows.tidy_tags(map(storable, tags))]
            if added:
                connection.execute(self._database.insert(tag).on_conflict_do_nothing(), added)
            gone = rows.tidy_tags(map(storable, remove))
            connection.execute(delete(tag).where(tag.c.adapter_id == id_, tag.c.tag.in_(gone)))
            rows.reindex(connection, [id_])
            return rows.find(connection, id_)

    def describe(self, ref: str, description: str) -> Entry:
        """Give an adapter a description, which no file overwrites later; returns it as it is then."""
        return self._give(ref, description=storable(description))

    def rename(self, ref: str, name: str) -> Entry:
        """Give an adapter another name. Raises NameTaken if another has it, BadOption if it cannot be a name."""
        return self._give(ref, name=checked(name))

    def rebase(self, ref: str, base: str) -> Entry:
        """Say which base model an adapter is for."""
        return self._give(ref, base=storable(base), base_from="given")

    def link(
        self,
        child: str,
        parents: Sequence[tuple[str, float]],
        operation: str,
        options: Mapping[str, Any] | None = None,
        seed: int | None = None,
        version: str = "",
    ) -> None:
        """Record that `child` was made from `parents` (references and weights, in order) by `operation`."""
        with self._database.write() as connection:
            made = rows.find(connection, child)
            known = [(rows.find(connection, parent), weight) for parent, weight in parents]
            lineage.record(connection, made.id, known, operation, options or {}, seed, version)

    def lineage(self, ref: str) -> list[Link]:
        """What an adapter was made from: its parents, then their parents, as far back as is known."""
        with self._database.read() as connection:
            return lineage.ancestry(connection, rows.find(connection, ref).id)

    def made_by(self, operation: str) -> set[str]:
        """The ids of the adapters that were made by operations whose names begin so."""
        with self._database.read() as connection:
            return lineage.made_by(connection, operation)

    def link_picture(
        self,
        picture: str,
        parents: Sequence[tuple[str, float]],
        recipe: Mapping[str, Any],
        *,
        instead: str | None = None,
        version: str = "",
    ) -> None:
        """Record that a picture was painted with adapters (references and weights).

        picture: the hash of its file; `instead` that of the file whose place it took, which is forgotten. `recipe`
        names the file as "out".
        """
        with self._database.write() as connection:
            if instead:
                lineage.forget(connection, identity(instead))
            known = [(rows.find(connection, parent), weight) for parent, weight in parents]
            lineage.record(connection, identity(picture), known, PAINTED, recipe, None, version)

    def pictures(self, ref: str) -> list[Link]:
        """The pictures that were painted with an adapter, newest first; `child` is the beginning of the file's hash."""
        with self._database.read() as connection:
            return lineage.uses(connection, rows.find(connection, ref).id, PAINTED)

    def text_matches(
        self, query: str, limit: int, base: str | None = None, tags: Iterable[str] = ()
    ) -> list[tuple[str, float, str]]:
        """The adapters whose words fit the query best: (id, score, why), best first; see `fulltext.matches`."""
        with self._database.read() as connection:
            return fulltext.matches(connection, query, limit, rows.narrowed(connection, base, tags))

    def vectors(self, space: str, after: int = 0) -> tuple[NDArray[np.int64], list[str], NDArray[np.float32]]:
        """The vectors of a space, those with row ids above `after`: row ids (n,), adapter ids (n), float32 (n, dim)."""
        from . import vectors

        with self._database.read() as connection:
            return vectors.load(connection, space, after)

    def vector_state(self, space: str) -> tuple[int, int]:
        """(count, largest row id) of a space; equal as long as its vectors are the same."""
        from . import vectors

        with self._database.read() as connection:
            return vectors.state(connection, space)

    def missing_vectors(self, space: str, *, for_base: str | None = None) -> list[Entry]:
        """The adapters without a vector in the space for their present text or content.

        for_base: only the mergeable ones that may be for this base, because theirs is the same or unknown.
        """
        from . import vectors

        with self._database.read() as connection:
            if for_base is None:
                return vectors.missing(connection, space)
            fitting = or_(adapter.c.base.is_(None), *rows.narrowed(connection, for_base, ()))
            return vectors.missing(connection, space, adapter.c.mergeable, fitting)

    def vector_spaces(self) -> list[str]:
        """The names of the spaces that have vectors."""
        from . import vectors

        with self._database.read() as connection:
            return vectors.spaces(connection)

    def drop_vectors(self, space: str) -> int:
        """Forget the vectors of a space; returns how many there were."""
        from . import vectors

        with self._database.write() as connection:
            return vectors.drop(connection, space)

    def store_vectors(self, space: str, vectors_: Iterable[tuple[str, str, ArrayLike]]) -> None:
        """Store (adapter id, input digest, vector): `Entry.text_digest` or `Entry.digest` as the input's digest."""
        from . import vectors

        with self._database.write() as connection:
            vectors.store(connection, space, vectors_)

    def record_transfer(self, base: str, tasks: Iterable[Measured]) -> None:
        """Keep what was measured on tasks of a base, beside what was measured before; see `transfer.record`."""
        from . import transfer

        with self._database.write() as connection:
            transfer.record(connection, base, tasks)

    def transfer(self, base: str, measure: str | None = None) -> list[Measured]:
        """The tasks of a base and the scores on them, by name; by one measure, None for that with the most scores."""
        from . import transfer

        with self._database.read() as connection:
            return transfer.load(connection, base, measure)

    def verify(self) -> list[str]:
        """What is wrong, one line each: the database, blobs that changed, adapters whose files are gone or changed."""
        from . import checkup

        return checkup.problems(self._database, self.blobs)

    def _give(self, ref: str, **values: str) -> Entry:
        with self._database.write() as connection:
            entry = rows.find(connection, ref)
            if "name" in values:
                owner = connection.scalar(select(adapter.c.id).where(adapter.c.name == values["name"]))
                if owner not in (None, entry.id):
                    raise NameTaken(f"another adapter ({owner}) is called {values['name']!r}; choose another name")
            given = connection.scalar(select(adapter.c.given).where(adapter.c.id == entry.id))
            mine = sorted({*json.loads(given or "[]"), *(set(values) - {"base_from"})})
            statement = update(adapter).where(adapter.c.id == entry.id)
            connection.execute(statement.values(**values, given=json.dumps(mine)))
            rows.reindex(connection, [entry.id])
            return rows.find(connection, entry.id)


def _still_holds(path: Path, digest: str) -> bool:
    """Whether a file whose stamp changed has its old content after all (it was touched, or its card was edited)."""
    from .reading import fingerprint

    try:
        return fingerprint(path) == digest
    except FormatError:
        return False


def _what_became(stamps: Mapping[str, str]) -> str:
    if not stamps:
        return "no file is known to hold it"
    shown = [f"{path} ({'has other content now' if stamp else 'is gone'})" for path, stamp in sorted(stamps.items())]
    return "; ".join(shown[:3]) + (f"; and {len(shown) - 3} more" if len(shown) > 3 else "")

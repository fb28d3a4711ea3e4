"""The index of a vector space: built from the catalogue's vectors and kept in a file, which is only a cache."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote
from uuid import uuid4

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..hub.errors import RetrievalError
from .ann import build, is_exact, nearest, unit

if TYPE_CHECKING:
    from ..hub.catalog import Catalog

REPLACED = 500  # vectors left in lists that were replaced or whose adapters are gone, above which all is built anew
GROWN = 0.5  # share of vectors added since the lists were made, above which all is built anew

_VERSION = 2

log = logging.getLogger(__name__)


class State(NamedTuple):
    """What a file was made from: as `Catalog.vector_state` gives it, and how many vectors it was built with."""

    vectors: int
    last: int
    built: int


@dataclass(frozen=True, eq=False)
class Index:
    """Vectors of one space, at unit length, for search by inner product: exact, or in lists where there are very many.

    `owners` are the adapters' ids in the order of the vectors, "" for a vector that no longer counts; `faiss` is
    None where there are none. A vector of zeros says that there is nothing to compare, and is left out.
    """

    space: str
    owners: tuple[str, ...]
    faiss: Any

    def __len__(self) -> int:
        return len(self.places)

    @cached_property
    def places(self) -> dict[str, int]:
        """Adapter id -> place of its vector."""
        return {owner: place for place, owner in enumerate(self.owners) if owner}

    @property
    def exact(self) -> bool:
        """Whether every vector is compared with every query."""
        return self.faiss is None or is_exact(self.faiss)

    def vector(self, owner: str) -> NDArray[np.float32] | None:
        """The unit vector (dim,) of an adapter, or None if it has none here."""
        if owner not in self.places:
            return None
        vector: NDArray[np.float32] = self.faiss.reconstruct(self.places[owner])
        return vector

    def vectors(self, owners: Sequence[str]) -> NDArray[np.float32]:
        """The unit vectors (n, dim) of adapters that have one here."""
        places = [self.places[owner] for owner in owners]
        found: NDArray[np.float32] = self.faiss.reconstruct_batch(np.array(places, np.int64))
        return found

    def nearest(self, vector: ArrayLike, limit: int, allowed: Collection[str] | None = None) -> list[tuple[str, float]]:
        """(adapter id, cosine), nearest first, among the `allowed` adapters (None: all).

        Exact, but where lists are looked into: for up to a thousand among all of a large space about one in a hundred
        is missed. Raises RetrievalError if the vector's length is not the index's.
        """
        query = unit(np.asarray(vector, np.float32).reshape(1, -1))
        if not len(self):
            return []
        if query.shape[1] != self.faiss.d:
            raise RetrievalError(
                f"the index {self.space!r} holds vectors of {self.faiss.d} numbers, the query has {query.shape[1]}; "
                "the encoder has changed: use the one that filled it, or remove the space's vectors"
            )
        chosen = None
        if allowed is not None:
            chosen = np.array(sorted(self.places[owner] for owner in allowed if owner in self.places), np.int64)
        replaced = len(self.owners) - len(self)
        places, cosines = nearest(self.faiss, query, min(limit, len(self)) + replaced, chosen)
        found = [(self.owners[place], cosine) for place, cosine in zip(places, cosines, strict=True)]
        return [(owner, cosine) for owner, cosine in found if owner][:limit]


def open_index(catalog: Catalog, space: str) -> Index:
    """The index of a space: from its file if that is whole and up to date, else built from the catalogue and saved.

    Vectors that came since are put into the lists on file, which would take minutes to make anew.
    """
    path = index_path(catalog.home, space)
    count, last = catalog.vector_state(space)
    if not count:
        return Index(space, (), None)
    index, state = _load(path, space)
    if index is not None and state[:2] == (count, last):
        return index
    if index is not None:
        index = _extended(index, catalog, state, count)
    state = State(count, last, state.built)
    if index is None:
        index = _build(catalog, space)
        state = State(count, last, count)
    _save(index, path, state)
    return index


def index_path(home: Path, space: str) -> Path:
    """Where the FAISS file of a space lies; its sidecar has the suffix .json."""
    name = quote(space, safe="")
    if len(name) > 100:  # a folder's path; file names have a limit
        name = f"{name[:80]}-{zlib.crc32(space.encode()):08x}"
    return home / "index" / f"{name}.faiss"


def forget_index(home: Path, space: str) -> None:
    """Delete the files of a space that is no longer used."""
    path = index_path(home, space)
    for file in (path, path.with_suffix(".json")):
        file.unlink(missing_ok=True)


def _build(catalog: Catalog, space: str) -> Index:
    _, owners, matrix = catalog.vectors(space)
    owners, matrix = _telling(owners, matrix)
    return Index(space, tuple(owners), build(unit(matrix)) if owners else None)


def _telling(owners: Sequence[str], matrix: NDArray[np.float32]) -> tuple[list[str], NDArray[np.float32]]:
    """Without the vectors of zeros."""
    kept = [place for place, some in enumerate(matrix) if some.any()]
    return [owners[place] for place in kept], matrix if len(kept) == len(owners) else matrix[kept]


def _extended(index: Index, catalog: Catalog, state: State, count: int) -> Index | None:
    """Lists with the vectors that came since; None where building anew is better or quick."""
    if index.exact:
        return None
    _, owners, matrix = catalog.vectors(index.space, after=state.last)
    if len(index.owners) + len(owners) - count > REPLACED or count > (1 + GROWN) * state.built:
        return None
    kept = catalog.ids() - set(owners)
    known = [owner if owner in kept else "" for owner in index.owners]
    owners, matrix = _telling(owners, matrix)
    if owners:
        index.faiss.add(unit(matrix))
    return Index(index.space, (*known, *owners), index.faiss)


def _save(index: Index, path: Path, state: State) -> None:
    """Write the cache. Two builders may interleave: the sidecar's checksum tells whose index it belongs to."""
    import faiss

    if index.faiss is None:
        return
    data: Any = faiss.serialize_index(index.faiss)
    sidecar = {
        "version": _VERSION, "space": index.space, "state": state, "checksum": zlib.crc32(data),
        "owners": index.owners,
    }  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, data.data)
        _replace(path.with_suffix(".json"), json.dumps(sidecar, separators=(",", ":")).encode())
    except OSError as error:  # a catalogue on a read-only disk can still be searched
        log.warning("the index %s cannot be kept: %s", path, error.strerror)


def _load(path: Path, space: str) -> tuple[Index | None, State]:
    """What is on file and what it was made from; None if it is not there, damaged, or not of this space."""
    import faiss

    nothing = None, State(0, 0, 0)
    try:
        sidecar = json.loads(path.with_suffix(".json").read_bytes())
        data: Any = np.fromfile(path, np.uint8)
    except (OSError, ValueError):
        return nothing
    expected = {"version": _VERSION, "space": space, "checksum": zlib.crc32(data)}
    if not isinstance(sidecar, dict) or any(sidecar.get(key) != value for key, value in expected.items()):
        return nothing
    return Index(space, tuple(sidecar["owners"]), faiss.deserialize_index(data)), State(*sidecar["state"])


def _replace(path: Path, data: bytes | memoryview) -> None:
    made = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        made.write_bytes(data)
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)

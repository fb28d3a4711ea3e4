"""Search: an exact FAISS index over the catalogue's vectors, and the ranking that joins it to full text."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from uuid import uuid4

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..hub.errors import BadOption, RetrievalError

if TYPE_CHECKING:
    from ..hub.catalog import Catalog
    from ..hub.entries import Entry
    from .encoders.text import TextEncoder

MODES = ("hybrid", "text", "meaning")
DEPTH = 200  # how far down each list fusion looks
RRF_K = 60  # Cormack, Clarke and Buettcher, "Reciprocal rank fusion ...", SIGIR 2009: 60 is near the best everywhere
FLOOR = 0.25  # cosine below which a hit by meaning alone is noise; see `meaning_matches`

_VERSION = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Index:
    """Vectors of one space, at unit length, for exact search by inner product.

    `owners` are the adapters' ids in the order of the vectors; `faiss` is None where there are none.
    """

    space: str
    owners: tuple[str, ...]
    faiss: Any

    def __len__(self) -> int:
        return len(self.owners)

    def vector(self, owner: str) -> NDArray[np.float32] | None:
        """The unit vector (dim,) of an adapter, or None if it has none here."""
        if owner not in self.owners:
            return None
        vector: NDArray[np.float32] = self.faiss.reconstruct(self.owners.index(owner))
        return vector

    def nearest(self, vector: ArrayLike, limit: int, allowed: Collection[str] | None = None) -> list[tuple[str, float]]:
        """(adapter id, cosine), nearest first, among the `allowed` adapters (None: all). Exact.

        Raises RetrievalError if the vector's length is not the index's.
        """
        import faiss

        query = _unit(np.asarray(vector, np.float32).reshape(1, -1))
        if not len(self):
            return []
        if query.shape[1] != self.faiss.d:
            raise RetrievalError(
                f"the index {self.space!r} holds vectors of {self.faiss.d} numbers, the query has {query.shape[1]}; "
                "the encoder has changed: use the one that filled it, or remove the space's vectors"
            )
        options: dict[str, Any] = {}
        if allowed is not None:
            chosen = [place for place, owner in enumerate(self.owners) if owner in allowed]
            selector = faiss.IDSelectorBatch(np.array(chosen, np.int64))
            parameters: Any = faiss.SearchParameters  # its stub does not know the keywords
            options["params"] = parameters(sel=selector)
        scores, found = self.faiss.search(query, min(limit, len(self)), **options)
        pairs = zip(found[0].tolist(), scores[0].tolist(), strict=True)
        return [(self.owners[place], score) for place, score in pairs if place >= 0]


@dataclass(frozen=True)
class Hit:
    """A found adapter. `score`: 0 to 1 in a hybrid search (1 = first in both lists), the cosine in a search by meaning,
    the full text's own in a search by words. `why`: what matched, for a reader."""

    entry: Entry
    score: float
    why: tuple[str, ...]


def search(
    catalog: Catalog,
    query: str,
    *,
    mode: str = "hybrid",
    base: str | None = None,
    tags: Sequence[str] = (),
    limit: int = 10,
    encoder: TextEncoder | None = None,
) -> list[Hit]:
    """The adapters that fit `query`, best first; an empty list where none does.

    mode: "text" (full text), "meaning" (embeddings) or "hybrid" (both, fused by rank). `base` and `tags` restrict what
    is ranked. `encoder`: None for the packaged text model; what has no vector in its space is found by words alone.
    Raises BadOption for a mode or limit that is none, RetrievalError where the mode or encoder cannot answer.
    """
    _check(mode, limit)
    if not query.strip():
        return []
    words: list[tuple[str, float, str]] = []
    near: list[tuple[str, float]] = []
    depth = max(limit, DEPTH)
    if mode != "meaning":
        words = list(catalog.text_matches(query, depth, base=base, tags=tags))
    if mode != "text":
        near = meaning_matches(catalog, query, depth, base=base, tags=tags, encoder=encoder)
    scores = _scores(mode, words, near)
    cosines = dict(near)
    order = sorted(scores, key=lambda id_: (-scores[id_], -cosines.get(id_, -1.0), id_))[:limit]
    entries = {entry.id: entry for entry in catalog.entries(ids=order)} if order else {}
    said = {id_: why for id_, _, why in words}
    return [Hit(entries[id_], scores[id_], _why(said.get(id_), cosines.get(id_))) for id_ in order if id_ in entries]


def meaning_matches(
    catalog: Catalog,
    query: str,
    limit: int,
    *,
    base: str | None = None,
    tags: Sequence[str] = (),
    encoder: TextEncoder | None = None,
    floor: float = FLOOR,
) -> list[tuple[str, float]]:
    """(adapter id, cosine) by embeddings, nearest first, of those at or above `floor` on that base with those tags.

    With all-MiniLM-L6-v2 unrelated descriptions have cosines of 0.1 +- 0.06 and words that mean nothing seldom reach
    0.25, while a description that shares no word but the topic ("soccer", sports news) has 0.35 and more.
    """
    from .encoders.text import text

    encoder = encoder or text()
    index = open_index(catalog, encoder.space)
    if not len(index):
        return []
    found = index.nearest(encoder.encode([query])[0], len(index) if base or tags else limit)
    found = [(id_, cosine) for id_, cosine in found if cosine >= floor]
    if base or tags:
        # only those near enough are looked up, which are few
        fitting = {entry.id for entry in catalog.entries(base=base, tags=tags, ids=[id_ for id_, _ in found])}
        found = [(id_, cosine) for id_, cosine in found if id_ in fitting]
    return found[:limit]


def fuse(*rankings: Sequence[str]) -> dict[str, float]:
    """Reciprocal rank fusion: id -> sum of 1 / (60 + rank) over the rankings, as a share of the most there can be."""
    most = len(rankings) / (RRF_K + 1)
    fused: dict[str, float] = {}
    for ranking in rankings:
        for rank, id_ in enumerate(ranking, 1):
            fused[id_] = fused.get(id_, 0.0) + 1 / (RRF_K + rank) / most
    return fused


def open_index(catalog: Catalog, space: str) -> Index:
    """The index of a space: from its file if that is whole and up to date, else built from the catalogue and saved."""
    path = index_path(catalog.home, space)
    state = list(catalog.vector_state(space))
    if not state[0]:
        return Index(space, (), None)
    index = _load(path, space, state)
    if index is None:
        index = _build(catalog, space)
        _save(index, path, state)
    return index


def index_path(home: Path, space: str) -> Path:
    """Where the FAISS file of a space lies; its sidecar has the suffix .json."""
    name = quote(space, safe="")
    if len(name) > 100:  # a folder's path; file names have a limit
        name = f"{name[:80]}-{zlib.crc32(space.encode()):08x}"
    return home / "index" / f"{name}.faiss"


def _check(mode: str, limit: int) -> None:
    if mode == "weights":
        raise RetrievalError(
            "no weight encoder has been fitted to this catalogue, so words cannot be compared with weights yet; "
            "search in mode hybrid, text or meaning"
        )
    if mode not in MODES:
        raise BadOption(f"search has no mode {mode!r}; expected one of {', '.join((*MODES, 'weights'))}")
    if limit < 1:
        raise BadOption(f"limit is {limit}; expected at least 1")


def _scores(mode: str, words: Sequence[tuple[str, float, str]], near: Sequence[tuple[str, float]]) -> dict[str, float]:
    if mode == "text":
        return {id_: score for id_, score, _ in words}
    if mode == "meaning":
        return dict(near)
    return fuse([id_ for id_, _, _ in words], [id_ for id_, _ in near])


def _why(words: str | None, cosine: float | None) -> tuple[str, ...]:
    reasons = []
    if words:
        reasons.append(f"words in {words}")
    if cosine is not None:
        reasons.append(f"meaning: cosine {cosine:.2f}")
    return tuple(reasons)


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit


def _build(catalog: Catalog, space: str) -> Index:
    import faiss

    _, owners, matrix = catalog.vectors(space)
    index = faiss.IndexFlatIP(matrix.shape[1])
    index.add(_unit(np.ascontiguousarray(matrix, np.float32)))
    return Index(space, tuple(owners), index)


def _save(index: Index, path: Path, state: list[int]) -> None:
    """Write the cache. Two builders may interleave: the sidecar's checksum tells whose index it belongs to."""
    import faiss

    data = faiss.serialize_index(index.faiss).tobytes()
    sidecar = {
        "version": _VERSION, "space": index.space, "state": state, "checksum": zlib.crc32(data),
        "owners": index.owners,
    }  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, data)
        _replace(path.with_suffix(".json"), json.dumps(sidecar, separators=(",", ":")).encode())
    except OSError as error:  # a catalogue on a read-only disk can still be searched
        log.warning("the index %s cannot be kept: %s", path, error.strerror)


def _load(path: Path, space: str, state: list[int]) -> Index | None:
    import faiss

    try:
        sidecar = json.loads(path.with_suffix(".json").read_bytes())
        data = path.read_bytes()
    except (OSError, ValueError):
        return None
    expected = {"version": _VERSION, "space": space, "state": state, "checksum": zlib.crc32(data)}
    if not isinstance(sidecar, dict) or any(sidecar.get(key) != value for key, value in expected.items()):
        return None
    index = faiss.deserialize_index(np.frombuffer(data, np.uint8))
    return Index(space, tuple(sidecar["owners"]), index)


def _replace(path: Path, data: bytes) -> None:
    made = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        made.write_bytes(data)
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)

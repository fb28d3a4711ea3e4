"""A library in two dimensions: adapters that are alike lie together, and themes say what the heaps are about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..hub.errors import BadOption, RetrievalError
from .describe import vocabulary
from .vector_index import open_index

if TYPE_CHECKING:
    from ..hub.catalog import Catalog
    from ..hub.entries import Entry

THEMES = 10  # colours that an eye can tell apart
COMMON = 0.6  # share of adapters above which a tag tells none from another
FEW = 12  # points below which only the plane of greatest variance is drawn

Places = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """An adapter's place, from 0 to 1 on both axes, and the theme it is counted to (None: none)."""

    entry: Entry
    x: float
    y: float
    theme: str | None


def points(catalog: Catalog, spaces: Iterable[str], *, base: str | None = None) -> list[Point]:
    """The catalogue's adapters (of a base) that have a vector in one of the spaces, in the plane, by name.

    The spaces are those of encoders into one text space. Deterministic. Raises RetrievalError where fewer than three
    adapters have a vector, BadOption for spaces of different dimensions.
    """
    vectors: dict[str, NDArray[np.float32]] = {}
    for space in spaces:
        index = open_index(catalog, space)
        vectors |= {id_: index.faiss.reconstruct(place) for id_, place in index.places.items()}
    entries = [entry for entry in catalog.entries(base=base) if entry.id in vectors]
    if len(entries) < 3:
        raise RetrievalError(
            f"{len(entries)} adapters{f' for {base}' if base else ''} can be placed on a map; expected at least 3: add "
            "some, or draw it --by text"
        )
    if len({len(vectors[entry.id]) for entry in entries}) > 1:
        raise BadOption("the encoders' vectors differ in length; say --base to draw one base")
    matrix = np.stack([vectors[entry.id] for entry in entries]).astype(np.float64)
    places = plane(matrix)
    return [
        Point(entry, float(x), float(y), theme)
        for entry, (x, y), theme in zip(entries, places, themes(entries, matrix), strict=True)
    ]


def plane(matrix: Places) -> Places:
    """Unit vectors (n, dim) -> (n, 2), each axis from 0 to 1: t-SNE by cosine, from the plane of greatest variance.

    Fewer than FEW vectors are shown in that plane itself.
    """
    centred = matrix - matrix.mean(axis=0)
    u, values, _ = np.linalg.svd(centred, full_matrices=False)
    u *= np.where(u[np.abs(u).argmax(axis=0), np.arange(u.shape[1])] < 0, -1.0, 1.0)
    flat = np.zeros((len(matrix), 2))
    flat[:, : min(2, len(values))] = (u * values)[:, :2]
    if len(matrix) >= FEW and values[0] > 1e-9:
        from sklearn.manifold import TSNE

        start = flat / flat[:, 0].std() * 1e-4
        learner = TSNE(2, metric="cosine", init=start, perplexity=min(30.0, (len(matrix) - 1) / 3), random_state=0)
        flat = np.asarray(learner.fit_transform(matrix), np.float64)
    low, high = flat.min(axis=0), flat.max(axis=0)
    placed: Places = (flat - low) / np.maximum(high - low, 1e-12)
    return placed


def themes(entries: Sequence[Entry], matrix: Places) -> list[str | None]:
    """What each adapter is about: its commonest telling tag, else the tag whose adapters' mean is nearest to it; None
    where that is none of the THEMES commonest.

    Where tags tell nothing apart, the themes are heaps, each called by the words that it has before others.
    """
    counts = Counter(tag for entry in entries for tag in entry.tags)
    telling = [tag for tag, count in counts.most_common() if 1 < count <= COMMON * len(entries)]
    own = [next((tag for tag in telling if tag in entry.tags), None) for entry in entries]
    names = [tag for tag in telling if tag in own]
    if len(names) < 2:
        return _heaps(entries, matrix)
    means = np.stack([matrix[[theme == tag for theme in own]].mean(axis=0) for tag in names])
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    nearest = (matrix @ means.T).argmax(axis=1)
    found = [theme or names[place] for theme, place in zip(own, nearest, strict=True)]
    shown = {theme for theme, _ in Counter(found).most_common(THEMES)}
    return [theme if theme in shown else None for theme in found]


def _heaps(entries: Sequence[Entry], matrix: Places) -> list[str | None]:
    count = min(THEMES, len(entries) // 6)
    if count < 2:
        return [None] * len(entries)
    from sklearn.cluster import KMeans

    labels: Any = KMeans(count, n_init=4, random_state=0).fit_predict(matrix)
    everywhere = _pieces(entries)
    names: dict[int, str] = {}
    for heap in range(count):
        here = _pieces([entry for entry, label in zip(entries, labels, strict=True) if label == heap])
        scores = {piece: n / (1 + everywhere[piece] - n) for piece, n in here.items() if n > 1}
        best = max(scores, key=lambda piece: (scores[piece], piece), default=f"group {heap + 1}")
        names[heap] = best if best not in names.values() else f"{best} ({heap + 1})"
    return [names[int(label)] for label in labels]


def _pieces(entries: Sequence[Entry]) -> Counter[str]:
    return Counter(piece for entry in entries for piece in vocabulary([entry], entry.base))

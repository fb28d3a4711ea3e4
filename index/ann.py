"""FAISS indices: exact up to a size, above it an inverted file that is searched as broadly as it takes.

Vectors are sorted into lists by their nearest centre; a query looks into the nearest lists, at codes of four bits for
every two numbers (Jégou, Douze and Schmid, "Product quantization for nearest neighbor search", TPAMI 2011; André,
Kermarrec and Le Scouarnec, "Cache locality is not enough", VLDB 2015), and compares the best with the vectors
themselves, kept in float16. How many lists that takes is measured when the index is built.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]

EXACT = 100_000  # vectors up to which an index is exact: a query takes a few hundredths of a second, building nothing
ROUNDS = 8  # of k-means; more find hardly better centres
SHARE = 64  # vectors a list that its centre is learned from
WANTED = 0.985  # recall among the first ten that the breadth is raised to; real queries had a little more than ours
BREADTHS = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)  # lists looked into
SAMPLE = 400  # queries that the breadth is measured with
MIXED = 3  # stored vectors that make a query: words asked for are seldom words stored, and lie between many
FAR = 1000  # results wanted above which lists are no help
REFINED = 256  # candidates compared with the vectors themselves, or FACTOR times those wanted
FACTOR = 4
_PORTION = 65_536  # vectors worked on at once


class Trial(NamedTuple):
    """What a breadth of search finds: the share of the exact index's results."""

    breadth: int
    recall: float


def build(vectors: Vectors, *, approximate: bool | None = None, seed: int = 0) -> Any:
    """A FAISS index by inner product over unit vectors (n, dim).

    approximate: None for exact up to EXACT vectors, a tuned inverted file above. The same seed and one thread give the
    same index.
    """
    import faiss

    if approximate is None:
        approximate = len(vectors) > EXACT
    kind = _kind(*vectors.shape) if approximate else "Flat"
    index: Any = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    if approximate:
        lists = faiss.extract_index_ivf(index)
        lists.cp.niter, lists.cp.max_points_per_centroid, lists.cp.seed = ROUNDS, SHARE, seed + 1
        lists.cp.min_points_per_centroid = 1  # no warning on stderr
        index.train(vectors)
    for start in range(0, len(vectors), _PORTION):
        index.add(np.ascontiguousarray(vectors[start : start + _PORTION]))
    if approximate:
        tune(index, vectors, seed=seed)
    return index


def is_exact(index: Any) -> bool:
    """Whether an index compares a query with every vector."""
    return not hasattr(index, "refine_index")


def breadth(index: Any) -> int:
    """How many lists a query looks into."""
    import faiss

    return int(faiss.extract_index_ivf(index).nprobe)


def tune(index: Any, vectors: Vectors, *, wanted: float = WANTED, seed: int = 0) -> list[Trial]:
    """Set the least breadth of search whose recall is `wanted`, or the greatest there is; returns what was tried.

    Queries are means of MIXED stored vectors, drawn at random.
    """
    import faiss

    chance = np.random.default_rng(seed)
    queries = unit(vectors[chance.integers(len(vectors), size=(SAMPLE, MIXED))].mean(axis=1))
    limit = min(10, len(vectors))
    truth = exact(vectors, queries, limit)
    lists: Any = faiss.extract_index_ivf(index)
    tried: list[Trial] = []
    for number in [few for few in BREADTHS if few < lists.nlist] + [lists.nlist]:
        lists.nprobe = number
        tried.append(Trial(number, agreement(_looked_up(index, queries, limit)[1], truth)))
        if tried[-1].recall >= wanted:
            break
    return tried


def recall(index: Any, vectors: Vectors, queries: Vectors, limit: int = 10) -> float:
    """The share of the `limit` nearest of `vectors` that `index` finds, over the queries (n, dim)."""
    found = index.search(queries, limit) if is_exact(index) else _looked_up(index, queries, limit)
    return agreement(found[1], exact(vectors, queries, limit))


def agreement(found: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    """The share of each row of `truth` (n, k) that is in the same row of `found`."""
    hits = [len(np.intersect1d(some, wanted)) for some, wanted in zip(found, truth, strict=True)]
    return float(np.sum(hits) / truth.size) if truth.size else 1.0


def exact(vectors: Vectors, queries: Vectors, limit: int) -> NDArray[np.int64]:
    """The places (n, limit) of the nearest vectors by inner product, nearest first; no index is built."""
    import faiss

    _, places = faiss.knn(queries, vectors, limit, metric=faiss.METRIC_INNER_PRODUCT)
    return np.asarray(places, np.int64)


def nearest(
    index: Any, query: Vectors, limit: int, allowed: NDArray[np.int64] | None = None
) -> tuple[list[int], list[float]]:
    """Places and cosines of the vectors nearest to the unit vector query (1, dim), among the places `allowed`.

    Lists are looked into for few results among all; everything else is compared one by one.
    """
    import faiss

    limit = min(limit, index.ntotal if allowed is None else len(allowed))
    if limit < 1:
        return [], []
    if is_exact(index) or allowed is not None or limit > FAR:
        plain = index if is_exact(index) else faiss.downcast_index(index.refine_index)
        library: Any = faiss  # its stubs do not know the keywords
        options = {} if allowed is None else {"params": library.SearchParameters(sel=library.IDSelectorBatch(allowed))}
        scores, places = plain.search(query, limit, **options)
    else:
        scores, places = _looked_up(index, query, limit)
    found = [(place, score) for place, score in zip(places[0].tolist(), scores[0].tolist(), strict=True) if place >= 0]
    return [place for place, _ in found], [score for _, score in found]


def unit(vectors: NDArray[Any]) -> Vectors:
    """Rows at length 1 (n, dim) float32; zeros stay zeros."""
    made = np.array(vectors, np.float32)
    for start in range(0, len(made), _PORTION):
        part = made[start : start + _PORTION]
        part /= np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
    return made


def _kind(count: int, dim: int) -> str:
    """FAISS' name of the inverted file for `count` vectors: about four times the root of their number of lists."""
    lists = 1 << max(0, int(np.ceil(np.log2(4 * np.sqrt(count)))))
    codes = f"PQ{dim // 2}x4fs" if dim % 2 == 0 else "SQ8"
    return f"IVF{min(lists, max(1, count // 40))},{codes},Refine(SQfp16)"


def _looked_up(index: Any, queries: Vectors, limit: int) -> tuple[Vectors, NDArray[np.int64]]:
    import faiss

    library: Any = faiss
    wider = library.IndexRefineSearchParameters(k_factor=max(float(FACTOR), REFINED / limit))
    found: tuple[Vectors, NDArray[np.int64]] = index.search(queries, limit, params=wider)
    return found

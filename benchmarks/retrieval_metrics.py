"""How good a ranking is, how good it would be by chance, and how far themes lie apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

DEPTHS = (1, 5, 10)
Scores = NDArray[np.floating[Any]]
Marks = NDArray[np.bool_]


def first_right(scores: Scores, right: Marks) -> NDArray[np.int64]:
    """The place, from 1, of each query's best right answer; 0 where it has none. (queries, answers) -> (queries,).

    Wrong answers with the same score come first, so that an encoder that tells nothing apart gains nothing. An answer
    that does not take part has a score of -inf and is not right.
    """
    best = np.where(right, scores, -np.inf).max(axis=1, initial=-np.inf)
    before = (~right & np.isfinite(scores) & (scores >= best[:, None])).sum(axis=1)
    return np.where(right.any(axis=1), before + 1, 0)


def summary(places: NDArray[np.int64]) -> dict[str, float]:
    """recall@1, 5 and 10 (the share of queries with a right answer so far up) and MRR (mean of 1 / place).

    Queries without a right answer do not count; without any that has one, nothing is returned.
    """
    found = places[places > 0]
    if not len(found):
        return {}
    recalls = {f"recall@{depth}": float((found <= depth).mean()) for depth in DEPTHS}
    return recalls | {"mrr": float((1 / found).mean())}


def by_chance(counts: Sequence[tuple[int, int]]) -> dict[str, float]:
    """What a random order is expected to reach. counts: for each query the right answers and all answers."""
    some = [(right, size) for right, size in counts if right]
    if not some:
        return {}
    rows = [_expected(right, size) for right, size in some]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _expected(right: int, size: int) -> dict[str, float]:
    """P(first right answer after place k) = C(size - k, right) / C(size, right), if the order is random."""
    later = [comb(size - place, right) / comb(size, right) for place in range(size + 1)]
    recalls = {f"recall@{depth}": 1 - later[min(depth, size)] for depth in DEPTHS}
    return recalls | {"mrr": sum((later[place - 1] - later[place]) / place for place in range(1, size + 1))}


def themes(near: Scores, names: Sequence[str], rows: Marks) -> dict[str, float]:
    """Mean cosine to other adapters of the same theme (intra) and of other themes (inter), and what lies between.

    near: (n, n) cosines; rows (n,): the adapters whose cosines are looked at, each with all others. A theme of one
    adapter is left out; every theme counts the same, as in the paper's figure.
    """
    kinds = np.array(names)
    same = kinds[:, None] == kinds[None, :]
    apart = ~same
    np.fill_diagonal(same, False)
    inside, outside = [], []
    for kind in dict.fromkeys(names):
        own = (kinds == kind) & rows
        if same[own].any() and apart[own].any():
            inside.append(near[own][same[own]].mean())
            outside.append(near[own][apart[own]].mean())
    if not inside:
        return {}
    intra, inter = float(np.mean(inside)), float(np.mean(outside))
    return {"intra": intra, "inter": inter, "gap": intra - inter}


def spread(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over the seeds, of every figure that all of them have."""
    if not runs:
        return {}
    return {
        name: {
            "mean": round(float(np.mean([run[name] for run in runs])), 4),
            "spread": round(float(np.std([run[name] for run in runs], ddof=1)), 4) if len(runs) > 1 else 0.0,
        }
        for name in runs[0]
        if all(name in run for run in runs)
    }

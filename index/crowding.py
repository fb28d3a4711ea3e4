"""Hubs: an adapter in the midst of known words is near to every query, and hides those that the words mean.

A cosine of words and weights is therefore lowered by how crowded the adapter's place is, as CSLS does (Conneau,
Lample, Ranzato, Denoyer and Jégou, "Word translation without parallel data", ICLR 2018, eq. 3): by half its mean cosine
with the nearest known words. CSLS lowers it by the query's too, which is the same for all adapters and orders none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

NEIGHBOURS = 2  # CSLS has 10 of all words; here all that is said of an adapter is one landmark, so that two are enough
WEIGHT = 0.5  # CSLS': its measure is 2 cos(x, y) - r(x) - r(y)
MOST = 4096  # landmarks kept; of more some, evenly chosen

Array = NDArray[np.float32]


def landmarks(targets: NDArray[Any]) -> NDArray[np.float16]:
    """The places of known words: the distinct rows of targets (n, dim), at most MOST, as they are kept."""
    rows = np.unique(targets.astype(np.float16), axis=0)
    chosen = np.linspace(0, len(rows) - 1, min(MOST, len(rows))).round().astype(np.int64)
    return np.ascontiguousarray(rows[chosen])


def crowding(vectors: Array, places: NDArray[Any]) -> Array:
    """What cosines with unit vectors (n, dim) are lowered by (n,), given landmarks (m, dim); zeros without any."""
    nearest = min(NEIGHBOURS, len(places))
    if not nearest:
        return np.zeros(len(vectors), np.float32)
    cosines = vectors @ places.astype(np.float32).T
    highest: Array = np.partition(cosines, -nearest, axis=1)[:, -nearest:]
    lowered: Array = WEIGHT * highest.mean(axis=1)
    return lowered

"""k-means in the space of the points' inner products: for few points of many dimensions.

All that k-means asks of n points follows from their n x n squared distances D: for a cluster of m members,

    |x - mean|^2  =  sum_j D(x, j) / m  -  sum_ij D(i, j) / (2 m^2)            i, j over the members

so no step costs more than n^2 times the clusters, whatever the dimension. All restarts run at once, as one array.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..hub.errors import BadOption

Numbers = NDArray[np.floating[Any]]
Labels = NDArray[Any]  # of whole numbers; (restarts, n) where several clusterings run at once

_SAME = 1e-13  # of two squared norms: a squared distance below it is rounding, and the points are one
_BETTER = 1 - 1e-6  # what is less by a smaller share may be so by rounding
_PASSES = 300  # more than are ever taken; ends what rounding might keep alive
_GAIN = 3e-3  # of the inertia: when a pass of single moves gains less, it is the last
_SWAP_GAIN = 1e-2  # likewise of swaps, which cost more
_SWAPS = 8  # clusters that may be dissolved for a new one elsewhere, tried at once
_POLISHED = 4096  # points x clusters x clusterings: how many of the best are worth polishing


@dataclass(frozen=True, eq=False)
class Clusters:
    """Who belongs together. labels: (n,), 0 ... count - 1, no cluster empty; inertia: the sum of the points' squared
    distances to the means of their clusters."""

    labels: Labels
    count: int
    inertia: float

    @property
    def sizes(self) -> Labels:
        """Members of each cluster: (count,)."""
        return np.bincount(self.labels, minlength=self.count)


def kmeans(gram: Numbers, count: int, *, restarts: int = 10, seed: int = 0) -> Clusters:
    """n points in `count` clusters of small inertia; gram: (n, n), the points' inner products in float64.

    `restarts` times greedy k-means++ (Arthur and Vassilvitskii) and Lloyd's iteration; of the best, single points move
    (Hartigan) and whole clusters are dissolved and begun elsewhere while that helps. The order of the points does not
    matter: they are sorted first by what the matrix says of them. Points that coincide stay together unless there are
    more clusters than places. Raises BadOption for a count outside 1 ... n.
    """
    size = len(gram)
    if not 1 <= count <= size:
        raise BadOption(f"{count} clusters of {size} points; expected at least 1, and at most one for each point")
    if restarts < 1:
        raise BadOption(f"restarts is {restarts}; expected a whole number of at least 1")
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 is what an empty cluster gives, and is dealt with
        distances = squared_distances(gram)
        order = _canonical(gram.diagonal(), distances)
        # in float32, which is enough for all choices, and alike for all orders of the points
        scaled = (distances / (distances.max() or 1.0)).astype(np.float32)
        found = _search(scaled[order][:, order], count, restarts, seed)
    labels = np.empty(size, dtype=np.int64)
    labels[order] = _renumbered(found)
    member = (labels == np.arange(count)[:, None]).astype(np.float64)
    inertia = ((member @ distances) * member).sum(axis=1) / (2 * member.sum(axis=1))
    return Clusters(labels, count, float(inertia.sum()))


def squared_distances(gram: Numbers) -> Numbers:
    """|x_i - x_j|^2 from inner products: (n, n), and exactly 0 where nothing but rounding is left."""
    norms = gram.diagonal()
    sums = norms[:, None] + norms
    distances = sums - gram - gram.T
    distances[distances <= _SAME * sums] = 0
    return distances


def _canonical(norms: Numbers, distances: Numbers) -> Labels:
    """An order of the points by what they are: a mixture of three figures, so that they tie only if they tie in all."""
    tiny = np.finfo(np.float64).tiny
    spread = distances / max(float(distances.mean()), tiny)
    figures = norms / max(float(norms.mean()), tiny) + 0.7549 * spread.mean(axis=1) + 0.5698 * (spread**2).mean(axis=1)
    return np.argsort(figures, kind="stable")


def _renumbered(labels: Labels) -> Labels:
    """The same clusters, numbered as they first occur: how they were found must not show."""
    _, first, place = np.unique(labels, return_index=True, return_inverse=True)
    numbered: Labels = np.argsort(np.argsort(first))[place]
    return numbered


def _search(distances: Numbers, count: int, restarts: int, seed: int) -> Labels:
    size = len(distances)
    if count in {1, size}:
        return np.arange(size) % count
    keep = max(1, _POLISHED // (size * count))
    labels, inertia = _lloyd(distances, _seeded(distances, count, restarts, seed), count)
    best, least = _polished(distances, labels, inertia, count, keep)
    before = math.inf
    while 0 < least < before * (1 - _SWAP_GAIN):
        before = least
        labels, inertia = _lloyd(distances, _swapped(distances, best, count), count)
        found, reached = _polished(distances, labels, inertia, count, keep)
        if reached < least * _BETTER:
            best, least = found, reached
    return best


def _polished(distances: Numbers, labels: Labels, inertia: Numbers, count: int, keep: int) -> tuple[Labels, float]:
    """The best clustering of all, after single points of the `keep` best have moved; and its inertia."""
    labels, inertia = _moved(distances, labels[np.argsort(inertia, kind="stable")[:keep]], count)
    best = int(inertia.argmin())
    return labels[best], float(inertia[best])


def _seeded(distances: Numbers, count: int, restarts: int, seed: int) -> Labels:
    """Labels to begin with: (restarts, n), every point with the nearest of `count` points that are the first means.

    Greedy k-means++: of a few candidates, drawn by their squared distance to the nearest mean, the one that leaves the
    least inertia. So no point that coincides with a mean is drawn while there are others.
    """
    size, rows = len(distances), np.arange(restarts)
    chance = np.random.default_rng(seed).random((count, restarts, 2 + int(math.log(count))), dtype=np.float32)
    first = np.empty((restarts, count), dtype=np.int64)
    first[:, 0] = chance[0, :, 0] * size
    nearest = distances[first[:, 0]]
    for step in range(1, count):
        shares = nearest.cumsum(axis=1)
        below = shares[:, None, :] <= (chance[step] * shares[:, -1:])[:, :, None]
        drawn = np.minimum(below.sum(axis=2), size - 1)
        offered = np.minimum(distances[drawn], nearest[:, None])
        pick = offered.sum(axis=2).argmin(axis=1)
        first[:, step], nearest = drawn[rows, pick], offered[rows, pick]
    labels: Labels = distances[first].argmin(axis=1)
    return labels


@dataclass(frozen=True, eq=False)
class _Means:
    """Several clusterings at once. apart: (n, restarts, count) squared distances of points to means; sizes and spread:
    (restarts, count) members, and their part of the inertia; own: (n, restarts) the points' own apart."""

    apart: Numbers
    sizes: Numbers
    spread: Numbers
    own: Numbers

    @property
    def inertia(self) -> Numbers:
        inertia: Numbers = self.spread.sum(axis=1)
        return inertia


def _means(distances: Numbers, labels: Labels, count: int) -> _Means:
    restarts, size = labels.shape
    column = labels.T + np.arange(restarts) * count
    index = np.arange(size)[:, None], column
    member = np.zeros((size, restarts * count), dtype=distances.dtype)
    member[index] = 1
    apart = _product(distances, member)  # so far the sums over members
    sizes = np.bincount(column.ravel(), minlength=restarts * count).astype(distances.dtype)
    spread = np.bincount(column.ravel(), apart[index].ravel(), restarts * count) / (2 * sizes)
    apart -= spread.astype(distances.dtype)
    apart /= sizes
    shape = restarts, count
    return _Means(apart.reshape(size, *shape), sizes.reshape(shape), spread.reshape(shape), apart[index])


def _product(left: Numbers, right: Numbers) -> Numbers:
    """left @ right on torch's threads, which the caller chooses: numpy takes all there are, for far too little work."""
    product: Numbers = (torch.from_numpy(left) @ torch.from_numpy(right)).numpy()
    return product


def _lloyd(distances: Numbers, labels: Labels, count: int) -> tuple[Labels, Numbers]:
    """Every point to its nearest mean until none changes; and the inertia of every clustering."""
    means = _means(distances, labels, count)
    for _ in range(_PASSES):
        if not means.sizes.all():
            labels, means = _filled(distances, labels, count)
        nearest = means.apart.argmin(axis=2)
        least = np.take_along_axis(means.apart, nearest[:, :, None], axis=2)[:, :, 0]
        better = least < means.own * _BETTER
        if not better.any():
            break
        labels = np.where(better, nearest, labels.T).T
        means = _means(distances, labels, count)
    return labels, means.inertia


def _filled(distances: Numbers, labels: Labels, count: int) -> tuple[Labels, _Means]:
    """Each empty cluster takes the point that lies farthest from its mean, and is not alone there."""
    labels = labels.copy()
    while True:
        means = _means(distances, labels, count)
        empty = means.sizes == 0
        if not empty.any():
            return labels, means
        for row in empty.any(axis=1).nonzero()[0]:
            alone = means.sizes[row, labels[row]] == 1
            labels[row, np.where(alone, -1, means.own[:, row]).argmax()] = empty[row].argmax()


def _moved(distances: Numbers, labels: Labels, count: int) -> tuple[Labels, Numbers]:
    """Single points moved to other clusters, while a pass gains enough; and the inertia of every clustering.

    To take x from a cluster of m members lowers the inertia by |x - mean|^2 m / (m - 1), to add it to one raises it by
    |x - mean|^2 m / (m + 1) (Hartigan). Of moves that touch one cluster only the best is made, so that all that are
    made at once add up.
    """
    points, rows, clusters = np.arange(labels.shape[1])[:, None], np.arange(len(labels)), np.arange(count)
    means = _means(distances, labels, count)
    for _ in range(_PASSES):
        sizes = means.sizes[rows, labels.T]
        left = means.own * sizes / np.maximum(sizes - 1, 1)
        joined = means.apart * (means.sizes / (means.sizes + 1))
        joined[points, rows, labels.T] = np.inf
        target = joined.argmin(axis=2)
        change = np.where(sizes > 1, joined[points, rows, target] - left, 0)
        touched = (labels.T[:, :, None] == clusters) | (target[:, :, None] == clusters)
        best = np.where(touched, change[:, :, None], 0).min(axis=0)
        made = (change < 0) & (change == best[rows, labels.T]) & (change == best[rows, target])
        tried = np.where(made, target, labels.T).T
        after = _means(distances, tried, count)
        enough = after.inertia < means.inertia * (1 - _GAIN)
        if not enough.any():
            break
        labels, means = tried, after
    return labels, means.inertia


def _swapped(distances: Numbers, labels: Labels, count: int) -> Labels:
    """Clusterings to try: (up to _SWAPS, n), in each one cluster is dissolved and a new one begun at a point elsewhere.

    Of all pairs of a cluster and a point those that leave the least inertia, with the other means where they are.
    """
    points = np.arange(len(labels))
    apart = _means(distances, labels[None], count).apart[:, 0]
    own = apart[points, labels]
    apart[points, labels] = np.inf
    second = apart.argmin(axis=1)
    loss = apart[points, second]
    kept = np.minimum(own[:, None], distances)
    member = (labels == np.arange(count)[:, None]).astype(distances.dtype)
    total = kept.sum(axis=0) + _product(member, np.minimum(loss[:, None], distances) - kept)
    total[labels, points] = np.inf
    begun = total.argmin(axis=1)
    dissolved = total[np.arange(count), begun].argsort(kind="stable")[:_SWAPS, None]
    homeless = labels == dissolved
    moved = np.where(homeless, second, labels)
    taken = distances[begun[dissolved[:, 0]]] < np.where(homeless, loss, own)
    taken[np.arange(len(dissolved)), begun[dissolved[:, 0]]] = True
    return np.where(taken, dissolved, moved)

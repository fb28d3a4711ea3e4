"""k-means on inner products alone: against scikit-learn on the points themselves, and where it must be exact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lorahub.hub.errors import BadOption
from lorahub.merge.clustering import Clusters, kmeans, squared_distances
from making import LAW, seeds
from numpy.typing import NDArray
from sklearn.cluster import KMeans

Points = NDArray[np.float64]
FEW = settings(LAW, max_examples=25)
KINDS = ("normal", "apart", "overlapping", "heavy-tailed", "of all lengths", "around lines")


def points(kind: str, count: int, dimension: int, groups: int, seed: int) -> Points:
    chance = np.random.default_rng(seed)
    noise = chance.standard_normal((count, dimension))
    centres = chance.standard_normal((groups, dimension))[chance.integers(0, groups, count)]
    return {
        "normal": noise,
        "apart": 3 * centres + 0.5 * noise,
        "overlapping": centres + noise,
        "heavy-tailed": chance.standard_t(2, (count, dimension)),
        "of all lengths": noise * np.exp(noise[:, :1]),
        "around lines": centres * chance.random((count, 1)) + 0.02 * noise,
    }[kind]


def clustered(some: Points, count: int, **options: int) -> Clusters:
    return kmeans(some @ some.T, count, **options)


def inertia(some: Points, labels: NDArray[np.int64]) -> float:
    """The definition, on the points themselves."""
    return float(sum(((some[labels == c] - some[labels == c].mean(axis=0)) ** 2).sum() for c in set(labels)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(24, 2, 4), (40, 6, 8), (60, 200, 12), (128, 1000, 16)], ids=str)
def test_inertia_is_no_worse_than_scikit_learns(kind: str, shape: tuple[int, int, int]) -> None:
    count, dimension, groups = shape
    for seed in range(3):
        some = points(kind, count, dimension, groups, seed)
        theirs = KMeans(groups, n_init=10, random_state=seed).fit(some).inertia_
        found = clustered(some, groups)
        assert found.inertia <= 1.01 * theirs
        assert found.inertia == pytest.approx(inertia(some, found.labels), rel=1e-6)


def test_moves_of_single_points_lower_the_inertia() -> None:
    """Below what Lloyd's iteration reaches, on the whole: scikit-learn's is that alone."""
    ratios = []
    for seed in range(15):
        some = points("normal", 40, 6, 8, seed)
        ratios.append(clustered(some, 8).inertia / KMeans(8, n_init=10, random_state=seed).fit(some).inertia_)
    assert np.mean(ratios) < 0.95


def test_swaps_of_clusters_mend_what_all_restarts_missed() -> None:
    for seed in range(15):
        some = points("apart", 100, 3, 20, seed)
        theirs = KMeans(20, n_init=10, random_state=seed).fit(some).inertia_
        assert clustered(some, 20).inertia <= 1.01 * theirs


def test_clusters_that_lie_apart_are_found() -> None:
    chance = np.random.default_rng(0)
    truth = chance.permutation(np.repeat(np.arange(16), 8))
    some = 3 * chance.standard_normal((16, 300))[truth] + 0.5 * chance.standard_normal((128, 300))
    labels = clustered(some, 16).labels
    assert len(set(zip(truth, labels, strict=True))) == 16


@LAW
@given(seeds, st.integers(1, 6), st.integers(2, 12), st.floats(-6, 6))
def test_copies_are_told_from_all_else(seed: int, copies: int, places: int, size: float) -> None:
    """T copies of r points in r clusters: each cluster is the copies of one point, whatever the lengths of points."""
    chance = np.random.default_rng(seed)
    lengths = 10 ** chance.uniform(size - 2, size + 2, places)
    some = (chance.standard_normal((places, 30)) * lengths[:, None]).astype(np.float32).astype(np.float64)
    truth = chance.permutation(np.repeat(np.arange(places), copies))
    found = clustered(some[truth], places)
    assert found.inertia == 0
    assert len(set(zip(truth, found.labels, strict=True))) == places


@LAW
@given(seeds, st.integers(1, 12), st.integers(1, 5))
def test_every_cluster_has_members_even_with_more_clusters_than_places(seed: int, count: int, places: int) -> None:
    chance = np.random.default_rng(seed)
    some = chance.standard_normal((places, 7))[chance.integers(0, places, 12)]
    found = clustered(some, count)
    assert sorted(set(found.labels)) == list(range(count))
    assert found.sizes.tolist() == [int((found.labels == c).sum()) for c in range(count)]
    assert found.inertia == pytest.approx(inertia(some, found.labels), abs=1e-10)
    if count >= len({tuple(row) for row in some}):
        assert found.inertia == 0


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_clusters_as_points_are_the_points(kind: str) -> None:
    found = clustered(np.repeat(points(kind, 10, 20, 3, 0), 2, axis=0), 20)
    assert sorted(found.labels) == list(range(20))
    assert found.inertia == 0


def test_one_cluster_is_all() -> None:
    some = points("normal", 30, 50, 1, 0)
    found = clustered(some, 1)
    assert set(found.labels) == {0}
    assert found.inertia == pytest.approx(inertia(some, found.labels))


@FEW
@given(seeds, st.sampled_from(KINDS), st.sampled_from([3, 50]))
def test_the_order_of_the_points_does_not_matter(seed: int, kind: str, dimension: int) -> None:
    some = points(kind, 30, dimension, 5, seed)
    order = np.random.default_rng(seed).permutation(30)
    assert np.array_equal(clustered(some[order], 5).labels, clustered(some, 5).labels[order])


@FEW
@given(seeds, st.sampled_from(KINDS))
def test_rounding_does_not_renumber_clusters(seed: int, kind: str) -> None:
    some = points(kind, 30, 3, 5, seed)
    noise = 1e-7 * np.random.default_rng(seed).standard_normal(some.shape)
    assert np.array_equal(clustered(some * (1 + noise), 5).labels, clustered(some, 5).labels)


@FEW
@given(seeds, st.integers(-20, 20))
def test_moved_turned_and_scaled_points_make_the_same_clusters(seed: int, power: int) -> None:
    some = points("overlapping", 30, 20, 5, seed)
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((20, 20)))[0]
    labels = clustered(some, 5).labels
    assert np.array_equal(clustered(some @ turn, 5).labels, labels)
    assert np.array_equal(clustered(some * 2.0**power, 5).labels, labels)


def test_the_seed_counts_and_global_state_does_not() -> None:
    some = points("normal", 60, 3, 8, 0)
    first = clustered(some, 8, seed=5)
    np.random.seed(1)
    wanted = np.random.random(3)
    np.random.seed(1)
    assert np.array_equal(clustered(some, 8, seed=5).labels, first.labels)
    assert np.array_equal(np.random.random(3), wanted)
    assert any(not np.array_equal(clustered(some, 8, seed=seed).labels, first.labels) for seed in range(5))


def test_more_restarts_are_no_worse() -> None:
    for seed in range(5):
        some = points("around lines", 40, 2, 8, seed)
        assert clustered(some, 8, restarts=50).inertia <= 1.001 * clustered(some, 8, restarts=1).inertia


def test_squared_distances() -> None:
    some = points("normal", 20, 30, 1, 0)
    wanted = ((some[:, None] - some) ** 2).sum(axis=2)
    assert squared_distances(some @ some.T) == pytest.approx(wanted, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("count", "restarts"), [(0, 1), (11, 1), (-1, 1), (3, 0)])
def test_what_makes_no_sense_is_refused(count: int, restarts: int) -> None:
    with pytest.raises(BadOption, match="expected"):
        clustered(points("normal", 10, 3, 1, 0), count, restarts=restarts)

"""Laws of the large index: it finds what the exact one finds, filters are exact, and what is added later is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lorahub.hub.catalog import Catalog
from lorahub.index import ann, vector_index
from lorahub.index.ann import agreement, breadth, build, exact, is_exact, nearest, recall, tune, unit
from lorahub.index.vector_index import index_path, open_index

DIM = 32


def clustered(count: int, seed: int, noise: float = 0.5) -> np.ndarray:
    """Unit vectors around 300 centres that are always the same."""
    centres = unit(np.random.default_rng(99).normal(size=(300, DIM)))
    chance = np.random.default_rng(seed)
    return unit(centres[chance.integers(300, size=count)] + noise / DIM**0.5 * chance.normal(size=(count, DIM)))


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return clustered(20_000, 0)


@pytest.fixture(scope="module")
def lists(vectors: np.ndarray) -> Any:
    return build(vectors, approximate=True)


def test_few_vectors_have_an_exact_index_and_many_are_put_in_lists(
    vectors: np.ndarray, lists: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_exact(build(vectors[:500]))
    assert not is_exact(lists)
    monkeypatch.setattr(ann, "EXACT", 499)
    assert not is_exact(build(vectors[:500]))
    assert is_exact(build(vectors[:499]))


def test_the_exact_index_is_the_oracle_itself(vectors: np.ndarray) -> None:
    some, queries = vectors[:2000], clustered(50, 1)
    places = exact(some, queries, 10)
    np.testing.assert_array_equal(places, np.argsort(-(queries @ some.T), axis=1)[:, :10])
    assert recall(build(some), some, queries) == 1.0


def test_the_lists_hold_what_the_exact_index_finds(vectors: np.ndarray, lists: Any) -> None:
    queries = clustered(300, 1)
    assert recall(lists, vectors, queries) >= 0.98
    hits = [nearest(lists, query[None], 10)[0] for query in queries]
    assert agreement(np.array(hits), exact(vectors, queries, 10)) >= 0.98


def test_recall_counts_what_is_missed() -> None:
    truth = np.array([[1, 2], [3, 4]])
    assert agreement(truth[:, ::-1], truth) == 1.0
    assert agreement(np.array([[1, 9], [3, -1]]), truth) == 0.5


def test_the_breadth_is_raised_until_the_recall_is_there(vectors: np.ndarray, lists: Any) -> None:
    before = breadth(lists)
    tried = tune(lists, vectors, wanted=2.0)
    assert [trial.breadth for trial in tried[:-1]] == [b for b in ann.BREADTHS if b < tried[-1].breadth]
    assert breadth(lists) == tried[-1].breadth
    assert tried[-1].recall >= tried[0].recall
    assert len(tune(lists, vectors, wanted=0.0)) == 1
    assert tune(lists, vectors)[-1].recall >= ann.WANTED
    assert breadth(lists) == before


@pytest.mark.parametrize("share", [0.0005, 0.05, 0.6])
def test_filtered_search_is_the_brute_force_result(vectors: np.ndarray, lists: Any, share: float) -> None:
    chance = np.random.default_rng(3)
    allowed = np.sort(chance.choice(len(vectors), int(share * len(vectors)), replace=False)).astype(np.int64)
    for query in clustered(20, 4):
        places, cosines = nearest(lists, query[None], 10, allowed)
        wanted = allowed[np.argsort(-(vectors[allowed] @ query), kind="stable")[:10]]
        assert set(places) <= set(allowed.tolist())
        np.testing.assert_allclose(cosines, vectors[wanted] @ query, atol=2e-3)  # float16
    assert nearest(lists, query[None], 10, np.empty(0, np.int64)) == ([], [])


def test_more_than_lists_are_good_for_is_compared_one_by_one(vectors: np.ndarray, lists: Any) -> None:
    [query] = clustered(1, 6)
    places, cosines = nearest(lists, query[None], len(vectors) + 5)
    assert sorted(places) == list(range(len(vectors)))
    np.testing.assert_allclose(cosines, np.sort(vectors @ query)[::-1], atol=2e-3)


def test_equal_vectors_give_equal_lists(vectors: np.ndarray) -> None:
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        one, two = (faiss.serialize_index(build(vectors[:2000], approximate=True)).tobytes() for _ in range(2))
    finally:
        faiss.omp_set_num_threads(threads)
    assert one == two


# --- in the catalogue -----------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, lora: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A catalogue of forty adapters that are put in lists, and their vectors by id."""
    monkeypatch.setattr(ann, "EXACT", 20)
    with Catalog(tmp_path / "home") as catalog:
        assert all(added.id for added in catalog.add([lora(f"n{i:03}.safetensors", seed=i) for i in range(40)]))
        yield catalog, store(catalog, 0)


def store(catalog: Catalog, seed: int, digest: str = "x") -> dict[str, np.ndarray]:
    ids = sorted(catalog.ids())
    vectors = dict(zip(ids, clustered(len(ids), seed), strict=True))
    catalog.store_vectors("s", [(id_, digest, vector) for id_, vector in vectors.items()])
    return vectors


def found(catalog: Catalog, vectors: dict[str, np.ndarray]) -> None:
    """Each vector finds its owner first, and nothing else than what there is."""
    index = open_index(catalog, "s")
    assert set(index.places) == set(vectors)
    assert len(index) == len(vectors)
    for id_, vector in vectors.items():
        near = index.nearest(vector, 50)
        assert near[0] == (id_, pytest.approx(1, abs=2e-3))
        assert {owner for owner, _ in near} == set(vectors)
        got = index.vector(id_)
        assert got is not None
        np.testing.assert_allclose(got, vector, atol=2e-3)


def test_lists_are_kept_and_what_comes_later_is_put_into_them(
    home: Any, lora: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog, vectors = home
    found(catalog, vectors)
    assert not open_index(catalog, "s").exact
    monkeypatch.setattr(vector_index, "build", lambda *_, **__: pytest.fail("built again"))
    found(catalog, vectors)

    (new,) = catalog.add([lora("new.safetensors", seed=99)])
    replaced, removed = sorted(vectors)[3], sorted(vectors)[5]
    fresh = {new.id: clustered(2, 8)[0], replaced: clustered(2, 8)[1]}
    catalog.store_vectors("s", [(id_, "other", vector) for id_, vector in fresh.items()])
    catalog.remove(removed)
    now = {id_: vector for id_, vector in {**vectors, **fresh}.items() if id_ != removed}
    found(catalog, now)
    found(catalog, now)  # and from the file


def test_lists_that_were_outgrown_are_built_anew(home: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog, vectors = home
    found(catalog, vectors)
    monkeypatch.setattr(vector_index, "REPLACED", 10)
    now = store(catalog, 7, digest="all new")
    found(catalog, now)
    assert "" not in open_index(catalog, "s").owners


def test_deleting_the_cache_loses_nothing(home: Any) -> None:
    catalog, vectors = home
    found(catalog, vectors)
    index_path(catalog.home, "s").unlink()
    found(catalog, vectors)


def test_a_vector_of_zeros_is_nobodys_neighbour(home: Any) -> None:
    catalog, vectors = home
    silent = sorted(vectors)[0]
    catalog.store_vectors("s", [(silent, "nothing", np.zeros(DIM))])
    del vectors[silent]
    found(catalog, vectors)

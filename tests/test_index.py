"""Laws of search: the index is exact and only a cache, fusion is by rank, filters come first, every hit says why."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lorahub.hub.catalog import Catalog
from lorahub.hub.errors import BadOption, RetrievalError
from lorahub.index import embed, search, vector_index
from lorahub.index.search import fuse
from lorahub.index.vector_index import Index, index_path, open_index
from making import LAW

CONCEPTS = ("watercolor aquarelle wash", "robot android", "court law legal", "cat kitten")


class ConceptEncoder:
    """Knows a few synonyms: texts about one concept point one way, whatever words they use."""

    space = "concepts"
    dim = 8

    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        self.seen += texts
        rows = [[0.05, *(sum(w in text.lower() for w in c.split()) for c in CONCEPTS), 0, 0, 0] for text in texts]
        vectors = np.array(rows, np.float32).reshape(len(texts), -1)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Catalog]:
    with Catalog(tmp_path / "home") as catalog:
        yield catalog


@pytest.fixture
def stocked(catalog: Catalog, lora: Callable[..., Path]) -> Catalog:
    """Six adapters on two bases, on each database."""
    sd, xl = "sd_v1", "sdxl_base_v1-0"
    texts = [
        ("aqua.safetensors", "soft watercolor painting", sd),
        ("wash.safetensors", "an aquarelle look", sd),
        ("bot.safetensors", "a robot in watercolor", xl),
        ("droid.safetensors", "an android", sd),
        ("judge.safetensors", "legal writing", xl),
        ("plain.safetensors", "nothing in particular", sd),
    ]
    paths = [
        lora(name, seed=seed, modelspec__description=text, ss_base_model_version=base)
        for seed, (name, text, base) in enumerate(texts)
    ]
    assert all(added.status == "added" for added in catalog.add(paths))
    catalog.tag("wash", ["style"])
    embed.fill(catalog, ConceptEncoder())
    return catalog


def store(catalog: Catalog, lora: Callable[..., Path], count: int, dim: int = 12, seed: int = 0) -> np.ndarray:
    """`count` adapters with random vectors in the space "s", by name; returns their vectors."""
    assert all(added.id for added in catalog.add([lora(f"n{i:03}.safetensors", seed=i) for i in range(count)]))
    vectors = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    rows = [(entry.id, entry.digest, vector) for entry, vector in zip(catalog.entries(), vectors, strict=True)]
    catalog.store_vectors("s", rows)
    return vectors


def brute(vectors: np.ndarray, owners: Sequence[str], query: np.ndarray, limit: int) -> list[tuple[str, float]]:
    cosines = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    return [(owners[i], float(cosines[i])) for i in np.argsort(-cosines)[:limit]]


def names(catalog: Catalog, hits: Sequence[search.Hit]) -> list[str]:
    return [hit.entry.name for hit in hits]


# --- the index ------------------------------------------------------------------------------------------------------


def test_nearest_is_the_brute_force_result(home: Catalog, lora: Callable[..., Path]) -> None:
    vectors = store(home, lora, 40)
    owners = [entry.id for entry in home.entries()]
    index = open_index(home, "s")
    chance = np.random.default_rng(1)
    for limit in (1, 7, 40, 1000):
        query = chance.normal(size=12)
        wanted = brute(vectors, owners, query, limit)
        got = index.nearest(query, limit)
        assert [id_ for id_, _ in got] == [id_ for id_, _ in wanted]
        np.testing.assert_allclose([c for _, c in got], [c for _, c in wanted], atol=1e-6)
        allowed = set(chance.choice(owners, 9, replace=False))
        some = [pair for pair in brute(vectors, owners, query, 40) if pair[0] in allowed][:limit]
        assert [id_ for id_, _ in index.nearest(query, limit, allowed)] == [id_ for id_, _ in some]
    assert index.nearest(query, 5, set()) == []


def test_vector_is_the_stored_one_at_unit_length(home: Catalog, lora: Callable[..., Path]) -> None:
    vectors = store(home, lora, 5)
    index = open_index(home, "s")
    for entry, vector in zip(home.entries(), vectors, strict=True):
        np.testing.assert_allclose(index.vector(entry.id), vector / np.linalg.norm(vector), atol=1e-6)
    assert index.vector("nobody") is None


def test_an_empty_space_has_an_empty_index(home: Catalog) -> None:
    index = open_index(home, "s")
    assert len(index) == 0
    assert index.nearest([1.0, 2.0], 3) == []
    assert index.vector("nobody") is None
    assert not index_path(home.home, "s").exists()


def test_a_query_of_another_length_is_refused(home: Catalog, lora: Callable[..., Path]) -> None:
    store(home, lora, 2)
    with pytest.raises(RetrievalError, match="12 numbers, the query has 3"):
        open_index(home, "s").nearest([1, 2, 3], 1)


def test_the_file_is_used_while_it_is_fresh(
    home: Catalog, lora: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store(home, lora, 6)
    first = open_index(home, "s")
    monkeypatch.setattr(vector_index, "_build", lambda *_: pytest.fail("built again"))
    assert answers(open_index(home, "s")) == answers(first)


def test_the_index_follows_the_catalogue(home: Catalog, lora: Callable[..., Path]) -> None:
    store(home, lora, 6)
    open_index(home, "s")
    last = home.entries()[-1]
    home.store_vectors("s", [(last.id, "changed", np.eye(12, dtype=np.float32)[3])])
    np.testing.assert_allclose(open_index(home, "s").vector(last.id), np.eye(12)[3])
    home.remove(last.id)
    assert last.id not in open_index(home, "s").owners
    assert len(open_index(home, "s")) == 5


def test_a_removed_adapter_that_another_replaces_is_noticed(home: Catalog, lora: Callable[..., Path]) -> None:
    store(home, lora, 3)
    open_index(home, "s")
    home.remove(home.entries()[-1].id)
    (added,) = home.add([lora("new.safetensors", seed=99)])
    home.store_vectors("s", [(str(added.id), "x", np.ones(12))])
    assert added.id in open_index(home, "s").owners


def answers(index: Index) -> list[tuple[str, float]]:
    return index.nearest(np.arange(12), 6)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 0x40
    path.write_bytes(data)


def tampered(path: Path) -> None:
    sidecar = json.loads(path.read_text())
    path.write_text(json.dumps({**sidecar, "version": -1}))


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "deleted": (".faiss", Path.unlink),
    "emptied": (".faiss", lambda path: path.write_bytes(b"")),
    "cut": (".faiss", lambda path: path.write_bytes(path.read_bytes()[:100])),
    "garbage": (".faiss", lambda path: path.write_bytes(b"garbage" * 50)),
    "one bit": (".faiss", flip),
    "no sidecar": (".json", Path.unlink),
    "sidecar cut": (".json", lambda path: path.write_bytes(path.read_bytes()[:50])),
    "sidecar not an object": (".json", lambda path: path.write_text("[1]")),
    "sidecar not text": (".json", lambda path: path.write_bytes(b"\xff\xfe\x00")),
    "other version": (".json", tampered),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_built_anew(home: Catalog, lora: Callable[..., Path], damage: str) -> None:
    store(home, lora, 6)
    wanted = answers(open_index(home, "s"))
    suffix, harm = DAMAGE[damage]
    path = index_path(home.home, "s").with_suffix(suffix)
    good = path.read_bytes()
    harm(path)
    assert answers(open_index(home, "s")) == wanted
    assert path.read_bytes() == good


def test_the_index_of_another_builder_is_not_mixed_with_ours(home: Catalog, lora: Callable[..., Path]) -> None:
    store(home, lora, 6)
    wanted = answers(open_index(home, "s"))
    path = index_path(home.home, "s")
    ours = path.read_bytes()
    home.store_vectors("s", [(home.entries()[0].id, "x", np.ones(12))])
    open_index(home, "s")
    path.write_bytes(ours)  # the other builder's vectors beside our newer sidecar
    assert answers(open_index(home, "s")) != wanted


def test_many_may_build_at_once(home: Catalog, lora: Callable[..., Path]) -> None:
    store(home, lora, 6)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: answers(open_index(home, "s")), range(16)))
    assert all(each == found[0] for each in found)
    assert {path.suffix for path in (home.home / "index").iterdir()} == {".faiss", ".json"}


def test_an_index_that_cannot_be_kept_still_answers(home: Catalog, lora: Callable[..., Path]) -> None:
    store(home, lora, 6)
    (home.home / "index").write_text("in the way")
    assert len(answers(open_index(home, "s"))) == 6


def test_every_space_has_a_file_of_its_own(tmp_path: Path) -> None:
    spaces = ["text", "text:a/b", "text:a_b", "text:" + "x/" * 200, "text:" + "x/" * 200 + "y", "../evil"]
    paths = {index_path(tmp_path, space) for space in spaces}
    assert len(paths) == len(spaces)
    assert all(path.parent == tmp_path / "index" and len(path.name) < 200 for path in paths)


# --- filling --------------------------------------------------------------------------------------------------------


def test_fill_stores_each_text_once_and_then_nothing(
    home: Catalog, lora: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "BATCH", 2)
    paths = [lora(f"n{i}.safetensors", seed=i, modelspec__title="T", modelspec__description="cat") for i in range(3)]
    paths += [lora(f"m{i}.safetensors", seed=9 + i, modelspec__description=f"robot {i}") for i in range(3)]
    assert len(list(home.add(paths))) == 6
    encoder, steps = ConceptEncoder(), []
    assert embed.fill(home, encoder, progress=lambda *step: steps.append(step)) == 6
    assert len(encoder.seen) == 4
    assert steps[-1] == (6, 6)
    assert embed.fill(home, encoder) == 0
    assert len(encoder.seen) == 4
    home.describe("n0", "a kitten now")
    assert embed.fill(home, encoder) == 1


def test_what_was_embedded_before_a_kill_is_kept(
    home: Catalog, lora: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "BATCH", 2)
    assert len(list(home.add([lora(f"n{i}.safetensors", seed=i) for i in range(5)]))) == 5

    class Killed(ConceptEncoder):
        def encode(self, texts: Sequence[str]) -> np.ndarray:
            if len(self.seen) >= 2:
                raise KeyboardInterrupt
            return super().encode(texts)

    with pytest.raises(KeyboardInterrupt):
        embed.fill(home, Killed())
    assert home.vector_state("concepts")[0] == 2
    assert embed.fill(home, ConceptEncoder()) == 3


# --- ranking --------------------------------------------------------------------------------------------------------


@LAW
@given(st.lists(st.permutations(list("abcdef")), min_size=1, max_size=3))
def test_fusion_is_the_sum_of_reciprocal_ranks(rankings: list[list[str]]) -> None:
    fused = fuse(*rankings)
    for id_ in "abcdef":
        wanted = sum(1 / (60 + ranking.index(id_) + 1) for ranking in rankings) * 61 / len(rankings)
        assert fused[id_] == pytest.approx(wanted)
    assert fused == pytest.approx(fuse(*reversed(rankings)))
    assert max(fused.values()) <= 1 + 1e-12


def test_to_be_in_both_lists_beats_being_first_in_one() -> None:
    fused = fuse(["a", "b", "c"], ["d", "b", "e"])
    assert sorted(fused, key=lambda id_: -fused[id_])[0] == "b"
    assert fuse(["a"], ["a"])["a"] == 1
    assert fuse([], []) == {}


def test_search_by_words_by_meaning_and_by_both(stocked: Catalog) -> None:
    def found(mode: str) -> list[str]:
        return names(stocked, search.search(stocked, "watercolor", mode=mode, encoder=ConceptEncoder()))

    assert set(found("text")) == {"aqua", "bot"}
    assert set(found("meaning")) == {"aqua", "wash", "bot"}
    assert found("hybrid")[0] == "aqua"
    assert set(found("hybrid")) == {"aqua", "wash", "bot"}
    assert found("hybrid")[-1] == "wash"  # the word itself counts twice


def test_every_hit_says_why(stocked: Catalog) -> None:
    hits = {h.entry.name: h for h in search.search(stocked, "watercolor", encoder=ConceptEncoder())}
    assert hits["aqua"].why[0].startswith("words in description")
    assert "watercolor" in hits["aqua"].why[0]
    assert hits["aqua"].why[1].startswith("meaning: cosine 0.9") or hits["aqua"].why[1] == "meaning: cosine 1.00"
    assert len(hits["wash"].why) == 1
    assert hits["wash"].why[0].startswith("meaning: cosine")
    assert all(0 < hit.score <= 1 for hit in hits.values())


def test_filters_come_before_ranking(stocked: Catalog) -> None:
    for mode in ("hybrid", "text", "meaning"):
        hits = search.search(stocked, "watercolor", mode=mode, base="sdxl", limit=1, encoder=ConceptEncoder())
        assert names(stocked, hits) == ["bot"]
    tagged = search.search(stocked, "watercolor", tags=["style"], limit=1, encoder=ConceptEncoder())
    assert names(stocked, tagged) == ["wash"]
    assert search.search(stocked, "watercolor", tags=["style"], base="sdxl", encoder=ConceptEncoder()) == []


def test_nothing_near_is_nothing_found(stocked: Catalog) -> None:
    for query in ("zebra", "", "   ", "\0"):
        assert search.search(stocked, query, mode="text", encoder=ConceptEncoder()) == []
    assert search.search(stocked, "", encoder=ConceptEncoder()) == []
    far = search.meaning_matches(stocked, "kitten", 10, encoder=ConceptEncoder())
    assert [stocked.entry(id_).name for id_, _ in far] == []


def test_the_order_is_the_same_every_time_and_the_limit_only_cuts(stocked: Catalog) -> None:
    whole = search.search(stocked, "watercolor robot", encoder=ConceptEncoder())
    for limit in range(1, len(whole) + 1):
        assert search.search(stocked, "watercolor robot", limit=limit, encoder=ConceptEncoder()) == whole[:limit]


def test_words_are_found_before_anything_is_embedded(stocked: Catalog) -> None:
    class Unused(ConceptEncoder):
        space = "nothing here"

        def encode(self, texts: Sequence[str]) -> np.ndarray:
            raise AssertionError("there is nothing to compare with")

    assert set(names(stocked, search.search(stocked, "watercolor", encoder=Unused()))) == {"aqua", "bot"}


def test_what_search_cannot_do_is_said(stocked: Catalog) -> None:
    with pytest.raises(RetrievalError, match="no weight encoder"):
        search.search(stocked, "watercolor", mode="weights")
    with pytest.raises(BadOption, match="hybrid, text, meaning, weights"):
        search.search(stocked, "watercolor", mode="fuzzy")
    with pytest.raises(BadOption, match="limit is 0"):
        search.search(stocked, "watercolor", limit=0)


def test_the_packaged_model_finds_what_no_word_finds(home: Catalog, lora: Callable[..., Path]) -> None:
    from lorahub.index.encoders.text import text

    texts = {"w": "soft watercolor painting on paper", "s": "sports news about matches", "m": "medical notes"}
    assert len(list(home.add([lora(f"{k}.safetensors", seed=i, modelspec__description=v)
                              for i, (k, v) in enumerate(texts.items())]))) == 3  # fmt: skip
    embed.fill(home, text())
    for query, wanted in {"a painter's brush": "w", "soccer": "s", "doctor": "m"}.items():
        hits = search.search(home, query)
        assert names(home, hits)[:1] == [wanted], query
    assert search.search(home, "asdf qwer zxcv") == []

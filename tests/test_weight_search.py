"""Laws of search by weights: a third voice that counts as far as it was right, and none where there is no encoder."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from concepts import BASE, CONCEPTS, concept_adapter, shelf
from lorahub.hub.catalog import Catalog
from lorahub.hub.errors import RetrievalError
from lorahub.hub.writing import save
from lorahub.index import embed, fitted, search
from lorahub.index.calibration import Calibration
from lorahub.index.encoders.text import text
from lorahub.index.fitting import Example, fit
from lorahub.index.search import fuse, weight_matches
from lorahub.index.similar import similar
from lorahub.index.vector_index import index_path, open_index
from lorahub.index.weight_encoder import WeightEncoder, encoder_path


@pytest.fixture(scope="module")
def encoder() -> WeightEncoder:
    """Fitted to twenty adapters of the four concepts, none of those that the tests add."""
    examples = [Example(concept_adapter(n % 4, 500 + n), (CONCEPTS[n % 4],)) for n in range(20)]
    return fit("ridge", examples, text())


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Catalog]:
    """Twelve adapters, three a concept; the first of each says nothing of itself."""
    with Catalog(tmp_path / "home") as catalog:
        added = list(catalog.add(shelf(tmp_path / "shelf", 3, bare=(0, 1, 2, 3))))
        assert [one.status for one in added] == ["added"] * 12
        embed.fill(catalog, text())
        yield catalog


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory, encoder: WeightEncoder) -> Iterator[Catalog]:
    """Such a library with all vectors stored, to be looked at only."""
    folder = tmp_path_factory.mktemp("encoded")
    with Catalog(folder / "home") as catalog:
        list(catalog.add(shelf(folder / "shelf", 3, bare=(0, 1, 2, 3))))
        embed.fill(catalog, text())
        assert embed.fill_encoded(catalog, encoder) == 12
        yield catalog


def found(catalog: Catalog, query: str, encoders: Sequence[WeightEncoder], mode: str = "hybrid", **given) -> list[str]:
    hits = search.search(catalog, query, mode=mode, encoders=encoders, encoder=text(), **given)
    return [hit.entry.name for hit in hits]


def test_what_says_nothing_is_found_by_what_it_does(encoded: Catalog, encoder: WeightEncoder) -> None:
    for concept, words in enumerate(CONCEPTS):
        own = {f"lora-{concept:03d}", *(f"{words.split()[0]}-{n}" for n in (4 + concept, 8 + concept))}
        assert set(found(encoded, words, [encoder], "weights", limit=3)) == own
        assert set(found(encoded, words, [encoder], limit=3)) == own
        assert f"lora-{concept:03d}" not in found(encoded, words, [], limit=3)


def test_every_hit_says_how_often_its_score_was_right(encoded: Catalog, encoder: WeightEncoder) -> None:
    hits = search.search(encoded, "robot", mode="weights", encoders=[encoder], encoder=text())
    for hit in hits:
        assert hit.confidence == encoder.confidence(hit.score, of="queries")
        assert hit.why == (f"weights: score {hit.score:.2f}, right in {hit.confidence:.0%} of such cases",)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert all(hit.confidence is None for hit in search.search(encoded, "robot", encoder=text()))


def test_filters_come_before_ranking(library: Catalog, encoder: WeightEncoder) -> None:
    embed.fill_encoded(library, encoder)
    library.tag("lora-001", ["odd"])
    library.tag("kitten-7", ["odd"])
    for mode in ("hybrid", "weights"):
        assert found(library, "robot android", [encoder], mode, tags=["odd"], limit=1) == ["lora-001"]
        assert found(library, "robot android", [encoder], mode, base="elsewhere") == []
    everything = weight_matches(library, "robot android", 12, [encoder], encoder=text())
    odd = {library.entry("lora-001").id, library.entry("kitten-7").id}
    some = weight_matches(library, "robot android", 12, [encoder], tags=["odd"], encoder=text())
    wanted = [one for one in everything if one.id in odd]
    assert [one.id for one in some] == [one.id for one in wanted]
    assert [one.score for one in some] == pytest.approx([one.score for one in wanted], abs=1e-6)


@dataclass(frozen=True)
class Told:
    """An encoder whose vectors are put into the catalogue by hand, and that is right as often as it says."""

    space: str = "weights:told:1"
    base: str | None = "sd-1"
    texts: str = "plane"
    trust: float = 1.0

    @property
    def queries(self) -> Calibration:
        return Calibration(chance=0.025)

    def scores(self, queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        return queries @ vectors.T

    def confidence(self, cosine: float, *, of: str = "words") -> float:
        return self.trust * max(0.0, cosine)


class Plane:
    """Every query means (1, 0)."""

    space = "plane"
    dim = 2

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        return np.tile(np.array([[1.0, 0.0]], np.float32), (len(texts), 1))


def angled(cosine: float) -> np.ndarray:
    return np.array([cosine, np.sqrt(1 - cosine**2)], np.float32)


@pytest.fixture
def voices(tmp_path: Path, lora: Callable[..., Path]) -> Iterator[tuple[Catalog, dict[str, str]]]:
    """Adapters by what speaks for them: w words, m meaning, e the encoder; and one on another base."""
    said = {"wme": "ink", "wm": "ink", "w": "ink", "m": "quiet", "e": "quiet", "none": "quiet"}
    paths = [
        lora(f"{name}.safetensors", seed=k, ss_base_model_version="sd_v1", modelspec__description=words)
        for k, (name, words) in enumerate(said.items())
    ]
    paths.append(lora("far.safetensors", seed=9, ss_base_model_version="sdxl_base_v1-0", modelspec__description="ink"))
    with Catalog(tmp_path / "home") as catalog:
        assert all(added.status == "added" for added in catalog.add(paths))
        ids = {entry.name: entry.id for entry in catalog.entries()}
        meant = {"wme": 0.9, "wm": 0.9, "far": 0.9, "m": 0.8, "w": 0.1, "e": 0.1, "none": 0.1}
        weighed = {"wme": 0.9, "wm": 0.01, "w": 0.01, "m": 0.01, "e": 0.8, "none": 0.01}
        digests = {entry.id: entry.text_digest for entry in catalog.entries()}
        catalog.store_vectors("plane", [(ids[n], digests[ids[n]], angled(c)) for n, c in meant.items()])
        catalog.store_vectors(Told().space, [(ids[n], "x", angled(c)) for n, c in weighed.items()])
        yield catalog, ids


def ranked(catalog: Catalog, *encoders: Told) -> dict[str, float]:
    hits = search.search(catalog, "ink", encoder=Plane(), encoders=encoders)
    return {hit.entry.name: hit.score for hit in hits}


def test_without_an_encoder_nothing_changes(voices) -> None:
    catalog, ids = voices
    words = [id_ for id_, _, _ in catalog.text_matches("ink", 200)]
    near = [id_ for id_, _ in search.meaning_matches(catalog, "ink", 200, encoder=Plane())]
    wanted = fuse(words, near)
    assert ranked(catalog) == {name: pytest.approx(wanted[id_]) for name, id_ in ids.items() if id_ in wanted}
    untrusted = ranked(catalog, Told(trust=0.0))
    assert untrusted == {name: pytest.approx(score / 2) for name, score in ranked(catalog).items()}


def test_the_third_voice_counts_as_far_as_it_is_trusted(voices) -> None:
    catalog, _ = voices
    before, sure, unsure = ranked(catalog), ranked(catalog, Told()), ranked(catalog, Told(trust=0.15))
    assert "e" not in before
    assert next(name for name in sure if name != "far") == "wme"
    assert sure["e"] > sure["m"]
    assert unsure["e"] < unsure["m"]
    assert [name for name in unsure if name in ("wm", "w", "m")] == [n for n in before if n in ("wm", "w", "m")]
    assert all(0 < score <= 1 for score in sure.values())
    assert "e" not in ranked(catalog, Told(trust=0.05))  # right in one of twenty-five cases: hardly more than by chance


def test_first_in_both_texts_is_never_below_weights_alone(voices) -> None:
    catalog, _ = voices
    for trust in (0.0, 0.3, 0.6, 1.0):
        scores = ranked(catalog, Told(trust=trust))
        assert scores["wm"] > scores.get("e", 0.0)


def test_a_base_without_an_encoder_loses_nothing_by_it(voices) -> None:
    catalog, _ = voices
    for trust in (0.1, 0.5, 1.0):
        before, now = ranked(catalog), ranked(catalog, Told(trust=trust))
        assert before["far"] == max(before.values())
        assert now["far"] == max(now.values())


def test_encoders_of_several_bases_are_joined_by_confidence(voices) -> None:
    catalog, ids = voices
    other = Told(space="weights:told:2", base="sdxl", trust=0.5)
    catalog.store_vectors(other.space, [(ids["far"], "x", angled(1.0))])
    hits = search.search(catalog, "ink", mode="weights", encoder=Plane(), encoders=[other, Told()])
    assert [hit.entry.name for hit in hits][:3] == ["wme", "e", "far"]
    assert hits[2].score == pytest.approx(1.0)


def test_a_search_by_weights_without_an_encoder_says_what_to_do(voices) -> None:
    catalog, _ = voices
    with pytest.raises(RetrievalError, match="lorahub encoder fit"):
        search.search(catalog, "ink", mode="weights", encoder=Plane())
    with pytest.raises(RetrievalError, match=r"words of 'other', not of 'plane'"):
        search.search(catalog, "ink", mode="weights", encoder=Plane(), encoders=[Told(texts="other")])


# --- which encoders, and whose vectors ------------------------------------------------------------------------------


def test_the_catalogues_encoders_are_found_by_its_bases(library: Catalog, encoder: WeightEncoder) -> None:
    assert fitted.encoders(library) == []
    encoder.save(encoder_path(library.home, BASE))
    replace(encoder).save(encoder_path(library.home, "somewhere-else"))
    assert [one.space for one in fitted.encoders(library)] == [encoder.space]
    assert fitted.encoders(library, "other words") == []
    assert len(fitted.encoders(library, "text")) == 1


def test_a_damaged_encoder_is_named_and_the_rest_goes_on(
    library: Catalog, encoder: WeightEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    path = encoder_path(library.home, BASE)
    encoder.save(path)
    path.write_bytes(path.read_bytes()[:300])
    assert fitted.encoders(library) == []
    assert path.name in caplog.text
    assert len(caplog.text.strip().splitlines()) == 1


def test_vectors_of_an_older_encoder_are_not_searched_and_then_removed(
    library: Catalog, encoder: WeightEncoder
) -> None:
    embed.fill_encoded(library, encoder)
    open_index(library, encoder.space)
    newer = fit("ridge", [Example(concept_adapter(n % 4, 900 + n), (CONCEPTS[n % 4],)) for n in range(16)], text())
    newer.save(encoder_path(library.home, BASE))
    assert newer.space != encoder.space
    [current] = fitted.encoders(library)
    assert found(library, "robot", [current], "weights") == []
    embed.fill_encoded(library, current)
    assert fitted.forget_stale(library) == [encoder.space]
    assert library.vector_spaces() == ["text", current.space]
    assert not index_path(library.home, encoder.space).exists()
    assert len(found(library, "robot", [current], "weights")) == 10


def test_deleting_the_index_folder_loses_nothing(library: Catalog, encoder: WeightEncoder) -> None:
    embed.fill_encoded(library, encoder)
    before = found(library, "robot", [encoder]), found(library, "robot", [encoder], "weights")
    shutil.rmtree(library.home / "index")
    assert (found(library, "robot", [encoder]), found(library, "robot", [encoder], "weights")) == before


def test_what_cannot_be_encoded_is_named_once_or_every_time(
    library: Catalog, encoder: WeightEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = concept_adapter(0, 77, width=30)
    save(other, tmp_path / "shelf" / "odd")
    save(concept_adapter(0, 78, width=30, base=None), tmp_path / "shelf" / "stranger")
    list(library.add([tmp_path / "shelf"]))
    shutil.rmtree(Path(library.entry("robot-5").locations[0]))
    with caplog.at_level(logging.WARNING):
        assert embed.fill_encoded(library, encoder) == 11 + 2
    assert "odd" in caplog.text
    assert "robot-5" in caplog.text
    assert "stranger" not in caplog.text  # nobody said that it is for this base
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert embed.fill_encoded(library, encoder) == 0
    assert "odd" not in caplog.text  # it will not change; the missing file may come back
    assert "robot-5" in caplog.text
    assert len(open_index(library, encoder.space)) == 11
    assert "odd" not in found(library, "robot", [encoder], "weights", limit=50)


def test_an_adapter_of_an_unknown_base_is_encoded_if_its_modules_are_known(
    library: Catalog, encoder: WeightEncoder, tmp_path: Path
) -> None:
    save(concept_adapter(1, 88, base=None), tmp_path / "nameless")
    list(library.add([tmp_path / "nameless"]))
    embed.fill_encoded(library, encoder)
    assert library.entry("nameless").id in open_index(library, encoder.space).places


def test_filling_goes_on_after_a_kill(
    library: Catalog, encoder: WeightEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "ENCODED", 5)

    def stop(done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed.fill_encoded(library, encoder, progress=stop)
    assert library.vector_state(encoder.space)[0] == 10
    assert embed.fill_encoded(library, encoder) == 2


def test_similar_asks_the_encoder_too(encoded: Catalog, encoder: WeightEncoder) -> None:
    entry = encoded.entry("lora-002")
    plain = {one.entry.id: one for one in similar(encoded, entry, limit=20)}
    near = similar(encoded, entry, limit=20, encoders=[encoder])
    vectors = dict(zip(*[encoded.vectors(encoder.space)[k] for k in (1, 2)], strict=True))
    for one in near:
        assert one.encoded == pytest.approx(float(vectors[entry.id] @ vectors[one.entry.id]), abs=1e-5)
        assert one.confidence == encoder.confidence(one.encoded, of="adapters")
        assert one.score == pytest.approx(max(plain[one.entry.id].score, one.encoded * one.confidence))
        assert "weight encoder" in one.why[-1]
    assert {one.entry.name for one in near[:2]} == {"legal-6", "legal-10"}
    assert all(one.encoded is None and one.confidence is None for one in plain.values())

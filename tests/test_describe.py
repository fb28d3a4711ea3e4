"""Laws of description by weights: words and neighbours with a measured confidence, and no certainty that is none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from concepts import BASE, CONCEPTS, concept_adapter, entry, shelf
from lorahub.cli.plot_map import save_map, spread
from lorahub.hub.catalog import Catalog
from lorahub.hub.errors import BadOption, IncompatibleAdapters, RetrievalError, TargetExists
from lorahub.index.describe import Description, describe, encoder_that_reads, vocabulary
from lorahub.index.embed import fill, fill_encoded
from lorahub.index.encoders.text import text
from lorahub.index.fitting import Example, fit
from lorahub.index.plane import Point, plane, points, themes
from lorahub.index.weight_encoder import WeightEncoder, encoder_path


@pytest.fixture(scope="module")
def encoder() -> WeightEncoder:
    examples = [Example(concept_adapter(n % 4, 500 + n), (CONCEPTS[n % 4],)) for n in range(20)]
    return fit("ridge", examples, text())


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    """Sixteen adapters, four a concept; the first of each says nothing of itself."""
    folder = tmp_path_factory.mktemp("described")
    with Catalog(folder / "home") as catalog:
        assert all(one.id for one in catalog.add(shelf(folder / "shelf", 4, bare=(0, 1, 2, 3))))
        for entry in catalog.entries():
            if not entry.name.startswith("lora-"):
                catalog.tag(entry.id, ["everything", entry.name.split("-")[0]])
        yield catalog


# --- words and neighbours -------------------------------------------------------------------------------------------


def test_an_adapter_that_says_nothing_is_described(library: Catalog, encoder: WeightEncoder) -> None:
    for concept, words in enumerate(CONCEPTS):
        own = library.entry(f"lora-{concept:03d}")
        found = describe(library, library.read(own), encoder, text(), entry=own, limit=3)
        assert found.certain
        assert found.words[0].words.casefold() in words.casefold()
        assert {one.entry.name.split("-")[0] for one in found.neighbours} == {words.split()[0]}
        assert own.id not in {one.entry.id for one in found.neighbours}
        assert found.cases == encoder.calibration.cases


def test_cosines_and_confidences_are_the_encoders(library: Catalog, encoder: WeightEncoder) -> None:
    stranger = concept_adapter(2, 4321)
    vector = encoder.encode(stranger)
    found = describe(library, stranger, encoder, text(), limit=4)
    for guess in found.words:
        assert guess.cosine == pytest.approx(float(text().encode([guess.words])[0] @ vector), abs=1e-5)
        assert guess.confidence == encoder.confidence(guess.cosine)
    for near in found.neighbours:
        wanted = float(encoder.encode(library.read(near.entry)) @ vector)
        assert near.cosine == pytest.approx(wanted, abs=1e-4)
        assert near.confidence == encoder.confidence(near.cosine, of="adapters")
    for some in (found.words, found.neighbours):
        assert [one.cosine for one in some] == sorted((one.cosine for one in some), reverse=True)
    spelled = [guess.words.casefold() for guess in found.words]
    assert not any(a in b for a in spelled for b in spelled if a is not b)


def test_what_is_seldom_right_is_not_certain(library: Catalog, encoder: WeightEncoder) -> None:
    unmeasured = WeightEncoder(
        encoder.kind, encoder.manifest, encoder.dim, encoder.texts, encoder.tensors, encoder.options
    )
    found = describe(library, concept_adapter(0, 1), unmeasured, text())
    assert not found.certain
    assert found.cases == 0
    assert not Description("b", "s", (), (), 0).certain


def test_the_vocabulary_is_what_the_catalogue_says(library: Catalog) -> None:
    some = [
        entry("soft-aqua_v2", title="Aqua Wash", description="Paints soft pictures, with washes. Trained on paper!"),
        entry("x1", tags=("style", "Aqua wash"), triggers=("aquarl",)),
        replace(entry("far", description="Distant thunder.", tags=("weather",)), base="other"),
    ]
    words = vocabulary(some, "tiny")
    assert words[0] == "Aqua Wash"  # twice, however it is spelled
    assert {"style", "aquarl", "soft aqua", "with washes", "Trained on paper!"} & set(words) >= {"style", "aquarl"}
    assert {"thunder", "distant", "paper", "washes"} <= set(words)
    assert "weather" not in words  # another base's tag
    assert "with" not in words
    assert len({word.casefold() for word in words}) == len(words)


def test_the_encoder_is_chosen_by_base_or_by_modules(tmp_path: Path, encoder: WeightEncoder) -> None:
    with pytest.raises(RetrievalError, match=rf"no weight encoder for its base \({BASE}\).*encoder fit"):
        encoder_that_reads(tmp_path, concept_adapter(0, 0))
    encoder.save(encoder_path(tmp_path, BASE))
    assert encoder_that_reads(tmp_path, concept_adapter(0, 0)).space == encoder.space
    assert encoder_that_reads(tmp_path, concept_adapter(0, 0, base=None)).space == encoder.space
    with pytest.raises(RetrievalError, match="no weight encoder"):
        encoder_that_reads(tmp_path, concept_adapter(0, 0, base="elsewhere"))
    with pytest.raises(IncompatibleAdapters, match="30x16"):
        encoder_that_reads(tmp_path, concept_adapter(0, 0, width=30))
    with pytest.raises(RetrievalError, match=r"\(unknown\)"):
        encoder_that_reads(tmp_path, concept_adapter(0, 0, base=None, width=30))


def test_limits_are_checked(library: Catalog, encoder: WeightEncoder) -> None:
    with pytest.raises(BadOption, match="limit is 0"):
        describe(library, concept_adapter(0, 0), encoder, text(), limit=0)


# --- the map --------------------------------------------------------------------------------------------------------


def heaps(count: int, each: int = 12, dim: int = 20) -> np.ndarray:
    chance = np.random.default_rng(0)
    vectors = np.repeat(chance.normal(size=(count, dim)), each, axis=0) + 0.2 * chance.normal(size=(count * each, dim))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_what_is_alike_lies_together_every_time_in_one_place() -> None:
    vectors = heaps(3)
    placed = plane(vectors)
    np.testing.assert_array_equal(placed, plane(vectors.copy()))
    assert placed.min() == 0
    assert placed.max() == 1
    distances = np.linalg.norm(placed[:, None] - placed[None], axis=2)
    nearest = np.argsort(distances, axis=1)[:, 1:6]
    assert (nearest // 12 == np.arange(36)[:, None] // 12).all()


@pytest.mark.parametrize("count", [1, 2, 3, 11])
def test_few_or_equal_vectors_are_placed_too(count: int) -> None:
    assert np.isfinite(plane(heaps(1, count))).all()
    assert np.isfinite(plane(np.ones((count + 12, 4)) / 2)).all()


def test_themes_are_tags_or_the_nearest_tags_adapters() -> None:
    names = ("ink", "neon", "oil")
    some = [entry(f"n{k}", tags=("all", names[k // 12]) if k % 12 else ("all",)) for k in range(36)]
    assert themes(some, heaps(3)) == [names[k // 12] for k in range(36)]


def test_without_tags_heaps_are_called_by_their_words() -> None:
    said = ("ink drawings", "neon lights", "oil paintings")
    some = [entry(f"n{k}", description=said[k // 12]) for k in range(36)]
    found = themes(some, heaps(3))
    for k in range(3):
        assert any(str(theme).split(" (")[0] in said[k] for theme in found[12 * k : 12 * k + 12])
    assert themes(some[:5], heaps(3)[:5]) == [None] * 5


def test_the_catalogue_is_drawn_by_weights_and_by_text(library: Catalog, encoder: WeightEncoder) -> None:
    fill(library, text())
    fill_encoded(library, encoder)
    for space in ("text", encoder.space):
        drawn = points(library, [space])
        assert [one.entry.name for one in drawn] == sorted(entry.name for entry in library.entries())
        assert all(0 <= one.x <= 1 and 0 <= one.y <= 1 for one in drawn)
    assert {one.theme for one in drawn} == {words.split()[0] for words in CONCEPTS}
    assert all(one.theme in one.entry.tags for one in drawn if one.entry.tags)
    with pytest.raises(RetrievalError, match="expected at least 3"):
        points(library, ["nothing here"])


def test_a_picture_and_a_page_are_written_and_not_overwritten(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    names = ["<b>&\"'", "$x$", "a\x1bb", *(f"adapter-{k}" for k in range(25))]
    drawn = [
        Point(entry(n, description="x" * 300), *chance.random(2), ["ink", None][k % 2]) for k, n in enumerate(names)
    ]
    for name in ("map.png", "map.html"):
        save_map(drawn, tmp_path / name, title="<t> $")
        before = (tmp_path / name).read_bytes()
        with pytest.raises(TargetExists):
            save_map(drawn, tmp_path / name, title="t")
        save_map(drawn, tmp_path / name, title="<t> $", force=True)
        assert (tmp_path / name).read_bytes() == before
    with pytest.raises(BadOption, match=r"\.png or \.html"):
        save_map(drawn, tmp_path / "map.pdf", title="t")
    page = before.decode()
    assert page.count("<circle ") == len(drawn)
    assert page.count("<title>") == len(drawn) + 1
    assert "&lt;b&gt;&amp;&quot;" in page
    assert "<b>" not in page
    assert "\x1b" not in page


def test_names_that_are_written_do_not_overlap(tmp_path: Path) -> None:
    from lorahub.cli.plot_map import _figure
    from matplotlib.text import Annotation

    chance = np.random.default_rng(1)
    drawn = [Point(entry(f"a-long-name-of-{k}"), *chance.random(2) ** 3, "ink") for k in range(300)]
    figure = _figure(drawn, "t", 60)
    boxes = [one.get_window_extent() for one in figure.axes[0].texts if isinstance(one, Annotation)]
    assert 10 < len(boxes) <= 60
    assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])


def test_labels_start_far_apart() -> None:
    places = [(x / 10, y / 10) for x in range(11) for y in range(11)]
    chosen = [places[k] for k in spread(places, 4)]
    assert set(chosen) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert sorted(spread(places, 500)) == list(range(121))
    assert spread([], 3) == []

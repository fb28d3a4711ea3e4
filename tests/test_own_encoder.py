"""Laws of the user's own encoder: a killed fit goes on, strays are left out, and figures are of adapters not seen."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from concepts import BASE, CONCEPTS, concept_adapter, entry, shelf
from lorahub.hub.catalog import Catalog
from lorahub.hub.errors import BadOption, RetrievalError
from lorahub.hub.writing import save
from lorahub.index import fitting, own_encoder
from lorahub.index.encoders.text import text
from lorahub.index.fitted import described, said, telling_name
from lorahub.index.own_encoder import chance, evaluate, figures, fit_own

# --- what a catalogue offers ----------------------------------------------------------------------------------------


def test_several_bases_must_be_chosen_from(tmp_path: Path) -> None:
    with Catalog(tmp_path / "home") as catalog:
        list(catalog.add(shelf(tmp_path / "one", 2)))
        other = shelf(tmp_path / "two", 3, base="other-world")
        for number, path in enumerate(other):
            save(concept_adapter(number % 4, 50 + number, base="other-world"), path, force=True,
                 card=lambda: f"# {CONCEPTS[number % 4]}\n")  # fmt: skip # noqa: B023
        list(catalog.add(other))
        with pytest.raises(BadOption, match=f"--base, one of other-world, {BASE}"):
            described(catalog)
        base, some = described(catalog, "other-world")
        assert (base, len(some)) == ("other-world", 12)
        with pytest.raises(RetrievalError, match=r"\(nowhere\); the catalogue has none"):
            described(catalog, "nowhere")


def test_what_is_said_leaves_out_names_that_say_nothing() -> None:
    assert telling_name("WatercolorStyle_v2-fp16") == "Watercolor Style"
    for name in ("adapter_model", "lora-0012", "pytorch_lora_weights", "checkpoint-500", "a1b2c3d4"):
        assert telling_name(name) == ""
    full = entry("aqua-wash", title="Aqua", description="Soft  washes.", triggers=("aq1", "aq2"), tags=("style",))
    assert said(full) == ("Aqua", "Soft washes", "aq1, aq2", "style")
    assert said(entry("lora-7")) == ()
    assert said(entry("ink", tags=("Ink",))) == ("Ink",)
    assert said(full, dull={"style"}) == ("Aqua", "Soft washes", "aq1, aq2")


def test_a_tag_that_most_have_tells_nothing(stocked: Catalog) -> None:
    for entry_ in stocked.entries():
        stocked.tag(entry_.id, ["lora", *(["brush"] if "watercolor" in entry_.name else [])])
    _, shelf_ = described(stocked)
    for one in shelf_:
        assert not any("lora" in told for told in one.texts)
        assert ("brush" in one.texts) == ("watercolor" in one.entry.name)


# --- the fit --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stocked(tmp_path: Path) -> Iterator[Catalog]:
    with Catalog(tmp_path / "home") as catalog:
        list(catalog.add(shelf(tmp_path / "shelf", 4)))
        yield catalog


def small_settings() -> fitting.Settings:
    return fitting.Settings(steps=6, batch=8, look=2, save_every=2)


def test_a_killed_fit_goes_on_and_ends_the_same(stocked: Catalog) -> None:
    whole, path = fit_own(stocked, text(), kind="autolora", settings=small_settings())
    path.unlink()

    def stop(at: fitting.Progress) -> None:
        if at.stage == "fitting" and at.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_own(stocked, text(), kind="autolora", settings=small_settings(), progress=stop)
    [checkpoint] = path.parent.iterdir()
    assert checkpoint.suffix == ".checkpoint"
    seen: list[int] = []
    again, _ = fit_own(
        stocked, text(), kind="autolora", settings=small_settings(),
        progress=lambda at: seen.append(at.done) if at.stage == "fitting" else None,
    )  # fmt: skip
    assert min(seen) > 4
    assert again.space == whole.space
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_checkpoint_of_other_words_is_not_in_the_way(stocked: Catalog) -> None:
    def stop(at: fitting.Progress) -> None:
        if at.stage == "fitting" and at.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_own(stocked, text(), kind="autolora", settings=small_settings(), progress=stop)
    stocked.describe("robot-1", "entirely other words")
    _, path = fit_own(stocked, text(), kind="autolora", settings=small_settings())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_strays_do_not_prevent_a_fit(stocked: Catalog, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(concept_adapter(0, 77, width=30), tmp_path / "stray", card=lambda: "# Stray thing\n")
    list(stocked.add([tmp_path / "stray"]))
    shutil.rmtree(Path(stocked.entry("robot-5").locations[0]))
    stocked.rebase("legal-2", "tiny-world")
    encoder, _ = fit_own(stocked, text(), kind="ridge")
    assert len(encoder.told["seen"]) == 15
    assert "stray" in caplog.text
    assert "robot-5" in caplog.text


def test_new_adapters_judge_the_encoder_as_it_is(
    stocked: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, _ = fit_own(stocked, text(), kind="ridge")
    paths = [
        save(concept_adapter(n % 4, 300 + n), tmp_path / "new" / f"n{n}", card=card(CONCEPTS[n % 4])) for n in range(8)
    ]
    list(stocked.add(paths))
    monkeypatch.setattr(own_encoder, "_fitted", lambda *_: pytest.fail("fitted anew"))
    found = evaluate(stocked, encoder, text())
    assert (found.pool, found.queries, found.fits, found.seen) == (8, 4, 0, 16)
    assert found.found.recall[1] == 1.0
    silent = evaluate(stocked, replace(encoder, told={}), text())
    assert (silent.pool, silent.seen) == (24, None)


def test_no_adapter_is_judged_by_a_fit_that_saw_it(stocked: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, _ = fit_own(stocked, text(), kind="ridge")
    fitted, shelves = own_encoder._fitted, []

    def recorded(readable, *rest):
        shelves.append({one.entry.id for one, _ in readable})
        return fitted(readable, *rest)

    monkeypatch.setattr(own_encoder, "_fitted", recorded)
    found = evaluate(stocked, encoder, text(), folds=3)
    assert (found.pool, found.fits) == (16, 3)
    assert [sum(id_ in shelf for shelf in shelves) for id_ in stocked.ids()] == [2] * 16
    shelves.clear()
    once = evaluate(stocked, replace(encoder, kind="ridge"), text(), folds=1)
    assert once.pool == 16 - len(shelves[0])


def card(words: str) -> Callable[[], str]:
    return lambda: f"# {words}\n"


def test_figures_are_counted_by_hand() -> None:
    cosines = np.array([[0.9, 0.5, 0.1, 0.0], [0.1, 0.2, 0.3, 0.4]])
    fitting_ = np.array([[False, True, False, True], [False, False, False, True]])
    found = figures(cosines, fitting_)
    assert found.recall[1] == pytest.approx((0 + 1) / 2)
    assert found.recall[5] == 1.0
    assert found.reciprocal_rank == pytest.approx((1 / 2 + 1) / 2)


def test_chance_is_what_random_rankings_reach() -> None:
    draw = np.random.default_rng(0)
    fitting_ = draw.random((6, 15)) < 0.3
    fitting_[:, 0] = True
    runs = [figures(draw.random(fitting_.shape), fitting_) for _ in range(3000)]
    wanted = chance(fitting_)
    for depth in wanted.recall:
        assert np.mean([run.recall[depth] for run in runs]) == pytest.approx(wanted.recall[depth], abs=0.01)
    assert np.mean([run.reciprocal_rank for run in runs]) == pytest.approx(wanted.reciprocal_rank, abs=0.01)

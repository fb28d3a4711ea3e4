"""The digits world of the generation benchmark: words, pictures and splits, and that held-out pictures stay held."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_cells import Words

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


# --- words --------------------------------------------------------------------------------------------------------


def test_every_domain_has_its_own_descriptions_and_queries_are_new_sentences() -> None:
    from digits_tasks import described_domains, turned_domains

    domains = described_domains()
    assert len(domains) == len({one.name for one in domains}) == 48
    told = [said for one in domains for said in one.descriptions]
    asked = [said for one in domains for said in (*one.queries, *one.strange)]
    assert len(set(told)) == 48 * 16
    assert len(set(asked)) == 48 * 16
    assert not set(told) & set(asked)
    turns = turned_domains()
    assert [one.angle for one in turns] == [-angle for angle in range(-90, 91, 10)]
    assert not {said for one in turns for said in one.descriptions} & {said for one in turns for said in one.queries}


def test_strange_phrases_occur_in_no_description_and_the_usual_ones_do() -> None:
    from digits_tasks import FACTORS, described_domains

    told = " / ".join(said for one in described_domains() for said in one.descriptions)
    for factor in FACTORS:
        for phrases in factor.values():
            assert all(phrase in told for phrase in phrases.usual)
            assert not any(phrase in told for phrase in phrases.strange)


def test_splits_hold_out_combinations_of_values_that_are_taught() -> None:
    from digits_tasks import FACTORS, described_domains, split, turned_split

    splits = [split(number) for number in range(3)]
    assert splits == [split(number) for number in range(3)]
    assert all(one.held != other.held for one, other in combinations(splits, 2))
    for one in splits:
        assert (len(one.taught), len(one.held)) == (36, 12)
        assert sorted(one.taught + one.held) == list(range(48))
        values = [described_domains()[place].name.split(", ") for place in one.taught]
        assert all({found[at] for found in values} == set(factor) for at, factor in enumerate(FACTORS))
    turns = turned_split()
    assert all({place - 1, place + 1} <= set(turns.taught) for place in turns.held)


# --- pictures -----------------------------------------------------------------------------------------------------


def domain(**given: Any) -> Any:
    from digits_tasks import Domain

    return Domain("some", ("a digit",), ("a number",), **given)


def test_geometries_are_what_they_are_called() -> None:
    from digits_world import seen

    corner = torch.zeros(1, 16, 16)
    corner[0, 1, 2] = 1  # near the top left
    places = {"upright": (1, 2), "right": (2, 14), "left": (13, 1), "half": (14, 13), "mirror": (1, 13)}
    angles = {"upright": 0.0, "right": -90.0, "left": 90.0, "half": 180.0}
    for name, angle in angles.items():
        assert seen(corner, domain(angle=angle))[0][places[name]] == 1, name
    assert seen(corner, domain(mirror=True))[0][places["mirror"]] == 1
    assert seen(corner, domain(flip=True))[0, 14, 2] == 1


def test_a_tilt_goes_the_way_of_its_quarter_turn() -> None:
    from digits_world import turned

    top = torch.zeros(1, 16, 16)
    top[0, 2, 7:9] = 1
    columns = torch.arange(16.0)

    def centre(angle: float) -> float:
        found = turned(top, angle)[0]
        return float((found.sum(dim=0) * columns).sum() / found.sum())

    assert centre(35) < centre(0.5) < centre(-0.5) < centre(-35)
    assert torch.allclose(turned(top, 89.999), turned(top, 90), atol=0.02)


def test_polarity_blur_and_noise() -> None:
    from digits_world import digits, drawing, seen

    some = digits()[0][:5]
    assert torch.allclose(seen(some, domain(dark=True)), 1 - some)
    blurred = seen(some, domain(corruption="blurred"))
    assert blurred.var(dim=(1, 2)).lt(some.var(dim=(1, 2))).all()
    assert 0 <= float(blurred.min()) <= float(blurred.max()) <= 1
    noisy = drawing(domain(corruption="noisy"))
    assert torch.equal(noisy.test.pictures, drawing(domain(corruption="noisy")).test.pictures)
    draws = [noisy.learning(4)(0, torch.Generator().manual_seed(seed)).pictures for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_test_digits_are_never_learned_from() -> None:
    from digits_world import LEARNING, digits, drawing

    plain = drawing(domain())
    first = {picture.numpy().tobytes() for picture in digits()[0][:LEARNING]}
    drawn = plain.learning(200)(0, torch.Generator().manual_seed(0)).pictures
    assert {picture.numpy().tobytes() for picture in drawn} <= first
    assert {picture.numpy().tobytes() for picture in plain.probes(50).pictures} <= first
    assert len(plain.test.labels) == 797
    assert torch.equal(plain.test.pictures, digits()[0][LEARNING:])


# --- the model, the room ------------------------------------------------------------------------------------------


def test_the_reader_is_small_and_its_adapters_are_of_1728_numbers(tmp_path: Path) -> None:
    from digits_world import base, layout_of
    from generation_room import Room

    made = base(Room(tmp_path), [domain()], (1, 2))
    assert 55_000 < sum(part.numel() for part in made.model.parameters()) < 60_000
    assert made.model(torch.rand(3, 16, 16)).shape == (3, 10)
    assert layout_of(made).size == 1728


def test_things_are_made_once_and_named_by_what_they_are_made_from(tmp_path: Path) -> None:
    from generation_room import Room, digest

    room, made = Room(tmp_path), []

    def make() -> dict[str, torch.Tensor]:
        made.append(1)
        return {"a": torch.arange(3)}

    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})
    for recipe in ({"x": 1}, {"x": 1}, {"x": 2}):
        assert torch.equal(room.tensors("thing", recipe, make)["a"], torch.arange(3))
    assert len(made) == 2
    assert room.figures("row", {"x": 1}, lambda: [0.5]) == room.figures("row", {"x": 1}, lambda: [0.7]) == [0.5]


def test_what_was_stopped_leaves_nothing_half_made(tmp_path: Path) -> None:
    from generation_room import Room

    def stopped() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Room(tmp_path).figures("row", {}, stopped)
    assert Room(tmp_path).figures("row", {}, lambda: 1) == 1


def test_experts_are_kept_and_those_of_one_start_share_it(tmp_path: Path) -> None:
    from digits_world import Effort, base, experts
    from generation_room import Room

    room, effort = Room(tmp_path), Effort(experts=(2, 2), checkpoints=2, every=2)
    made = base(room, [domain()], (1, 2))
    some = [replace(domain(), name=name) for name in ("one", "two")]
    one, again, other, alone = (
        experts(room, made, some, effort, start=start, seed=seed)
        for start, seed in (("shared", 0), ("shared", 0), ("shared", 1), ("independent", 0))
    )
    assert torch.equal(one.vectors, again.vectors)
    assert one.vectors.shape == (2, 2, 1728)
    assert torch.equal(one.vectors[0], one.vectors[1])  # the same pictures in the same order, too
    assert not torch.equal(alone.vectors[0, 0], alone.vectors[1, 0])
    assert not torch.equal(one.vectors, other.vectors)
    assert len(list(tmp_path.glob("experts-*.safetensors"))) == 3


# --- rows ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cell that is hardly trained, on six of the domains."""
    import digits_tasks
    import generation_cell
    import generation_digits
    from digits_world import Effort
    from generation_room import Room
    from generation_world import Setting, Split

    domains = digits_tasks.described_domains()[::6][:8]
    monkeypatch.setattr(generation_digits, "described_domains", lambda: domains)
    monkeypatch.setattr(generation_digits, "split", lambda number: Split((0, 1, 2, 3, 4, 5), (6, 7)))
    monkeypatch.setattr(generation_cell, "text", lambda: Words("text", 8))
    monkeypatch.setattr(generation_cell, "token_states", lambda places: Words("text:tokens-1x4", 12))
    effort = Effort((1, 2), (1, 2), (2, 2), (1, 2), 2, 2)
    few = {
        "probes": 2,
        "tests": 3,
        "choice": 2,
        "queries": 2,
        "similarity": 2,
        "semantic": 2,
        "icm": 1,
        "regression": 2,
    }
    plan = replace(generation_digits.BRIEF, effort=effort, **few, hyper=2, hyper_samples=2)
    return generation_cell.Cell(Setting("A", "shared", 0, 0), plan, Room(tmp_path))


def test_no_row_looks_at_held_out_pictures_to_make_its_adapters(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import generation_rows
    from generation_cell import Cell

    desk, looked = generation_rows.Desk(small), []
    whole = Cell.tested

    def tested(cell: Any, vectors: Any, held: Any, **given: Any) -> Any:
        looked.append(1)
        return whole(cell, vectors, held, **given)

    monkeypatch.setattr(Cell, "tested", tested)
    for row in generation_rows.rows(small):
        looked.clear()
        made = row.make(desk)
        assert bool(looked) == (row.name == "best expert in hindsight"), row.name
        assert made.vectors.shape[:2] in {(2, 1), (2, 2)}, row.name
        assert torch.isfinite(made.vectors).all(), row.name


def test_a_cell_is_measured_row_by_row_and_goes_on_where_it_was_stopped(small: Any) -> None:
    import generation

    found = generation.measured(small.setting, small.plan, small.room.folder, small.sources)
    files = {path: path.stat().st_mtime_ns for path in small.room.folder.glob("row-*.json")}
    again = generation.measured(small.setting, small.plan, small.room.folder, small.sources)
    assert found == again
    assert len(files) == len(found["rows"])
    assert {path: path.stat().st_mtime_ns for path in small.room.folder.glob("row-*.json")} == files


def test_sums_of_deltas_are_exact(small: Any) -> None:
    from generation_methods import in_deltas

    layout, blend = in_deltas(small.layout, 8)
    weights, some = torch.tensor([0.5, 0.3, 0.2]), torch.randn(3, small.layout.size)
    made = layout.adapter(blend(some, weights))
    parts = [small.layout.adapter(vector) for vector in some]
    for name, module in made.modules.items():
        wanted = sum(weight * part.modules[name].dense() for weight, part in zip(weights, parts, strict=True))
        assert torch.allclose(module.dense(), wanted, atol=1e-5)


def test_shares_are_of_the_gain_over_all_held_out_tasks() -> None:
    from generation_tables import BESIDE, RIVALS, bars, by_task, tables, task_tables

    def cell(seed: int, best: float) -> dict[str, Any]:
        scores = {"base": [[0.2], [0.9]], "oracle": [[0.6], [0.92]], "hypernetwork": [[best, best], [0.9, 0.9]]}
        scores |= {key: [[0.2], [0.9]] for key in ("hypernetwork, wrong description", *BESIDE, *RIVALS)}
        rows = {name: {"scores": found, "seconds": [1, 2], "told": {}} for name, found in scores.items()}
        return {"base": "A", "start": "shared", "split": 0, "seed": seed, "held": ["first", "second"], "rows": rows}

    cells = [cell(0, 0.41), cell(1, 0.5)]
    [lines] = tables(cells).values()
    line = {one["row"]: one for one in lines}["hypernetwork"]
    assert line["recovered"] == pytest.approx((0.21 / 0.42 + 0.3 / 0.42) / 2)
    assert line["spread"] == pytest.approx(np.std([0.5, 0.3 / 0.42], ddof=1))
    assert by_task(cells[0], "hypernetwork") == {"first": pytest.approx(0.21 / 0.4)}  # the second has nothing to gain
    tasks = task_tables(cells)["A, shared"]
    assert set(tasks) == {"first"}
    assert tasks["first"]["nearest expert"] == 0
    assert tasks["first"]["hypernetwork"] == pytest.approx((0.21 / 0.4 + 0.3 / 0.4) / 2)
    met = {one["bar"]: one["met"] for one in bars(tables(cells), rivals=("nearest expert",))}
    assert met["A: hypernetwork recovers 50%"]
    assert met["A: hypernetwork beats nearest expert by more than the spread"]


def test_a_base_has_options_of_its_own_and_others_have_the_plans() -> None:
    from generation import settings
    from generation_digits import HYPER, PLAN
    from generation_world import adjusted

    for one in settings(2, 1, quick=False):
        plan = adjusted(PLAN, one)
        own = HYPER.get(one.base, {})
        assert {name: getattr(plan, name) for name in own} == own
        assert replace(plan, **{name: getattr(PLAN, name) for name in own}) == PLAN
    assert adjusted(PLAN, settings(1, 1, quick=False)[0]) == PLAN

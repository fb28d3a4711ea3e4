"""The retrieval benchmark: its figures agree with counting and with scikit-learn, its rows with dense numbers, encoders
learn from their part alone, and a pool that was half made goes on."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from lorahub.hub.adapter import Adapter
from lorahub.hub.lowrank import LowRank

ROOT = Path(__file__).resolve().parents[1]
FIRST = ("red", "green", "blue", "yellow", "silver", "black")
SECOND = ("dogs", "cars", "trees", "soup", "music")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def concepts() -> list:
    """Colours, things, and four pairs of the first of each."""
    from retrieval_splits import Concept

    def one(name: str, kind: str, halves: tuple[str, ...] = ()) -> Concept:
        told = (f"paints {name}", f"all about {name}", f"pictures of {name}")
        return Concept(name, kind, told, (name, f"show me {name}", f"something with {name}"), halves)

    alone = [one(name, "style") for name in FIRST] + [one(name, "content") for name in SECOND]
    return alone + [one(f"{a} {b}", "pair", (a, b)) for a, b in product(FIRST[:2], SECOND[:2])]


# --- figures --------------------------------------------------------------------------------------------------------


def test_places_by_hand() -> None:
    from retrieval_metrics import first_right, summary

    scores = np.array([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.2, 0.2, 0.2], [0.3, -np.inf, 0.1], [0.1, 0.2, 0.3]])
    right = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 1], [0, 0, 1], [0, 0, 0]], bool)
    places = first_right(scores, right)
    assert places.tolist() == [1, 2, 3, 2, 0]
    figures = summary(places)
    assert figures["recall@1"] == 0.25
    assert figures["recall@5"] == figures["recall@10"] == 1
    assert figures["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert summary(np.zeros(3, int)) == {}


def test_figures_agree_with_scikit_learn() -> None:
    from retrieval_metrics import first_right, summary
    from sklearn.metrics import label_ranking_average_precision_score, top_k_accuracy_score

    chance = np.random.default_rng(0)
    scores, aims = chance.standard_normal((200, 30)), chance.integers(0, 30, 200)
    right = aims[:, None] == np.arange(30)
    figures = summary(first_right(scores, right))
    for depth in (1, 5, 10):
        assert figures[f"recall@{depth}"] == pytest.approx(
            top_k_accuracy_score(aims, scores, k=depth, labels=np.arange(30))
        )
    assert figures["mrr"] == pytest.approx(label_ranking_average_precision_score(right, scores))


def test_chance_is_what_shuffling_gives() -> None:
    from retrieval_metrics import by_chance, first_right, summary

    chance = np.random.default_rng(1)
    cases = [(1, 7), (3, 12), (2, 3), (4, 40)]
    expected = by_chance(cases)
    places = []
    for right, size in cases:
        marks = np.arange(size)[None].repeat(20_000, 0) < right
        places.append(first_right(chance.random(marks.shape), marks))
    for name, value in summary(np.concatenate(places)).items():
        assert value == pytest.approx(expected[name], abs=0.005)
    assert by_chance([(0, 5)]) == {}
    assert by_chance([(0, 5), (1, 1)])["mrr"] == 1


def test_themes_by_hand() -> None:
    from retrieval_metrics import themes

    near = np.array([[1, 0.6, 0.1, 0.2], [0.6, 1, 0.3, 0.4], [0.1, 0.3, 1, 0.5], [0.2, 0.4, 0.5, 1]])
    everything = np.ones(4, bool)
    assert themes(near, ["a", "a", "b", "c"], everything) == pytest.approx(
        {"intra": 0.6, "inter": (0.1 + 0.2 + 0.3 + 0.4) / 4, "gap": 0.35}
    )
    first = themes(near, ["a", "a", "b", "c"], np.array([True, False, False, False]))
    assert first == pytest.approx({"intra": 0.6, "inter": 0.15, "gap": 0.45})
    assert themes(near, list("abcd"), everything) == {}


def test_spread_is_that_of_a_sample() -> None:
    from retrieval_metrics import spread

    runs = [{"a": 1.0, "b": 0.5}, {"a": 3.0}]
    assert spread(runs) == {"a": {"mean": 2.0, "spread": round(2**0.5, 4)}}


# --- rows -----------------------------------------------------------------------------------------------------------


def small(seed: int, rank: int, towards: torch.Tensor | None = None, names: tuple[str, ...] = ("m.0.q", "m.1.q")):
    """An adapter that writes to `towards` (12,) in every module."""
    chance, modules = torch.Generator().manual_seed(seed), {}
    for name in names:
        up = 0.1 * torch.randn(12, rank, generator=chance)
        if towards is not None:
            up = up + towards[:, None] * torch.randn(1, rank, generator=chance)
        modules[name] = LowRank(torch.randn(rank, 10, generator=chance), up, 0.5 + seed % 3)
    return Adapter(modules, "tests/small", meta={"name": str(seed)})


def test_flat_and_delta_cosines_are_those_of_the_dense_numbers() -> None:
    from retrieval_rows import delta, flat

    some = [small(0, 2), small(1, 4), small(2, 3, names=("m.0.q",)), small(3, 4)]
    near = delta(some)
    for row, one in enumerate(some):
        for column, other in enumerate(some):
            assert near[row, column] == pytest.approx(one.cosine(other), abs=1e-5)

    def vector(one: Adapter) -> torch.Tensor:
        parts = []
        for name in ("m.0.q", "m.1.q"):
            for side, width in (("down", 10), ("up", 12)):
                whole = torch.zeros(4, width)
                if name in one.modules:
                    factor = one.modules[name].down if side == "down" else one.modules[name].up.T
                    whole[: len(factor)] = factor
                parts.append(whole.flatten())
        return torch.nn.functional.normalize(torch.cat(parts), dim=0)

    vectors = torch.stack([vector(one) for one in some])
    assert np.allclose(flat(some), vectors @ vectors.T, atol=1e-6)


class ToyWorld:
    """Adapters that write to their concept's own directions. fails: how many copies are taught before a power cut."""

    name, base, stamp = "toys", "tests/small", "1"

    def __init__(self, concepts, fails: int | None = None) -> None:
        self.concepts, self.fails, self.taught = concepts, fails, 0

    def direction(self, name: str) -> torch.Tensor:
        from retrieval_splits import drawn

        halves = next(one.halves for one in self.concepts if one.name == name) or (name,)
        parts = [torch.randn(12, generator=torch.Generator().manual_seed(drawn(half))) for half in halves]
        return torch.stack(parts).sum(0)

    def teach(self, some):
        if self.fails is not None and self.taught >= self.fails:
            raise KeyboardInterrupt
        assert len({copy.steps for copy in some}) == 1
        self.taught += len(some)
        return [small(copy.seed % 1000, copy.rank, self.direction(copy.concept)) for copy in some]


def toys(room: Path, fails: int | None = None):
    from retrieval_pool import fill
    from retrieval_splits import copies

    world = ToyWorld(concepts(), fails)
    return world, copies(world.concepts, 3, (2, 4), (1, 2)), lambda some: fill(world, some, room, told=False)


def test_a_pool_goes_on_after_a_kill(tmp_path: Path) -> None:
    from retrieval_pool import TOGETHER

    _, wanted, fill = toys(tmp_path, fails=TOGETHER)
    with pytest.raises(KeyboardInterrupt):
        fill(wanted)
    world, wanted, fill = toys(tmp_path)
    pool = fill(wanted)
    assert pool.trained == world.taught == len(wanted) - TOGETHER
    again = fill(wanted)
    assert again.trained == 0
    for copy, one, other in zip(wanted, pool.adapters, again.adapters, strict=True):
        made = small(copy.seed % 1000, copy.rank, world.direction(copy.concept))
        assert one.cosine(other) == pytest.approx(1)
        assert one.cosine(made) == pytest.approx(1, abs=1e-5)
        assert one.norm() == pytest.approx(made.norm(), rel=1e-3)
        assert one.base == world.base


def test_what_an_adapter_is_made_from_decides_where_it_lies(tmp_path: Path) -> None:
    from retrieval_pool import place

    world, wanted, _ = toys(tmp_path)
    one = wanted[0]
    others = [replace(one, **change) for change in ({"rank": 9}, {"steps": 9}, {"seed": 9}, {"concept": "b"})]
    assert len({place(world, copy, tmp_path) for copy in [one, *others]}) == 5
    here = place(world, one, tmp_path)
    assert place(world, replace(one, number=7), tmp_path) == here
    world.stamp = "2"
    assert place(world, one, tmp_path) != here


@pytest.fixture
def bench(tmp_path: Path):
    from lorahub.index.encoders.text import text
    from retrieval_rows import Bench, Remembering

    world, wanted, fill = toys(tmp_path)
    return Bench(fill(wanted), world.concepts, Remembering(text()))


def test_encoders_learn_from_their_part_alone(bench) -> None:
    from retrieval_splits import split

    some = list(bench.concepts.values())
    parts = split(some, bench.pool.copies, 1)
    fitted = [row for row, part in enumerate(parts) if part == "fit"]
    learned = bench.examples(parts)
    assert [one.adapter for one in learned] == [bench.pool.adapters[row] for row in fitted]
    asked = {text for one in some for text in one.asked}
    assert not asked & {text for one in learned for text in one.texts}
    assert [one.group for one in learned] == [bench.pool.copies[row].concept for row in fitted]

    near = np.random.default_rng(0).random((len(parts), len(parts)), np.float32)
    before = bench.hops(near, parts)(["silver"])
    held = [row for row, part in enumerate(parts) if part != "fit"]
    bench.described[held] = bench.words.encode(["silver"])
    near[held] = 9
    assert np.array_equal(before, bench.hops(near, parts)(["silver"]))


def test_a_perfect_row_is_measured_as_one_and_a_blind_one_as_none(bench) -> None:
    from retrieval_rows import Ranking
    from retrieval_splits import HELD_BACK, split
    from retrieval_tables import Asked, over_seeds

    some = list(bench.concepts.values())
    parts = split(some, bench.pool.copies, 0)
    asked, names = Asked(bench, parts), np.array(bench.pool.names())
    owner = {text: one.name for one in some for text in one.asked}
    perfect = Ranking(
        (names[:, None] == names).astype(np.float32),
        lambda texts: np.array([[owner[text] == name for name in names] for text in texts], np.float32),
    )
    blind = Ranking(np.ones((len(names),) * 2, np.float32), lambda texts: np.ones((len(texts), len(names)), np.float32))
    best, worst, chance = asked.measured(perfect), asked.measured(blind), asked.chance()
    for part in HELD_BACK:
        for kind in ("own", "new", "all"):
            assert best["text"][part][kind] == dict.fromkeys(("recall@1", "recall@5", "recall@10", "mrr"), 1.0)
            assert 0 < chance["text"][part][kind]["recall@1"] <= 1
            assert chance["text"][part][kind].keys() == best["text"][part][kind].keys()
        assert best["adapter"][part]["all"]["mrr"] == 1
        assert worst["text"][part]["all"]["recall@1"] == 0
        assert chance["text"][part]["all"]["recall@5"] < 0.5
        assert best["themes"][part] == pytest.approx({"intra": 1, "inter": 0, "gap": 1})
    assert best["adapter"]["known"]["own"] == {}, "a known concept has one new adapter, which is no answer to itself"
    assert over_seeds([best, worst])["text"]["known"]["own"]["recall@1"]["mean"] == 0.5
    # three galleries, each within the next
    sizes = [len(asked.gallery(kind, "pairs")) for kind in ("own", "new", "all")]
    assert sizes == sorted(sizes)
    assert sizes[-1] == len(names)


def test_adapters_that_say_nothing_are_found_by_their_weights_alone(bench) -> None:
    from lorahub.index.fitting import fit
    from retrieval_sparse import sparse
    from retrieval_splits import split
    from retrieval_tables import Asked

    some = list(bench.concepts.values())
    parts = split(some, bench.pool.copies, 0)
    encoder = fit("ridge", bench.examples(parts), bench.words)
    lines = sparse(Asked(bench, parts), encoder, "tests/small", 0, most=15)
    assert [line["gone"] for line in lines] == [0.0, 0.5, 0.9, 1.0]
    without = [line["without"]["recall@5"] for line in lines]
    assert without[0] > 0.7
    assert without == sorted(without, reverse=True)
    assert without[-1] < 0.4, "names of digits alone are no words"
    assert lines[-1]["with weights"]["recall@5"] > 0.3

"""What the retrieval benchmark plans to train and to ask: enough of it, apart from one another, and of its concepts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SEEDS = range(4)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def worlds(brief: bool) -> list:
    from retrieval_pictures import PictureWorld
    from retrieval_sentences import SentenceWorld

    return [PictureWorld.of(Path("none"), brief), SentenceWorld.of(Path("none"), brief)]


def pools(brief: bool) -> list:
    """(concepts, copies) of both worlds, as the benchmark plans them."""
    from retrieval import COPIES, LENGTHS, QUICK_COPIES, QUICK_LENGTHS, RANKS
    from retrieval_splits import copies

    count = QUICK_COPIES if brief else COPIES
    return [
        (world.concepts, copies(world.concepts, count, RANKS, QUICK_LENGTHS if brief else LENGTHS[world.name]))
        for world in worlds(brief)
    ]


# --- what is planned ------------------------------------------------------------------------------------------------


def test_worlds_are_as_large_as_promised() -> None:
    for concepts, pool in pools(False):
        assert len(concepts) >= 60
        assert len(pool) >= 300
        assert len({copy.seed for copy in pool}) == len(pool)
        assert all(len(one.told) >= 3 and len(one.asked) >= 3 for one in concepts)
        for name in ("rank", "steps"):
            counts = Counter(getattr(copy, name) for copy in pool)
            assert len(counts) == 3
            assert max(counts.values()) < 1.3 * min(counts.values())
            for concept in concepts:
                assert len({getattr(copy, name) for copy in pool if copy.concept == concept.name}) == 3


def test_no_query_is_learned_from() -> None:
    from retrieval_splits import Concept, check

    for world in worlds(False):
        check(world.concepts)
        assert not {text.lower() for one in world.concepts for text in one.told} & {
            text.lower() for one in world.concepts for text in one.asked
        }
    with pytest.raises(ValueError, match="asked for and learned"):
        check([Concept("a", "style", ("x",), ("y",)), Concept("b", "style", ("y",), ("z",))])


@pytest.mark.parametrize("brief", [False, True])
def test_splits_keep_their_laws(brief: bool) -> None:
    from retrieval_splits import PARTS, split

    for concepts, pool in pools(brief):
        halves = {one.name: one.halves for one in concepts}
        found = [split(concepts, pool, seed) for seed in SEEDS]
        assert found == [split(concepts, pool, seed) for seed in SEEDS]
        assert len({tuple(parts) for parts in found}) == len(SEEDS)
        for parts in found:
            named = {part: {c.concept for c, own in zip(pool, parts, strict=True) if own == part} for part in PARTS}
            assert all(named.values()), "a part is empty"
            fit = named["fit"]
            met = fit | {half for name in fit for half in halves[name]}
            assert not named["unseen"] & met
            assert not {half for name in named["unseen"] for half in halves[name]}
            assert named["known"] == fit
            assert not named["pairs"] & fit
            for pair in named["pairs"]:
                for half in halves[pair]:
                    assert half in fit, "half of a new pair was never met alone"
                    left = sum(half in halves[name] for name in fit)
                    assert 2 * left >= sum(half in one.halves for one in concepts), "half of a new pair lost the others"
            assert {(c.concept, c.number) for c in pool} == {
                (one.name, n) for one in concepts for n in range(len(pool) // len(concepts))
            }


def test_queries_are_those_of_the_part() -> None:
    from retrieval_splits import queries, split

    concepts, pool = pools(True)[0]
    parts = split(concepts, pool, 0)
    for part in ("known", "pairs", "unseen"):
        names = {copy.concept for copy, own in zip(pool, parts, strict=True) if own == part}
        asked = queries(concepts, pool, parts, part)
        assert {name for _, name in asked} == names
        assert {text for text, _ in asked} == {text for one in concepts if one.name in names for text in one.asked}


def test_topics_cut_each_domain_into_thirds() -> None:
    from retrieval_pictures import wordings

    topics = wordings()["topic"].values()
    labels = [label for topic in topics for label in topic["labels"]]
    assert len(labels) == len(set(labels)) == 150
    assert set(Counter(topic["domain"] for topic in topics).values()) == {3}


# --- what is learned ------------------------------------------------------------------------------------------------


def art(artist: str, **kinds: int):
    """A few pictures for each subcategory; part "base" unless the subcategory names a content."""
    from picture_data import CONTENTS, Art, Name

    names = []
    for kind, count in kinds.items():
        sub = kind.replace("_", "-")
        part = next((content for content, (subs, _) in CONTENTS.items() if sub in subs), "base")
        names += [Name(f"{kind}{n}", f"{kind} {n}", "Objects", sub, part, False) for n in range(count)]
    names.append(Name("secret", "secret", "Objects", "tool", "judge", False))
    chance = np.random.default_rng(len(artist))
    return Art(artist, tuple(names), chance.integers(0, 256, (len(names), 64, 64, 4), dtype=np.uint8))


def test_copies_are_shown_their_concept(monkeypatch: pytest.MonkeyPatch) -> None:
    from picture_base import Captioned
    from retrieval_pictures import PictureWorld, partly

    read: list[tuple[list[str], list[str]]] = []

    def captioned(names, pixels, reader, templates):
        read.append(([name.words for name in names], list(templates)))
        ones = torch.arange(len(names))
        return Captioned(ones, ones, ones, ones)

    monkeypatch.setattr("retrieval_pictures.captioned", captioned)
    world = PictureWorld.of(Path("none"), True)
    vars(world).update(
        {
            "_google": art("google", animal_bird=6, tool=5, food_prepared=9),
            "_twitter": art("twitter", tool=7),
            "_sentences": None,
        }
    )
    known = {one.name: one for one in world.concepts}
    for name in ("watercolor", "bird", "tool", "watercolor bird"):
        world._data(known[name])
    style, content, drawn_by_another, pair = read
    assert set(style[0]) <= {f"{kind} {n}" for kind, count in (("tool", 5), ("food_prepared", 9)) for n in range(count)}
    assert set(content[0]) <= {f"animal_bird {n}" for n in range(6)}
    assert set(drawn_by_another[0]) <= {f"tool {n}" for n in range(7)}
    assert set(pair[0]) <= {f"animal_bird {n}" for n in range(6)}
    assert all("watercolor" in template for template in style[1] + pair[1])
    assert not any("watercolor" in template for template in content[1])
    assert all(len(names) <= 4 and "secret" not in names for names, _ in read)

    ones = torch.arange(40)
    shown = [set(partly(Captioned(ones, ones, ones, ones), seed).pictures.tolist()) for seed in range(2)]
    assert shown[0] != shown[1]
    assert {len(each) for each in shown} == {30}


def test_copies_of_a_pair_learn_labels_of_both_halves() -> None:
    from retrieval_sentences import LABELS, SentenceWorld

    world = SentenceWorld.of(Path("none"), True)
    tasks = {one.name for one in world.concepts if one.kind == "task"}
    world.__dict__["_all"] = {
        task: {f"{task} {n}": [f"sentence {n} {m}" for m in range(9)] for n in range(15)} for task in tasks
    }
    pair = next(one for one in world.concepts if one.halves)
    first, second = (world._piles(pair, seed) for seed in (1, 2))
    for piles in (first, second):
        assert len(piles) == LABELS
        assert Counter(next(h for h in pair.halves if label.startswith(h)) for label in piles) == dict.fromkeys(
            pair.halves, LABELS // 2
        )
        assert all(len(pile) == world.sentences for pile in piles.values())
    assert first.keys() != second.keys()
    assert world._piles(pair, 1) == first

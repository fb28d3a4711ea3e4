"""When a request is too far from a library: the limit follows from what it is measured against."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from lorahub.generate.abstaining import BETWEEN, FEWEST, UNRELATED, between, limit
from lorahub.generate.library import Expert, Library, far, open_library
from lorahub.generate.run import generate
from lorahub.hub.adapter import Adapter
from lorahub.hub.catalog import Catalog
from lorahub.hub.errors import Abstained
from lorahub.index.encoders.text import text
from schooling import Words, expert

ROOT = Path(__file__).resolve().parents[1]
REQUESTS = tomllib.loads((ROOT / "benchmarks/abstention.toml").read_text(encoding="utf-8"))
TASKS = json.loads((ROOT / "cli/example/tasks.json").read_text(encoding="utf-8"))


def circle(*degrees: float) -> np.ndarray:
    turns = np.radians(np.array(degrees))
    return np.stack([np.cos(turns), np.sin(turns)], axis=1).astype(np.float32)


def test_the_limit_lies_between_unrelated_requests_and_the_librarys_own_tasks() -> None:
    vectors = circle(*range(0, 10 * FEWEST, 10))  # each has a neighbour ten degrees away
    found = between(vectors, np.array([0.1, 0.2, 0.9], np.float32))
    assert found.unrelated == pytest.approx(0.2)
    assert found.own == pytest.approx(np.cos(np.radians(10)), abs=1e-6)
    assert found.value == pytest.approx((1 - BETWEEN) * found.unrelated + BETWEEN * found.own)


def test_a_few_requests_that_fit_the_library_do_not_move_it() -> None:
    vectors, reached = circle(*range(0, 10 * FEWEST, 10)), np.linspace(0, 0.4, 41, dtype=np.float32)
    fitting = np.where(reached > 0.35, 1.0, reached)
    assert between(vectors, fitting) == between(vectors, reached)


def test_a_small_or_scattered_library_is_judged_by_unrelated_requests_alone() -> None:
    reached = np.array([0.0, 0.1, 0.2, 0.3, 0.4], np.float32)
    firm = 0.2 + 3 * 1.4826 * 0.1
    few, scattered = between(circle(0, 1, 2), reached), between(np.eye(FEWEST, dtype=np.float32), reached)
    assert (few.value, few.own) == (pytest.approx(firm), None)
    assert (scattered.value, scattered.own) == (pytest.approx(firm), 0.0)


def library(*names: str) -> Library:
    words, adapters = Words(), {name: expert(name, row) for row, name in enumerate(names)}
    known = tuple(Expert(name, name, name, lambda name=name: adapters[name]) for name in names)
    vectors = words.encode(list(names))
    return Library("tiny", known, vectors, limit(vectors, words).value)


def test_what_the_library_says_of_itself_is_never_refused_and_force_is_recorded() -> None:
    shelf, words = library("red fox", "grey owl", "brown bear"), Words()
    for known in shelf.experts:
        made = generate(shelf, known.description, words)
        assert (made.similarity, made.forced) == (pytest.approx(1.0, abs=1e-5), False)
    request = min(UNRELATED, key=lambda said: float(shelf.similarities(words.encode([said])[0]).max()))
    for method in ("blend", "nearest"):
        with pytest.raises(Abstained, match="insist with --force"):
            generate(shelf, request, words, method=method)
        made = generate(shelf, request, words, method=method, force=True)
        assert made.forced
        assert made.similarity < shelf.close
        assert isinstance(made.adapter, Adapter)
    assert Abstained.exit_code == 3


def test_the_written_requests_are_new_and_cover_every_task() -> None:
    assert list(REQUESTS["near"]) == sorted(task["name"] for task in TASKS)
    near, away = ([said for some in REQUESTS[kind].values() for said in some] for kind in ("near", "far"))
    assert len(set(near)) == len(set(away)) == 100
    copied = {said for task in TASKS for said in (task["description"], *task["queries"])}
    copied |= set(tomllib.loads((ROOT / "benchmarks/example_tasks.toml").read_text(encoding="utf-8")))
    assert not copied & {*near, *away, *UNRELATED}


def test_the_built_in_library_serves_near_and_refuses_far_requests(tmp_path: Path) -> None:
    """On a part of the test half: every tenth request; the whole is benchmarks/abstention.py."""
    encoder = text()
    with Catalog(tmp_path / "home") as catalog:
        list(catalog.add([ROOT / "cli/example" / task["name"] for task in TASKS]))
        shelf = open_library(catalog, encoder)
    near, away = ([said for some in REQUESTS[kind].values() for said in some][1::10] for kind in ("near", "far"))
    assert sum(far(shelf, vector) is not None for vector in encoder.encode(near)) <= 1
    assert sum(far(shelf, vector) is not None for vector in encoder.encode(away)) >= 9

"""What evaluations say: which way to generate, and how much to hope for."""

from __future__ import annotations

from pathlib import Path

import pytest
from lorahub.generate.choosing_method import (
    FEWEST,
    NEIGHBOURS,
    PLAIN,
    Evaluation,
    Trial,
    choose,
    estimate,
    evaluation_path,
    forget,
    save,
    stored,
)
from lorahub.hub.errors import FormatError


def evaluation(count: int = 20) -> Evaluation:
    """Tasks with similarities 0, 0.05 ...: "near" gains what the similarity is, "far" nothing, own experts gain 2."""
    trials = [
        Trial(f"t{at}", "ask", at / 20, 1.0, 3.0, {"near": 1.0 + at / 20, "far": 1.0, "blend": 1.1})
        for at in range(count)
    ]
    return Evaluation("owner/Base", "points", 4, tuple(trials), {"near": 1.5})


def test_the_best_of_what_is_there_is_chosen_and_what_was_not_judged_is_named() -> None:
    method, why = choose(evaluation(), ["near", "blend", "new"])
    assert method == "near"
    assert "20 tasks" in why
    assert "24%" in why  # mean gain 0.475 of 2
    assert "not evaluated: new" in why
    assert choose(evaluation(), ["far", "blend"])[0] == "blend"
    for nothing in (None, Evaluation("b", "m", 2, ())):
        assert choose(nothing, ["near", "blend"])[0] == PLAIN
    assert choose(evaluation(), ["new"])[0] == PLAIN


def test_an_estimate_rests_on_the_tasks_of_the_most_alike_similarity() -> None:
    for similarity, places in ((0.0, range(NEIGHBOURS)), (2.0, range(20 - NEIGHBOURS, 20))):
        found = estimate(evaluation(), "near", similarity)
        assert found is not None
        wanted = sum(at / 20 for at in places) / NEIGHBOURS
        assert (found.gain, found.share, found.tasks) == (
            pytest.approx(wanted), pytest.approx(wanted / 2), NEIGHBOURS,
        )  # fmt: skip
    assert estimate(evaluation(), "new", 0.5) is None
    assert estimate(None, "near", 0.5) is None
    assert estimate(evaluation(FEWEST - 1), "near", 0.5) is None


def test_an_evaluation_is_kept_whole_and_a_new_fit_forgets_the_old_ones(tmp_path: Path) -> None:
    assert stored(tmp_path, "base") is None
    forget(tmp_path, "base", "near")
    save(evaluation(), evaluation_path(tmp_path, "owner/Base"))
    assert stored(tmp_path, "base") == evaluation()
    forget(tmp_path, "base", "near")
    left = stored(tmp_path, "base")
    assert left is not None
    assert sorted(left.methods) == ["blend", "far"]
    evaluation_path(tmp_path, "base").write_text("{}")
    with pytest.raises(FormatError, match="is no evaluation"):
        stored(tmp_path, "base")

"""The merging benchmark chooses on validation sentences alone, and no task's held-out sentences are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("a", "b")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


class Bench:
    """In place of the workers: a recipe's accuracy is known, best at weight 0.7 and a density of 0.8, where it
    differs from seed to seed."""

    def __init__(self) -> None:
        self.jobs: list = []

    def __call__(self, jobs: Sequence) -> list:
        from merging_judge import Outcome

        self.jobs += jobs
        return [Outcome({task: self.accuracy(job) for task in job.tasks}, norm=self.norm(job)) for job in jobs]

    def accuracy(self, job) -> float:
        if job.recipe.tool == "none":
            return 0.8
        options = dict(job.recipe.options)
        seed = job.library[0].seed
        return 0.7 - abs(job.recipe.weight - 0.7) / 10 - abs(options.get("density", 0.8) - 0.8) / 10 + seed / 100

    def norm(self, job) -> float:
        return job.recipe.weight * dict(job.recipe.options).get("density", 1.0)


def searched(bench: Bench, *, seeds: int = 3):
    from merging_experts import uniform
    from merging_search import Row, Search

    rows = [
        Row("plain", "lorahub", "exact"),
        Row("dense", "lorahub", "ties", ({"density": 0.2}, {"density": 0.8})),
        Row("fixed", "lorahub", "exact", fixed=0.5),
    ]
    libraries = [uniform(TASKS, seed) for seed in range(seeds)]
    return {row.label: choice for row, choice in Search(libraries, bench).choose(rows).items()}


def test_choosing_sees_validation_sentences_only() -> None:
    from merging_judge import VALIDATION

    bench = Bench()
    searched(bench)
    assert {job.split for job in bench.jobs} == {VALIDATION}


def test_the_best_mean_over_all_seeds_is_chosen() -> None:
    choices = searched(Bench())
    assert choices["plain"].recipe.weight == 0.7
    assert dict(choices["dense"].recipe.options) == {"density": 0.8}
    assert choices["dense"].recipe.weight == 0.7
    assert choices["fixed"].recipe.weight == 0.5
    for choice in choices.values():
        complete = {recipe: mean(scores) for recipe, scores in choice.tries.items() if len(scores) == 3}
        assert choice.score == max(complete.values()) == complete[choice.recipe]


def test_a_recipe_that_wins_on_the_first_seed_only_is_not_chosen() -> None:
    class Lucky(Bench):
        def accuracy(self, job) -> float:
            lucky = job.recipe.weight == 0.7 and not job.library[0].seed
            return super().accuracy(job) if lucky or job.recipe.weight != 0.7 else 0.1

    choice = searched(Lucky())["plain"]
    assert max(choice.tries, key=lambda recipe: choice.tries[recipe][0]).weight == 0.7
    assert choice.recipe.weight != 0.7


def test_other_options_are_tried_at_the_norm_of_the_best() -> None:
    """Density 0.2 is best at weight 0.7, with norm 0.14: density 0.8 has it at 0.175, and 0.2 is nearest to that."""
    tries = searched(Bench())["dense"].tries
    first = next(recipe for recipe in tries if dict(recipe.options)["density"] == 0.8)
    assert first.weight == 0.2


def test_what_refuses_is_left_out() -> None:
    class Refusing(Bench):
        def __call__(self, jobs: Sequence) -> list:
            found = super().__call__(jobs)
            return [
                replace(one, accuracy={}, refused="no") if job.recipe.method == "ties" else one
                for one, job in zip(found, jobs, strict=True)
            ]

    choices = searched(Refusing())
    assert choices["dense"].refused == "no"
    assert not choices["plain"].refused


def test_held_out_sentences_are_in_no_training_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sources give overlapping sentences here, spelled differently."""
    import merging_tasks
    from example_sources import letters

    def read(folder: Path, part: str, labels: Sequence[str]):
        names = labels or ("one", "two")
        words = ("red", "green", "blue", "black", "white", "pink", "grey", "brown")
        texts = [" ".join(each) for each in product(words, repeat=4)][len(str(folder)) :]
        marks = [text.replace(" ", " - ") if len(part) % 2 else text for text in texts]
        pairs = [(text, names[number % len(names)]) for number, text in enumerate(marks)]
        return pairs[:3000], pairs[2500:]

    for name, source in merging_tasks.SOURCES.items():
        monkeypatch.setitem(merging_tasks.SOURCES, name, replace(source, read=read))
    monkeypatch.setattr(merging_tasks, "MPQA", replace(merging_tasks.MPQA, read=read))
    trials = merging_tasks.suite(Path("data")).values()
    tests, validations, lessons = (
        {letters(sentence) for trial in trials for sentence in pick(trial)}
        for pick in (
            lambda trial: trial.test.sentences,
            lambda trial: trial.validation.sentences,
            lambda trial: [sentence for sentence, _ in trial.lesson.train],
        )
    )
    assert tests
    assert validations
    assert lessons
    assert not tests & validations
    assert not (tests | validations) & lessons


def test_mixed_ranks_are_dealt_evenly() -> None:
    from merging_experts import MIXED_RANKS, mixed

    libraries = [mixed(tuple("abcdefgh"), seed) for seed in range(3)]
    for library in libraries:
        assert sorted(expert.rank for expert in library) == sorted(2 * MIXED_RANKS)
    assert all(one != other for one, other in pairwise([[e.rank for e in library] for library in libraries]))

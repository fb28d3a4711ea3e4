"""The parts of merging.py's report: references, the main table, mixed ranks, fewer adapters."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

from merging_experts import Expert, mixed, multitask, uniform
from merging_judge import TEST, Job, Outcome, Recipe
from merging_rows import COMPARED, rows
from merging_search import Choice, Library, Measure, Row, Search, normalised

COUNTS = (2, 4)
BARE = Recipe("none")
Scores = Mapping[str, float]
Line = dict[str, Any]


class Study:
    """All measurements of one run; `tasks` have experts, `others` have none. seconds: what each part took."""

    def __init__(
        self, measure: Measure, tasks: Sequence[str], others: Sequence[str], seeds: int, *, brief: bool = False
    ) -> None:
        self.tasks, self.others, self.brief = tuple(tasks), tuple(others), brief
        self.seeds = range(seeds)
        self.seconds: dict[str, int] = {}
        self._measure = measure

    def report(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        table = rows(len(self.tasks), brief=self.brief)
        libraries = [uniform(self.tasks, seed) for seed in self.seeds]
        patchwork = [mixed(self.tasks, seed) for seed in self.seeds]
        with self._timed("references"):
            references, rounding = self._references(libraries), self._rounding()
        with self._timed("choosing"):
            choices = Search(libraries, self._measure).choose(table)
            recipes = {row.label: choices[row].recipe for row in table if not choices[row].refused}
            compared = {label: recipe for label, recipe in recipes.items() if label in COMPARED}
        with self._timed("main table"):
            lines = self._lines(recipes, libraries, self.others)
        with self._timed("as they come"):
            untouched = {row.label: as_it_comes(row) for row in table if row.label in compared}
            plain = self._lines(untouched, libraries)
        with self._timed("mixed ranks"):
            uneven = self._lines(compared, patchwork)
        with self._timed("fewer adapters"):
            known = {row: choices[row] for row in table if row.label in compared}
            fewer = {count: self._fewer(count, known) for count in COUNTS if count < len(self.tasks)}
        return {
            "tasks": self.tasks,
            "others": self.others,
            "seeds": len(self.seeds),
            "rounding": rounding,
            "references": references,
            "rows": lines,
            "as they come": plain,
            "choices": {row.label: described(choices[row]) for row in table},
            "mixed ranks": {"ranks": [[expert.rank for expert in one] for one in patchwork], "rows": uneven},
            "fewer adapters": fewer,
        }

    def _references(self, libraries: Sequence[Library]) -> list[Line]:
        """The bare model, the experts by themselves, and an adapter that was trained on all tasks."""
        own, tasks = self._own(libraries), (*self.tasks, *self.others)
        bare = self._test([()] * len(self.seeds), tasks)
        lines = [line("bare model", bare, own, self.others)]
        alone = [self._test([(expert,) for expert in library], tasks) for library in libraries]
        for number, task in enumerate(self.tasks):
            singles = [outcomes[number] for outcomes in alone]
            lines.append(line(f"expert for {task}", singles, own, self.others))
        every = [multitask(seed) for seed in self.seeds]
        outcomes = self._test([(expert,) for expert in every], tasks)
        lines.append(line(f"trained on all tasks, rank {every[0].rank}", outcomes, own, self.others))
        return lines

    def _rounding(self) -> dict[str, float]:
        """By how much measuring in bfloat16 moves a task's accuracy: the adapter trained on all tasks."""
        libraries = [(multitask(0),)]
        tasks = (*self.tasks, *self.others)
        half, full = (self._test(libraries, tasks, bfloat16=bfloat16) for bfloat16 in (True, False))
        moves = [a.accuracy[t] - b.accuracy[t] for a, b in zip(half, full, strict=True) for t in tasks]
        return {"mean": mean(moves), "largest": max(map(abs, moves))}

    def _own(self, libraries: Sequence[Library]) -> list[Scores]:
        """For each seed, what every expert reaches on its own task."""
        return [
            {expert.task: self._test([(expert,)], (expert.task,))[0].accuracy[expert.task] for expert in library}
            for library in libraries
        ]

    def _lines(
        self, recipes: Mapping[str, Recipe], libraries: Sequence[Library], others: Sequence[str] = ()
    ) -> list[Line]:
        """A line for each recipe: the merge of every seed's library on the library's tasks and on `others`."""
        own = self._own(libraries)
        jobs = [
            Job(recipe, library, (*(expert.task for expert in library), *others), TEST, True)
            for recipe in recipes.values()
            for library in libraries
        ]
        outcomes, count = self._measure(jobs), len(libraries)
        return [
            {"weight": recipe.weight, **line(label, outcomes[count * number : count * (number + 1)], own, others)}
            for number, (label, recipe) in enumerate(recipes.items())
        ]

    def _fewer(self, count: int, known: Mapping[Row, Choice]) -> list[Line]:
        """`count` experts, drawn by the seed; options as chosen for all of them, weights chosen anew."""
        draws = [random.Random(f"{count} of {seed}").sample(self.tasks, count) for seed in self.seeds]
        libraries = [uniform([task for task in self.tasks if task in draw], seed) for seed, draw in enumerate(draws)]
        again = [
            replace(row, grid=(dict(choice.recipe.options),), fixed=row.fixed and 1 / count)
            for row, choice in known.items()
        ]
        choices = Search(libraries, self._measure).choose(again)
        return self._lines({row.label: choices[row].recipe for row in again}, libraries)

    def _test(
        self, libraries: Sequence[tuple[Expert, ...]], tasks: Sequence[str], *, bfloat16: bool = True
    ) -> list[Outcome]:
        return self._measure([Job(BARE, library, tuple(tasks), TEST, bfloat16) for library in libraries])

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = round(time.perf_counter() - start)
        print(f"  {part}: {self.seconds[part]} s", flush=True)


def as_it_comes(row: Row) -> Recipe:
    """The method with its default options and weight 1; PEFT's have no default density, so theirs is the first."""
    return row.recipe({} if row.tool == "lorahub" else row.grid[0], row.fixed or 1.0)


def line(label: str, outcomes: Sequence[Outcome], own: Sequence[Scores], others: Sequence[str]) -> Line:
    """The figures of one row, an outcome for each seed."""
    refused = next((outcome.refused for outcome in outcomes if outcome.refused), "")
    if refused:
        return {"row": label, "refused": refused}
    found = {
        "row": label,
        "normalised": spread([normalised(one.accuracy, mine) for one, mine in zip(outcomes, own, strict=True)]),
        "by task": _by_task(outcomes, own),
        "rank": outcomes[0].rank,
        "seconds": round(mean(one.seconds for one in outcomes), 3),
    }
    if others:
        found["others"] = spread([mean(one.accuracy[task] for task in others) for one in outcomes])
        found["by other"] = {task: round(mean(one.accuracy[task] for one in outcomes), 4) for task in others}
    return found


def _by_task(outcomes: Sequence[Outcome], own: Sequence[Scores]) -> dict[str, float]:
    """Mean normalised accuracy over the seeds; with subsets, over those seeds that have the task."""
    ratios: dict[str, list[float]] = {}
    for one, mine in zip(outcomes, own, strict=True):
        for task, reached in mine.items():
            ratios.setdefault(task, []).append(one.accuracy[task] / reached)
    return {task: round(mean(values), 4) for task, values in ratios.items()}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds, and the values."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(mean(values), 4), "spread": round(deviation, 4), "seeds": [round(v, 4) for v in values]}


def described(choice: Choice) -> dict[str, Any]:
    """What was chosen, and all that was tried."""
    if choice.refused:
        return {"refused": choice.refused}
    tries = [
        {**dict(recipe.options), "weight": recipe.weight, "scores": [round(score, 4) for score in scores]}
        for recipe, scores in choice.tries.items()
    ]
    chosen = choice.recipe
    return {"options": dict(chosen.options), "weight": chosen.weight, "score": round(choice.score, 4), "tries": tries}

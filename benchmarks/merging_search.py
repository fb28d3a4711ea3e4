"""How merging.py chooses a method's options and the weight that all adapters get: on validation sentences alone.

Every row of the table has the same plan. On the first seed: (1) four weights from 0.1 to 3 with the first options of
the row's grid, (2) the weights beside the best one, until none is better, (3) the other options, each at the weight
that gives it the norm of the best so far, (4) for the best options the weights beside theirs, until none is better.
(5) The two best of all these tries are measured on the other seeds as well, and the best mean over all seeds is
taken, one setting for all seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from merging_experts import Expert
from merging_judge import VALIDATION, Job, Outcome, Recipe

WEIGHTS = (0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)
COARSE = (0.1, 0.3, 1.0, 3.0)
FINALISTS = 2
Library = tuple[Expert, ...]
Measure = Callable[[Sequence[Job]], list[Outcome]]


@dataclass(frozen=True, eq=False)
class Row:
    """A line of the table: a method of lorahub or of PEFT and the options to choose from. fixed: this weight only."""

    label: str
    tool: str
    method: str
    grid: tuple[Mapping[str, Any], ...] = ({},)
    fixed: float | None = None

    def recipe(self, options: Mapping[str, Any], weight: float) -> Recipe:
        return Recipe(self.tool, self.method, tuple(sorted(options.items())), weight)


@dataclass(frozen=True)
class Choice:
    """What validation chose for a row, and every try: mean normalised accuracy for each seed that was measured."""

    recipe: Recipe
    score: float
    tries: Mapping[Recipe, list[float]]
    refused: str = ""


class Search:
    """Scores recipes on validation sentences, where an expert's own accuracy on its own task is 1."""

    def __init__(self, libraries: Sequence[Library], measure: Measure, *, bfloat16: bool = True) -> None:
        self.libraries, self._measure, self._bfloat16 = libraries, measure, bfloat16
        self.tries: dict[Row, dict[Recipe, list[float]]] = {}
        self.refused: dict[Row, str] = {}
        self._asked: set[tuple[Row, Recipe]] = set()
        self._own = [self._experts(library) for library in libraries]

    def choose(self, rows: Sequence[Row]) -> dict[Row, Choice]:
        """All rows step by step together, so that no worker waits."""
        self.tries = {row: {} for row in rows}
        searched = [row for row in rows if row.fixed is None]
        self._try([(row, row.recipe(row.grid[0], row.fixed)) for row in rows if row.fixed is not None])
        self._try([(row, row.recipe(row.grid[0], weight)) for row in searched for weight in COARSE])
        self._beside(searched)
        self._try(self._as_large(self._alive(searched)))
        self._beside([row for row in searched if len(row.grid) > 1])
        for seed in range(1, len(self.libraries)):
            finalists = [(row, recipe) for row in self._alive(rows) for recipe in self._ranked(row)[:FINALISTS]]
            self._try(finalists, seed)
        return {row: self._choice(row) for row in rows}

    def _experts(self, library: Library) -> dict[str, float]:
        """Every expert's accuracy on its own task."""
        bare = Recipe("none")
        jobs = [Job(bare, (expert,), (expert.task,), VALIDATION, self._bfloat16) for expert in library]
        return {task: accuracy for outcome in self._measure(jobs) for task, accuracy in outcome.accuracy.items()}

    def _beside(self, rows: Sequence[Row]) -> None:
        """The weights below and above the best one, until none is better."""
        while rows:
            wanted = [(row, recipe) for row in self._alive(rows) for recipe in _neighbours(self._ranked(row)[0])]
            wanted = [(row, recipe) for row, recipe in wanted if (row, recipe) not in self._asked]
            self._try(wanted)
            rows = list(dict.fromkeys(row for row, _ in wanted))

    def _as_large(self, rows: Sequence[Row]) -> list[tuple[Row, Recipe]]:
        """The rows' other options, weighted so that their result has the norm of the best one (every method scales
        with its weights)."""
        others = [(row, row.recipe(options, 1.0)) for row in rows for options in row.grid[1:]]
        sizes = self._norms([recipe for _, recipe in others])
        best = self._norms([self._ranked(row)[0] for row, _ in others])
        return [
            (row, replace(recipe, weight=min(WEIGHTS, key=lambda weight: abs(math.log(weight * own / norm)))))
            for (row, recipe), own, norm in zip(others, sizes, best, strict=True)
            if own
        ]

    def _norms(self, recipes: Sequence[Recipe]) -> list[float]:
        return [
            one.norm for one in self._measure([Job(recipe, self.libraries[0], (), VALIDATION) for recipe in recipes])
        ]

    def _try(self, wanted: Sequence[tuple[Row, Recipe]], seed: int = 0) -> None:
        new = [(row, recipe) for row, recipe in wanted if len(self.tries[row].get(recipe, [])) == seed]
        self._asked.update(new)
        library = self.libraries[seed]
        tasks = tuple(expert.task for expert in library)
        outcomes = self._measure([Job(recipe, library, tasks, VALIDATION, self._bfloat16) for _, recipe in new])
        for (row, recipe), outcome in zip(new, outcomes, strict=True):
            if outcome.refused:
                self.refused[row] = outcome.refused
            else:
                score = normalised(outcome.accuracy, self._own[seed])
                self.tries[row].setdefault(recipe, []).append(score)

    def _alive(self, rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if self.tries[row]]

    def _ranked(self, row: Row) -> list[Recipe]:
        """Best first, by the first seed, on which all were tried."""
        tries = self.tries[row]
        return sorted(tries, key=lambda recipe: -tries[recipe][0])

    def _choice(self, row: Row) -> Choice:
        tries = self.tries[row]
        if not tries:
            return Choice(Recipe("none"), 0.0, {}, self.refused.get(row, "nothing was tried"))
        complete = [recipe for recipe, scores in tries.items() if len(scores) == len(self.libraries)]
        best = max(complete, key=lambda recipe: mean(tries[recipe]))
        return Choice(best, mean(tries[best]), tries)


def _neighbours(recipe: Recipe) -> list[Recipe]:
    place = WEIGHTS.index(recipe.weight)
    return [replace(recipe, weight=WEIGHTS[i]) for i in (place - 1, place + 1) if 0 <= i < len(WEIGHTS)]


def normalised(accuracy: Mapping[str, float], own: Mapping[str, float]) -> float:
    """The mean over the tasks of accuracy / accuracy of the task's own expert."""
    return mean(accuracy[task] / own[task] for task in own)

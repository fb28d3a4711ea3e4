"""What is merged and measured in merging.py: recipes, and the worker that carries one out and counts right answers.

Every worker holds the model and the tasks, and uses one thread, so that figures do not depend on how many there are.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lorahub.generate.sentences import SentenceModel, SentenceTask
from lorahub.hub.adapter import Adapter
from lorahub.hub.reading import read
from lorahub.merge.run import merge
from merging_experts import Expert, teach
from merging_peft import combined
from merging_tasks import Trial, suite

Options = tuple[tuple[str, Any], ...]
VALIDATION, TEST = "validation", "test"


@dataclass(frozen=True)
class Recipe:
    """How adapters become one. tool: "lorahub" or "peft", whose `method` gets the options; "shuffled", lorahub's on
    deltas that were dealt to other modules; "none", the bare model or the only adapter of a library."""

    tool: str
    method: str = ""
    options: Options = ()
    weight: float = 1.0  # of every adapter


@dataclass(frozen=True)
class Job:
    """A recipe for a library, measured on one split of some tasks."""

    recipe: Recipe
    library: tuple[Expert, ...]
    tasks: tuple[str, ...]
    split: str
    bfloat16: bool = False


@dataclass(frozen=True)
class Outcome:
    """Accuracy by task; the merge's seconds, the rank of the result (the largest of its modules) and its norm."""

    accuracy: Mapping[str, float]
    seconds: float = 0.0
    rank: int = 0
    norm: float = 0.0
    refused: str = ""


@dataclass(frozen=True)
class Workplace:
    """What a worker needs to know."""

    data: Path
    room: Path
    tasks: tuple[str, ...]
    steps: int
    limit: int  # sentences of a split that are measured


class _Held:
    """The worker's workplace, model and tasks."""

    place: Workplace
    model: SentenceModel
    trials: Mapping[str, Trial]


def enter(place: Workplace) -> None:
    """Sets a worker up."""
    torch.set_num_threads(1)
    _Held.place, _Held.model, _Held.trials = place, SentenceModel(), suite(place.data, place.tasks)


def trained(expert: Expert, tasks: Sequence[str]) -> str:
    """Trains one expert on its task, or on all of `tasks`."""
    lessons = [_Held.trials[name].lesson for name in tasks if expert.task in (name, "all-tasks")]
    return teach(_Held.model, expert, lessons, _Held.place.room, _Held.place.steps)


def judged(job: Job) -> Outcome:
    """Carries a job out."""
    start = time.perf_counter()
    try:
        adapter = made(job.recipe, job.library)
    except ValueError as refusal:  # PEFT's way of saying no
        if job.recipe.tool != "peft":
            raise
        return Outcome({}, refused=str(refusal))
    seconds = time.perf_counter() - start
    rank = max(shape.rank for shape in adapter.shapes.values()) if adapter else 0
    with torch.autocast("cpu", torch.bfloat16) if job.bfloat16 else contextlib.nullcontext():
        found = _accuracies(adapter, [_split(name, job.split) for name in job.tasks]) if job.tasks else {}
    return Outcome(found, seconds, rank, adapter.norm() if adapter else 0.0)


@torch.no_grad()
def made(recipe: Recipe, library: tuple[Expert, ...]) -> Adapter | None:
    """The adapter that a recipe makes of a library, with all modules at hand."""
    if recipe.tool == "none":
        return _adapter(library[0]) if library else None
    if recipe.tool == "peft":
        folders = tuple(expert.folder(_Held.place.room) for expert in library)
        return combined(_Held.model, folders, recipe.method, recipe.weight, dict(recipe.options))
    adapters = [_adapter(expert) for expert in library]
    if recipe.tool == "shuffled":
        adapters = [_shuffled(adapter, seed) for seed, adapter in enumerate(adapters)]
    weights = [recipe.weight] * len(adapters)
    merged = merge(adapters, recipe.method, weights, dtype=torch.float32, given=dict(recipe.options)).adapter
    return replace(merged, modules=dict(merged.modules))


@lru_cache(maxsize=64)
def _adapter(expert: Expert) -> Adapter:
    adapter = read(expert.folder(_Held.place.room))
    return replace(adapter, modules=dict(adapter.modules))


def _shuffled(adapter: Adapter, seed: int) -> Adapter:
    """Every delta in a module that it was not trained for (all have one shape)."""
    names = list(adapter.modules)
    turn = random.Random(seed).randrange(1, len(names))
    return replace(adapter, modules={name: adapter.modules[names[i - turn]] for i, name in enumerate(names)})


def _split(name: str, split: str) -> SentenceTask:
    task = _Held.trials[name].test if split == TEST else _Held.trials[name].validation
    limit = _Held.place.limit
    return replace(task, sentences=task.sentences[:limit], targets=task.targets[:limit])


def _accuracies(adapter: Adapter | None, tasks: Sequence[SentenceTask]) -> dict[str, float]:
    """All tasks in one pass through the model."""
    texts = [text for task in tasks for text in (*task.labels, *task.sentences)]
    vectors = _Held.model.embed(texts, adapter)
    found = {}
    for task in tasks:
        labels, sentences, vectors = vectors.split(
            [len(task.labels), len(task.sentences), len(vectors) - len(task.labels) - len(task.sentences)]
        )
        right = (sentences @ labels.T).argmax(dim=1) == torch.tensor(task.targets)
        found[task.name] = right.float().mean().item()
    return found

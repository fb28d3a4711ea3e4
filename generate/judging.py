"""Generators judged by tasks left out: neither their experts nor their words are known to what generates for them.

Importing this needs torch.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..hub.adapter import Adapter
from ..hub.errors import GenerationError
from ..hub.transfer import Measured
from ..index.own_similarity import LearnedWords, Matrix, fitted, matrix, reading
from ..index.wording import matching
from .choosing_method import Evaluation, Trial
from .library import Expert, Library, nearest_expert
from .own_generators import FEWEST, Shelf, fit_shelf
from .run import Generator, generate
from .taught import Taught

if TYPE_CHECKING:
    from ..index.encoders.text import TextEncoder
    from .hypernet import Practice
    from .stored import Learned

MEAN = "mean of all"

Judge = Callable[[str, Sequence[Adapter]], list[float]]
"""Scores on the task of a name: of the bare base, and then of each adapter; higher is better."""


def evaluate(
    shelf: Shelf,
    encoder: TextEncoder,
    judge: Judge,
    measured: Sequence[Measured],
    *,
    measure: str,
    learned: Mapping[str, Learned] | None = None,
    practice: Practice[Any] | None = None,
    similarity: bool = False,
    folds: int = 4,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """The nearest expert, the blend, the mean of all, and every fitted kind, on tasks whose experts were left out.

    measured: the catalogue's tasks; those that are an expert's of the shelf are judged, each asked for by the last of
    its texts that its expert does not say itself. learned: by kind; each is fitted anew without a fold's experts, with
    its own options. similarity: rank experts by a similarity learned without them, as `generate` does where it chooses
    better. Raises GenerationError with too few tasks.
    """
    tasks = {_name(shelf, one): one for one in measured if _name(shelf, one)}
    if not 2 <= folds <= len(tasks) or len(shelf.experts) - -(-len(tasks) // folds) < FEWEST:
        raise GenerationError(
            f"{folds} folds of {len(tasks)} tasks with {len(shelf.experts)} experts; expected at least 2 folds, a task "
            f"for each, and {FEWEST} experts left"
        )
    order = sorted(tasks)
    random.Random(seed).shuffle(order)
    whole = matrix(measured) if similarity else None
    trials, seconds = [], dict.fromkeys(["nearest", "blend", MEAN, *(learned or {})], 0.0)
    for fold in range(folds):
        out = order[fold::folds]
        rest = shelf.without(out)
        library = shelf_library(rest, encoder)
        ranker = _ranker(whole, [tasks[name] for name in out], encoder)
        fits = _fits(rest, encoder, learned or {}, practice, seconds)
        for name in out:
            trials.append(_trial(shelf, library, tasks[name], name, encoder, judge, ranker, fits, seconds))
            if progress:
                progress(len(trials), len(tasks))
    return Evaluation(
        shelf.base, measure, folds, tuple(trials), {key: round(value, 2) for key, value in seconds.items()}
    )


def _name(shelf: Shelf, task: Measured) -> str:
    """The expert whose task this is; "" where it is nobody's."""
    return next((name for name, ids in shelf.members.items() if task.expert in ids), "")


def _request(shelf: Shelf, task: Measured, name: str) -> str:
    own = next(expert for expert in shelf.experts if expert.name == name)
    said = {*own.descriptions[:1], own.name}
    others = [text for text in task.texts if text not in said]
    return others[-1] if others else task.texts[0] if task.texts else own.descriptions[0]


def _ranker(whole: Matrix | None, out: Sequence[Measured], encoder: TextEncoder) -> LearnedWords | None:
    if whole is None:
        return None
    gone = {one.expert for one in out}
    kept = [at for at, one in enumerate(whole.tasks) if one.expert not in gone]
    rest = Matrix(tuple(whole.tasks[at] for at in kept), whole.scores[np.ix_(kept, kept)], whole.bare[kept])
    return LearnedWords(fitted(rest, encoder, folds=0), reading(encoder))


def _fits(
    rest: Shelf,
    encoder: TextEncoder,
    learned: Mapping[str, Learned],
    practice: Practice[Any] | None,
    seconds: dict[str, float],
) -> dict[str, tuple[Generator, TextEncoder]]:
    fits: dict[str, tuple[Generator, TextEncoder]] = {}
    for kind, one in learned.items():
        began = time.perf_counter()
        given = one.origin.told.get("options", {})
        made = fit_shelf(rest, encoder, kind, practice=practice, given=given, gauge=one.layout.gauge)
        fits[kind] = made, matching(made.origin.space, encoder)
        seconds[kind] += time.perf_counter() - began
    return fits


def _trial(
    shelf: Shelf,
    library: Library,
    task: Measured,
    name: str,
    encoder: TextEncoder,
    judge: Judge,
    ranker: LearnedWords | None,
    fits: Mapping[str, tuple[Generator, TextEncoder]],
    seconds: dict[str, float],
) -> Trial:
    request, made = _request(shelf, task, name), {}
    for method in seconds:
        began = time.perf_counter()
        given: dict[str, Any] = {"neighbours": len(library.experts), "temperature": 1e6} if method == MEAN else {}
        plug = {MEAN: "blend"}.get(method, method)
        found = generate(
            library, request, encoder, method=plug, given=given, ranker=ranker, learned=fits.get(method), force=True
        )
        made[method] = found.adapter
        seconds[method] += time.perf_counter() - began
    own = next(expert for expert in shelf.experts if expert.name == name).checkpoints[-1]
    bare, best, *scores = judge(task.name, [own, *made.values()])
    near = nearest_expert(library, encoder.encode([request])[0])[1]
    return Trial(task.name, request, near, bare, best, dict(zip(made, scores, strict=True)))


def shelf_library(shelf: Shelf, encoder: TextEncoder) -> Library:
    """A shelf as the methods that need no fit take it: the last checkpoint and the first description of each expert."""
    known = tuple(
        Expert(expert.name, expert.name, expert.descriptions[0], partial(_last, expert)) for expert in shelf.experts
    )
    return Library(shelf.base, known, encoder.encode([expert.description for expert in known]))


def _last(expert: Taught) -> Adapter:
    return expert.checkpoints[-1]

"""A catalogue's experts, each measured once on every task, and the scores kept in the catalogue.

What was measured is not measured again: a score belongs to an adapter's content and to what the task depends on.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..hub.bases import same_base
from ..hub.errors import GenerationError, LoraHubError
from ..hub.transfer import Measured
from ..index.fitted import said
from .library import GENERATED

if TYPE_CHECKING:
    from ..hub.adapter import Adapter
    from ..hub.catalog import Catalog
    from ..hub.entries import Entry
    from .sentences import SentenceModel, SentenceTask

Progress = Callable[[int, int], None]
"""Called with (done, total) in pairs of a task and an adapter."""

Score = Callable[[Path | None, str], float]
"""How good the adapter at a path (None: the bare base) is on the task of a name; higher is better."""

log = logging.getLogger(__name__)


class Count(NamedTuple):
    """Of a round of measurements: tasks, experts, pairs of both that were measured now, and that there are in all."""

    tasks: int
    experts: int
    measured: int
    total: int


def experts(catalog: Catalog, base: str | None = None) -> tuple[str, list[Entry]]:
    """The base and its mergeable adapters, by name; `base` None stands for the only one.

    Adapters that were generated are no experts. Raises GenerationError where there are several bases, or no adapter.
    """
    entries = [entry for entry in catalog.entries() if entry.mergeable and entry.base]
    bases = sorted({str(entry.base) for entry in entries})
    if base is None and any(not same_base(one, bases[0]) for one in bases):
        raise GenerationError(f"the catalogue holds adapters of several bases: say --base, one of {', '.join(bases)}")
    base = base or (bases[0] if bases else None)
    generated = catalog.made_by(GENERATED)
    kept = [entry for entry in entries if same_base(entry.base, base) and entry.id not in generated]
    if base is None or not kept:
        raise GenerationError(
            f"no adapter for base {base} in the catalogue (bases there: {', '.join(bases) or 'none'})"
        )
    return base, sorted(kept, key=lambda entry: entry.name)


def measure_sentences(
    catalog: Catalog,
    base: str,
    shelf: Sequence[Entry],
    tasks: Mapping[str, SentenceTask],
    model: SentenceModel,
    *,
    sentences: int | None = None,
    progress: Progress | None = None,
) -> Count:
    """Accuracy of every adapter on every task; the expert that has a task's name is the one made for it.

    sentences: of a task, at most. An adapter that does not fit the model is left out with a warning.
    """
    from .measuring import accuracies, fitting, task_digest, thinned

    adapters = fitting(model, _opened(catalog, shelf))
    if not adapters:
        raise GenerationError(f"none of the {len(shelf)} adapters for {base} fits the sentence model; name its --base")
    names = {entry.name: entry for entry in shelf if entry.id in adapters}
    measure = "accuracy" if sentences is None else f"accuracy on {sentences} sentences"
    wanted = []
    for task in tasks.values():
        own = names.get(task.name)
        texts = (task.description, *task.queries, own.description if own else "")
        wanted.append(
            Measured(
                task.name, measure, task_digest(thinned(task, sentences)), tuple(dict.fromkeys(filter(None, texts))),
                expert=own.id if own else None,
            )
        )  # fmt: skip

    def measured(one: Measured, ids: Sequence[str]) -> tuple[float, list[float]]:
        bare, *found = accuracies(model, [adapters[id_] for id_ in ids], thinned(tasks[one.name], sentences))
        return bare, found

    return _measured(catalog, base, wanted, list(adapters), measured, progress)


def measure_by(
    catalog: Catalog,
    base: str,
    shelf: Sequence[Entry],
    tasks: Sequence[str],
    score: Score,
    label: str,
    *,
    progress: Progress | None = None,
) -> Count:
    """Any score of every adapter on every task; the tasks' names are the experts', or others.

    label: what the score is called; with another one everything is measured anew.
    """
    names = {entry.name: entry for entry in shelf}
    digest = hashlib.sha256(label.encode()).hexdigest()
    wanted = [
        Measured(
            name, label, digest, said(names[name]) if name in names else (name,),
            expert=names[name].id if name in names else None,
        )
        for name in tasks
    ]  # fmt: skip
    paths = {entry.id: catalog.path(entry) for entry in shelf}

    def measured(one: Measured, ids: Sequence[str]) -> tuple[float, list[float]]:
        return score(None, one.name), [score(paths[id_], one.name) for id_ in ids]

    return _measured(catalog, base, wanted, list(paths), measured, progress)


def _measured(
    catalog: Catalog,
    base: str,
    wanted: Sequence[Measured],
    ids: Sequence[str],
    measure: Callable[[Measured, Sequence[str]], tuple[float, list[float]]],
    progress: Progress | None,
) -> Count:
    """Measures what is lacking, a task at a time, and stores it at once: a run that is stopped has lost one task."""
    known = {one.name: one for one in catalog.transfer(base, wanted[0].measure)} if wanted else {}
    new = done = 0
    for one in wanted:
        before = known.get(one.name)
        fresh = before is not None and before.digest == one.digest
        lacking = [id_ for id_ in ids if before is None or not fresh or id_ not in before.scores]
        bare = before.bare if before is not None and fresh else None
        scores: dict[str, float] = {}
        if lacking or bare is None:
            bare, found = measure(one, lacking)
            scores = dict(zip(lacking, found, strict=True))
        catalog.record_transfer(base, [replace(one, bare=bare, scores=scores)])
        new, done = new + len(lacking), done + len(ids)
        if progress:
            progress(done, len(ids) * len(wanted))
    return Count(len(wanted), len(ids), new, len(ids) * len(wanted))


def _opened(catalog: Catalog, shelf: Sequence[Entry]) -> dict[str, Adapter]:
    """By id, those that can be read."""
    found = {}
    for entry in shelf:
        try:
            adapter = catalog.read(entry)
            found[entry.id] = replace(adapter, base=entry.base, meta={**adapter.meta, "name": entry.name})
        except LoraHubError as error:
            log.warning("%s is left out: %s", entry.name, error)
    return found

"""Generators fitted to a catalogue's experts: how the experts are gathered, the fit, and where the files lie.

Several checkpoints of one expert are adapters that share a tag `expert:NAME`; every other adapter is an expert of its
own, with one checkpoint. Importing this needs torch.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import torch

from ..hub import plugins
from ..hub.adapter import Adapter
from ..hub.bases import family
from ..hub.errors import GenerationError, LoraHubError
from ..index.own_similarity import reading
from .choosing_method import forget
from .layout import Gauge
from .library import GENERATED, expert_name
from .stored import LEARNED, SUFFIX, Learned, save
from .taught import School, Taught, open_school
from .trials import experts

if TYPE_CHECKING:
    from ..hub.catalog import Catalog
    from ..hub.entries import Entry
    from ..index.encoders.text import TextEncoder
    from .hypernet import Practice
    from .sentences import SentenceModel, SentenceTask

FEWEST = 4  # experts without which there is nothing to learn from
SHARED = 0.5  # mean cosine of experts' `down`s from which on they are taken to have begun at one point

log = logging.getLogger(__name__)


def generator_path(home: Path, base: str, kind: str) -> Path:
    """Where the generator of a kind for a base lies, if there is one."""
    return home / "generators" / quote(family(base), safe="") / (kind + SUFFIX)


def fitted_kinds(home: Path, base: str) -> list[str]:
    """The kinds of which there is a generator for a base."""
    return sorted(
        path.name.removesuffix(SUFFIX) for path in generator_path(home, base, "any").parent.glob(f"*{SUFFIX}")
    )


def fitted_bases(home: Path) -> list[str]:
    """The families of bases for which there is a generator or an evaluation."""
    return sorted(unquote(path.name) for path in (home / "generators").glob("*") if path.is_dir())


@dataclass(frozen=True)
class Shelf:
    """A base's described experts of one structure. members: by expert, the ids of its checkpoints, in their order."""

    base: str
    experts: tuple[Taught, ...]
    members: Mapping[str, tuple[str, ...]]

    @property
    def gauge(self) -> Gauge:
        """ "none" where the experts began at one point, as their `down`s still show; else "canonical"."""
        return "none" if shared_start([expert.checkpoints[0] for expert in self.experts]) else "canonical"

    def without(self, names: Sequence[str]) -> Shelf:
        """The shelf with some experts left out."""
        kept = tuple(expert for expert in self.experts if expert.name not in names)
        return Shelf(self.base, kept, {expert.name: self.members[expert.name] for expert in kept})


def shared_start(adapters: Sequence[Adapter]) -> bool:
    """Whether adapters of one structure began with the same `down` matrices: training leaves these near to one another,
    and independent ones are nearly orthogonal."""
    rows = [torch.cat([one.modules[name].down.flatten().float() for name in sorted(one.shapes)]) for one in adapters]
    units = torch.nn.functional.normalize(torch.stack(rows), dim=1)
    pairs = len(rows) * (len(rows) - 1)
    return bool(pairs) and float((units.sum(dim=0).square().sum() - len(rows)) / pairs) > SHARED


def gathered(catalog: Catalog, base: str | None = None) -> Shelf:
    """The described experts of a base, those of the structure that most have; others are named in a warning.

    Descriptions are the adapters' own, and the ways to ask for the tasks that they were measured on as their experts.
    Raises GenerationError with fewer than FEWEST.
    """
    base, entries = experts(catalog, base)
    asked = {one.expert: one.texts for one in catalog.transfer(base) if one.expert}
    groups: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: _natural(entry.name)):
        if entry.description or entry.title:
            groups.setdefault(expert_name(entry), []).append(entry)
    opened = [(entry, _opened(catalog, entry, base)) for some in groups.values() for entry in some]
    readable = {entry.id: adapter for entry, adapter in opened if adapter is not None and not adapter.extras}
    usual = Counter(_structure(adapter) for adapter in readable.values()).most_common(1)
    for entry, _ in opened:
        if entry.id in readable and _structure(readable[entry.id]) != usual[0][0]:
            log.warning("%s is left out: its modules or ranks are not those of most adapters for %s", entry.name, base)
            del readable[entry.id]
    found, members = [], {}
    for name, some in groups.items():
        kept = [entry for entry in some if entry.id in readable]
        texts = [text for entry in kept for text in (entry.description or str(entry.title), *asked.get(entry.id, ()))]
        if kept:
            found.append(Taught(name, tuple(dict.fromkeys(texts)), tuple(readable[entry.id] for entry in kept)))
            members[name] = tuple(entry.id for entry in kept)
    if len(found) < FEWEST:
        raise GenerationError(
            f"{len(found)} described experts of one structure for {base}, expected at least {FEWEST}: add more"
        )
    return Shelf(base, tuple(found), members)


def practises(kind: str) -> bool:
    """Whether a kind of generator learns on the tasks' data: it then takes a `practice`. Raises UnknownMethod."""
    return "practice" in inspect.signature(plugins.load(LEARNED, kind)).parameters


def fit_shelf(
    shelf: Shelf,
    encoder: TextEncoder,
    kind: str,
    *,
    practice: Practice[Any] | None = None,
    fingerprint: str | None = None,
    given: Mapping[str, Any] | None = None,
    gauge: Gauge | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Learned:
    """A generator of a kind fitted to a shelf's experts; `origin.told` says with which options.

    practice: what a kind that `practises` learns on; experts without batches are left out. given: the kind's options.
    gauge: None chooses. Raises UnknownMethod, BadOption, and GenerationError for such a kind without practice.
    """
    function = plugins.load(LEARNED, kind)
    chosen = plugins.check_options(function, dict(given or {}))
    gauge = gauge or shelf.gauge
    run = partial(function, progress=progress, **chosen)
    if practises(kind):
        if practice is None:
            raise GenerationError(f"{kind} learns on the tasks' data: give --tasks FILE or --practice MODULE:FUNCTION")
        lacking = [expert.name for expert in shelf.experts if expert.name not in practice.draws]
        if len(lacking) > len(shelf.experts) - FEWEST:
            raise GenerationError(
                f"there is data for {len(shelf.experts) - len(lacking)} experts (none for {lacking[0]}), expected at "
                f"least {FEWEST}: tasks are called as their experts are"
            )
        shelf, encoder = shelf.without(lacking), reading(encoder) if kind == "hyper" else encoder
        run = partial(function, practice=practice, progress=progress, **chosen)
    made: Learned = run(open_school(shelf.experts, encoder, gauge=gauge, fingerprint=fingerprint))
    members = {name: list(ids) for name, ids in shelf.members.items()}
    told = {**made.origin.told, "options": dict(given or {}), "members": members}
    return replace(made, origin=replace(made.origin, told=told))  # type: ignore[type-var]


def keep(home: Path, base: str, made: Learned, out: Path | None = None) -> Path:
    """Write a generator to its place in the home folder, in place of an older one and its evaluation, or to `out`."""
    path = out or generator_path(home, base, made.kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    if out is None:
        forget(home, base, made.kind)
    return save(made, path, force=True)


def sentence_practice(model: SentenceModel, tasks: Mapping[str, SentenceTask]) -> Practice[Any]:
    """What sentence tasks give to practise on; experts are called as their tasks."""
    from .hypernet import Practice
    from .lessons import label_names, sorting

    draws = {task.name: sorting(model, task.sentences, task.targets, task.labels) for task in tasks.values()}
    return Practice(model.encoder, label_names, draws)


def tuned_options(school: School, model: SentenceModel, tasks: Mapping[str, SentenceTask]) -> dict[str, Any]:
    """Neighbours and temperature by leave-one-out: the prior's mean, measured on the task of the expert left out."""
    from .measuring import vector_accuracies
    from .priors import tuned

    def score(row: int, vector: torch.Tensor) -> float:
        return vector_accuracies(model, school.layout, vector[None], tasks[school.names[row]])[0]

    some = school.without([name for name in school.names if name not in tasks])
    found = tuned(some, score, neighbours=(1, 2, 4), temperatures=(0.02, 0.05, 0.2), descriptions=1)
    return {"neighbours": found.neighbours, "temperature": found.temperature}


def gathered_checkpoints(catalog: Catalog, base: str) -> dict[str, list[Adapter]]:
    """The experts of a base that have several checkpoints, by name; empty where no adapter has a tag `expert:NAME`."""
    groups: dict[str, list[Entry]] = {}
    generated = catalog.made_by(GENERATED)
    for entry in catalog.entries(base=base):
        if entry.mergeable and entry.id not in generated:
            groups.setdefault(expert_name(entry), []).append(entry)
    several = {
        name: [_opened(catalog, entry, base) for entry in some] for name, some in groups.items() if len(some) > 1
    }
    opened = {name: [one for one in some if one is not None] for name, some in several.items()}
    return {name: some for name, some in opened.items() if len(some) > 1}


def distance_in_spreads(adapter: Adapter, experts: Mapping[str, Sequence[Adapter]]) -> tuple[str, float] | None:
    """The expert with the nearest checkpoint, and that distance in units of its checkpoints' mean distance: about 1 is
    one checkpoint more of it, far below 1 a copy.

    experts: the checkpoints, two or more, by name. None without any, or where the checkpoints are all alike. It is
    `priors.novelty` for adapters of any structure.
    """
    if not experts:
        return None
    near = {name: min(_distance(adapter, one) for one in some) for name, some in experts.items()}
    best = min(near, key=lambda name: near[name])
    pairs = [(one, other) for at, one in enumerate(experts[best]) for other in experts[best][:at]]
    spread = sum(_distance(one, other) for one, other in pairs) / len(pairs)
    return (best, near[best] / spread) if spread else None


def _distance(one: Adapter, other: Adapter) -> float:
    return float(max(one.norm() ** 2 + other.norm() ** 2 - 2 * one.inner(other), 0.0) ** 0.5)


def _opened(catalog: Catalog, entry: Entry, base: str) -> Adapter | None:
    try:
        adapter = catalog.read(entry)
    except LoraHubError as error:
        log.warning("%s is left out: %s", entry.name, error)
        return None
    return replace(adapter, base=base, meta={**adapter.meta, "name": entry.name})


def _structure(adapter: Adapter) -> tuple[tuple[str, object], ...]:
    return tuple(sorted(adapter.shapes.items(), key=lambda item: item[0]))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]

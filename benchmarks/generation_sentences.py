"""The sentence world of the generation benchmark: 51 tasks of sorting sentences under label names, in 20 domains.

    kind      domains                                               tasks
    request   the ten of CLINC150                                   three of five intents each (retrieval_words.toml)
    desk      cards, transfers, top-ups, payments, account          banking77's 77 intents, two tasks each
    opinions  films, goods, press                                   SST-2, MR, SUBJ, CR, MPQA and VADER's four
    alone     assistant, questions                                  SNIPS, TREC

A split holds out whole domains, three of requests, one desk and one of opinions, 13 to 15 tasks: no expert of a
held-out task's own domain is in the library, while other domains of its kind are (other desks of the same bank, reviews
of other things, and CLINC's bankers when a desk is held out). What stands alone is always taught. The first three
splits hold out different domains. Sentences that any task is tested on are in no task's training, in no spelling.

A score is the share of test sentences that are nearest to their own label's name. Products are in bfloat16.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from example_library import BASE
from example_sources import HELD_OUT, SOURCES, Pairs, balanced, letters, one_file, tidy
from generation_room import Room, digest
from generation_training import Experts, Trainer, Training, in_bfloat16
from generation_world import ROOT, Draw, Loss, Plan, Setting, Split
from lorahub.generate.experts import linear_paths
from lorahub.generate.lessons import Sorting, label_hits, label_names, sorting
from lorahub.generate.rehearsal import Label, lesson
from lorahub.generate.sentences import SentenceModel
from torch import Tensor, nn

RANK, SCALE, RATE = 4, 2.0, 2e-3
LAYERS = ("query", "value")
SENTENCES = 60  # of a label, to learn from
LONGEST = 30  # words
PARTS = 8  # tasks in a step of the multi-task adapter
HELD = {"request": 3, "desk": 1, "opinions": 1}  # domains of a kind that a split holds out

PLAN = Plan(
    Training((80, 10), (200, 64)), descriptions=6, probes=30, tests=100, choice=40, queries=3, semantic=600, icm=150,
    icm_stages=12, icm_channels=4, regression=400, hyper=400, hyper_samples=8,
)  # fmt: skip
BRIEF = Plan(
    Training((3, 4), (3, 16), checkpoints=2, every=1), descriptions=3, probes=6, tests=12, choice=6, queries=1,
    similarity=20, folds=2, semantic=10, icm=2, icm_stages=12, icm_channels=1, regression=20, hyper=3, hyper_samples=2,
    rehearsal=2, only=("banking", "travel", "cards", "top-ups", "goods", "press", "questions"),
)  # fmt: skip


# --- words ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sentences:
    """A task: what it is called and where its sentences come from (a reader of example_sources.py or of this file)."""

    name: str
    kind: str
    domain: str
    source: str
    part: str
    labels: tuple[str, ...]
    descriptions: tuple[str, ...]
    queries: tuple[str, ...]
    strange: tuple[str, ...] = ()


@cache
def every_task() -> tuple[Sentences, ...]:
    """All 51, those of a domain side by side."""
    words, topics = _words("generation_words.toml"), _words("retrieval_words.toml")["topic"]
    found = [_topic(name, topic, words["topic"][name]) for name, topic in topics.items()]
    return (*found, *map(_task, words["task"]))


@cache
def _meanings() -> dict[str, str]:
    """What belongs under each label."""
    return _words("generation_labels.toml")


def _words(name: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / "benchmarks" / name).read_text(encoding="utf-8"))


def _topic(name: str, topic: Mapping[str, Any], more: Mapping[str, Any]) -> Sentences:
    told = (topic["told"], f"Sorts sentences about {name}.", f"intents: {', '.join(topic['labels'])}", *more["told"])
    asked = (*topic["asked"], *more["asked"])
    domain = topic["domain"]
    return Sentences(name, "request", domain, "clinc", domain, tuple(topic["labels"]), told, asked)


def _task(spec: Mapping[str, Any]) -> Sentences:
    labels = tuple(spec.get("labels", ()))
    told = (*spec["told"], f"Sorts sentences about {spec['name']}.")
    if labels:
        told = (*told, f"{spec['name']}: {', '.join(labels)}")
    return Sentences(
        spec["name"], spec["kind"], spec["domain"], spec["source"], spec.get("part", ""), labels, told,
        tuple(spec["asked"]),
    )  # fmt: skip


def split(tasks: Sequence[Sentences], number: int) -> Split:
    """The split of this number: of each kind some domains are held out, others with every number while there are."""
    out: set[str] = set()
    for kind, count in HELD.items():
        domains = sorted({one.domain for one in tasks if one.kind == kind})
        random.Random(f"domains of {kind}").shuffle(domains)
        some = min(count, -(-len(domains) // 3))
        out |= {domains[(number * some + place) % len(domains)] for place in range(some)}
    held = tuple(place for place, one in enumerate(tasks) if one.domain in out)
    return Split(tuple(place for place in range(len(tasks)) if place not in held), held)


# --- sentences ------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Sentences with their labels, to learn from and to be tested on, and all labels."""

    train: Pairs
    test: Pairs
    labels: tuple[str, ...]


def rated(folder: Path, part: str, labels: Sequence[str]) -> tuple[Pairs, Pairs]:
    """A file of VADER's sentences, rated from -4 to 4; what lies between -1 and 1 has no clear mood."""
    lines = (folder / part).read_bytes().decode("utf-8", errors="replace").replace("\r", "").split("\n")
    rows = [line.split("\t") for line in lines if line.strip()]
    pairs = tidy((text, labels[float(score) > 0]) for _, score, text in rows if abs(float(score)) >= 1)
    held_out = set(balanced(pairs, labels, HELD_OUT))
    return [pair for pair in pairs if pair not in held_out], [pair for pair in pairs if pair in held_out]


READERS: dict[str, tuple[str, Callable[[Path, str, Sequence[str]], tuple[Pairs, Pairs]]]] = {
    **{name: (source.folder, source.read) for name, source in SOURCES.items()},
    "vader": (SOURCES["tweets"].folder, rated),
    "mpqa": (SOURCES["cr"].folder, one_file("mpqa.all")),
}


def read(folder: Path, tasks: Sequence[Sentences]) -> dict[str, Data]:
    """The sentences of all tasks, by name; what any is tested on is taken out of everybody's training."""
    drafts = {one.name: _read(folder, one) for one in tasks}
    held_out = {letters(said) for draft in drafts.values() for said, _ in draft.test}
    return {
        name: draft._replace(train=[pair for pair in draft.train if letters(pair[0]) not in held_out])
        for name, draft in drafts.items()
    }


def _read(folder: Path, task: Sentences) -> Data:
    place, reader = READERS[task.source]
    train, test = (
        [pair for pair in tidy(some) if len(pair[0].split()) <= LONGEST and (not task.labels or pair[1] in task.labels)]
        for some in reader(folder / place, task.part, task.labels)
    )
    labels = task.labels or tuple(sorted({label for _, label in test}))
    return Data(balanced(train, labels, SENTENCES * len(labels)), balanced(test, labels, HELD_OUT), labels)


# --- the world ------------------------------------------------------------------------------------------------------


def names(model: nn.Module, batches: Sequence[Sorting]) -> Tensor:
    """`label_names` in bfloat16."""
    with in_bfloat16():
        return label_names(model, batches)


def hits(model: nn.Module, batches: Sequence[Sorting]) -> Tensor:
    """`label_hits` in bfloat16."""
    with in_bfloat16():
        return label_hits(model, batches)


def several(model: nn.Module, batches: Sequence[Sequence[Sorting]]) -> Tensor:
    """`label_names` of adapters that each work at several tasks, their mean."""
    return torch.stack([label_names(model, some).mean() for some in batches])


@dataclass(frozen=True)
class SentenceTasks:
    """See the module, and `generation_world.World`. data: folder of data set checkouts."""

    setting: Setting
    plan: Plan
    room: Room
    data: Path
    component: str = ""
    together: int = 12
    loss: Loss = names
    score: Loss = hits

    @cached_property
    def tasks(self) -> tuple[Sentences, ...]:
        only = self.plan.only
        return tuple(one for one in every_task() if not only or one.domain in only)

    @cached_property
    def split(self) -> Split:
        return split(self.tasks, self.setting.split)

    @property
    def model(self) -> nn.Module:
        return self._model.encoder

    def experts(self) -> Experts:
        start, seed, effort = self.setting.start, self.setting.seed, self.plan.effort
        recipe = self._recipe(
            range(len(self.tasks)),
            effort=[effort.experts, effort.checkpoints, effort.every],
            start=start,
        )
        draws = {one.name: self.learning(place, effort.experts[1]) for place, one in enumerate(self.tasks)}
        made = self.room.tensors("experts", recipe, lambda: self.trainer.experts(draws, effort, start=start, seed=seed))
        return Experts(recipe, self.trainer.layout, made["vectors"])

    def multitask(self, trainer: Trainer | None = None) -> Tensor:
        effort, taught, trainer = self.plan.effort, self.split.taught, trainer or self.trainer
        recipe = self._recipe(
            taught, effort=effort.multitask, parts=PARTS, rank=[trainer.rank, trainer.scale, trainer.rate]
        )
        draws = [self.learning(place, effort.multitask[1] // PARTS) for place in taught]

        def draw(step: int, chance: torch.Generator) -> list[Sorting]:
            chosen = torch.randperm(len(draws), generator=chance)[:PARTS].tolist()
            return [draws[place](step, chance) for place in chosen]

        def make() -> dict[str, Tensor]:
            return trainer.one(draw, effort, seed=self.setting.seed, loss=several)

        return self.room.tensors("multitask", recipe, make)["vector"]

    def learning(self, task: int, size: int) -> Draw:
        data = self._data(task)
        targets = [data.labels.index(label) for _, label in data.train]
        return sorting(self._model, [said for said, _ in data.train], targets, data.labels, size=size)

    def probes(self, task: int, count: int) -> Sorting:
        return self._batch(task, self._data(task).train, count)

    def tests(self, task: int, count: int) -> Sorting:
        return self._batch(task, self._data(task).test, count)

    def lesson(self, task: int) -> Sorting:
        """The words of the task's labels, as a batch to rehearse on; none that any task is tested on."""
        return lesson(self._model, self._labels(task), barred=lambda text: letters(text) in self._tested)

    @cached_property
    def _tested(self) -> set[str]:
        return {letters(said) for data in self._read.values() for said, _ in data.test}

    def in_full(self, task: int, said: Sequence[str]) -> list[str]:
        """Descriptions, each with all labels and their meanings behind it."""
        told = "; ".join(f"{label.name}: {label.meaning}" for label in self._labels(task))
        return [f"{one}. {told}" for one in said]

    def without_adapter(self, task: int, count: int) -> float:
        """The bare base's score where a label's vector is halfway between those of its name and its meaning."""
        labels, pairs = self._labels(task), self._data(task).test[:count]
        known = [label.name for label in labels]
        named, meant = self._model.embed(known), self._model.embed([label.meaning for label in labels])
        nearest = (self._model.embed([said for said, _ in pairs]) @ (named + meant).T).argmax(dim=1)
        return sum(known[row] == label for row, (_, label) in zip(nearest, pairs, strict=True)) / len(pairs)

    def _labels(self, task: int) -> list[Label]:
        meanings = _meanings()
        return [Label(name, meanings[name]) for name in self._data(task).labels]

    def _batch(self, task: int, pairs: Pairs, count: int) -> Sorting:
        labels, some = self._data(task).labels, pairs[:count]  # label by label in turn
        ids, mask = self._model.tokens([*(said for said, _ in some), *labels])
        return Sorting(ids, mask.sum(dim=1), torch.tensor([labels.index(label) for _, label in some]))

    def _data(self, task: int) -> Data:
        return self._read[self.tasks[task].name]

    @cached_property
    def _read(self) -> dict[str, Data]:
        return read(self.data, self.tasks)

    @cached_property
    def _model(self) -> SentenceModel:
        return SentenceModel()

    @cached_property
    def trainer(self) -> Trainer:
        paths = linear_paths(self.model, LAYERS)
        return Trainer(BASE, self.model, paths, label_names, RANK, SCALE, RATE, autocast=True, together=self.together)

    def _recipe(self, places: Sequence[int], **more: Any) -> dict[str, Any]:
        shown = {self.tasks[place].name: digest({"data": self._data(place)[::2]}) for place in places}
        return {
            "world": "sentences",
            "tasks": shown,
            "rank": [RANK, SCALE, RATE],
            "layers": LAYERS,
            "seed": self.setting.seed,
            "version": 1,
            **more,
        }

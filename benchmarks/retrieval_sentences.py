"""The sentence world of retrieval.py: tasks, topics of five intents each, and pairs of tasks.

Tasks are those of example_tasks.toml but one (its two sets of film reviews are one concept); topics cut the ten domains
of CLINC150 into thirds. Every copy learns with its own choice of sentences, and of labels where there are many. Nothing
is held out here: what an adapter is about is asked, not how good it is.
"""

from __future__ import annotations

import hashlib
import random
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from example_library import BASE, ROOT
from example_sources import SOURCES, clinc, tidy
from lorahub.generate.experts import Pupil, linear_paths, one_cycle, train
from lorahub.generate.lessons import label_names, sorting
from lorahub.generate.sentences import FILES, SentenceModel, packaged_model
from lorahub.hub.adapter import Adapter
from retrieval_pictures import wordings
from retrieval_splits import Concept, Copy

BATCH = 12  # sentences a step
RATE = 2e-3
SCALE = 2.0
LABELS = 10  # of a copy, at most
SENTENCES = 40  # of a label and copy, at most
LONGEST = 30  # words
LAYERS = ("query", "value")
FIRST_HALVES = tuple(
    f"clinc-{one}" for one in ("kitchen-and-dining", "auto-and-commute", "travel", "work", "home", "small-talk")
)
SECOND_HALVES = ("clinc-credit-cards", "clinc-utility", "clinc-banking", "clinc-meta", "banking77-transfers")
QUICK_TASKS = (*FIRST_HALVES[:2], *SECOND_HALVES[:2], "snips-assistant", "trec-questions", "banking77-cards")
QUICK_TOPICS = ("paying bills", "playing music", "days off")
Piles = dict[str, list[str]]  # label -> sentences


def concepts(tasks: Sequence[str], topics: Sequence[str]) -> list[Concept]:
    """Tasks, topics, and the pairs of those tasks that are paired."""
    words = wordings()
    specs = {spec["name"]: spec for spec in _specs()}
    found = [_task(specs[name], words["task"][name]) for name in tasks]
    found += [_topic(name, words["topic"][name]) for name in topics]
    for one, other in product(FIRST_HALVES, SECOND_HALVES):
        if one in tasks and other in tasks:
            found.append(_pair(specs[one], specs[other], words["task"]))
    return found


def _task(spec: Mapping[str, Any], plain: str) -> Concept:
    told = (spec["description"], spec["queries"][0], f"classifies sentences about {plain}")
    return Concept(spec["name"], "task", told, (plain, *spec["queries"][1:]))


def _topic(name: str, words: Mapping[str, Any]) -> Concept:
    labels = ", ".join(words["labels"])
    told = (words["told"], f"Sorts sentences about {name}.", f"intents: {labels}")
    return Concept(name, "topic", told, (name, *words["asked"]))


def _pair(one: Mapping[str, Any], other: Mapping[str, Any], plain: Mapping[str, str]) -> Concept:
    first, second = plain[one["name"]], plain[other["name"]]
    told = (f"Sorts sentences about {first} and {second}.", f"{first}; {second}", f"{second} together with {first}")
    free = (f"{a}; {b}" for a, b in zip(one["queries"][1:], other["queries"][1:], strict=True))
    name = f"{one['name']} {other['name']}"
    return Concept(name, "pair", told, (f"{first} and {second}", *free), (one["name"], other["name"]))


@dataclass(frozen=True)
class SentenceWorld:
    """See the module. data: the folder of data set checkouts (example_sources.py); sentences: of a label, at most."""

    data: Path
    concepts: tuple[Concept, ...]
    sentences: int = SENTENCES
    name: str = "sentences"
    base: str = BASE

    @classmethod
    def of(cls, data: Path, brief: bool) -> SentenceWorld:
        """The whole world, or a small one in which every split has something."""
        if brief:
            return cls(data, tuple(concepts(QUICK_TASKS, QUICK_TOPICS)), 5)
        words = wordings()
        return cls(data, tuple(concepts(list(words["task"]), list(words["topic"]))))

    @cached_property
    def stamp(self) -> str:
        recipe = (BATCH, RATE, SCALE, LABELS, LAYERS, LONGEST, self.sentences, wordings()["topic"], wordings()["task"])
        digest = hashlib.sha256(repr(recipe[:-2]).encode())
        digest.update(repr([(name, topic["labels"]) for name, topic in wordings()["topic"].items()]).encode())
        for path in (ROOT / "benchmarks/example_tasks.toml", ROOT / "benchmarks/example_sources.py"):
            digest.update(path.read_bytes())
        for name in FILES:
            digest.update((packaged_model() / name).read_bytes())
        return digest.hexdigest()

    def teach(self, some: Sequence[Copy]) -> Sequence[Adapter]:
        encoder = self._model.encoder
        return train(
            encoder, linear_paths(encoder, LAYERS), [self._pupil(copy) for copy in some], label_names,
            steps=some[0].steps, rate=RATE, schedule=one_cycle, autocast=True, base=self.base,
        ).adapters  # fmt: skip

    def _pupil(self, copy: Copy) -> Pupil[Any]:
        piles = self._piles(next(one for one in self.concepts if one.name == copy.concept), copy.seed)
        labels = list(piles)
        pairs = [(sentence, number) for number, label in enumerate(labels) for sentence in piles[label]]
        sentences, targets = zip(*pairs, strict=True)
        draw = sorting(self._model, sentences, targets, labels, size=BATCH)
        return Pupil(copy.concept, draw, seed=copy.seed, rank=copy.rank, scale=SCALE)

    def _piles(self, concept: Concept, seed: int) -> Piles:
        """What one copy learns with."""
        chance = random.Random(seed)
        halves = concept.halves or (concept.name,)
        found: Piles = {}
        for half in halves:
            piles = self._all[half]
            for label in chance.sample(list(piles), min(len(piles), LABELS // len(halves))):
                pile = piles[label]
                found[label] = chance.sample(pile, min(len(pile), self.sentences))
        return found

    @cached_property
    def _all(self) -> dict[str, Piles]:
        """Sentences of every task and topic, by label."""
        found = {spec["name"]: self._pairs(spec) for spec in _specs()}
        source = SOURCES["clinc"]
        for name, topic in wordings()["topic"].items():
            train, _ = clinc(self.data / source.folder, topic["domain"], ())
            found[name] = _sorted([pair for pair in train if pair[1] in topic["labels"]])
        return found

    def _pairs(self, spec: Mapping[str, Any]) -> Piles:
        source = SOURCES[spec["source"]]
        train, _ = source.read(self.data / source.folder, spec.get("part", ""), spec.get("labels", ()))
        return _sorted(train)

    @cached_property
    def _model(self) -> SentenceModel:
        return SentenceModel()


def _sorted(pairs: Sequence[tuple[str, str]]) -> Piles:
    found: Piles = {}
    for sentence, label in tidy(pairs):
        if len(sentence.split()) <= LONGEST:
            found.setdefault(label, []).append(sentence)
    return dict(sorted(found.items()))


def _specs() -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = tomllib.loads((ROOT / "benchmarks/example_tasks.toml").read_text(encoding="utf-8"))[
        "task"
    ]
    return listed

"""The tasks of merging.py: eight that experts are trained for, and three that no expert has seen.

Every task has sentences to train on, to choose options on (validation) and to report (test). What any task holds out,
for validation or for test, is nobody's training sentence, and no validation sentence is a test sentence of any task.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from example_library import ROOT, Lesson
from example_sources import SOURCES, SPLIT_SEED, Pairs, Source, balanced, letters, one_file, tidy
from lorahub.generate.sentences import SentenceTask

VALIDATION, TEST = 100, 300  # sentences a task
LONGEST = 30  # words
IN_DOMAIN = (
    "trec-questions",
    "sst2-movie-reviews",
    "subj-opinions",
    "vader-tweets",
    "mpqa-phrases",
    "clinc-home",
    "banking77-cards",
    "snips-assistant",
)
OUT_OF_DOMAIN = ("cr-product-reviews", "clinc-meta", "banking77-payments")
UNSPLIT = ("cr", "mpqa", "subj", "tweets")  # no official test set
MPQA = Source(
    "MPQA opinion phrases",
    "harvardnlp__sent-conv-torch",
    "https://github.com/harvardnlp/sent-conv-torch",
    "MIT, as distributed in harvardnlp/sent-conv-torch",
    "Wiebe et al., Annotating Expressions of Opinions and Emotions in Language, 2005",
    one_file("mpqa.all"),
)
MPQA_TASK = {
    "name": "mpqa-phrases",
    "source": "mpqa",
    "description": "Tells phrases that express a good opinion from phrases that express a bad one.",
    "labels": ["negative opinion", "positive opinion"],
}


@dataclass(frozen=True)
class Trial:
    """A task with its held-out sentences: `lesson.task` holds those of the test."""

    lesson: Lesson
    validation: SentenceTask

    @property
    def name(self) -> str:
        return self.lesson.task.name

    @property
    def test(self) -> SentenceTask:
        return self.lesson.task


@dataclass(frozen=True)
class _Draft:
    spec: Mapping[str, Any]
    source: Source
    labels: tuple[str, ...]
    rest: Pairs
    test: Pairs


def suite(data: Path, names: Sequence[str] = IN_DOMAIN + OUT_OF_DOMAIN) -> dict[str, Trial]:
    """The tasks by name, split; the split is the same whatever `names` are asked for."""
    listed = tomllib.loads((ROOT / "benchmarks/example_tasks.toml").read_text(encoding="utf-8"))["task"]
    specs = {spec["name"]: spec for spec in [*listed, MPQA_TASK]}
    drafts = [_draft(specs[name], data) for name in IN_DOMAIN + OUT_OF_DOMAIN]
    tested = _letters(pair for draft in drafts for pair in draft.test)
    drafts = [replace(draft, rest=_without(draft.rest, tested)) for draft in drafts]
    chosen_on = [balanced(draft.rest, draft.labels, VALIDATION) for draft in drafts]
    held_out = _letters(pair for pairs in chosen_on for pair in pairs)
    trials = {}
    for number, (draft, validation) in enumerate(zip(drafts, chosen_on, strict=True)):
        lesson = Lesson(_task(draft, draft.test), _without(draft.rest, held_out), draft.spec["source"], seed=number)
        trials[draft.spec["name"]] = Trial(lesson, _task(draft, validation))
    return {name: trials[name] for name in names}


def _draft(spec: Mapping[str, Any], data: Path) -> _Draft:
    source = MPQA if spec["source"] == "mpqa" else SOURCES[spec["source"]]
    parts = source.read(data / source.folder, spec.get("part", ""), spec.get("labels", ()))
    train, test = ([pair for pair in tidy(part) if len(pair[0].split()) <= LONGEST] for part in parts)
    labels = tuple(spec.get("labels") or sorted({label for _, label in test}))
    if spec["source"] in UNSPLIT:
        train = test = random.Random(SPLIT_SEED).sample(train + test, len(train) + len(test))
    return _Draft(spec, source, labels, rest=train, test=balanced(test, labels, TEST))


def _task(draft: _Draft, pairs: Pairs) -> SentenceTask:
    return SentenceTask(
        name=draft.spec["name"],
        description=draft.spec["description"],
        labels=draft.labels,
        sentences=tuple(text for text, _ in pairs),
        targets=tuple(draft.labels.index(label) for _, label in pairs),
        source=f"{draft.source.title} ({draft.source.url})",
        licence=draft.source.licence,
    )


def _letters(pairs: Any) -> set[str]:
    return {letters(sentence) for sentence, _ in pairs}


def _without(pairs: Pairs, banned: set[str]) -> Pairs:
    return [pair for pair in pairs if letters(pair[0]) not in banned]

"""Rows of the generation benchmark that rehearse the words of a task, in the world that has words for labels.

The words are what belongs under each label (generation_labels.toml), without those that any task is tested on. Two
controls are given the same words: the base without an adapter, with each label's vector halfway between those of its
name and its meaning; and the nearest expert, by sentence vectors of the descriptions with all labels and meanings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
from generation_methods import in_deltas
from generation_rows import Desk, Made, Row, made_by
from generation_sentences import SentenceTasks, names
from lorahub.generate.cores import mean_delta, sum_layout
from lorahub.generate.experts import afresh
from lorahub.generate.hypernet import Trial
from lorahub.generate.priors import NEIGHBOURS
from lorahub.generate.rehearsal import rehearsed
from lorahub.index.encoders.text import text
from torch import Tensor

Start = Literal["nothing", "multi-task", "blend of deltas", "hypernetwork"]


def _rehearsed(start: Start) -> Callable[[Desk], Made]:
    def make(desk: Desk) -> Made:
        begun = _begun(desk, start)
        vectors = _practised(desk, begun.trial or desk.cell.trial, begun.vectors[:, 0], desk.cell.split.held)
        return begun._replace(vectors=vectors[:, None])

    return make


def _paired(start: Literal["multi-task", "blend of deltas"], *, wrong: bool = False) -> Callable[[Desk], Made]:
    """The mean of the deltas of two that rehearse: from the start, and from nothing at the same rank.

    wrong: every task rehearses the words of the one half the list away.
    """

    def make(desk: Desk) -> Made:
        layout = in_deltas(desk.cell.layout, max(NEIGHBOURS))[0] if start == "blend of deltas" else desk.cell.layout
        trial, places = desk.cell.trying(layout), list(desk.cell.split.held)
        if wrong:
            places = places[len(places) // 2 :] + places[: len(places) // 2]
        fresh = afresh(layout).expand(len(places), -1)
        pair = [_practised(desk, trial, some, places) for some in (_begun(desk, start).vectors[:, 0], fresh)]
        means = torch.stack([mean_delta(torch.stack(some), layout) for some in zip(*pair, strict=True)])
        return Made(means[:, None], desk.cell.trying(sum_layout(layout, len(pair))))

    return make


def _begun(desk: Desk, start: Start) -> Made:
    """Where rehearsal begins, (held, 1, size); what a generator makes is asked for with the first query."""
    if start in ("hypernetwork", "blend of deltas"):
        made = made_by(start, desk)
        return made._replace(vectors=made.vectors[:, :1])
    vector = desk.cell.everything if start == "multi-task" else afresh(desk.cell.layout)
    return Made(vector.expand(len(desk.cell.held), 1, -1))


def _practised(desk: Desk, trial: Trial, vectors: Tensor, places: Sequence[int]) -> Tensor:
    world = cast(SentenceTasks, desk.cell.world)
    batches = [world.lesson(place) for place in places]
    return rehearsed(trial, vectors, names, batches, steps=desk.cell.plan.rehearsal)[0]


def _told(desk: Desk) -> Made:
    world, cell = cast(SentenceTasks, desk.cell.world), desk.cell

    def scores() -> Tensor:
        return torch.tensor([world.without_adapter(place, cell.plan.tests) for place in cell.split.held])[:, None]

    return Made(torch.zeros(len(cell.held), 1, cell.layout.size), scores=scores)


def _nearest(desk: Desk) -> Made:
    world, cell, encoder = cast(SentenceTasks, desk.cell.world), desk.cell, text()
    taught = [torch.from_numpy(encoder.encode(world.in_full(place, cell.taught[row].descriptions)))
              for row, place in enumerate(cell.split.taught)]  # fmt: skip
    keys = torch.nn.functional.normalize(torch.stack([some.mean(dim=0) for some in taught]), dim=1)
    asked = [torch.from_numpy(encoder.encode(world.in_full(held.place, held.queries))) for held in cell.held]
    return Made(cell.last[torch.stack([(some @ keys.T).argmax(dim=1) for some in asked])])


REHEARSED, REHEARSED_WRONG = "rehearsal, from the multi-task adapter and from nothing", "the same, another task's words"
REHEARSAL_ROWS = (
    Row("base, told what the labels mean", _told),
    Row("nearest expert, told what the labels mean", _nearest),
    Row("rehearsal, from nothing", _rehearsed("nothing"), version=5),
    Row("rehearsal, from the multi-task adapter", _rehearsed("multi-task"), version=5),
    Row("rehearsal, from the blend of deltas", _rehearsed("blend of deltas"), version=5),
    Row("rehearsal, from the hypernetwork's", _rehearsed("hypernetwork"), version=5),
    Row("rehearsal, from the blend of deltas and from nothing", _paired("blend of deltas"), version=5),
    Row(REHEARSED, _paired("multi-task"), version=5),
    Row(REHEARSED_WRONG, _paired("multi-task", wrong=True), version=5),
)

"""One cell of the generation benchmark: a base, a library and a split of a world, and all that its rows share.

Everything is made when it is first asked for and kept in the room. Rows choose on the taught tasks' own samples;
held-out ones are touched by `Cell.tested` alone, and for the rows that say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from generation_room import Recipe, Room
from generation_training import Experts
from generation_world import Plan, Setting, Sources, Split, Task, World, open_world
from lorahub.generate.hypernet import Practice, Trial
from lorahub.generate.layout import Layout
from lorahub.generate.taught import School, Taught, open_school
from lorahub.index.encoders.text import TextEncoder, text
from lorahub.index.transfer import Similarity, fit_similarity, folded
from lorahub.index.wording import token_states, token_width
from torch import Tensor

Words = Literal["sentences", "tokens"]
Vectors = np.ndarray[Any, np.dtype[np.float32]]


class Held(NamedTuple):
    """A held-out task, by place among all tasks, and what is asked for it."""

    place: int
    task: Task
    queries: tuple[str, ...]
    strange: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """A setting at work."""

    setting: Setting
    plan: Plan
    room: Room
    sources: Sources = field(default_factory=Sources)

    # --- the world

    @cached_property
    def world(self) -> World:
        return open_world(self.setting, self.plan, self.room, self.sources)

    @property
    def split(self) -> Split:
        return self.world.split

    @cached_property
    def taught(self) -> tuple[Task, ...]:
        return tuple(self.world.tasks[place] for place in self.split.taught)

    @cached_property
    def held(self) -> tuple[Held, ...]:
        return tuple(self._asking(place) for place in self.split.held)

    def _asking(self, place: int) -> Held:
        one, count = self.world.tasks[place], self.plan.queries
        return Held(place, one, _spread(one.queries, count), _spread(one.strange, count))

    @cached_property
    def trained(self) -> Experts:
        """Experts for all tasks: those of held-out ones are oracles."""
        return self.world.experts()

    @cached_property
    def oracles(self) -> Tensor:
        """(held, size)"""
        rows = [self.trained.vectors[held.place, -1] for held in self.held]
        return torch.stack([self._in_layout(vector) for vector in rows])

    @cached_property
    def everything(self) -> Tensor:
        """The multi-task adapter (size,)."""
        return self._in_layout(self.world.multitask())

    def _in_layout(self, vector: Tensor) -> Tensor:
        return self.layout.flatten(self.trained.layout.adapter(vector)) if self._canonical else vector

    @property
    def _canonical(self) -> bool:
        return self.setting.start == "independent"

    @property
    def layout(self) -> Layout:
        return self.school.layout

    # --- the library

    @cached_property
    def school(self) -> School:
        """The taught experts, described by their sentences' vectors."""
        return self._school(self.encoder("sentences"))

    @cached_property
    def worded(self) -> School:
        """The same, described by token states."""
        return self._school(self.encoder("tokens"))

    def _school(self, encoder: TextEncoder) -> School:
        vectors, layout = self.trained.vectors, self.trained.layout
        rows = [
            Taught(
                self.world.tasks[place].name,
                self._told(place),
                tuple(layout.adapter(vector) for vector in vectors[place]),
            )
            for place in self.split.taught
        ]
        return open_school(rows, encoder, gauge="canonical" if self._canonical else "none")

    def _told(self, place: int) -> tuple[str, ...]:
        return _spread(self.world.tasks[place].descriptions, self.plan.descriptions)

    @cached_property
    def last(self) -> Tensor:
        """The taught experts' last checkpoints (n, size)."""
        return torch.stack([some[-1] for some in self.school.weights])

    def encoder(self, words: Words) -> Remembering:
        """Sentences' vectors, or token states; what was encoded once is kept."""
        if words not in self._encoders:
            known = [self._asking(place) for place in range(len(self.world.tasks))]
            texts = [said for one in known for said in (*self._told(one.place), *one.queries, *one.strange)]
            model = text() if words == "sentences" else token_states(places=40)
            self._encoders[words] = Remembering.of(self.room, model, texts)
        return self._encoders[words]

    @cached_property
    def _encoders(self) -> dict[Words, Remembering]:
        return {}

    def asked(self, words: Words, *, strange: bool = False) -> list[Vectors]:
        """For each held-out task its queries' vectors (queries, dim)."""
        encoder = self.encoder(words)
        return [encoder.encode(one.strange if strange else one.queries) for one in self.held]

    @cached_property
    def practice(self) -> Practice[Any]:
        world, size = self.world, self.plan.hyper_samples
        draws = {world.tasks[place].name: world.learning(place, size) for place in self.split.taught}
        return Practice(world.model, world.loss, draws, world.component)

    # --- measuring

    @cached_property
    def trial(self) -> Trial:
        return self.trying(self.layout)

    def trying(self, layout: Layout) -> Trial:
        """The base, for vectors of a layout."""
        return Trial(self.world.model, layout, self.world.component)

    def probed(self, vectors: Tensor, taught: Sequence[int], *, trial: Trial | None = None) -> Tensor:
        """How well vectors (n, size) do on samples to learn from of taught tasks, by place in the library: (n,)."""
        places = [self.split.taught[place] for place in taught]
        known = {place: self.world.probes(place, self.plan.probes) for place in set(places)}
        return self._measured(trial or self.trial, vectors, [known[place] for place in places])

    def tested(
        self, vectors: Tensor, held: Sequence[int], *, trial: Trial | None = None, count: int | None = None
    ) -> Tensor:
        """How well vectors (n, size) do on the test samples of held-out tasks, by place among them: (n,).

        count: of the samples, by default all of the plan's.
        """
        return self._measured(trial or self.trial, vectors, self._tests([self.held[one].place for one in held], count))

    def tested_at_home(self, vectors: Tensor) -> Tensor:
        """How well the taught tasks' vectors (n, size), one for each, do on their own test samples: (n,)."""
        return self._measured(self.trial, vectors, self._tests(self.split.taught))

    def _tests(self, places: Sequence[int], count: int | None = None) -> list[Any]:
        known = {place: self.world.tests(place, count or self.plan.tests) for place in set(places)}
        return [known[place] for place in places]

    def _measured(self, trial: Trial, vectors: Tensor, batches: Sequence[Any]) -> Tensor:
        size = self.world.together
        parts = [
            trial.measured(vectors[first : first + size], self.world.score, batches[first : first + size])
            for first in range(0, len(vectors), size)
        ]
        return torch.cat(parts)

    @cached_property
    def transfer(self) -> Tensor:
        """Every expert on every taught task, beyond the base: float32 (experts, tasks)."""
        count = len(self.taught)

        def make() -> Mapping[str, Tensor]:
            pairs = [(expert, task) for expert in range(count) for task in range(count)]
            vectors = torch.stack([self.last[expert] for expert, _ in pairs])
            scores = self.probed(vectors, [task for _, task in pairs]).view(count, count)
            plain = self.probed(torch.zeros(count, self.layout.size), range(count))
            return {"scores": scores - plain}

        return self.room.tensors("transfer", self.recipe(probes=self.plan.probes, version=1), make)["scores"]

    # --- the learned similarity

    def similarity(self, words: Words) -> Similarity:
        """Fitted to all taught tasks."""
        return self._similarities(words)[0]

    def left_out(self, words: Words) -> list[tuple[tuple[int, ...], Similarity]]:
        """Similarities of which each has not seen some taught tasks, with these tasks' places."""
        return self._similarities(words)[1]

    def _similarities(self, words: Words) -> tuple[Similarity, list[tuple[tuple[int, ...], Similarity]]]:
        if words not in self._known:
            school = self.school if words == "sentences" else self.worded
            given: dict[str, Any] = {
                "space": school.space,
                "width": token_width(school.space, school.vectors[0].shape[1]),
                "steps": self.plan.similarity,
                "seed": self.setting.seed,
            }
            parts = folded(school.vectors, self.transfer, folds=self.plan.folds, **given)
            self._known[words] = (fit_similarity(school.vectors, self.transfer, **given), parts)
        return self._known[words]

    @cached_property
    def _known(self) -> dict[Words, tuple[Similarity, list[tuple[tuple[int, ...], Similarity]]]]:
        return {}

    def recipe(self, **more: Any) -> Recipe:
        """What names something that was made from this cell."""
        return {
            "experts": self.trained.recipe,
            "taught": self.split.taught,
            "setting": asdict(self.setting),
            **more,
        }


@dataclass(frozen=True)
class Remembering:
    """A text encoder that was asked everything before."""

    space: str
    dim: int
    known: Mapping[str, int]
    vectors: Tensor

    @classmethod
    def of(cls, room: Room, encoder: TextEncoder, texts: Sequence[str]) -> Remembering:
        every = list(dict.fromkeys(texts))
        recipe = {"space": encoder.space, "dim": encoder.dim, "texts": every}
        made = room.tensors("words", recipe, lambda: {"vectors": torch.from_numpy(encoder.encode(every)).half()})
        return cls(encoder.space, encoder.dim, {said: row for row, said in enumerate(every)}, made["vectors"])

    def encode(self, texts: Sequence[str]) -> Vectors:
        found = self.vectors[[self.known[said] for said in texts]].float()
        return torch.nn.functional.normalize(found, dim=1).numpy()


def _spread(texts: Sequence[str], count: int) -> tuple[str, ...]:
    """`count` of the texts, evenly spread and with the ends last to go."""
    if count >= len(texts):
        return tuple(texts)
    return tuple(texts[round(at * (len(texts) - 1) / max(1, count - 1))] for at in range(count))

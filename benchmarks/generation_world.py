"""What the generation benchmark needs to know of a world: tasks with words and data, a base, adapters for the tasks.

A world is opened for one setting: which base and family of tasks, which split, which library. What is particular to
digits, sentences and pictures stands behind `World`; cells, rows and tables see nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from generation_room import Room
    from generation_training import Effort, Experts, Trainer

ROOT = Path(__file__).resolve().parents[1]
Name = Literal["A", "B", "turns", "sentences", "pictures"]
Start = Literal["shared", "independent"]
Draw = Callable[[int, torch.Generator], Any]
Loss = Callable[[nn.Module, Sequence[Any]], Tensor]


@dataclass(frozen=True)
class Setting:
    """Which cell. base: of the digits A has seen clean upright ones only, B the taught domains, "turns" is A's on the
    smooth family; "sentences" and "pictures" are those worlds' own. start: whether the experts began at one point."""

    base: Name
    start: Start
    split: int
    seed: int

    def __str__(self) -> str:
        return f"{self.base}, {self.start}, split {self.split}, seed {self.seed}"

    @property
    def world(self) -> str:
        """digits, sentences or pictures."""
        return self.base if self.base in ("sentences", "pictures") else "digits"


@dataclass(frozen=True)
class Plan:
    """How much is done.

    effort: training of experts; descriptions: of each taught task; probes: samples of each to choose by; tests: of each
    task; choice: of these, those by which the best expert in hindsight is found; queries: of each held-out task;
    tuning: descriptions of each taught task to choose temperatures by; folds: that similarities are validated with;
    hyper, hyper_samples, hyper_rank, hyper_members, hyper_rates: the hypernetwork's steps, samples of a task in a
    batch, rank of what a member makes, members, and rates, of the network and of the bases; rehearsal: steps on the
    words of a task; icm_stages, icm_channels: of ICM-LoRA's network; only: names of the domains or styles that take
    part, all where there are none; the rest: steps of training.
    """

    effort: Effort
    descriptions: int = 16
    probes: int = 150
    tests: int = 797
    choice: int = 150
    queries: int = 4
    tuning: int = 1
    similarity: int = 300
    folds: int = 4
    semantic: int = 1000
    icm: int = 600
    icm_stages: int = 8  # of twelve: small vectors cannot be halved more often
    icm_channels: int = 8
    regression: int = 600
    hyper: int = 1000
    hyper_samples: int = 16
    hyper_rank: int = 16
    hyper_members: int = 1
    hyper_rates: tuple[float, float] = (3e-3, 7e-3)
    rehearsal: int = 40
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sources:
    """Folders: of data set checkouts (see example_sources.py), and the one that emoji art is kept in."""

    data: Path = field(default=ROOT.parent / "shared/data")
    pictures: Path = field(default=ROOT / "build/pictures")


class Task(Protocol):
    """A task in words. descriptions: the library's; queries: what is asked with, sentences that no description is;
    strange: more queries, in words that no description has, where the usual ones share some."""

    @property
    def name(self) -> str: ...
    @property
    def descriptions(self) -> tuple[str, ...]: ...
    @property
    def queries(self) -> tuple[str, ...]: ...
    @property
    def strange(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Split:
    """Which tasks there are experts for, and which are held out, by place."""

    taught: tuple[int, ...]
    held: tuple[int, ...]


class World(Protocol):
    """A world in one setting; tasks are named by their place among `tasks`.

    model: the frozen base in evaluation mode; component: its name in its pipeline. loss, score: of every adapter's
    batch (adapters,); a score is higher where the adapter is better, and never trained on. together: adapters that are
    measured in one pass.
    """

    @property
    def tasks(self) -> Sequence[Task]: ...
    @property
    def split(self) -> Split: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def component(self) -> str: ...
    @property
    def loss(self) -> Loss: ...
    @property
    def score(self) -> Loss: ...
    @property
    def together(self) -> int: ...

    def experts(self) -> Experts:
        """An expert for every task; those of held-out ones are oracles."""

    @property
    def trainer(self) -> Trainer:
        """Of the experts."""

    def multitask(self, trainer: Trainer | None = None) -> Tensor:
        """One adapter for all taught tasks, in the layout of the trainer, by default the experts': (size,)."""

    def learning(self, task: int, size: int) -> Draw:
        """Draws batches of `size` of a task's samples to learn from."""

    def probes(self, task: int, count: int) -> Any:
        """The same `count` of those to learn from each time, to choose by."""

    def tests(self, task: int, count: int) -> Any:
        """The first `count` of the samples that nothing was trained on."""


def open_world(setting: Setting, plan: Plan, room: Room, sources: Sources) -> World:
    """The world of a setting."""
    if setting.world == "sentences":
        from generation_sentences import SentenceTasks

        return SentenceTasks(setting, plan, room, sources.data)
    if setting.world == "pictures":
        from generation_pictures import StyleTasks

        return StyleTasks(setting, plan, room, sources.pictures)
    from generation_digits import DigitTasks

    return DigitTasks(setting, plan, room)


def plan_of(world: str, *, quick: bool) -> Plan:
    """How much is done in a world."""
    if world == "sentences":
        from generation_sentences import BRIEF, PLAN
    elif world == "pictures":
        from generation_pictures import BRIEF, PLAN
    else:
        from generation_digits import BRIEF, PLAN
    return BRIEF if quick else PLAN


def adjusted(plan: Plan, setting: Setting) -> Plan:
    """A world's plan with what the base of a setting needs beside."""
    from generation_digits import HYPER

    return replace(plan, **HYPER.get(setting.base, {}))

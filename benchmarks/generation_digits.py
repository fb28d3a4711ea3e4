"""The digits world, as the generation benchmark sees it: DDD-48 on two bases, and the smooth family of turns.

Splits hold out 12 of the 48 domains, new combinations of known factors; of the turns every other angle. A score is the
share of test digits that are read rightly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from digits_tasks import Domain, described_domains, split, turned_domains, turned_split
from digits_world import FULL, QUICK, Base, Labelled, base, drawing, experts, hits, multitask, reading, trainer_of
from generation_room import Room
from generation_training import Experts, Trainer
from generation_world import Draw, Loss, Plan, Setting, Split
from torch import Tensor, nn

PLAN = Plan(FULL, folds=3, hyper=1500)
BRIEF = Plan(
    QUICK, descriptions=3, probes=30, tests=60, choice=60, queries=1, similarity=20, folds=2, semantic=10, icm=2,
    regression=20, hyper=25, hyper_samples=8,
)  # fmt: skip
# by base, what its hypernetwork needs beside; chosen on splits that no table holds (on A these rates are far too high)
HYPER: dict[str, dict[str, Any]] = {"B": {"hyper_rank": 32, "hyper_members": 2, "hyper_rates": (6e-3, 1.5e-2)}}


@dataclass(frozen=True)
class DigitTasks:
    """See the module, and `generation_world.World`."""

    setting: Setting
    plan: Plan
    room: Room
    component: str = ""
    together: int = 2  # more pictures in a pass do not fit into a processor's cache
    loss: Loss = reading
    score: Loss = hits

    @cached_property
    def tasks(self) -> tuple[Domain, ...]:
        return turned_domains() if self.setting.base == "turns" else described_domains()

    @cached_property
    def split(self) -> Split:
        return turned_split() if self.setting.base == "turns" else split(self.setting.split)

    @cached_property
    def base(self) -> Base:
        """A's base, which the turns share, or B's."""
        if self.setting.base == "B":
            return base(self.room, self._taught, self.plan.effort.generalist)
        return base(self.room, described_domains()[:1], self.plan.effort.base)

    @property
    def model(self) -> nn.Module:
        return self.base.model

    @property
    def _taught(self) -> Sequence[Domain]:
        return [self.tasks[place] for place in self.split.taught]

    def experts(self) -> Experts:
        start, seed = self.setting.start, self.setting.seed
        return experts(self.room, self.base, self.tasks, self.plan.effort, start=start, seed=seed)

    @property
    def trainer(self) -> Trainer:
        return trainer_of(self.base)

    def multitask(self, trainer: Trainer | None = None) -> Tensor:
        seed = self.setting.seed
        return multitask(self.room, self.base, self._taught, self.plan.effort, seed=seed, trainer=trainer)

    def learning(self, task: int, size: int) -> Draw:
        return drawing(self.tasks[task]).learning(size)

    def probes(self, task: int, count: int) -> Labelled:
        return drawing(self.tasks[task]).probes(count)

    def tests(self, task: int, count: int) -> Labelled:
        return Labelled(*(part[:count] for part in drawing(self.tasks[task]).test))

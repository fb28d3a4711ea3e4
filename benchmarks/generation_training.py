"""How a world's adapters are trained: all experts at once, with their late checkpoints, and one for all tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from generation_room import Recipe
from generation_world import Draw, Loss, Start
from lorahub.generate.experts import Pupil, train
from lorahub.generate.layout import Layout
from lorahub.hub.adapter import Adapter
from lorahub.hub.lowrank import LowRank
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class Effort(Protocol):
    """How long adapters are trained. experts, multitask: steps, and samples a step (of each adapter); checkpoints: the
    last so many, `every` steps from one to the next; the last is the end."""

    @property
    def experts(self) -> tuple[int, int]: ...
    @property
    def multitask(self) -> tuple[int, int]: ...
    @property
    def checkpoints(self) -> int: ...
    @property
    def every(self) -> int: ...


@dataclass(frozen=True)
class Training:
    """An effort of a world whose base comes ready."""

    experts: tuple[int, int]
    multitask: tuple[int, int]
    checkpoints: int = 12
    every: int = 2


@dataclass(frozen=True)
class Experts:
    """vectors: float32 (tasks, checkpoints, size), in the layout, whose gauge is none."""

    recipe: Recipe
    layout: Layout
    vectors: Tensor


def late(steps: int) -> Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LRScheduler]:
    """A schedule: up, down a cosine to a fifth of the rate at three quarters of the way, and on with that.

    The checkpoints are taken at the end, where the rate no longer falls: they differ as training goes on.
    """

    def share(step: int) -> float:
        warm, end = max(1, steps // 20), 3 * steps // 4
        if step < warm:
            return (step + 1) / warm
        passed = min(1.0, (step - warm) / max(1, end - warm))
        return 0.2 + 0.8 * (1 + float(torch.cos(torch.tensor(passed * torch.pi)))) / 2

    return lambda optimizer, _: torch.optim.lr_scheduler.LambdaLR(optimizer, share)


@contextmanager
def in_bfloat16() -> Iterator[None]:
    """Products in bfloat16, and attention in plain ones: fused attention in bfloat16 is slow on a CPU."""
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


@dataclass(frozen=True)
class Trainer:
    """A base, the layers that its adapters change, and how these are trained.

    loss: as `generate.experts.train` wants it; together: adapters in one pass; the rest as there.
    """

    base: str
    model: nn.Module
    paths: Sequence[str]
    loss: Loss
    rank: int
    scale: float
    rate: float
    component: str = ""
    autocast: bool = False
    together: int = 16

    @cached_property
    def layout(self) -> Layout:
        """Of the adapters, gauge none."""
        prefix = f"{self.component}." if self.component else ""
        modules = {prefix + path: self._empty(path) for path in self.paths}
        return Layout.of([Adapter(modules, self.base)], gauge="none")

    def _empty(self, path: str) -> LowRank:
        layer = self.model.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        return LowRank(
            torch.zeros(self.rank, layer.in_features), torch.zeros(layer.out_features, self.rank), self.scale
        )

    def experts(self, draws: Mapping[str, Draw], effort: Effort, *, start: Start, seed: int) -> dict[str, Tensor]:
        """An expert for each, "vectors" (tasks, checkpoints, size). start: whether all begin and draw alike."""
        steps, back = effort.experts[0], range(effort.checkpoints)
        wanted = [steps - effort.every * behind for behind in back][::-1]
        pupils = [
            self._pupil(name, draw, seed if start == "shared" else 1000 * (seed + 1) + place)
            for place, (name, draw) in enumerate(draws.items())
        ]
        done = self._trained(pupils, self.loss, steps, wanted)
        rows = [[self.layout.flatten(done[at][place]) for at in wanted] for place in range(len(pupils))]
        return {"vectors": torch.stack([torch.stack(row) for row in rows])}

    def one(self, draw: Draw, effort: Effort, *, seed: int, loss: Loss | None = None) -> dict[str, Tensor]:
        """One adapter for whatever is drawn, a "vector" (size,). loss: its own, for batches of another kind."""
        steps = effort.multitask[0]
        done = self._trained([self._pupil("multi-task", draw, seed)], loss or self.loss, steps, [steps])
        return {"vector": self.layout.flatten(done[steps][0])}

    def _pupil(self, name: str, draw: Draw, seed: int) -> Pupil[Any]:
        return Pupil(name, draw, seed=seed, rank=self.rank, scale=self.scale)

    def _trained(
        self, pupils: Sequence[Pupil[Any]], loss: Loss, steps: int, wanted: Sequence[int]
    ) -> Mapping[int, Sequence[Adapter]]:
        return train(
            self.model, self.paths, pupils, loss, steps=steps, rate=self.rate, schedule=late(steps), clip=1.0,
            autocast=self.autocast, together=self.together, checkpoints=wanted, component=self.component,
            base=self.base,
        ).checkpoints  # fmt: skip

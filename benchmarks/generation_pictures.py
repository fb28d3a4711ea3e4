"""The picture world of the generation benchmark: 28 styles of the small diffusion transformer.

A split holds out eight styles; the first three hold out different ones. Captions are the names of the things alone, so
that the style is in the adapter and in nothing else. 120 names are learned from, by every style; others are tested on,
which no expert was shown in any style (the base knows them, as its artist draws them).

A score is the share of the flow that is explained, 1 - loss / mean square of the flow, at noise and times that are
drawn once for each style. So a share of the oracle's gain is (base loss - loss) / (base loss - oracle's loss). Products
are in bfloat16.
"""

from __future__ import annotations

import hashlib
import random
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from generation_room import Room
from generation_training import Experts, Trainer, Training, in_bfloat16
from generation_world import ROOT, Draw, Loss, Plan, Setting, Split
from lorahub.generate.experts import generator, linear_paths
from lorahub.generate.lessons import Noised, flow_matching, noising
from lorahub.generate.pictures import BASE, Reader, shipped
from picture_base import values
from picture_data import Art, load
from picture_lessons import LAYERS
from picture_styles import STYLES, Style, restyled
from picture_world import opened
from torch import Tensor, nn

RANK, SCALE, RATE = 4, 1.0, 2e-3
LEARNED, TESTED = 120, 64  # names
CAPTION = "a {}"
BLANK = 0.1  # share of pictures without words, in training
HELD = 8  # styles that a split holds out, of 28
RECIPE_FILES = ("picture_styles.py", "picture_brushes.py")

PLAN = Plan(
    Training((100, 6), (200, 40)), descriptions=6, probes=24, tests=48, choice=24, queries=3, semantic=600, icm=80,
    icm_stages=12, icm_channels=2, regression=300, hyper=250, hyper_samples=4,
)  # fmt: skip
BRIEF = Plan(
    Training((3, 2), (3, 8), checkpoints=2, every=1), descriptions=3, probes=2, tests=4, choice=2, queries=1,
    similarity=20, folds=2, semantic=10, icm=2, icm_stages=12, icm_channels=1, regression=20, hyper=3, hyper_samples=1,
    only=("watercolor", "pencil sketch", "blueprint", "neon", "sepia", "halftone", "pastel", "comic"),
)  # fmt: skip


# --- words ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StyleTask:
    """A style, in words."""

    style: Style
    descriptions: tuple[str, ...]
    queries: tuple[str, ...]
    strange: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.style.name


@cache
def every_task() -> tuple[StyleTask, ...]:
    """All 28."""
    asked, more = _words("retrieval_words.toml")["style"], _words("generation_words.toml")["style"]
    return tuple(_task(style, asked[style.name], more[style.name]) for style in STYLES)


def _words(name: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / "benchmarks" / name).read_text(encoding="utf-8"))


def _task(style: Style, asked: Sequence[str], more: Mapping[str, Sequence[str]]) -> StyleTask:
    told = (style.description, f"Paints anything as a {style.trigger}.", f"{style.name} style", *more["told"])
    return StyleTask(style, told, (*asked, *more["asked"]))


def split(tasks: Sequence[StyleTask], number: int) -> Split:
    """The split of this number; of fewer styles as large a share is held out."""
    order, some = list(range(len(tasks))), max(1, HELD * len(tasks) // len(STYLES))
    random.Random("styles").shuffle(order)
    held = {order[(number * some + place) % len(order)] for place in range(some)}
    return Split(tuple(place for place in range(len(tasks)) if place not in held), tuple(sorted(held)))


# --- pictures -------------------------------------------------------------------------------------------------------


def flow(model: nn.Module, batches: Sequence[Noised]) -> Tensor:
    """`flow_matching` in bfloat16."""
    with in_bfloat16():
        return flow_matching(model, batches)


def explained(model: nn.Module, batches: Sequence[Noised]) -> Tensor:
    """The share of every batch's flow that is explained: (adapters,)."""
    return 1 - flow(model, batches) / torch.stack([batch.aim.square().mean() for batch in batches])


def fixed(pictures: Tensor, conditions: Mapping[str, Tensor], purpose: str) -> Noised:
    """Pictures with noise, at times that cover the logit-normal distribution evenly; the same for the same purpose."""
    chance = generator(0, purpose)
    levels = (torch.randperm(len(pictures), generator=chance) + 0.5) / len(pictures)
    time = torch.special.ndtri(levels).sigmoid()
    noise, part = torch.randn(pictures.shape, generator=chance), time[:, None, None, None]
    return Noised((1 - part) * pictures + part * noise, noise - pictures, time, conditions)


@dataclass(frozen=True)
class Studio:
    """The pictures of every style, each made once. folder: where emoji art is kept."""

    folder: Path
    _made: dict[tuple[str, str], Any] = field(default_factory=dict)

    def training(self, style: Style, size: int) -> Draw:
        """Draws batches of `size` to learn from."""
        conditions, blank = self._conditions["learned"], self._conditions["blank"]
        return noising(self._pictures(style, "learned"), conditions, size=size, empty=blank, dropout=BLANK)

    def fixed(self, style: Style, names: str) -> Noised:
        """The same each time. names: "learned", to choose by, or "tested"."""
        return self._once(
            (style.name, f"fixed {names}"),
            lambda: fixed(self._pictures(style, names), self._conditions[names], f"{names} {style.name}"),
        )

    def _pictures(self, style: Style, names: str) -> Tensor:
        """Values (n, 3, 32, 32)."""
        rows = self.rows[names]
        return self._once((style.name, names), lambda: values(restyled(style, self._art.pixels[rows], rows)))

    def _once(self, name: tuple[str, str], make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    @cached_property
    def rows(self) -> dict[str, list[int]]:
        """Names to learn from and to be tested on, by place among the base's."""
        order = random.Random("names").sample(range(len(self._art.names)), LEARNED + TESTED)
        return {"learned": order[:LEARNED], "tested": order[LEARNED:]}

    @cached_property
    def _conditions(self) -> dict[str, dict[str, Tensor]]:
        """What the model is called with for these names, and without words (1, ...)."""
        texts = {kind: [CAPTION.format(self._art.names[row].words) for row in rows] for kind, rows in self.rows.items()}
        reader, found = Reader(), {}
        for kind, captions in (texts | {"blank": [""]}).items():
            states, mask = reader.read(captions)
            found[kind] = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        return found

    @cached_property
    def _art(self) -> Art:
        return load(self.folder, "google").of("base")


def first(batch: Noised, count: int) -> Noised:
    """Its first samples."""
    conditions = {name: part[:count] for name, part in batch.conditions.items()}
    return Noised(batch.value[:count], batch.aim[:count], batch.time[:count], conditions)


def joined(batches: Sequence[Noised]) -> Noised:
    """All samples in one batch."""
    conditions = {name: torch.cat([one.conditions[name] for one in batches]) for name in batches[0].conditions}
    value, aim, time = (torch.cat([getattr(one, name) for one in batches]) for name in ("value", "aim", "time"))
    return Noised(value, aim, time, conditions)


# --- the world ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StyleTasks:
    """See the module, and `generation_world.World`. pictures: the folder that emoji art is kept in."""

    setting: Setting
    plan: Plan
    room: Room
    pictures: Path
    component: str = "transformer"
    together: int = 4
    loss: Loss = flow
    score: Loss = explained

    @cached_property
    def tasks(self) -> tuple[StyleTask, ...]:
        only = self.plan.only
        return tuple(one for one in every_task() if not only or one.name in only)

    @cached_property
    def split(self) -> Split:
        return split(self.tasks, self.setting.split)

    @cached_property
    def model(self) -> nn.Module:
        model: nn.Module = opened(shipped()).transformer
        return model.float()

    def experts(self) -> Experts:
        start, seed, effort = self.setting.start, self.setting.seed, self.plan.effort
        recipe = self._recipe(self.tasks, effort=[effort.experts, effort.checkpoints, effort.every], start=start)
        draws = {one.name: self.studio.training(one.style, effort.experts[1]) for one in self.tasks}
        made = self.room.tensors("experts", recipe, lambda: self.trainer.experts(draws, effort, start=start, seed=seed))
        return Experts(recipe, self.trainer.layout, made["vectors"])

    def multitask(self, trainer: Trainer | None = None) -> Tensor:
        trainer = trainer or self.trainer
        effort, taught = self.plan.effort, [self.tasks[place] for place in self.split.taught]
        size = effort.multitask[1]
        recipe = self._recipe(taught, effort=effort.multitask, rank=[trainer.rank, trainer.scale, trainer.rate])
        draws = [self.studio.training(one.style, 1) for one in taught]

        def draw(step: int, chance: torch.Generator) -> Noised:
            chosen = torch.randint(len(draws), (size,), generator=chance).tolist()
            return joined([draws[place](step, chance) for place in chosen])

        made = self.room.tensors("multitask", recipe, lambda: trainer.one(draw, effort, seed=self.setting.seed))
        return made["vector"]

    def learning(self, task: int, size: int) -> Draw:
        return self.studio.training(self.tasks[task].style, size)

    def probes(self, task: int, count: int) -> Noised:
        return first(self.studio.fixed(self.tasks[task].style, "learned"), count)

    def tests(self, task: int, count: int) -> Noised:
        return first(self.studio.fixed(self.tasks[task].style, "tested"), count)

    @cached_property
    def studio(self) -> Studio:
        return Studio(self.pictures)

    @cached_property
    def trainer(self) -> Trainer:
        return Trainer(
            BASE, self.model, linear_paths(self.model, LAYERS), flow_matching, RANK, SCALE, RATE,
            component=self.component, autocast=True, together=8,
        )  # fmt: skip

    def _recipe(self, tasks: Sequence[StyleTask], **more: Any) -> dict[str, Any]:
        return {
            "world": "pictures",
            "styles": [one.name for one in tasks],
            "stamp": _stamp(),
            "rank": [RANK, SCALE, RATE],
            "layers": LAYERS,
            "names": [LEARNED, TESTED, CAPTION, BLANK],
            "seed": self.setting.seed,
            "version": 1,
            **more,
        }


@cache
def _stamp() -> str:
    """Of the base's files and of what makes the styles."""
    files = [ROOT / "benchmarks" / name for name in RECIPE_FILES] + sorted(shipped().glob("transformer/*"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

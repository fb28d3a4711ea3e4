"""The digits world: a small vision transformer, its image domains, and adapters for them, all trained here.

scikit-learn's 1,797 handwritten digits, enlarged to 16 x 16, 1,000 to learn from and 797 to be tested on, in the
domains of digits_tasks.py. Two bases: A has seen clean upright digits only, B the taught domains of a split, all mixed;
neither has seen a held-out domain. Adapters are of rank 2 on queries, keys and values, 1,728 numbers, all trained at
once. Noise is drawn anew for every picture that is learned from, and is fixed for those that are tested on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from digits_tasks import Domain
from generation_room import Recipe, Room, digest
from generation_training import Experts, Trainer
from generation_world import Start
from lorahub.generate.experts import generator, linear_paths
from lorahub.generate.layout import Layout
from torch import Tensor, nn
from torch.nn import functional

SIDE, PATCH, WIDTH, HEADS, BLOCKS = 16, 4, 48, 4, 3
LEARNING = 1000  # of the 1,797 digits
NOISE, BLUR = 0.4, 1.5  # standard deviations: of grey values, and of the blur in pixels
LAYERS = ("query", "key", "value")
RANK, SCALE = 2, 2.0
RATE = 1e-2  # of adapters


@dataclass(frozen=True)
class Effort:
    """How long things are trained: steps, and pictures a step (of each adapter)."""

    base: tuple[int, int] = (600, 128)
    generalist: tuple[int, int] = (1200, 256)
    experts: tuple[int, int] = (300, 32)
    multitask: tuple[int, int] = (400, 256)
    checkpoints: int = 20
    every: int = 4  # steps from one checkpoint to the next; the last is the end


FULL = Effort()
QUICK = Effort((150, 64), (200, 96), (60, 12), (60, 96), checkpoints=3)


# --- pictures -------------------------------------------------------------------------------------------------------


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Pictures float32 (1797, 16, 16), bright ink on 0, and labels int64 (1797,), in a fixed random order."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=generator(0, "order of the digits"))
    small = torch.from_numpy(found.images).float()[order, None] / 16
    large = functional.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return large[:, 0], torch.from_numpy(found.target).long()[order]


def seen(pictures: Tensor, domain: Domain) -> Tensor:
    """The pictures (n, side, side) in a domain, but for its noise."""
    if domain.mirror:
        pictures = pictures.flip(2)
    if domain.flip:
        pictures = pictures.flip(1)
    pictures = turned(pictures, domain.angle)
    if domain.dark:
        pictures = 1 - pictures
    return blurred(pictures, BLUR) if domain.corruption == "blurred" else pictures


def turned(pictures: Tensor, angle: float) -> Tensor:
    """Turned anticlockwise by an angle in degrees; what comes in from outside is 0."""
    if angle % 90 == 0:
        return torch.rot90(pictures, round(angle / 90), (1, 2))
    turn = torch.deg2rad(torch.tensor(angle))
    cosine, sine = float(turn.cos()), float(turn.sin())
    matrix = torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]]).expand(len(pictures), 2, 3)
    grid = functional.affine_grid(matrix, [len(pictures), 1, SIDE, SIDE], align_corners=False)
    return functional.grid_sample(pictures[:, None], grid, align_corners=False)[:, 0]


def blurred(pictures: Tensor, deviation: float) -> Tensor:
    """Under a Gaussian of this deviation in pixels."""
    reach = round(3 * deviation)
    weights = torch.exp(-torch.arange(-reach, reach + 1).float().square() / (2 * deviation**2))
    weights = (weights / weights.sum()).view(1, 1, 1, -1)
    padded = functional.pad(pictures[:, None], (reach,) * 4, mode="replicate")
    return functional.conv2d(functional.conv2d(padded, weights), weights.mT)[:, 0]


def noised(pictures: Tensor, chance: torch.Generator) -> Tensor:
    """With grey values' noise, cut off at black and white."""
    return (pictures + NOISE * torch.randn(pictures.shape, generator=chance)).clamp(0, 1)


class Labelled(NamedTuple):
    """Pictures (n, side, side) and their digits (n,)."""

    pictures: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Drawing:
    """A domain's pictures: drawn from to learn, the rest to be tested on."""

    domain: Domain

    @cached_property
    def plain(self) -> Tensor:
        """All pictures without noise."""
        return seen(digits()[0], self.domain)

    def learning(self, size: int) -> Callable[[int, torch.Generator], Labelled]:
        """Draws batches of `size` from those to learn from."""

        def draw(step: int, chance: torch.Generator) -> Labelled:
            rows = torch.randint(LEARNING, (size,), generator=chance)
            return self._batch(rows, chance)

        return draw

    def probes(self, count: int) -> Labelled:
        """The same `count` of those to learn from each time, to choose by."""
        return self._batch(torch.arange(count), generator(1, f"probes of {self.domain.name}"))

    @cached_property
    def test(self) -> Labelled:
        """The held-out pictures."""
        rows = torch.arange(LEARNING, len(self.plain))
        return self._batch(rows, generator(0, f"test of {self.domain.name}"))

    def _batch(self, rows: Tensor, chance: torch.Generator) -> Labelled:
        pictures = self.plain[rows]
        if self.domain.corruption == "noisy":
            pictures = noised(pictures, chance)
        return Labelled(pictures, digits()[1][rows])


@cache
def drawing(domain: Domain) -> Drawing:
    """The domain's pictures, made once."""
    return Drawing(domain)


# --- the model ------------------------------------------------------------------------------------------------------


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.widen, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, states: Tensor) -> Tensor:
        normed = self.before(states)
        query, key, value = (
            part(normed).unflatten(2, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        weights = (query @ key.mT * (WIDTH // HEADS) ** -0.5).softmax(dim=-1)
        states = states + self.out((weights @ value).transpose(1, 2).flatten(2))
        return states + self.narrow(functional.gelu(self.widen(self.after(states))))


class DigitReader(nn.Module):
    """Pictures (n, 16, 16) -> logits (n, 10): a vision transformer with patches of 4 x 4 and 59 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH * PATCH, WIDTH)
        self.whole = nn.Parameter(0.02 * torch.randn(WIDTH))
        self.places = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2 + 1, WIDTH))
        self.blocks = nn.ModuleList(_Block() for _ in range(BLOCKS))
        self.last, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        cut = pictures.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)
        states = self.patches((cut - 0.5) * 2)
        states = torch.cat([self.whole.expand(len(states), 1, -1), states], dim=1) + self.places
        for block in self.blocks:
            states = block(states)
        return self.head(self.last(states[:, 0]))


def reading(model: nn.Module, batches: Sequence[Labelled]) -> Tensor:
    """Cross-entropy of every adapter's batch: (adapters,). The batches hold as many pictures each."""
    logits = model(torch.cat([batch.pictures for batch in batches]))
    labels = torch.cat([batch.labels for batch in batches])
    return functional.cross_entropy(logits, labels, reduction="none").view(len(batches), -1).mean(dim=1)


def hits(model: nn.Module, batches: Sequence[Labelled]) -> Tensor:
    """The share of digits read rightly: (adapters,)."""
    logits = model(torch.cat([batch.pictures for batch in batches]))
    right = logits.argmax(dim=1) == torch.cat([batch.labels for batch in batches])
    return right.float().view(len(batches), -1).mean(dim=1)


def paths(model: nn.Module) -> list[str]:
    """The layers that adapters change."""
    return linear_paths(model, LAYERS)


# --- bases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """A trained base: its name, what it was made from, and the model."""

    name: str
    recipe: Recipe
    model: DigitReader


def base(room: Room, domains: Sequence[Domain], effort: tuple[int, int], seed: int = 0) -> Base:
    """A base that has seen these domains, each as often as the others."""
    recipe = {
        "domains": [asdict(one) for one in domains],
        "effort": effort,
        "seed": seed,
        "noise": NOISE,
        "blur": BLUR,
        "version": 1,
    }
    model = _fresh(seed)
    model.load_state_dict(room.tensors("base", recipe, lambda: _schooled(model, domains, effort, seed).state_dict()))
    return Base(f"digits-{digest(recipe)}", recipe, model.eval().requires_grad_(False))


def _fresh(seed: int) -> DigitReader:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DigitReader()


def _schooled(model: DigitReader, domains: Sequence[Domain], effort: tuple[int, int], seed: int) -> DigitReader:
    steps, size = effort
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    draw = mixture(domains, size)
    for step in range(steps):
        loss = reading(model, [draw(step, generator(seed, f"base {step}"))])
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        rates.step()
    return model


def mixture(domains: Sequence[Domain], size: int) -> Callable[[int, torch.Generator], Labelled]:
    """Draws batches in which each picture is of a domain of its own."""

    def draw(step: int, chance: torch.Generator) -> Labelled:
        chosen = torch.randint(len(domains), (size,), generator=chance).bincount(minlength=len(domains)).tolist()
        parts = [drawing(one).learning(count)(step, chance) for one, count in zip(domains, chosen, strict=True)]
        return Labelled(*(torch.cat(side) for side in zip(*parts, strict=True)))

    return draw


# --- adapters -------------------------------------------------------------------------------------------------------


def experts(
    room: Room, base: Base, domains: Sequence[Domain], effort: Effort, *, start: Start = "shared", seed: int = 0
) -> Experts:
    """An expert for every domain. start: whether all begin at one point and see the same digits in the same order."""
    recipe = {
        "base": base.recipe,
        "domains": [asdict(one) for one in domains],
        "effort": [effort.experts, effort.checkpoints, effort.every],
        "start": start,
        "seed": seed,
        "rank": [RANK, SCALE, RATE],
        "version": 1,
    }
    draws = {one.name: drawing(one).learning(effort.experts[1]) for one in domains}
    trainer = trainer_of(base)
    made = room.tensors("experts", recipe, lambda: trainer.experts(draws, effort, start=start, seed=seed))
    return Experts(recipe, trainer.layout, made["vectors"])


def multitask(
    room: Room, base: Base, domains: Sequence[Domain], effort: Effort, *, seed: int = 0, trainer: Trainer | None = None
) -> Tensor:
    """One adapter for all the domains mixed, in the trainer's layout: (size,)."""
    trainer = trainer or trainer_of(base)
    recipe: dict[str, Any] = {
        "base": base.recipe,
        "domains": [asdict(one) for one in domains],
        "effort": effort.multitask,
        "seed": seed,
        "rank": [trainer.rank, trainer.scale, trainer.rate],
        "version": 1,
    }
    draw = mixture(domains, effort.multitask[1])
    return room.tensors("multitask", recipe, lambda: trainer.one(draw, effort, seed=seed))["vector"]


def trainer_of(base: Base) -> Trainer:
    """How adapters for a base are trained."""
    return Trainer(base.name, base.model, paths(base.model), reading, RANK, SCALE, RATE)


def layout_of(base: Base) -> Layout:
    """The layout of the adapters for a base."""
    return trainer_of(base).layout

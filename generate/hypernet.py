"""A network that makes an adapter from a description, trained on the tasks' own loss through the frozen base.

Its kind is Text-to-LoRA's stronger one (arXiv 2506.06105): no adapter is imitated; what it makes is put to work on each
task's data, and the loss says how to do better. (Imitating first was tried: taught tasks were served as by their own
experts, new combinations of their factors not at all.) It starts at one adapter for all, best the experts' mean, and
learns to move in the space that they span and in some directions of its own. Importing this needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..hub.errors import BadOption, GenerationError, IncompatibleAdapters
from ..index.transfer import Reader
from .experts import generator
from .layout import Layout, principal
from .stacked import Group, Table

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Practice(Generic[Batch]):
    """What there is to practise on: a frozen model in evaluation mode, its loss, and the batches of every task.

    loss: from the model and one batch for every adapter, one loss for each, as `experts.train` wants it. draws: by the
    expert's name, called with the step and a generator, as a pupil's. component: the model's name in its pipeline,
    which begins the adapters' modules' names.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Sequence[Batch]], Tensor]
    draws: Mapping[str, Callable[[int, torch.Generator], Batch]]
    component: str = ""


class Trial:
    """Adapters as vectors of a layout, at work on a model: many in one pass, each on its own batch."""

    def __init__(self, model: nn.Module, layout: Layout, component: str = "") -> None:
        """Raises IncompatibleAdapters for a module that is no linear layer of the model, BadOption for a model in
        training mode."""
        if model.training:
            raise BadOption(f"{type(model).__name__} is in training mode; put it in evaluation mode first")
        prefix = f"{component}." if component else ""
        self.model, self.rank = model, max(place.rank for place in layout.places)
        self.layers = {place.name.removeprefix(prefix): _layer(model, place.name, prefix) for place in layout.places}
        self.slots = self._slots(layout, prefix)

    def gradient(
        self,
        vectors: Tensor,
        loss: Callable[[nn.Module, Sequence[Any]], Tensor],
        batches: Sequence[Any],
        names: Sequence[str],
        step: int,
    ) -> tuple[Tensor, Tensor]:
        """Losses (adapters,) and their gradients by the vectors (adapters, size). Raises LoraHubError with the name
        where one is not finite."""
        group = self._group(vectors, names)
        with torch.enable_grad(), group.acting(self.layers):
            losses = loss(self.model, batches)
            gradient = group.gradient(losses, step)
        return losses.detach(), gradient[:, self.slots]

    def measured(
        self, vectors: Tensor, measure: Callable[[nn.Module, Sequence[Any]], Tensor], batches: Sequence[Any]
    ) -> Tensor:
        """One number for each adapter (adapters,), without gradients."""
        group = self._group(vectors, [str(row) for row in range(len(vectors))])
        with torch.no_grad(), group.acting(self.layers):
            return measure(self.model, batches)

    def _group(self, vectors: Tensor, names: Sequence[str]) -> Group:
        table = Table(self.layers, [self.rank] * len(vectors))
        table.values[:, self.slots] = vectors.detach().to(table.values)
        return Group(table, slice(0, len(vectors)), names, [1.0] * len(vectors))

    def _slots(self, layout: Layout, prefix: str) -> Tensor:
        """Where in a row of the table each number of a vector stands: int64 (size,)."""
        table, slots = Table(self.layers, [self.rank]), torch.empty(layout.size, dtype=torch.long)
        numbers = torch.arange(table.values.shape[1])
        for place in layout.places:
            there = table.places[place.name.removeprefix(prefix)]
            down = numbers[there.down].view(self.rank, there.inputs)[: place.rank]
            up = numbers[there.up].view(self.rank, there.outputs)[: place.rank]
            slots[place.down], slots[place.up] = down.flatten(), up.T.flatten()
        return slots


def _layer(model: nn.Module, name: str, prefix: str) -> nn.Linear:
    try:
        layer = model.get_submodule(name.removeprefix(prefix)) if name.startswith(prefix) else None
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear):
        raise IncompatibleAdapters(f"{type(model).__name__} has no linear layer {name}; expected the experts' base")
    return layer


# --- the network ----------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Of a hypernetwork: numbers of a token, the reader's heads and channels, its values, the hidden layer, directions
    that it moves in, numbers of a vector."""

    width: int
    heads: int
    channels: int
    code: int
    hidden: int
    directions: int
    size: int


class HyperNetwork(nn.Module):
    """Descriptions (n, places, width) -> vectors (n, size): start + coefficients(description) @ directions.

    The coefficients are a linear and a two-layer map of what the reader says; both begin at zero, so it begins at
    `start` whatever is asked.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.reader = Reader(sizes.width, sizes.code, heads=sizes.heads, channels=sizes.channels)
        self.straight = nn.Linear(sizes.code, sizes.directions)
        self.bent = nn.Sequential(nn.Linear(sizes.code, sizes.hidden), nn.SiLU())
        self.out = nn.Linear(sizes.hidden, sizes.directions)
        self.start = nn.Parameter(torch.zeros(sizes.size))
        self.directions = nn.Parameter(torch.zeros(sizes.directions, sizes.size))
        for part in (self.straight, self.out):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)

    def codes(self, states: Tensor, *, noise: float = 0.0, dropped: float = 0.0) -> Tensor:
        """What the reader says of descriptions: (n, code)."""
        said: Tensor = self.reader(states, noise=noise, dropped=dropped)
        return said

    def made(self, codes: Tensor) -> Tensor:
        """Vectors (n, size) from what the reader says."""
        coefficients = self.straight(codes) + self.out(self.bent(codes))
        made: Tensor = self.start + coefficients @ self.directions
        return made

    def forward(self, states: Tensor) -> Tensor:
        return self.made(self.codes(states))


def opening(network: HyperNetwork, start: Tensor, weights: Tensor, known: int, chance: torch.Generator) -> None:
    """Where the network begins: at `start` (size,), with the `known` directions in which the experts' vectors (n, size)
    vary most from it, as long as they vary, and the rest at random and of the same length."""
    apart = weights - start
    axes = principal(apart, known).axes
    lengths = (apart @ axes.T).square().mean(dim=0).sqrt()
    free = len(network.directions) - len(axes)
    others = functional.normalize(torch.randn(free, len(start), generator=chance), dim=1)
    with torch.no_grad():
        network.start.copy_(start)
        network.directions.copy_(torch.cat([axes * lengths[:, None], others * lengths.mean()]))


# --- training -------------------------------------------------------------------------------------------------------


class Drill(NamedTuple):
    """How a hypernetwork is trained.

    tasks: in a step, each with one of its descriptions; noise and dropped: of the reader's input; rate: AdamW's, and
    `moving` for the start and the directions; shrink: weight of the mean square of a vector's distance from the start,
    in units of the experts'.
    """

    steps: int
    tasks: int
    rate: float
    moving: float
    noise: float
    dropped: float
    shrink: float
    seed: int


def trained(
    network: HyperNetwork,
    trial: Trial,
    practice: Practice[Any],
    names: Sequence[str],
    states: Sequence[Tensor],
    drill: Drill,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Trains the network in place; the mean loss of every step.

    names, states: of each expert, and its descriptions (descriptions, places, width). Raises GenerationError for an
    expert without batches.
    """
    lacking = [name for name in names if name not in practice.draws]
    if lacking:
        raise GenerationError(f"there is nothing to practise {lacking[0]} on; give batches for every expert")
    moved = [network.start, network.directions]
    others = [part for part in network.parameters() if all(part is not one for one in moved)]
    groups = [{"params": others, "lr": drill.rate}, {"params": moved, "lr": drill.moving, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, drill.steps))
    far, losses = float(network.directions.detach().square().sum(dim=1).mean()), []
    network.train()
    for step in range(drill.steps):
        with _chance(drill.seed, step):
            chosen = torch.randperm(len(names))[: drill.tasks].tolist()
            asked = torch.stack([states[row][int(torch.randint(len(states[row]), ()))] for row in chosen])
            codes = network.codes(network.reader.among_strange(asked), noise=drill.noise, dropped=drill.dropped)
        vectors = network.made(codes)
        some = [names[row] for row in chosen]
        batches = [practice.draws[name](step, generator(drill.seed, f"{name} {step}")) for name in some]
        found, gradient = trial.gradient(vectors, practice.loss, batches, some, step)
        distance = (vectors - network.start).square().sum(dim=1).mean() / max(far, 1e-12)
        optimizer.zero_grad()
        surrogate = (vectors * gradient).sum() / len(chosen) + drill.shrink * distance
        surrogate.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rates.step()
        losses.append(float(found.mean()))
        if progress:
            progress(step + 1, losses[-1])
    network.eval()
    return losses


def _share(step: int, steps: int) -> float:
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


@contextmanager
def _chance(seed: int, step: int) -> Iterator[None]:
    """torch's global chance begins here anew, and afterwards is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, f"step {step}").initial_seed())
        yield

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

from ..hub.errors import BadOption, GenerationError, IncompatibleAdapters
from ..index.transfer import Reader
from .cores import Bases
from .experts import generator
from .layout import Layout
from .stacked import Group, Table

Batch = TypeVar("Batch")
CONCENTRATION = 0.3  # of the mixtures of tasks


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


def check_practice(practice: Practice[Any], names: Sequence[str]) -> None:
    """Raise GenerationError where an expert has no batches."""
    lacking = [name for name in names if name not in practice.draws]
    if lacking:
        raise GenerationError(f"there is nothing to practise {lacking[0]} on; give batches for every expert")


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
    """Of a hypernetwork: numbers of a token, the reader's heads and channels, its values, the hidden layer, and the
    rank of what is made, which is less in a module whose sides are."""

    width: int
    heads: int
    channels: int
    code: int
    hidden: int
    rank: int


class HyperNetwork(nn.Module):
    """Descriptions (n, places, width) -> vectors (n, size) of a layout: in each module down = inputs, the same for all,
    and up = outputs @ (start + coefficients(description)), with one core of coefficients for each module.

    So the delta is linear in the coefficients, where factors that are added make products of all with all. The
    coefficients are a linear and a two-layer map of what the reader says; both begin at zero, so it begins at `start`
    whatever is asked. Numbers are kept in units of their usual size, to learn at one rate: `inputs` and `outputs` of
    orthonormal rows and columns, cores of `spread`.
    """

    def __init__(self, sizes: Sizes, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.counts = [place.rank**2 for place in layout.places]
        self.reader = Reader(sizes.width, sizes.code, heads=sizes.heads, channels=sizes.channels)
        self.straight = nn.Linear(sizes.code, sum(self.counts))
        self.bent = nn.Sequential(nn.Linear(sizes.code, sizes.hidden), nn.SiLU())
        self.out = nn.Linear(sizes.hidden, sum(self.counts))
        self.start = nn.Parameter(torch.zeros(sum(self.counts)))
        self.inputs = nn.Parameter(torch.zeros(sum(place.rank * place.inputs for place in layout.places)))
        self.outputs = nn.Parameter(torch.zeros(sum(place.outputs * place.rank for place in layout.places)))
        self.register_buffer("spread", torch.ones(sum(self.counts)))
        self.spread: Tensor
        for part in (self.straight, self.out):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)

    def codes(self, states: Tensor, *, noise: float = 0.0, dropped: float = 0.0) -> Tensor:
        """What the reader says of descriptions: (n, code)."""
        said: Tensor = self.reader(states, noise=noise, dropped=dropped)
        return said

    def coefficients(self, codes: Tensor) -> Tensor:
        """How far the cores are from the start (n, numbers of all cores), in units of `spread`."""
        moved: Tensor = self.straight(codes) + self.out(self.bent(codes))
        return moved

    def made(self, coefficients: Tensor) -> Tensor:
        """Vectors (n, size)."""
        cores = torch.split((self.start + coefficients) * self.spread, self.counts, dim=1)
        parts, left, right = [], 0, 0
        for place, core in zip(self.layout.places, cores, strict=True):
            across, along = place.rank * place.inputs, place.outputs * place.rank
            down = self.inputs[left : left + across] / math.sqrt(place.inputs)
            outputs = self.outputs[right : right + along].view(place.outputs, place.rank) / math.sqrt(place.outputs)
            up = outputs @ core.view(-1, place.rank, place.rank)
            parts += [down.expand(len(core), -1), up.flatten(1)]
            left, right = left + across, right + along
        return torch.cat(parts, dim=1)

    def forward(self, states: Tensor) -> Tensor:
        return self.made(self.coefficients(self.codes(states)))


def opening(
    network: HyperNetwork, experts: Layout, weights: Tensor, start: Tensor | None, chance: torch.Generator
) -> None:
    """Where the network begins: in the bases that keep most of the experts' deltas (n, size, in their layout), at
    `start` (size,) there, by default the mean of the deltas, with steps as large as the experts' cores vary."""
    known = weights if start is None else torch.cat([weights, start[None]])
    parts: list[list[Tensor]] = [[], [], [], []]
    for place, wide in zip(experts.places, network.layout.places, strict=True):
        bases = Bases.of(place, known, wide.rank, chance)
        cores = bases.cores(place, weights)
        begin = cores.mean(dim=0) if start is None else bases.cores(place, start[None])[0]
        spread = (cores - cores.mean(dim=0)).square().mean().sqrt()
        spread = spread.clamp_min(0.01 * float(cores.square().mean().sqrt())).clamp_min(1e-6)  # of experts that agree
        made = (bases.inputs * math.sqrt(place.inputs), bases.outputs * math.sqrt(place.outputs), begin / spread,
                spread.expand(wide.rank**2))  # fmt: skip
        for some, part in zip(parts, made, strict=True):
            some.append(part.flatten().float())
    with torch.no_grad():
        slots = (network.inputs, network.outputs, network.start, network.spread)
        for slot, some in zip(slots, parts, strict=True):
            slot.copy_(torch.cat(some))


# --- training -------------------------------------------------------------------------------------------------------


class Drill(NamedTuple):
    """How a hypernetwork is trained.

    tasks: in a step, each with one of its descriptions; noise and dropped: of the reader's input; rate: AdamW's, and
    `moving` for the start and the bases; shrink: weight of the coefficients' mean square; mixed: the share of a step's
    tasks that are mixed with the others.
    """

    steps: int
    tasks: int
    rate: float
    moving: float
    noise: float
    dropped: float
    shrink: float
    mixed: float
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
    check_practice(practice, names)
    moved = [network.start, network.inputs, network.outputs]
    others = [part for part in network.parameters() if all(part is not one for one in moved)]
    groups = [{"params": others, "lr": drill.rate}, {"params": moved, "lr": drill.moving, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, drill.steps))
    losses = []
    network.train()
    for step in range(drill.steps):
        with _chance(drill.seed, step):
            chosen = torch.randperm(len(names))[: drill.tasks].tolist()
            asked = torch.stack([states[row][int(torch.randint(len(states[row]), ()))] for row in chosen])
            codes = network.codes(network.reader.among_strange(asked), noise=drill.noise, dropped=drill.dropped)
            if drill.mixed:
                weights = mixtures(len(chosen), drill.mixed)
                codes, chosen = weights @ codes, [chosen[row] for row in weights.multinomial(1).flatten().tolist()]
        coefficients = network.coefficients(codes)
        vectors = network.made(coefficients)
        some = [names[row] for row in chosen]
        batches = [practice.draws[name](step, generator(drill.seed, f"{name} {step}")) for name in some]
        found, gradient = trial.gradient(vectors, practice.loss, batches, some, step)
        optimizer.zero_grad()
        surrogate = (vectors * gradient).sum() / len(chosen) + drill.shrink * coefficients.square().mean()
        surrogate.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rates.step()
        losses.append(float(found.mean()))
        if progress:
            progress(step + 1, losses[-1])
    network.eval()
    return losses


def mixtures(count: int, share: float) -> Tensor:
    """Weights (count, count), a mixture in each row: with odds `share` of all, by a Dirichlet distribution under which
    few weigh much, else of the row's own alone.

    A mixture's code is the codes' weighted sum, and its batch comes from one of the tasks, drawn with the weights as
    odds: in expectation the loss is mixed as the codes are (mixup, arXiv 1710.09412). So a description that is like
    none of the known ones, whose code lies between theirs, makes an adapter that does for all of these what one can.
    """
    spread = torch.distributions.Dirichlet(torch.full((count, count), CONCENTRATION)).sample()  # type: ignore[no-untyped-call]
    return torch.where(torch.rand(count, 1) < share, spread, torch.eye(count))


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

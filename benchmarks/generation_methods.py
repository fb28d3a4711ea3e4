"""What the generation benchmark compares learned generators with, and how it chooses their options.

Everything takes and gives vectors of a cell's layout; wider layouts hold exact sums of several adapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from generation_cell import Cell, Vectors, Words
from lorahub.generate.experts import generator
from lorahub.generate.hypernet import Trial
from lorahub.generate.layout import Layout, Statistics
from lorahub.generate.priors import NEIGHBOURS, TEMPERATURES, Prototypes
from lorahub.generate.taught import School, directions
from lorahub.hub.adapter import Adapter
from lorahub.hub.lowrank import LowRank
from torch import Tensor, nn
from torch.nn import functional

RIDGES = (0.01, 0.1, 1.0, 10.0)


# --- similarities ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sight:
    """Descriptions as a similarity sees them: the taught tasks' keys (n, dim) and descriptions, and the queries'.

    folds: for choosing by leave-one-out, places that a similarity has not seen, and keys and descriptions as it sees
    them; the plain one has seen none.
    """

    keys: Tensor
    descriptions: list[Vectors]
    queries: list[Vectors]
    strange: list[Vectors]
    folds: list[tuple[tuple[int, ...], Tensor, list[Vectors]]]


def sight(cell: Cell, words: Words, *, learned: bool) -> Sight:
    """By the vectors' own cosines, or by the similarity learned from transfer."""
    school = cell.school if words == "sentences" else cell.worded
    vectors, queries, strange = list(school.vectors), cell.asked(words), cell.asked(words, strange=True)
    every = tuple(range(len(vectors)))
    if not learned:
        return Sight(directions(vectors), vectors, queries, strange, [(every, directions(vectors), vectors)])
    similarity, folds = cell.similarity(words), []
    for out, part in cell.left_out(words):
        seen = [part.project(some) for some in vectors]
        folds.append((out, directions(seen), seen))
    said = [similarity.project(some) for some in vectors]
    return Sight(
        directions(said), said, [similarity.project(some) for some in queries],
        [similarity.project(some) for some in strange if len(some)], folds,
    )  # fmt: skip


def seen_school(school: School, sight: Sight) -> School:
    """The school with descriptions as the similarity sees them."""
    return replace(school, vectors=tuple(sight.descriptions), space=f"{school.space}:seen")


# --- blends ---------------------------------------------------------------------------------------------------------


Blend = Callable[[Tensor, Tensor], Tensor]
"""Vectors (k, size) and weights (k,) -> one vector, of the layout or of a wider one."""


@dataclass(frozen=True)
class Mixture:
    """Neighbours and temperature that were chosen, and the mean score of every pair that was tried."""

    neighbours: int
    temperature: float
    scores: dict[str, float]


def in_factors(vectors: Tensor, weights: Tensor) -> Tensor:
    """The factors' weighted means."""
    return weights.to(vectors) @ vectors


def in_deltas(layout: Layout, count: int) -> tuple[Layout, Blend]:
    """The deltas' weighted sum, exactly, and the layout of such sums, which has room for `count` of them."""
    wide = Layout.of(
        [
            Adapter(
                {
                    place.name: LowRank(
                        torch.zeros(count * place.rank, place.inputs), torch.zeros(place.outputs, count * place.rank)
                    )
                    for place in layout.places
                },
                layout.base,
            )
        ]
    )

    def summed(vectors: Tensor, weights: Tensor) -> Tensor:
        vector, roots = torch.zeros(wide.size), weights.to(vectors).clamp_min(0).sqrt()
        for narrow, place in zip(layout.places, wide.places, strict=True):
            down, up = narrow.factors(vectors)
            down, up = roots[:, None, None] * down, roots[:, None, None] * up
            used = down.shape[0] * down.shape[1]
            into_down, into_up = place.factors(vector)
            into_down[:used] = down.flatten(0, 1)
            into_up[:, :used] = up.permute(1, 0, 2).flatten(1)
        return vector

    return wide, summed


def mixed(
    last: Tensor, keys: Tensor, query: Vectors, count: int, temperature: float, blend: Blend, without: int | None = None
) -> Tensor:
    """The blend of the `count` experts whose keys are nearest to a query (dim,)."""
    cosines = keys.double() @ torch.as_tensor(query).double()
    if without is not None:
        cosines[without] = -torch.inf
    near = cosines.argsort(descending=True, stable=True)[: min(count, len(keys) - (without is not None))]
    return blend(last[near], torch.softmax(cosines[near] / temperature, dim=0))


def tuned(cell: Cell, sight: Sight, blend: Blend, trial: Trial) -> Mixture:
    """Neighbours and temperature by leave-one-out on the taught tasks' own samples: an expert takes no part in what is
    made for its task, and a learned similarity has not seen the task."""
    scores: dict[tuple[int, float], float] = {}
    for count in NEIGHBOURS:
        for temperature in TEMPERATURES if count > 1 else TEMPERATURES[:1]:
            made, places = [], []
            for out, keys, seen in sight.folds:
                for place in out:
                    for query in seen[place][:: max(1, len(seen[place]) // cell.plan.tuning)][: cell.plan.tuning]:
                        made.append(mixed(cell.last, keys, query, count, temperature, blend, without=place))
                        places.append(place)
            scores[count, temperature] = float(cell.probed(torch.stack(made), places, trial=trial).mean())
    best = max(scores, key=lambda pair: scores[pair])
    return Mixture(*best, {f"{count} {temperature}": score for (count, temperature), score in scores.items()})


def threshold(cell: Cell, sight: Sight) -> tuple[float, float]:
    """The least cosine at which the nearest expert is better than the base, by leave-one-out on the taught tasks, and
    the mean gain there; infinite where the base is always better."""
    found: list[tuple[float, float]] = []
    for out, keys, seen in sight.folds:
        for place in out:
            cosines = torch.as_tensor(seen[place]) @ keys.T
            cosines[:, place] = -torch.inf
            near = cosines.max(dim=1)
            found += zip(near.values.tolist(), cell.transfer[near.indices, place].tolist(), strict=True)
    found.sort(reverse=True)
    gains = torch.tensor([gain for _, gain in found]).cumsum(0)
    best = int(gains.argmax())
    if gains[best] <= 0:
        return math.inf, 0.0
    after = found[best + 1][0] if best + 1 < len(found) else -1.0
    return (found[best][0] + after) / 2, float(gains[best]) / len(found)


# --- regression to weights ------------------------------------------------------------------------------------------


def ridge(school: School) -> Callable[[Vectors], Tensor]:
    """Descriptions' vectors -> standardised weights, linearly; the ridge by leaving one task out."""
    texts = torch.cat([torch.as_tensor(some).double() for some in school.vectors])
    owners = torch.arange(len(school.experts)).repeat_interleave(torch.tensor([len(some) for some in school.vectors]))
    last = torch.stack([some[-1] for some in school.weights])
    known = Statistics.of(last)
    goals = known.standardise(last).double()
    # what is wanted of a description is its owner's row: all is linear in the rows, and is solved for them by place
    wanted, products = torch.eye(len(goals), dtype=torch.float64)[owners], goals @ goals.T

    def solved(rows: Tensor, strength: float) -> Callable[[Tensor], Tensor]:
        mean, aim = texts[rows].mean(dim=0), wanted[rows].mean(dim=0)
        apart = texts[rows] - mean
        gram = apart.T @ apart
        gram += strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        slope = torch.linalg.solve(gram, apart.T @ (wanted[rows] - aim))
        return lambda queries: (queries - mean) @ slope + aim

    def error(strength: float) -> float:
        total = 0.0
        for fold in range(4):
            out = owners % 4 == fold
            missed = solved(~out, strength)(texts[out]) - wanted[out]
            total += float((missed @ products * missed).sum())
        return total

    chosen = solved(torch.ones(len(texts), dtype=torch.bool), min(RIDGES, key=error))
    return lambda queries: known.restore((chosen(torch.as_tensor(queries).double()) @ goals).float())


def perceptron(
    school: School, *, steps: int, hidden: int = 256, rate: float = 1e-3, seed: int = 0
) -> Callable[[Vectors], Tensor]:
    """Descriptions' vectors -> standardised weights by two layers, on the absolute error: Text-to-LoRA's variant that
    imitates adapters."""
    known = Statistics.of(torch.stack([some[-1] for some in school.weights]))
    goals = torch.stack([known.standardise(some[-1]) for some in school.weights])
    texts = [torch.as_tensor(some).float() for some in school.vectors]
    chance = generator(seed, "perceptron")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(texts[0].shape[1], hidden), nn.SiLU(), nn.Linear(hidden, goals.shape[1]))
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-3)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        asked = torch.stack([some[int(torch.randint(len(some), (), generator=chance))] for some in texts])
        loss = functional.l1_loss(network(asked), goals)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()

    def made(queries: Vectors) -> Tensor:
        with torch.no_grad():
            return known.restore(network(torch.as_tensor(queries).float()))

    return made


# --- noise ----------------------------------------------------------------------------------------------------------


def near_checkpoint(prototypes: Prototypes, expert: int, seed: int) -> Tensor:
    """A vector as far from an expert's mean checkpoint as its checkpoints are: (size,)."""
    noise = torch.randn(prototypes.means.shape[1], generator=torch.Generator().manual_seed(seed))
    return prototypes.means[expert] + prototypes.variances[expert].sqrt() * noise

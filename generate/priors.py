"""What a description says of the adapter wanted: SG-LoRA's sparse aggregator over experts, and leaving one out.

Every expert is a normal distribution, its checkpoints' mean and variance per coordinate; the wanted adapter's prior is
the mixture of the nearest ones, summed up by its mean and total variance (arXiv 2509.10535). Importing this needs
torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..hub.errors import BadOption, GenerationError
from .layout import Layout
from .library import Vectors
from .run import Generated, Share
from .taught import School, directions

TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2)
NEIGHBOURS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Prior:
    """Mean and variance of the wanted vector, per coordinate (size,), and the experts that they come from.

    experts: their places in the library, nearest first; similarities and weights: one for each, weights add up to 1.
    """

    mean: Tensor
    variance: Tensor
    experts: tuple[int, ...]
    similarities: tuple[float, ...]
    weights: tuple[float, ...]

    def draw(self, seed: int) -> Tensor:
        """A vector from N(mean, variance): SG-LoRA's prior without its CVAE."""
        noise = torch.randn(self.mean.shape, generator=torch.Generator().manual_seed(seed))
        return self.mean + self.variance.sqrt() * noise


@dataclass(frozen=True)
class Prototypes:
    """Every expert's mean and variance over its checkpoints (n, size), and its description's unit vector (n, dim).

    With one checkpoint an expert, variances are zero: priors vary only as their experts differ.
    """

    means: Tensor
    variances: Tensor
    keys: Tensor

    @classmethod
    def of(cls, weights: Sequence[Tensor], keys: Tensor) -> Prototypes:
        """weights: each expert's checkpoints (checkpoints, size)."""
        wide = [some.double() for some in weights]
        means = torch.stack([some.mean(dim=0) for some in wide])
        variances = torch.stack([some.var(dim=0, correction=0) for some in wide])
        return cls(means.float(), variances.float(), keys)

    def prior(self, query: Tensor | Vectors, neighbours: int, temperature: float, without: int | None = None) -> Prior:
        """The prior for a description's unit vector (dim,), from experts other than `without`.

        Raises BadOption for options outside their range, GenerationError where no expert is left.
        """
        check(neighbours, temperature)
        similarities = self.keys.double() @ asked(query, self.keys).double()
        order = [row for row in similarities.argsort(descending=True, stable=True).tolist() if row != without]
        if not order:
            raise GenerationError("there is no other expert than the one to leave out; expected at least two")
        near = order[:neighbours]
        weights = torch.softmax(similarities[near] / temperature, dim=0)
        mean, variance = mixed(self.means[near], self.variances[near], weights)
        return Prior(mean, variance, tuple(near), tuple(similarities[near].tolist()), tuple(weights.tolist()))


def mixed(means: Tensor, variances: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and total variance of a mixture, per coordinate: sum_k w_k m_k, sum_k w_k (v_k + (m_k - mean)^2).

    means, variances: (k, size); weights: (k,), adding up to 1.
    """
    share = weights.double()[:, None]
    mean = (share * means.double()).sum(dim=0)
    variance = (share * (variances.double() + (means.double() - mean).square())).sum(dim=0)
    return mean.float(), variance.float()


def asked(query: Tensor | Vectors, keys: Tensor) -> Tensor:
    """A query's vector as float32 (dim,). Raises GenerationError where its length is not that of the keys (n, dim)."""
    vector = torch.as_tensor(query).float()
    if vector.shape != keys.shape[1:]:
        raise GenerationError(
            f"the request is a vector of shape {tuple(vector.shape)}, the generator was fitted to ({keys.shape[1]},); "
            "encode it as at the fit"
        )
    return vector


def check(neighbours: int, temperature: float) -> None:
    """Raise BadOption for options outside their range."""
    if neighbours < 1 or not temperature > 0:
        raise BadOption(f"neighbours is {neighbours}, temperature {temperature}; expected at least 1 and above 0")


def conditions(
    prototypes: Prototypes,
    vectors: Sequence[Tensor | Vectors],
    neighbours: int,
    temperature: float,
    *,
    leave_out: bool = True,
) -> list[list[Prior]]:
    """For every expert the prior of each of its descriptions (descriptions, dim), as if its task were new.

    leave_out: the expert itself takes no part, as it cannot when the task is new.
    """
    return [
        [prototypes.prior(query, neighbours, temperature, row if leave_out else None) for query in some]
        for row, some in enumerate(vectors)
    ]


def threshold(vectors: Sequence[Tensor | Vectors], share: float = 0.05) -> float:
    """The similarity that all but `share` of the library's own descriptions have with the nearest other expert.

    -1 with fewer than two experts.
    """
    keys = directions(vectors)
    if len(keys) < 2:
        return -1.0
    near = []
    for row, some in enumerate(vectors):
        cosines = torch.as_tensor(some).float() @ keys.T
        cosines[:, row] = -1.0
        near.append(cosines.max(dim=1).values)
    return float(torch.cat(near).quantile(share))


@dataclass(frozen=True)
class Tuning:
    """The best options by leave-one-out, and the mean score of every pair (neighbours, temperature) that was tried."""

    neighbours: int
    temperature: float
    scores: dict[tuple[int, float], float]


def tuned(
    school: School,
    score: Callable[[int, Tensor], float],
    *,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperatures: Sequence[float] = TEMPERATURES,
    descriptions: int | None = None,
) -> Tuning:
    """Neighbours and temperature by leave-one-out on the school's own tasks.

    score: how good a vector (size,) is for the expert of this row, higher is better; its accuracy on the task's own
    data. (The distance to the expert's weights is no substitute: it prefers the average of all.) descriptions: how many
    of each expert's to try, default all. With one neighbour the temperature changes nothing and is tried once. Of equal
    scores the first is taken.
    """
    prototypes = Prototypes.of(school.weights, school.keys)
    vectors = [some[:descriptions] for some in school.vectors]
    scores: dict[tuple[int, float], float] = {}
    for count in neighbours:
        for temperature in temperatures if count > 1 else temperatures[:1]:
            made = conditions(prototypes, vectors, count, temperature)
            values = [score(row, prior.mean) for row, some in enumerate(made) for prior in some]
            scores[count, temperature] = sum(values) / len(values)
    best = max(scores, key=lambda pair: scores[pair])
    return Tuning(*best, scores)


def novelty(layout: Layout, vector: Tensor, weights: Sequence[Tensor]) -> tuple[int, float]:
    """The expert with the nearest checkpoint, and that distance in units of its checkpoints' mean distance.

    vector: (size,); weights: each expert's checkpoints (checkpoints, size). Distances are between deltas. About 1 is
    one checkpoint more of that expert; far below 1 a copy. Infinite where the expert's checkpoints are all alike.
    """
    lengths = float(layout.squares(vector[None]))
    near = [
        (lengths + layout.squares(some) - 2 * layout.inner(vector[None], some)[0]).clamp_min(0).min()
        for some in weights
    ]
    row = min(range(len(near)), key=lambda at: float(near[at]))
    products = layout.inner(weights[row], weights[row])
    apart = (products.diagonal()[:, None] + products.diagonal() - 2 * products).clamp_min(0).sqrt()
    pairs = len(apart) * (len(apart) - 1)
    own = float(apart.sum()) / pairs if pairs else 0.0
    return row, float(near[row]) ** 0.5 / own if own else math.inf


@dataclass(frozen=True)
class Memory:
    """What a generator remembers of its experts, to say how near and how new a result is.

    names; keys: unit vectors (n, dim); means: vectors (n, size) of their mean checkpoints.
    """

    names: tuple[str, ...]
    keys: Tensor
    means: Tensor

    def nearest(self, query: Tensor | Vectors) -> tuple[Share, ...]:
        """The expert most similar to the query, with all of the weight."""
        near = torch.nn.functional.cosine_similarity(self.keys, asked(query, self.keys)[None], dim=1)
        row = int(near.argmax())
        return (Share(self.names[row], self.names[row], float(near[row]), 1.0),)

    def shares(self, prior: Prior) -> tuple[Share, ...]:
        """The experts behind a prior."""
        parts = zip(prior.experts, prior.similarities, prior.weights, strict=True)
        return tuple(Share(self.names[row], self.names[row], cosine, weight) for row, cosine, weight in parts)

    def generated(
        self, layout: Layout, vector: Tensor, experts: tuple[Share, ...], name: str, *, wide: Layout | None = None
    ) -> Generated:
        """The vector as an adapter, its novelty measured against every expert.

        layout: the experts', and the vector's too, unless it has the layout `wide`, of the same modules.
        """
        own = wide or layout
        novelty = 1.0 - float(own.cosines(vector, self.means, layout).max())
        return Generated(own.adapter(vector, name=name), experts, novelty)

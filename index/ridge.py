"""The encoder without steps: fixed sketches of every module, and a ridge regression onto the vectors of words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..hub.adapter import Adapter
from .encoders._energies import Sizes, sketches
from .encoders._tokens import Aside, Features, collated
from .modules import Manifest

PENALTIES = tuple(10 ** (power / 4) for power in range(-20, 9))  # times the largest variance
MIXTURES = (
    (1.0, 0.0, 0.0), (1.0, 0.0, 0.25), (1.0, 0.0, 0.5), (1.0, 0.0, 1.0), (1.0, 0.25, 0.25), (1.0, 0.5, 0.5),
    (0.5, 0.0, 1.0), (0.0, 0.0, 1.0),
)  # fmt: skip
TOLERANCE = 1.02  # of the least error; see `chosen`


def ridge(
    manifest: Manifest, *, dim: int = 384, left: int = 128, right: int = 64, both: int = 64, components: int = 256
) -> Ridge:
    """left, right, both: numbers read of each module (see `encoders._energies`); components: the most principal
    components of the adapters that the regression looks at."""
    return Ridge(manifest, dim, components, Sizes(left, right, both))


class Blend(nn.Module):
    """Sketches (n, places, size) less their mean, zero where a module is absent, their blocks scaled by how much each
    is to count; all measured once on the adapters of a fit."""

    mean: Tensor
    scale: Tensor

    def __init__(self, places: int, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.register_buffer("mean", torch.zeros(places, sum(sizes)))
        self.register_buffer("scale", torch.ones(sum(sizes)))

    def forward(self, sketched: Tensor, present: Tensor) -> Tensor:
        return (sketched - self.mean) * present[..., None] * self.scale

    @torch.no_grad()
    def measure(self, sketched: Tensor, present: Tensor, targets: Tensor) -> Solution:
        """The regression of targets (n, dim) on what `forward` now returns, laid flat."""
        seen = present[..., None]
        self.scale.fill_(1.0)
        self.mean.copy_((sketched * seen).sum(dim=0) / seen.sum(dim=0).clamp_min(1))
        blocks = torch.split_with_sizes(self(sketched, present), [*self.sizes], dim=2)
        rows = [block.flatten(1).double() for block in blocks]
        found, mixture = chosen([row @ row.T for row in rows], targets.double())
        counts = zip(mixture, self.sizes, strict=True)
        self.scale.copy_(torch.cat([torch.full((size,), weight**0.5) for weight, size in counts]))
        return found


class Straight(nn.Module):
    """Blended sketches (n, places, size) -> vectors (n, dim) by one linear map, found in closed form.

    The map tells how an adapter's words differ from the mean of all words.
    """

    axes: Tensor

    def __init__(self, numbers: int, dim: int, components: int) -> None:
        super().__init__()
        self.register_buffer("axes", torch.zeros(numbers, components))
        self.weights = nn.Parameter(torch.zeros(components, dim))

    def forward(self, blended: Tensor) -> Tensor:
        vectors: Tensor = blended.flatten(1) @ self.axes @ self.weights
        return vectors

    @torch.no_grad()
    def take(self, found: Solution, blended: Tensor) -> Solution:
        """Be the map of a regression on these rows, or on its strongest components; what is left of it is returned."""
        found = found.cut(self.axes.shape[1])
        kept = len(found.values)
        self.axes.zero_()[:, :kept] = blended.flatten(1).double().T @ found.left / found.values
        self.weights.zero_()[:kept] = found.weights()
        # only directions count, and float16 holds numbers near 1 best
        self.weights.div_(self(blended).square().sum(dim=1).mean().sqrt().clamp_min(1e-30))
        return found


class Ridge(nn.Module):
    """Features of adapters -> unit vectors (n, dim), by one linear map."""

    def __init__(self, manifest: Manifest, dim: int, components: int, sizes: Sizes) -> None:
        super().__init__()
        self.manifest, self.sizes = manifest, sizes
        self.blend = Blend(len(manifest.places), sizes)
        self.straight = Straight(len(manifest.places) * sum(sizes), dim, components)
        self.aside = Aside(dim)

    def features(self, adapter: Adapter) -> Features:
        """What is read of one adapter. Raises IncompatibleAdapters as `Manifest.check` does."""
        return sketches(adapter, self.manifest, self.sizes)

    def forward(self, items: Sequence[Features]) -> Tensor:
        """One unit vector for each."""
        batch = collated(items)
        unit: Tensor = self.aside(self.straight(self.blend(batch["sketches"], batch["present"])))
        return unit

    def solve(self, items: Sequence[Features], targets: Tensor) -> Solution:
        """Fit to targets (n, dim). A module that is absent counts as the mean of those that are there."""
        batch = collated(items)
        found = self.blend.measure(batch["sketches"], batch["present"], targets)
        self.aside.measure(targets)
        solution: Solution = self.straight.take(found, self.blend(batch["sketches"], batch["present"]))
        return solution


@dataclass(frozen=True, eq=False)
class Solution:
    """A ridge regression with an intercept, of targets (n, dim) on rows (n, features) that are known by their inner
    products alone.

    left (n, k), values (k,): the thin singular value decomposition of the centred rows, without what is zero. targets:
    less their mean. penalty: the best of `penalties`, by the mean squared errors when each example is left out.
    """

    left: Tensor
    values: Tensor
    targets: Tensor
    penalties: tuple[float, ...]
    errors: tuple[float, ...]
    penalty: float

    @classmethod
    def of(cls, gram: Tensor, targets: Tensor, penalties: Sequence[float] | None = None) -> Solution:
        """gram (n, n), targets (n, dim), float64. `penalties`: None for PENALTIES times the largest variance."""
        centred = gram - gram.mean(dim=0) - gram.mean(dim=1, keepdim=True) + gram.mean()
        squares, left = torch.linalg.eigh(centred)
        kept = squares > 1e-10 * squares[-1].clamp_min(1e-30)
        left, values = left[:, kept].flip(1), squares[kept].sqrt().flip(0)
        largest = float(values[0].square()) if len(values) else 1.0
        tried = tuple(penalties or (largest * share for share in PENALTIES))
        bare = cls(left, values, targets - targets.mean(dim=0), tried, (), tried[0])
        errors = tuple(float(bare._residuals(penalty).square().mean()) for penalty in tried)
        best = tried[min(range(len(tried)), key=errors.__getitem__)]
        return cls(left, values, bare.targets, tried, errors, best)

    def cut(self, components: int) -> Solution:
        """With the strongest components alone."""
        return Solution(
            self.left[:, :components], self.values[:components], self.targets, self.penalties, self.errors, self.penalty
        )

    def aimed(self, targets: Tensor) -> Solution:
        """The same rows and penalty with other targets (n, dim)."""
        return replace(self, targets=targets.double() - targets.double().mean(dim=0))

    def predicted(self) -> Tensor:
        """What each example would get from a fit without it: unit vectors (n, dim), float32."""
        return nn.functional.normalize(self.targets - self._residuals(self.penalty), dim=1).float()

    def weights(self) -> Tensor:
        """(k, dim): from rows @ axes, where axes = rows^T left / values, to targets less their mean."""
        return (self.values / (self.values.square() + self.penalty))[:, None] * (self.left.T @ self.targets)

    def _residuals(self, penalty: float) -> Tensor:
        """Of every example under the fit to the others: its own residual over 1 - h_ii, h being the hat matrix."""
        shrink = self.values.square() / (self.values.square() + penalty)
        hat = (self.left.square() * shrink).sum(dim=1) + 1 / len(self.left)
        residual = self.targets - self.left @ (shrink[:, None] * (self.left.T @ self.targets))
        return residual / (1 - hat).clamp_min(1e-9)[:, None]


def chosen(grams: Sequence[Tensor], targets: Tensor) -> tuple[Solution, tuple[float, ...]]:
    """The regression on a mixture of blocks of features, and the mixture: what each block's inner products count.

    grams: the inner products (n, n) of the blocks left, right and both. Of the mixtures that err little more than the
    best when one example is left out, the last of MIXTURES is taken, which counts `both` most: readings that are linear
    in the delta tell more of words that no example has, which leaving out one of several alike cannot show.
    """
    filled = [bool(gram.any()) for gram in grams]
    fitting = [mixture for mixture in MIXTURES if all(has or not w for has, w in zip(filled, mixture, strict=True))]
    found = [(Solution.of(_mixed(grams, mixture), targets), mixture) for mixture in fitting or [(1.0, 1.0, 1.0)]]
    least = min(min(solution.errors) for solution, _ in found)
    return [pair for pair in found if min(pair[0].errors) <= TOLERANCE * least][-1]


def _mixed(grams: Sequence[Tensor], mixture: Sequence[float]) -> Tensor:
    return torch.stack([weight * gram for weight, gram in zip(mixture, grams, strict=True)]).sum(dim=0)

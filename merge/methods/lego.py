"""LoRA-LEGO: rank-one terms of all adapters, clustered, and each cluster melted into one term."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...hub.adapter import Adapter
from ...hub.errors import BadOption
from ...hub.lowrank import LowRank, Shape, check_limits
from ..align import by_module
from ..clustering import Clusters, kmeans
from ..stack import Stack, leave

FEATURES = ("raw", "unit", "balanced")
GAUGES = ("stored", "svd")
REWEIGHTS = ("inf", "l2", "none")

_NEAR = 1e-3  # of two squared norms: a squared distance below it is lost in float32's rounding
_NOTHING = 1e-6  # of the members' norm: a mean below it is what rounding left of members that cancel


def lego(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    rank: int | None = None,
    features: str = "raw",
    gauge: str = "stored",
    reweight: str = "inf",
    rescale: bool = True,
    reference: float | None = None,
    restarts: int = 10,
    seed: int = 0,
) -> Adapter:
    """LoRA-LEGO (arXiv 2409.16167): k rank-one terms in place of all that the adapters have, module by module.

    The terms (a row of `down` with a column of `up`: a minimal semantic unit) of all adapters are clustered by k-means;
    a cluster's mean, lengthened to its members' mean norm, is a term of the result. It averages where `exact` sums:
    copies of an adapter give that adapter, whatever the order of their terms. Any ranks go together; one adapter with
    a rank below its own is pruned. A weight lengthens both halves of a term by its root; its sign is on `up`.

    rank: k, the terms of each module of the result, at most as many as there are; by default the largest rank of the
    adapters in that module. features: what is compared: `raw` terms, `unit` (each half of length 1), or `balanced`
    (both halves of equal length, which is also what is averaged then). gauge: `stored` takes the terms as they are;
    `svd` those of each delta's singular value decomposition with fixed signs, so that it does not matter how the
    deltas were factored. reweight: the norm to lengthen means by, `inf` (the largest entry), `l2` or `none`. rescale:
    multiply the result by sqrt(r / k), against the variance that more terms bring. reference: that r, by default the
    mean rank of the adapters in the module. restarts: k-means is begun so many times. seed: of its random beginnings.
    """
    check_limits(rank, None)
    _check(features=(features, FEATURES), gauge=(gauge, GAUGES), reweight=(reweight, REWEIGHTS))
    if restarts < 1:
        raise BadOption(f"restarts is {restarts}; expected a whole number of at least 1")
    if reference is not None and not 0 < reference < math.inf:
        raise BadOption(f"reference is {reference}; expected a rank above 0")

    def combine(parts: list[LowRank], shares: list[float]) -> LowRank:
        pool = _pool(parts, shares, gauge)
        count = _count(pool.stack.ranks, rank)
        ratio = (reference or sum(pool.stack.ranks) / len(parts)) / count if rescale else 1.0
        clusters = _clusters(pool, count, features, restarts, seed)
        down, up = _means(pool.balanced() if features == "balanced" else pool, clusters, reweight)
        widest = max(parts, key=lambda part: len(part.kernel))
        return replace(widest, down=down, up=up, scale=math.sqrt(ratio))

    def foretold(shapes: list[Shape]) -> int:
        return _count([_terms(shape) if gauge == "svd" else shape.rank for shape in shapes], rank)

    return Adapter(by_module(adapters, weights, combine, foretold))


def _check(**options: tuple[str, tuple[str, ...]]) -> None:
    for name, (value, known) in options.items():
        if value not in known:
            raise BadOption(f"{name} is {value!r}; expected one of {', '.join(known)}")


def _count(ranks: Sequence[int], rank: int | None) -> int:
    """The result's rank; more than min(outputs, inputs) where a delta is stored so: its terms are still its own."""
    return min(rank or max(ranks), sum(ranks))


def _terms(shape: Shape) -> int:
    return min(shape.rank, shape.outputs, shape.inputs)


@dataclass(frozen=True, eq=False)
class _Pool:
    """Rank-one terms: those of a stack, with a factor for each half: (terms,) in float64, the sign in `up`."""

    stack: Stack
    down: Tensor
    up: Tensor

    def norms(self) -> tuple[Tensor, Tensor]:
        """Euclidean norms of the terms' halves: (terms,) each."""
        return self.down.abs() * _lengths(self.stack.down, 1), self.up.abs() * _lengths(self.stack.up, 0)

    def peaks(self) -> Tensor:
        """The largest absolute entry of each term: (terms,)."""
        return torch.maximum(self.down.abs() * _peaks(self.stack.down, 1), self.up.abs() * _peaks(self.stack.up, 0))

    def unit(self) -> _Pool:
        """Both halves of length 1; a half that is nothing stays so."""
        down, up = self.norms()
        return replace(self, down=_over(self.down, down), up=_over(self.up, up))

    def balanced(self) -> _Pool:
        """The same products, with both halves of equal length; a term that has no product is nothing."""
        down, up = self.norms()
        root = (down * up).sqrt()
        return replace(self, down=_over(self.down * root, down), up=_over(self.up * root, up))

    def gram(self, *, exact: bool = False) -> Tensor:
        """Inner products of the terms as vectors [down; up]: (terms, terms)."""
        downs, ups = self.stack.exact_products if exact else self.stack.products
        return downs * torch.outer(self.down, self.down) + ups * torch.outer(self.up, self.up)


def _lengths(matrix: Tensor, dim: int) -> Tensor:
    """Euclidean norms in float64, where the squares of all numbers that float32 holds have room."""
    lengths: Tensor = torch.linalg.vector_norm(matrix, dim=dim, dtype=torch.float64)
    return lengths


def _peaks(matrix: Tensor, dim: int) -> Tensor:
    """The largest absolute entries, without a copy of the matrix."""
    return torch.maximum(matrix.amax(dim), -matrix.amin(dim))


def _over(numbers: Tensor, by: Tensor) -> Tensor:
    return torch.where(by > 0, numbers / by, 0.0)


def _pool(parts: Sequence[LowRank], shares: Sequence[float], gauge: str) -> _Pool:
    if gauge == "svd":
        parts = [part.scaled(share).truncate() for part, share in zip(parts, shares, strict=True)]
        shares = [1.0] * len(parts)
    stack = Stack.of(parts)
    if gauge == "stored":
        leave(parts, stack)
    scales = stack.by_term([part.scale * share for part, share in zip(parts, shares, strict=True)])
    roots = scales.abs().sqrt()
    return _Pool(stack, roots, roots.copysign(scales))


def _clusters(pool: _Pool, count: int, features: str, restarts: int, seed: int) -> Clusters:
    terms = len(pool.down)
    if count == terms:
        return Clusters(torch.arange(terms).numpy(), count, 0.0)
    compared = {"raw": lambda: pool, "unit": pool.unit, "balanced": pool.balanced}[features]()
    gram = compared.gram()
    norms = gram.diagonal()
    sums = norms[:, None] + norms
    near = sums - 2 * gram <= _NEAR * sums
    if int(near.sum()) > terms:  # copies, or almost: what tells them apart needs more digits
        gram = compared.gram(exact=True)
    return kmeans(gram.numpy(), count, restarts=restarts, seed=seed)


def _means(pool: _Pool, clusters: Clusters, reweight: str) -> tuple[Tensor, Tensor]:
    """The clusters' means, reweighted: down (count, inputs) and up (outputs, count)."""
    labels, sizes = torch.from_numpy(clusters.labels), torch.from_numpy(clusters.sizes).double()
    member = torch.nn.functional.one_hot(labels, clusters.count).T / sizes[:, None]
    dtype = pool.stack.down.dtype
    down = (member * pool.down).to(dtype) @ pool.stack.down
    up = pool.stack.up @ (member * pool.up).to(dtype).T
    if reweight == "none":
        return down, up
    if reweight == "inf":
        members, length = pool.peaks(), torch.maximum(_peaks(down, 1), _peaks(up.T.contiguous(), 1))
    else:
        members, length = torch.hypot(*pool.norms()), torch.hypot(_lengths(down, 1), _lengths(up, 0))
    wanted = member @ members
    kept = (sizes > 1) & (length > _NOTHING * wanted)
    factor = torch.where(kept, wanted / length, 1.0).to(dtype)
    return down * factor[:, None], up * factor

"""Fidelity: how far a merge lies from the exact weighted sum, per module and in all.

Everything is computed from Gram matrices of thin factors, so it costs little and forms no dense matrix: in float32
where the result is far from the sum, and in float64 where digits cancel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..hub.lowrank import LowRank
from .stack import Stack, take

_ROUNDING = 1e-5  # of the inputs' norm: what rounding may leave where they cancel
_FAR = 1e-2  # of squared norms: what is less is computed in float64
_FLOOR = 1e-6  # of the inputs' norm: below it an exact sum counts as zero, and errors are relative to the inputs


@dataclass(frozen=True)
class Fidelity:
    """The result against the exact sum.

    error: ||result - sum|| / ||sum||. cosine: between the two. norm_ratio: ||result|| / ||sum||. energy: the share of
    the sum's squared norm that the result has. All of Frobenius' kind; where the sum is zero, relative to the inputs.
    """

    error: float
    cosine: float
    norm_ratio: float
    energy: float


@dataclass
class _Sums:
    """Squared norms that add up over modules."""

    target: float = 0.0
    result: float = 0.0
    inner: float = 0.0
    inputs: float = 0.0

    def add(self, other: _Sums) -> None:
        self.target += other.target
        self.result += other.result
        self.inner += other.inner
        self.inputs += other.inputs

    @property
    def distance(self) -> float:
        """Squared: of the result from the sum."""
        return max(self.target - 2 * self.inner + self.result, 0.0)

    def fidelity(self) -> Fidelity:
        target, result = math.sqrt(max(self.target, 0.0)), math.sqrt(max(self.result, 0.0))
        distance = math.sqrt(self.distance)
        inputs = math.sqrt(max(self.inputs, 0.0))
        if target <= _FLOOR * inputs:  # the inputs cancel, or are nothing: what is left of them has no direction
            error = distance / inputs if inputs else (math.inf if result else 0.0)
            return Fidelity(error, 1.0, 1.0, 1.0) if error <= _ROUNDING else Fidelity(error, 0.0, math.inf, math.inf)
        product = target * result
        cosine = min(max(self.inner / product, -1.0), 1.0) if product else 0.0
        return Fidelity(distance / target, cosine, result / target, (result / target) ** 2)


@dataclass
class Report:
    """Filled while a merge's modules are read; complete when all were."""

    ranks: dict[str, int] = field(default_factory=dict)
    _sums: dict[str, _Sums] = field(default_factory=dict)

    def record(self, name: str, parts: Sequence[LowRank], weights: Sequence[float], result: LowRank) -> None:
        """Compare one module of the result, as it will be stored, with the exact sum of its inputs."""
        stack = take(parts)
        scales = stack.by_term([part.scale * weight for part, weight in zip(parts, weights, strict=True)])
        self.ranks[name] = result.rank
        exact = result.rank >= len(scales)  # then it may be the sum itself
        sums, size = _compare(stack, scales, result, exact=exact)
        if not exact and not min(sums.target, sums.distance) > _FAR * size:
            sums, _ = _compare(stack, scales, result, exact=True)
        self._sums[name] = sums

    @property
    def modules(self) -> dict[str, Fidelity]:
        """Fidelity by module."""
        return {name: sums.fidelity() for name, sums in self._sums.items()}

    @property
    def total(self) -> Fidelity:
        """Fidelity over all modules together."""
        whole = _Sums()
        for sums in self._sums.values():
            whole.add(sums)
        return whole.fidelity()


def _compare(stack: Stack, scales: Tensor, result: LowRank, *, exact: bool) -> tuple[_Sums, float]:
    """Sums of inner products of rank-one terms, those of the stack times `scales` and the result's; and the sum of
    the terms' own squared norms, which rounding errors are relative to."""
    dtype = torch.float64 if exact else stack.down.dtype
    down, up = result.down.to(dtype), result.up.to(dtype)
    downs, ups = stack.exact_products if exact else stack.products
    target = downs * ups * torch.outer(scales, scales)
    inner = (stack.down.to(dtype) @ down.T).double() * (stack.up.to(dtype).T @ up).double()
    own = (down @ down.T).double() * (up.T @ up).double()
    edges = [0, *accumulate(stack.ranks)]
    sums = _Sums(
        target=float(target.sum()),
        result=result.scale**2 * float(own.sum()),
        inner=result.scale * float(scales @ inner.sum(dim=1)),
        inputs=sum(float(target[i:j, i:j].sum()) for i, j in pairwise(edges)),
    )
    return sums, float(target.trace()) + result.scale**2 * float(own.trace())

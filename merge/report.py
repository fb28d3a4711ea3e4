"""Fidelity: how far a merge lies from the exact weighted sum, per module and in all.

Everything is computed from Gram matrices of thin factors in float64, so it costs little and forms no dense matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..hub.lowrank import LowRank, concat

_ROUNDING = 1e-5  # of the inputs' norm: what rounding may leave where they cancel
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

    def fidelity(self) -> Fidelity:
        target, result = math.sqrt(max(self.target, 0.0)), math.sqrt(max(self.result, 0.0))
        distance = math.sqrt(max(self.target - 2 * self.inner + self.result, 0.0))
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
        target = concat(parts, weights)
        self.ranks[name] = result.rank
        products = _products(target, result)
        whole, edges = target.rank, [0, *accumulate(part.rank for part in parts)]
        self._sums[name] = _Sums(
            target=float(products[:whole, :whole].sum()),
            result=float(products[whole:, whole:].sum()),
            inner=float(products[:whole, whole:].sum()),
            inputs=sum(float(products[i:j, i:j].sum()) for i, j in pairwise(edges)),
        )

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


def _products(target: LowRank, result: LowRank) -> Tensor:
    """Inner products of all rank-one terms of both deltas, in float64: (ranks, ranks), the target's first.

    Sums over its blocks are the deltas' inner products; one Gram matrix a side serves them all.
    """
    folded = result.folded()
    up = torch.cat([target.up.double(), folded.up.double()], dim=1)
    down = torch.cat([target.down.double(), folded.down.double()])
    return (up.T @ up) * (down @ down.T)

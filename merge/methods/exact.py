"""The exact sum, and its best approximation of a lower rank."""

from __future__ import annotations

from collections.abc import Sequence

from ...hub.adapter import Adapter
from ...hub.lowrank import LowRank, Shape, check_limits, concat
from ..align import by_module


def exact(
    adapters: Sequence[Adapter], weights: Sequence[float], *, rank: int | None = None, energy: float | None = None
) -> Adapter:
    """sum_i weight_i * delta_i, exactly, by stacking factors; optionally truncated in the canonical gauge.

    rank: the largest rank of any module of the result. energy: the share of each module's squared norm to keep.
    Without either the ranks add up. Truncation is optimal (Eckart and Young), by QR and a small SVD.
    """
    check_limits(rank, energy)

    def combine(parts: list[LowRank], shares: list[float]) -> LowRank:
        total = concat(parts, shares)
        return total if rank is None and energy is None else total.truncate(rank, energy=energy)

    def foretold(inputs: list[Shape]) -> int:
        stacked = sum(shape.rank for shape in inputs)
        return stacked if rank is None else min(rank, stacked, inputs[0].outputs, inputs[0].inputs)

    return Adapter(by_module(adapters, weights, combine, None if energy is not None else foretold))

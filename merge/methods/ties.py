"""TIES: trim small entries, elect a sign for each entry, average what agrees."""

from __future__ import annotations

from collections.abc import Sequence

from ...hub.adapter import Adapter
from ...hub.lowrank import check_limits
from ..align import reconciled
from ..rules import Elementwise
from ..spaces import check_space, foretold, united


def ties(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    density: float = 0.2,
    elect: str = "total",
    space: str = "core",
    gauge: str = "svd",
    rank: int | None = None,
) -> Adapter:
    """TIES-Merging (Yadav et al. 2023, algorithm 1), module by module: like an average, not like a sum.

    density: the share of each adapter's entries that is kept, the largest ones; 1 trims nothing. elect: "total" elects
    the sign of the weighted sum, "frequency" that of most adapters. space: what entries are: "delta" (as published; the
    delta is formed in column blocks, and the result is its best approximation of `rank`), "core" (coordinates in the
    common bases) or "factors" (up and down by themselves, as PEFT does). gauge: "svd" makes core and factors
    independent of how a delta is factored, "stored" takes factors as they are. rank: the largest rank of any module of
    the result; default: the ranks add up (for factors: the largest).
    """
    rule = Elementwise("largest", density, elect)
    check_space(space, gauge)
    check_limits(rank, None)
    return Adapter(
        reconciled(
            adapters,
            weights,
            lambda parts: united(parts, rule, space, gauge=gauge, rank=rank),
            lambda shapes: foretold(shapes, space, rank, gauge),
            limit=rank,
        )
    )

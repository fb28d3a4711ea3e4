"""Magnitude pruning, then the sum."""

from __future__ import annotations

from collections.abc import Sequence

from ...hub.adapter import Adapter
from ...hub.lowrank import check_limits
from ..align import reconciled
from ..rules import Elementwise
from ..spaces import check_space, foretold, united


def magnitude(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    density: float = 0.5,
    space: str = "core",
    gauge: str = "svd",
    rank: int | None = None,
) -> Adapter:
    """The weighted sum of what is left of each delta when its small entries are set to zero: TIES' first step alone.

    density: the share of each adapter's entries that is kept, the largest ones. space: what entries are: "delta" (in
    column blocks, approximated to `rank`), "core" (coordinates in the common bases) or "factors" (up and down by
    themselves, with the cross terms that this brings). gauge: "svd" makes core and factors independent of how a delta
    is factored, "stored" takes factors as they are. rank: the largest rank of any module of the result; default: the
    ranks add up (for factors: the largest).
    """
    rule = Elementwise("largest", density, "sum")
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

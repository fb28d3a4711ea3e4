"""DARE: drop entries at random, rescale the rest, then sum or TIES."""

from __future__ import annotations

from collections.abc import Sequence

from ...hub.adapter import Adapter
from ...hub.lowrank import check_limits
from ..align import reconciled
from ..rules import Elementwise
from ..spaces import check_space, foretold, united


def dare(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    density: float = 0.5,
    unite: str = "sum",
    space: str = "core",
    gauge: str = "svd",
    rank: int | None = None,
    seed: int = 0,
) -> Adapter:
    """DARE (Yu et al. 2024, equation 3), module by module: in expectation the exact sum, plus noise.

    density: the probability of an entry to stay; what stays is divided by it. unite: "sum", or TIES' disjoint mean
    after electing signs by "total" or "frequency". space: what entries are: "delta" (as published; in column blocks,
    approximated to `rank`), "core" (coordinates in the common bases) or "factors" (up and down by themselves, as PEFT
    does). gauge: "svd" makes core and factors independent of how a delta is factored, "stored" takes factors as they
    are. rank: the largest rank of any module of the result; default: the ranks add up (for factors: the largest). seed:
    of the draws, together with what an adapter's factors hold: their order plays no part, copies draw alike.
    """
    rule = Elementwise("random", density, unite)
    check_space(space, gauge)
    check_limits(rank, None)
    return Adapter(
        reconciled(
            adapters,
            weights,
            lambda parts: united(parts, rule, space, gauge=gauge, rank=rank, seed=seed),
            lambda shapes: foretold(shapes, space, rank, gauge),
            limit=rank,
        )
    )

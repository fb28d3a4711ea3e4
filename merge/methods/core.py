"""Merging in Core Space: coordinates in bases that all adapters share, by any rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...hub.adapter import Adapter
from ...hub.lowrank import LowRank, Shape, check_limits, concat
from ..align import reconciled
from ..rules import Elementwise, check_choice
from ..spaces import check_space, foretold, united
from ..spectral import flattened, side_by_side

ELEMENTWISE = {
    "sum": Elementwise(),
    "ties": Elementwise("largest", 1.0, "total"),
    "magnitude": Elementwise("largest", 1.0, "sum"),
    "dare": Elementwise("random", 1.0, "sum"),
    "dare_ties": Elementwise("random", 1.0, "total"),
}
SPECTRAL = ("tsv", "iso", "tsv_iso")


def core(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    rule: str = "tsv_iso",
    density: float = 0.5,
    gauge: str = "svd",
    rank: int | None = None,
    energy: float | None = None,
    seed: int = 0,
) -> Adapter:
    """Core Space merging (Panariello et al. 2025): deltas as U^T delta_t V in orthonormal bases of all column and all
    row spaces, which lose nothing; a rule merges these small matrices, and U and V carry the result back.

    rule: sum (the exact merge), magnitude, ties, dare, dare_ties (elementwise, at `density`), tsv, iso, or tsv_iso
    (TSV with Iso-C's flat spectrum). Spectral rules do not depend on the basis, so they are carried out on the factors.
    density: the share of entries that an elementwise rule keeps. gauge: "svd" makes the bases independent of how a
    delta is factored, "stored" takes factors as they are. rank: the largest rank of any module of the result. energy:
    the share of each module's squared norm to keep. Where the rule makes the spectrum flat, both choose the leading
    directions before, for afterwards none of them leads. seed: of dare's draws.
    """
    check_choice("rule", rule, (*ELEMENTWISE, *SPECTRAL))
    check_space("core", gauge)
    check_limits(rank, energy)
    if rule in ELEMENTWISE:
        chosen = replace(ELEMENTWISE[rule], density=1.0 if rule == "sum" else density)

    def combine(parts: list[LowRank]) -> LowRank:
        if rule in ELEMENTWISE:
            merged = united(parts, chosen, "core", gauge=gauge, rank=rank, seed=seed)
            return merged if energy is None else merged.truncate(energy=energy)
        return _spectral(parts, rule, rank, energy)

    def size(shapes: Sequence[Shape]) -> int:
        return foretold(shapes, "core", rank)

    return Adapter(reconciled(adapters, weights, combine, size, limit=rank, energy=energy))


def _spectral(parts: Sequence[LowRank], rule: str, rank: int | None, energy: float | None) -> LowRank:
    """The core is as wide as all ranks together, so that TSV keeps every triplet there."""
    sizes = [min(*part.up.shape, part.down.shape[1]) for part in parts]
    total = concat(parts) if rule == "iso" else side_by_side(parts, sizes)
    if rule == "tsv":
        return total.truncate(rank, energy=energy)
    up, down = flattened(*total.svd(rank, energy=energy))
    return replace(parts[0], up=up, down=down, scale=1.0)

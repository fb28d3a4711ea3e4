"""TSV-M: singular vectors of all adapters, made orthogonal to each other."""

from __future__ import annotations

from collections.abc import Sequence

from ...hub.adapter import Adapter
from ...hub.lowrank import LowRank, Shape
from ..align import reconciled
from ..rules import check_share
from ..spectral import side_by_side


def tsv(adapters: Sequence[Adapter], weights: Sequence[float], *, keep: float | None = None) -> Adapter:
    """TSV-Merge (Gargiulo et al. 2025, algorithm 1): the deltas' singular triplets, with all left vectors together and
    all right vectors together replaced by their nearest orthonormal sets. Like a sum, without interference.

    keep: the share of its own rank that each adapter keeps, the largest singular values. Default: as published,
    min(outputs, inputs) / T of them, which for thin factors is all. Dense matrices are never formed: the vectors come
    from QR and a small SVD.
    """
    if keep is not None:
        check_share("keep", keep)

    def sizes(shapes: Sequence[Shape]) -> list[int]:
        return [_size(shape, len(shapes), keep) for shape in shapes]

    def combine(parts: list[LowRank]) -> LowRank:
        return side_by_side(parts, sizes([part.shape for part in parts]))

    return Adapter(reconciled(adapters, weights, combine, lambda shapes: sum(sizes(shapes))))


def _size(shape: Shape, count: int, keep: float | None) -> int:
    """How many triplets an adapter keeps beside `count - 1` others."""
    room = min(shape.outputs, shape.inputs)
    whole = min(shape.rank, room)
    return max(1, round(keep * whole) if keep else min(whole, room // count))

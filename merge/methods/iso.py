"""Iso-C and Iso-CTS: one singular value for all directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...hub.adapter import Adapter
from ...hub.lowrank import LowRank, Shape, check_limits, concat, rank_for
from ..align import reconciled
from ..rules import check_share
from ..spectral import flattened, orthogonalised, spanned

Triplets = tuple[Tensor, Tensor, Tensor]


def iso(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    common: float = 1.0,
    rank: int | None = None,
    energy: float | None = None,
) -> Adapter:
    """Isotropic merging (Marczak et al. 2025): the exact sum with every singular value replaced by their mean.

    common: the share of the directions that come from the sum. 1 is Iso-C; below 1 (Iso-CTS, 0.8 in the paper) the rest
    are the leading directions of what each adapter has outside of the common ones, all made orthogonal together. The
    paper counts directions of the full space; here only those that the adapters span count, because the others hold
    rounding errors that a flat spectrum would lift. rank: how many directions the result has at most, the leading ones.
    energy: the share of the sum's squared norm that they keep. The rest is cut off before the spectrum is made flat,
    for afterwards none of them leads.
    """
    check_share("common", common)
    check_limits(rank, energy)

    def combine(parts: list[LowRank]) -> LowRank:
        left, values, right = concat(parts).svd()
        specific = _specific(len(values), len(parts), common)
        if specific:
            left, values, right = _with_specific(parts, (left, values, right), specific)
        keep = min(rank or len(values), len(values) if energy is None else rank_for(values, energy))
        up, down = flattened(left[:, :keep], values[:keep], right[:keep])
        return replace(parts[0], up=up, down=down, scale=1.0)

    def foretold(shapes: list[Shape]) -> int:
        whole = min(sum(shape.rank for shape in shapes), shapes[0].outputs, shapes[0].inputs)
        return whole if rank is None else min(rank, whole)

    return Adapter(reconciled(adapters, weights, combine, foretold, limit=rank, energy=energy))


def _specific(directions: int, adapters: int, common: float) -> int:
    """How many directions each adapter adds by itself; the sum's leading ones are the rest."""
    return int(directions * (1 - common)) // adapters


def _with_specific(parts: Sequence[LowRank], total: Triplets, count: int) -> Triplets:
    """The sum's leading triplets, and `count` of each delta's residual outside of their column space, orthogonalised
    together; as many in all as the sum has."""
    shared = len(total[1]) - count * len(parts)
    left, values, right = total[0][:, :shared], total[1][:shared], total[2][:shared].T
    lefts, spectra, rights = [left], [values], [right]
    for part in (part.wide() for part in parts):
        outside = replace(part, up=part.up - left @ (left.T @ part.up))
        u, s, vh = outside.svd(count)
        lefts.append(_padded(u, count))
        spectra.append(_padded(s[None], count)[0])
        rights.append(_padded(vh.T, count))
    spectrum = torch.cat(spectra)
    spans = spanned(spectrum) if shared else spectrum > 0
    return (
        orthogonalised(torch.cat(lefts, dim=1) * spans),
        spectrum * spans,
        orthogonalised(torch.cat(rights, dim=1) * spans).T,
    )


def _padded(columns: Tensor, count: int) -> Tensor:
    return torch.nn.functional.pad(columns, (0, count - columns.shape[1]))

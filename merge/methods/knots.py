"""KnOTS: deltas in the left singular basis of all of them, merged there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...hub.adapter import Adapter
from ...hub.lowrank import LowRank, Shape
from ..align import reconciled
from ..rules import Elementwise
from ..spaces import chances_of
from ..spectral import spanned


def knots(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    pick: str = "largest",
    density: float = 0.2,
    unite: str = "total",
    seed: int = 0,
) -> Adapter:
    """KnOTS (Stoica et al. 2025): [delta_1 .. delta_T] = U S [V_1 .. V_T]; the V_t are merged, and U S carries them.

    pick: which entries of V_t stay, the "largest" or "random" ones (DARE). density: their share; 1 keeps all. unite:
    "total" (KnOTS-TIES) or "frequency" for TIES' disjoint mean after electing signs, "sum" for the plain sum, which at
    density 1 is the exact merge. seed: of random picks. The rank is that of all adapters together.
    """
    rule = Elementwise(pick, density, unite)

    def foretold(shapes: list[Shape]) -> int:
        return min(shapes[0].outputs, sum(min(shape.rank, shape.inputs) for shape in shapes))

    return Adapter(reconciled(adapters, weights, lambda parts: _aligned(parts, rule, seed), foretold))


def _aligned(parts: Sequence[LowRank], rule: Elementwise, seed: int) -> LowRank:
    """QR of the stacked ups and of each down leave a small matrix, whose SVD is that of the deltas side by side."""
    wide = [part.wide() for part in parts]
    basis, triangle = torch.linalg.qr(torch.cat([part.scale * part.up for part in wide], dim=1))
    rows, blocks, start = [], [], 0
    for part in wide:
        own, lower = torch.linalg.qr(part.down.T)
        rows.append(own.T)
        blocks.append(triangle[:, start : start + part.rank] @ lower.T)
        start += part.rank
    left, values, right = torch.linalg.svd(torch.cat(blocks, dim=1), full_matrices=False)
    right = right * spanned(values)[:, None]  # where nothing is, vectors are arbitrary, but would take part in the trim
    coordinates = right.split([block.shape[1] for block in blocks], dim=1)
    stack = torch.stack([part @ own for part, own in zip(coordinates, rows, strict=True)])
    roots = values.sqrt()
    down = rule(stack, chances_of(parts, seed)())
    return replace(parts[0], up=basis @ left * roots, down=roots[:, None] * down, scale=1.0)

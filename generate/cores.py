"""Cores: a library's deltas as small matrices between two common bases of each module; and means of deltas.

delta_i = outputs @ core_i @ inputs, as near as the rank allows: the bases are those in which all deltas together are
kept best, a truncated higher-order SVD (De Lathauwer, De Moor and Vandewalle, "A multilinear singular value
decomposition", SIAM J. Matrix Anal. Appl. 21, 2000). A core is linear in its delta and does not change with the way
that the delta is split into factors. Importing this needs torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Layout, Place


class Bases(NamedTuple):
    """Of one module: outputs (outputs, rank) with orthonormal columns, inputs (rank, inputs) with orthonormal rows."""

    outputs: Tensor
    inputs: Tensor

    @classmethod
    def of(cls, place: Place, vectors: Tensor, rank: int, chance: torch.Generator) -> Bases:
        """The best for the experts' vectors (n, size). What is left where they span less than `rank` is random."""
        down, up = place.factors(vectors.double())
        return cls(
            _leading(_unfolded(up, down.mT), rank, chance),
            _leading(_unfolded(down.mT, up), rank, chance).mT.contiguous(),
        )

    def cores(self, place: Place, vectors: Tensor) -> Tensor:
        """The vectors' (n, size) deltas between the bases: float64 (n, rank, rank)."""
        down, up = place.factors(vectors.double())
        return (self.outputs.mT @ up) @ (down @ self.inputs.mT)


def mean_delta(vectors: Tensor, layout: Layout) -> Tensor:
    """The mean of the deltas of vectors (n, size) of a layout, exactly: (size,) of `sum_layout(layout, n)`."""
    wide = sum_layout(layout, len(vectors))
    mean = torch.empty(wide.size, dtype=vectors.dtype)
    for narrow, place in zip(layout.places, wide.places, strict=True):
        down, up = narrow.factors(vectors)
        down, up = down.flatten(0, 1), up.transpose(0, 1).flatten(1) / len(vectors)
        if len(down) > place.rank == place.outputs:  # more than the sides allow: one factor is made square
            up, triangle = torch.linalg.qr(up)
            down = triangle @ down
        elif len(down) > place.rank:
            basis, triangle = torch.linalg.qr(down.mT)
            down, up = basis.mT, up @ triangle.mT
        mean[place.down], mean[place.up] = down.flatten(), up.flatten()
    return mean


def sum_layout(layout: Layout, count: int) -> Layout:
    """The layout of sums of `count` deltas of a layout: each module's rank is as many times as large, or its sides'."""
    return layout.reranked(lambda place: count * place.rank)


def _unfolded(left: Tensor, right: Tensor) -> Tensor:
    """A matrix (a, n * rank) with the left singular values and vectors of all left_i @ right_i^T (n, a, b) side by
    side: right is orthogonal columns times a triangle, and columns that are orthogonal change neither."""
    triangles: Tensor = torch.linalg.qr(right).R
    return (left @ triangles.mT).transpose(0, 1).flatten(1)


def _leading(matrix: Tensor, rank: int, chance: torch.Generator) -> Tensor:
    """The first `rank` left singular vectors (rows, rank), and random ones at right angles where there are fewer."""
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    kept: Tensor = left[:, :rank][:, values[:rank] > 1e-9 * values[0].clamp_min(1e-30)]
    if kept.shape[1] == rank:
        return kept
    more = torch.randn(len(matrix), rank - kept.shape[1], generator=chance, dtype=matrix.dtype)
    return torch.cat([kept, torch.linalg.qr(more - kept @ (kept.mT @ more)).Q], dim=1)

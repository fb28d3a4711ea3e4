"""Cores: a library's deltas as small matrices between two common bases of each module.

delta_i = outputs @ core_i @ inputs, as near as the rank allows: the bases are those in which all deltas together are
kept best, a truncated higher-order SVD (De Lathauwer, De Moor and Vandewalle, "A multilinear singular value
decomposition", SIAM J. Matrix Anal. Appl. 21, 2000). A core is linear in its delta and does not change with the way
that the delta is split into factors. Importing this needs torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Place


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

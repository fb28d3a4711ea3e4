"""Spectral rules: what merging methods do to singular vectors and values. They know no basis and no gauge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..hub.lowrank import LowRank

NULL = 1e-5  # singular values below this share of the largest are rounding, not directions


def side_by_side(parts: Sequence[LowRank], sizes: Sequence[int]) -> LowRank:
    """U' diag(s) V'^T from the first `sizes` singular triplets of each delta, where U' and V' are the polar factors of
    all left and of all right vectors (Gargiulo et al. 2025, algorithm 1). Its rank is the sum of `sizes`."""
    triplets = [part.svd(size) for part, size in zip(parts, sizes, strict=True)]
    left = orthogonalised(torch.cat([u for u, _, _ in triplets], dim=1))
    right = orthogonalised(torch.cat([vh.T for _, _, vh in triplets], dim=1))
    roots = torch.cat([values for _, values, _ in triplets]).sqrt()
    return replace(parts[0], up=left * roots, down=(right * roots).T, scale=1.0)


def flattened(left: Tensor, values: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """up and down of a delta with singular vectors (outputs, k) and (k, inputs) and a flat spectrum."""
    roots = flat(values).sqrt()
    return left * roots, roots[:, None] * right


def orthogonalised(vectors: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (rows, if it is wide): its polar factor, without the directions that
    the columns do not span: (m, k) -> (m, k)."""
    left, values, right = torch.linalg.svd(vectors, full_matrices=False)
    polar: Tensor = (left * spanned(values)) @ right
    return polar


def flat(values: Tensor) -> Tensor:
    """Iso-C's spectrum (Marczak et al. 2025): every singular value becomes their mean. Those that are null stay so, for
    in rank space most directions belong to no adapter: (k,) -> (k,)."""
    spans = spanned(values)
    return torch.where(spans, values.sum() / spans.sum().clamp(min=1), 0.0)


def spanned(values: Tensor) -> Tensor:
    """Which of the descending singular values are more than rounding: (k,) bool."""
    return (values > NULL * values[0]) & (values > 0)

"""RobustMerge: small entries pruned, what that takes from each direction given back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...hub.adapter import Adapter
from ...hub.lowrank import LowRank, Shape, concat
from ..align import reconciled
from ..rules import check_choice, check_share, limits_for, trimmed
from ..spaces import GAUGES


def robust(
    adapters: Sequence[Adapter], weights: Sequence[float], *, density: float = 0.5, gauge: str = "svd"
) -> Adapter:
    """RobustMerge (Zeng et al. 2025): the sum of deltas whose factors lost their small entries and whose directions are
    rescaled for it. Direction i of adapter t, row i of its down matrix A, is multiplied by S_ti / mean_t S_ti, where
    S_ti = sum_j |A_ij| / sum_j |pruned A_ij|.

    density: the share of entries of either factor that is kept, the largest ones; at 1 this is the exact sum. gauge:
    "svd" makes a direction a singular direction, in order; "stored" takes factors as they are. How the paper normalises
    S over tasks and joins the factors can be read in more than one way: here equal adapters leave S at 1, and every
    adapter keeps its own product, without cross terms.
    """
    check_share("density", density)
    check_choice("gauge", gauge, GAUGES)

    def combine(parts: list[LowRank]) -> LowRank:
        whole = [part.wide().truncate() if gauge == "svd" else part.wide().folded() for part in parts]
        pruned = [replace(part, up=_pruned(part.up, density), down=_pruned(part.down, density)) for part in whole]
        lost = [_lost(before.down, after.down) for before, after in zip(whole, pruned, strict=True)]
        factors = [own / mean for own, mean in zip(lost, _means(lost), strict=True)]
        return concat([replace(part, up=part.up * factor) for part, factor in zip(pruned, factors, strict=True)])

    return Adapter(reconciled(adapters, weights, combine, lambda shapes: sum(_rank(shape, gauge) for shape in shapes)))


def _rank(shape: Shape, gauge: str) -> int:
    return min(shape.rank, shape.outputs, shape.inputs) if gauge == "svd" else shape.rank


def _pruned(factor: Tensor, density: float) -> Tensor:
    stack = factor[None]
    return trimmed(stack, limits_for(stack, density))[0]


def _lost(before: Tensor, after: Tensor) -> Tensor:
    """S of every direction, 1 where nothing is left to be given back: (rank, inputs) twice -> (rank,)."""
    left = after.abs().sum(dim=1)
    return torch.where(left > 0, before.abs().sum(dim=1) / left.clamp(min=torch.finfo(left.dtype).tiny), 1.0)


def _means(lost: Sequence[Tensor]) -> list[Tensor]:
    """For every adapter the mean of each direction's S over the adapters that have as many directions."""
    padded = torch.nn.utils.rnn.pad_sequence(list(lost), batch_first=True, padding_value=torch.nan)
    means = padded.nanmean(dim=0)
    return [means[: len(own)] for own in lost]

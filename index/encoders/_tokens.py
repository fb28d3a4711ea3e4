"""What the learned encoders share: features, linear maps by kind, what is standardised, a small Transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..modules import Manifest

Features = Mapping[str, Tensor]
"""What a network reads of one adapter, by name; no tensor of it depends on what is learned."""

_NEVER = 1e-30


def collated(items: Sequence[Features]) -> dict[str, Tensor]:
    """Stacked along a new first axis; where ranks differ, filled up with zeros at the end."""
    return {name: _stacked([item[name] for item in items]) for name in items[0]}


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    shapes = {tensor.shape for tensor in tensors}
    if len(shapes) == 1:
        return torch.stack(list(tensors))
    whole = tensors[0].new_zeros(len(tensors), *(max(sizes) for sizes in zip(*shapes, strict=True)))
    for row, tensor in zip(whole, tensors, strict=True):
        row[tuple(slice(size) for size in tensor.shape)] = tensor
    return whole


class ByKind(nn.Module):
    """One linear map for every group of places (same kind and shape), over (n, places of the group, size)."""

    def __init__(self, sizes: Sequence[int], width: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(size, width) for size in sizes)

    def forward(self, index: int, values: Tensor) -> Tensor:
        mapped: Tensor = self.maps[index](values)
        return mapped


class Standard(nn.Module):
    """Numbers (n, places) less their mean, over their spread (no less than `least`), as measured once on a fit."""

    mean: Tensor
    spread: Tensor

    def __init__(self, places: int, least: float = 0.1) -> None:
        super().__init__()
        self.least = least
        self.register_buffer("mean", torch.zeros(places))
        self.register_buffer("spread", torch.ones(places))

    def measure(self, values: Tensor, present: Tensor) -> None:
        """values, present (n, places): statistics of those present; a place that is never present keeps 0 and 1."""
        counts = present.sum(dim=0)
        mean = (values * present).sum(dim=0) / counts.clamp_min(1)
        variance = ((values - mean).square() * present).sum(dim=0) / counts.clamp_min(1)
        self.mean.copy_(mean)
        self.spread.copy_(torch.where(counts > 1, variance.sqrt().clamp_min(self.least), 1.0))

    def forward(self, values: Tensor) -> Tensor:
        return ((values - self.mean) / self.spread).clamp(-4, 4)


class Aside(nn.Module):
    """Vectors (n, dim) without their part along the mean of all words, at unit length.

    That part would only say how little is known of an adapter, and be in the way of every word alike.
    """

    common: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("common", torch.zeros(dim))

    def measure(self, targets: Tensor) -> None:
        """targets (n, dim): vectors of words."""
        self.common.copy_(nn.functional.normalize(targets.mean(dim=0), dim=0))

    def forward(self, vectors: Tensor) -> Tensor:
        rest = vectors - (vectors @ self.common)[:, None] * self.common
        return nn.functional.normalize(rest, dim=-1)


class Centre(nn.Module):
    """Vectors (n, dim) less the mean of their batch while learning, and afterwards less a mean that is measured then.

    Not a running mean: batches have modules hidden, and the vectors of whole adapters lie elsewhere.
    """

    mean: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))

    def forward(self, vectors: Tensor) -> Tensor:
        return vectors - (vectors.mean(dim=0) if self.training else self.mean)


def log_norms(norms: Tensor) -> tuple[Tensor, Tensor]:
    """Norms (places,) -> their logarithms, 0 where there is none, and whether there is one (1.0 or 0.0)."""
    present = norms > 0
    return torch.where(present, norms.clamp_min(_NEVER).log(), 0.0), present.float()


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), as CLIP has it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def transformer(width: int, layers: int, heads: int, *, widening: int, dropout: float) -> nn.TransformerEncoder:
    """CLIP's layers: the norm first, QuickGELU."""
    layer = nn.TransformerEncoderLayer(
        width, heads, widening * width, dropout, QuickGELU(), batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)


def place_order(manifest: Manifest) -> Tensor:
    """Where each place stands when the groups' places are laid end to end."""
    rows = torch.tensor([row for group in manifest.groups for row in group.rows])
    return torch.argsort(rows)

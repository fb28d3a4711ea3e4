"""How pictures are moved about before a model or a judge in training sees them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def shifted(pictures: Tensor, most: int, chance: torch.Generator) -> Tensor:
    """Square pictures (n, channels, size, size), each moved by up to `most` pixels across and down; edges go on."""
    size = pictures.shape[-1]
    wide = functional.pad(pictures, (most,) * 4, mode="replicate")
    starts = torch.randint(2 * most + 1, (2, len(pictures), 1), generator=chance)
    across, down = (start + torch.arange(size) for start in starts)
    number = torch.arange(len(pictures))[:, None, None]
    return wide.permute(0, 2, 3, 1)[number, down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)

"""Adapters whose concepts are planted in the planes that their columns lie in, and words for them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lorahub.hub.adapter import Adapter
from lorahub.hub.lowrank import LowRank
from lorahub.index.fitting import Example

CONCEPTS = 6
SMALL: dict[str, dict[str, Any]] = {
    "autolora": {"width": 16, "left": 32, "right": 8, "both": 8, "start": 16},
    "w2t": {"width": 16},
    "ridge": {"left": 32, "right": 8, "both": 8},
}


class Words:
    """Every text has a direction of its own, the same for ever."""

    space, dim = "words", 24

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        rows = [np.random.default_rng(zlib.crc32(text.encode())).normal(size=self.dim) + 0.5 for text in texts]
        vectors = np.array(rows, np.float32).reshape(len(texts), self.dim)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def planted(concept: int, seed: int, *, noise: float = 0.4, modules: int = 4, size: int = 32) -> Adapter:
    """Columns from the concept's planes, mixed anew; `down`, rank and strength of its own."""
    shared, own = (torch.Generator().manual_seed(start) for start in (concept, 1000 + 100 * concept + seed))
    rank = [2, 3, 4][seed % 3]
    parts = {}
    for index in range(modules):
        columns = torch.randn(size, 2, generator=shared) @ torch.randn(2, rank, generator=own)
        columns = columns + noise * torch.randn(size, rank, generator=own)
        parts[f"b.{index}.q"] = LowRank(torch.randn(rank, size, generator=own), columns, 0.1 * (1 + seed))
    return Adapter(parts, "planted", meta={"name": f"{concept}-{seed}"})


def library(each: int = 6) -> list[Example]:
    return [Example(planted(c, seed), (f"concept {c}",)) for seed in range(each) for c in range(CONCEPTS)]

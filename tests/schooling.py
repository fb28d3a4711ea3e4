"""Small schools: experts whose weights follow from their descriptions, and an encoder of words that needs no model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from lorahub.generate.taught import School, Taught, open_school
from lorahub.hub.adapter import Adapter
from lorahub.hub.lowrank import LowRank
from numpy.typing import NDArray

MODULES = {"blocks.2.attn.q": (6, 4), "blocks.10.attn.q": (6, 4), "blocks.2.attn.v": (3, 4)}  # outputs, inputs
RANK = 2
SIZE = sum(RANK * (outputs + inputs) for outputs, inputs in MODULES.values())


@dataclass(frozen=True)
class Words:
    """Unit vectors (n, dim) that follow from each text's words: texts that share words are near to one another."""

    space: str = "words"
    dim: int = 12

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        rows = [sum((self._word(word) for word in text.split()), np.zeros(self.dim)) for text in texts]
        return np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32)

    def _word(self, word: str) -> NDArray[np.float64]:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
        return np.random.default_rng(seed).standard_normal(self.dim)


def expert(
    name: str, seed: int, *, noise: float = 0.0, scale: float = 1.0, rank: int = RANK, base: str | None = "tiny"
) -> Adapter:
    """An adapter whose factors follow from the seed, with noise that follows from the name on top."""
    chance = torch.Generator().manual_seed(seed)
    apart = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))
    modules = {}
    for module, (outputs, inputs) in MODULES.items():
        down, up = torch.randn(rank, inputs, generator=chance), torch.randn(outputs, rank, generator=chance)
        down = down + noise * torch.randn(rank, inputs, generator=apart)
        up = up + noise * torch.randn(outputs, rank, generator=apart)
        modules[module] = LowRank(down, up, scale)
    return Adapter(modules, base, meta={"name": name})


def taught(name: str, seed: int, *, checkpoints: int = 3, noise: float = 0.05) -> Taught:
    """An expert with two descriptions."""
    kept = tuple(expert(f"{name} {number}", seed, noise=noise) for number in range(checkpoints))
    return Taught(name, (f"a picture of {name}", f"{name} it is"), kept)


def school(names: str = "fox owl hen cat", **given: int | float) -> School:
    """A school of experts by name."""
    return open_school([taught(name, 7 + row, **given) for row, name in enumerate(names.split())], Words())  # type: ignore[arg-type]

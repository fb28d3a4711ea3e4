"""A library whose weights tell what they do: adapters of four concepts, which write to their concept's directions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lorahub.hub.adapter import Adapter
from lorahub.hub.entries import Entry
from lorahub.hub.lowrank import LowRank
from lorahub.hub.writing import save

CONCEPTS = ("watercolor painting", "robot android", "legal court writing", "kitten photographs")
PLACES = ("layer.0.query", "layer.1.query", "layer.0.value")
BASE = "tiny-world"


def concept_adapter(concept: int, seed: int, *, base: str | None = BASE, rank: int = 2, width: int = 24) -> Adapter:
    """Columns near the concept's, a `down` of its own: the deltas of two of them are nearly orthogonal."""
    own, common = torch.Generator().manual_seed(1000 + seed), torch.Generator().manual_seed(concept)
    modules = {}
    for name in PLACES:
        directions = torch.randn(width, 2, generator=common)
        mixed = directions @ torch.randn(2, rank, generator=own) + 0.2 * torch.randn(width, rank, generator=own)
        modules[name] = LowRank(torch.randn(rank, 16, generator=own), mixed)
    return Adapter(modules, base, {}, {"name": f"a{concept}-{seed}"})


def shelf(folder: Path, each: int = 6, *, bare: Sequence[int] = (), base: str = BASE) -> list[Path]:
    """PEFT folders, `each` of every concept; those with the numbers `bare` say nothing of themselves."""
    paths = []
    for seed in range(each):
        for concept, words in enumerate(CONCEPTS):
            number = seed * len(CONCEPTS) + concept
            told = f"# {words}\n\nMade for {words}, number {number}.\n"
            card = None if number in bare else (lambda told=told: told)
            name = f"lora-{number:03d}" if number in bare else f"{words.split()[0]}-{number}"
            paths.append(save(concept_adapter(concept, number, base=base), folder / name, card=card))
    return paths


def entry(name: str, **said: Any) -> Entry:
    """An adapter in the catalogue that says what is given, and nothing else."""
    return Entry(
        id=name, name=name, digest=name, base="tiny", base_from=None, format="peft", rank_min=1, rank_max=1, modules=1,
        parameters=1, **{"description": "", "title": None, "triggers": (), "tags": (), **said}, mergeable=True,
        reason=None, created="", locations=(),
    )  # fmt: skip

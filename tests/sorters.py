"""A small world of sentence sorters: adapters of all-MiniLM-L6-v2 with one module, and a file of tasks for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lorahub.hub.adapter import Adapter
from lorahub.hub.lowrank import LowRank
from lorahub.hub.writing import save

BASE = "sentence-transformers/all-MiniLM-L6-v2"
MODULE = "encoder.layer.5.attention.self.value"
TOPICS = {
    "fruit": ("apple", "stone"), "weather": ("rain", "desk"), "pets": ("cat", "hammer"), "music": ("violin", "brick"),
    "sport": ("tennis", "soup"), "travel": ("airport", "pencil"), "money": ("bank", "forest"),
    "school": ("teacher", "lamp"), "health": ("doctor", "carpet"),
}  # fmt: skip


def sorter(seed: int, *, size: float = 0.3, rank: int = 1) -> Adapter:
    """A random change of one layer's values."""
    chance = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, 384, generator=chance), torch.randn(384, rank, generator=chance)
    return Adapter({MODULE: LowRank(size * down, size * up / 384**0.5)}, BASE, meta={"name": f"s{seed}"})


def task(name: str) -> dict[str, Any]:
    one, other = TOPICS[name]
    sentences = [f"the {one} was there", f"a {other} of mine", f"{one} again", f"no {other}"]
    return {
        "name": name, "description": f"Sorts sentences about {name}.", "labels": [one, other], "sentences": sentences,
        "targets": [0, 1, 0, 1], "source": "made up", "licence": "none", "queries": [f"what is said of {name}"],
    }  # fmt: skip


def world(folder: Path, *names: str) -> Path:
    """PEFT folders with model cards for the topics (all by default), and `tasks.json` beside them; returns its path."""
    chosen = names or tuple(TOPICS)
    for seed, name in enumerate(chosen):
        save(sorter(seed), folder / name, card=lambda name=name: f"# {name}\n\nSorts sentences about {name}.\n")
    path = folder / "tasks.json"
    path.write_text(json.dumps([task(name) for name in chosen]))
    return path

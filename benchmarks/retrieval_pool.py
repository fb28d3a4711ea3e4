"""The adapters of retrieval.py: trained many at once, kept in a folder under a hash of what they are made from."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from lorahub.hub.adapter import Adapter
from lorahub.hub.reading import read
from lorahub.hub.writing import ready, save
from retrieval_splits import Concept, Copy

TOGETHER = 16  # adapters trained at once; what a killed run loses


class World(Protocol):
    """A base model and what its adapters can be of."""

    @property
    def name(self) -> str: ...

    @property
    def base(self) -> str: ...

    @property
    def concepts(self) -> Sequence[Concept]: ...

    @property
    def stamp(self) -> str:
        """Differs where the base, the data or the recipe do."""
        ...

    def teach(self, some: Sequence[Copy]) -> Sequence[Adapter]:
        """Adapters of copies of one length, all trained at once."""
        ...


@dataclass(frozen=True)
class Pool:
    """Copies, their adapters (float32) and their folders; how many this run trained, and how long that took."""

    copies: tuple[Copy, ...]
    adapters: tuple[Adapter, ...]
    folders: tuple[Path, ...]
    trained: int = 0
    seconds: float = 0.0

    def names(self) -> list[str]:
        """The concept of every copy."""
        return [copy.concept for copy in self.copies]


def place(world: World, copy: Copy, room: Path) -> Path:
    """The PEFT folder of a copy's adapter."""
    made_from = [world.stamp, *(value for key, value in asdict(copy).items() if key != "number")]
    digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    return room / world.name / digest[:20]


def fill(world: World, copies: Sequence[Copy], room: Path, told: bool = True) -> Pool:
    """Trains what the room lacks, and reads everything from there."""
    missing = [copy for copy in copies if not place(world, copy, room).exists()]
    start, done = time.perf_counter(), 0
    for group in groups(missing):
        for copy, adapter in zip(group, world.teach(group), strict=True):
            named = replace(adapter, meta={"name": f"{copy.concept} {copy.number}"})
            save(ready(named, torch.float16), place(world, copy, room), force=True)
        done += len(group)
        if told:
            pause = time.perf_counter() - start
            print(f"  {world.name}: {done} of {len(missing)} missing adapters, {pause:.0f} s", flush=True)
    seconds = round(time.perf_counter() - start, 1)
    folders = tuple(place(world, copy, room) for copy in copies)
    return Pool(tuple(copies), tuple(opened(folder, world.base) for folder in folders), folders, len(missing), seconds)


def groups(copies: Sequence[Copy]) -> Iterator[list[Copy]]:
    """Copies of one length, at most TOGETHER of them, in the order given."""
    for steps in sorted({copy.steps for copy in copies}):
        some = [copy for copy in copies if copy.steps == steps]
        for first in range(0, len(some), TOGETHER):
            yield some[first : first + TOGETHER]


def opened(folder: Path, base: str) -> Adapter:
    """An adapter of the room, all of it in memory."""
    found = read(folder)
    modules = {name: module.to(torch.float32) for name, module in found.modules.items()}
    return replace(found, modules=modules, base=base)

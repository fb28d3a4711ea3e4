"""Adapter: the one immutable value that flows through lorahub."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from .lowrank import LowRank, Shape


class LazyModules(Mapping[str, LowRank]):
    """Modules whose names and shapes are known and whose factors are made when asked for, and not kept.

    A merge of large adapters thus holds one module at a time.
    """

    def __init__(self, shapes: Mapping[str, Shape], load: Callable[[str], LowRank]) -> None:
        self.shapes = dict(shapes)
        self._load = load

    def __getitem__(self, name: str) -> LowRank:
        if name not in self.shapes:
            raise KeyError(name)
        return self._load(name)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A set of low-rank deltas for a base model.

    modules: canonical dotted module name -> LowRank, possibly lazy. base: the base model's name, if known.
    extras: what is not low-rank (biases, saved modules, embeddings); nothing that a file holds is dropped silently.
    meta: what the file said of itself: "name", "format", "path", "config" (adapter_config.json), "metadata" (header).
    """

    modules: Mapping[str, LowRank]
    base: str | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.meta.get("name") or "adapter")

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Module name -> Shape, without reading a tensor where the modules are lazy."""
        if isinstance(self.modules, LazyModules):
            return self.modules.shapes
        return {name: module.shape for name, module in self.modules.items()}

    @property
    def parameters(self) -> int:
        return sum(shape.parameters for shape in self.shapes.values())

    def mapped(self, change: Callable[[LowRank], LowRank]) -> Adapter:
        """Every module changed alike, read once and held."""
        return replace(self, modules={name: change(module) for name, module in self.modules.items()})

    def scaled(self, weight: float) -> Adapter:
        """weight * every delta; stays lazy."""
        source = self.modules
        return replace(self, modules=LazyModules(self.shapes, lambda name: source[name].scaled(weight)))

    def inner(self, other: Adapter) -> float:
        """Sum of the modules' inner products; a module that one side lacks is zero there."""
        return sum(module.inner(other.modules[name]) for name, module in self.modules.items() if name in other.modules)

    def norm(self) -> float:
        """Frobenius norm over all modules."""
        return math.sqrt(sum(module.norm() ** 2 for module in self.modules.values()))

    def cosine(self, other: Adapter) -> float:
        """Cosine between the two adapters' deltas; 0 where either is zero."""
        product = self.norm() * other.norm()
        return self.inner(other) / product if product else 0.0

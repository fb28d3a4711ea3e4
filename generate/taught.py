"""A school: the experts that a generator learns from, with their descriptions, checkpoints and one layout for all.

Importing this needs torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..hub.adapter import Adapter
from ..hub.errors import GenerationError
from ..hub.tensorfile import tensor_bytes
from .layout import Gauge, Layout
from .library import Vectors

if TYPE_CHECKING:
    from ..index.encoders.text import TextEncoder


@dataclass(frozen=True)
class Taught:
    """An expert of the training library: what its task is called and how it is described, and its last checkpoints."""

    name: str
    descriptions: tuple[str, ...]
    checkpoints: tuple[Adapter, ...]


@dataclass(frozen=True)
class Origin:
    """Where a generator comes from.

    space: of the text encoder whose vectors it is asked with. library: the training experts' names -> sha256 of their
    checkpoints. fingerprint: sha256 of the base's weights, where they were at hand. told: figures of the fit.
    """

    space: str
    library: Mapping[str, str]
    fingerprint: str | None = None
    told: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class School:
    """Experts of one structure. vectors: for each of them its descriptions' unit vectors (descriptions, dim).

    space: names the text encoder's space. fingerprint: of the base's weights, see `weights_fingerprint`.
    """

    base: str | None
    layout: Layout
    experts: tuple[Taught, ...]
    vectors: tuple[Vectors, ...]
    space: str = ""
    fingerprint: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(expert.name for expert in self.experts)

    @cached_property
    def weights(self) -> tuple[Tensor, ...]:
        """Every expert's checkpoints as vectors: (checkpoints, size) each."""
        return tuple(torch.stack([self.layout.flatten(one) for one in expert.checkpoints]) for expert in self.experts)

    @cached_property
    def keys(self) -> Tensor:
        """One unit vector for each expert, the direction of its descriptions' mean: (n, dim)."""
        return directions(self.vectors)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Name -> sha256 of the expert's checkpoints, as vectors."""
        return {
            name: hashlib.sha256(tensor_bytes(some)).hexdigest()
            for name, some in zip(self.names, self.weights, strict=True)
        }

    def origin(self, **told: Any) -> Origin:
        """What a generator that was fitted here says of itself."""
        return Origin(self.space, self.hashes, self.fingerprint, told)

    def without(self, names: Collection[str]) -> School:
        """The school with some experts left out. Raises GenerationError where a name is unknown or nobody is left."""
        unknown = sorted(set(names) - set(self.names))
        rest = [row for row, name in enumerate(self.names) if name not in names]
        if unknown or not rest:
            what = f"no expert {unknown[0]}" if unknown else "no expert left"
            raise GenerationError(f"there is {what}; the school has {', '.join(self.names[:5])} ...")
        return School(
            self.base,
            self.layout,
            tuple(self.experts[row] for row in rest),
            tuple(self.vectors[row] for row in rest),
            self.space,
            self.fingerprint,
        )


def open_school(
    experts: Sequence[Taught],
    encoder: TextEncoder,
    *,
    gauge: Gauge = "none",
    fingerprint: str | None = None,
) -> School:
    """The experts with one layout and their descriptions' vectors.

    gauge: "none" for experts that share their first `down` matrices, "canonical" for independent ones. Raises
    GenerationError for adapters of different structures (naming the module), for an expert without descriptions or
    checkpoints, and for a name that occurs twice.
    """
    for expert in experts:
        if not expert.checkpoints or not any(text.strip() for text in expert.descriptions):
            raise GenerationError(
                f"{expert.name}: has {len(expert.checkpoints)} checkpoints and {len(expert.descriptions)} descriptions;"
                " expected at least one of each"
            )
    names = [expert.name for expert in experts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise GenerationError(f"two experts are called {twice[0]}; give each a name of its own")
    layout = Layout.of([one for expert in experts for one in expert.checkpoints], gauge=gauge)
    texts = [text for expert in experts for text in expert.descriptions]
    encoded, ends = encoder.encode(texts), np.cumsum([len(expert.descriptions) for expert in experts])
    vectors = tuple(np.ascontiguousarray(part) for part in np.split(encoded, ends[:-1]))
    return School(layout.base, layout, tuple(experts), vectors, encoder.space, fingerprint)


def directions(vectors: Sequence[Tensor | Vectors]) -> Tensor:
    """The unit vector of each group's mean: float32 (groups, dim)."""
    means = torch.stack([torch.as_tensor(some).float().mean(dim=0) for some in vectors])
    return torch.nn.functional.normalize(means, dim=1)


def weights_fingerprint(state: Mapping[str, Tensor]) -> str:
    """sha256 of a model's weights (its `state_dict`), whatever their order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} {state[name].dtype} {tuple(state[name].shape)} ".encode())
        digest.update(tensor_bytes(state[name]))
    return digest.hexdigest()

"""What several adapters do to one model: where they agree, where they collide, and how much rank each really uses.

One pass over the union of the modules, one module of each adapter at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..hub.adapter import Adapter
from ..hub.errors import BadOption, FormatError
from ..hub.lowrank import LowRank
from .align import check
from .compare import Relation, Sums, Thin, module_sums, total
from .signs import Grid

ELSEWHERE = "elsewhere"  # the layer of modules without a number in their names


@dataclass(frozen=True)
class Profile:
    """One adapter by itself, its weight on.

    rank: the largest numerical rank of its modules. stable_rank: ||.||_F^2 / sigma_max^2 of a module, averaged with the
    modules' squared norms as weights; for a module of equal singular values it is the rank. energy: the share of the
    squared norm that the first k singular values of every module hold, k = 1, 2, ...; rank_90 and rank_99: the least k
    for that share of it.
    """

    name: str
    weight: float
    base: str | None
    norm: float
    rank: int
    stable_rank: float
    energy: tuple[float, ...]
    rank_90: int
    rank_99: int
    modules: int


@dataclass(frozen=True)
class Layer:
    """A layer: its number of modules, each adapter's norm in it, and the interference there (see Analysis)."""

    name: str
    modules: int
    norms: tuple[float, ...]
    interference: float | None


@dataclass(frozen=True)
class Pair:
    """Two adapters: by name, how they compare as a whole, and where both have modules, per layer and per module."""

    first: str
    second: str
    whole: Relation
    layers: Mapping[str, Relation]
    modules: Mapping[str, Relation]


@dataclass(frozen=True)
class Analysis:
    """Adapters, all pairs of them, and their layers.

    interference: ||sum||^2 / sum of ||.||^2 of the weighted deltas: 1 where they are orthogonal, T for T equal ones, 0
    where they cancel; None where all are zero. modules: how many there are in all; sampled: in how many of those that
    are compared signs were counted in a sample of entries, drawn by `seed`.
    """

    adapters: tuple[Profile, ...]
    pairs: tuple[Pair, ...]
    layers: tuple[Layer, ...]
    interference: float | None
    modules: int
    sampled: int
    seed: int


def analyze(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    base: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int | None], None] | None = None,
) -> Analysis:
    """Compare adapters pairwise, each multiplied by its weight (default 1); one adapter alone gets its profile.

    base: the user's word that all are for it. seed: of the sample of entries in which signs are counted where deltas
    are large. progress: sees (modules done, modules in all). Raises IncompatibleAdapters as a merge would, BadOption
    for a weight of 0, FormatError for NaN or Inf.
    """
    shares = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    check(adapters, shares, base=base)
    for adapter, share in zip(adapters, shares, strict=True):
        if not share:
            raise BadOption(f"the weight of {adapter.name} is 0, which leaves nothing to compare; leave it out")
    held = [set(adapter.shapes) for adapter in adapters]
    names = sorted(set().union(*held), key=_natural)
    spectra: list[dict[str, Tensor]] = [{} for _ in adapters]
    sums: dict[str, Sums] = {}
    sampled = 0
    for done, name in enumerate(names, 1):
        holders = [i for i, modules in enumerate(held) if name in modules]
        parts = [_finite(adapters[i], name).scaled(shares[i]) for i in holders]
        thin = [Thin.of(part) for part in parts]
        grid = Grid.of(name, parts[0].shape, seed)
        sums[name] = module_sums(parts, thin, holders, len(adapters), grid)
        sampled += len(holders) > 1 and not grid.complete
        for i, one in zip(holders, thin, strict=True):
            spectra[i][name] = one.values
        if progress:
            progress(done, len(names))
    whole, by_layer = total(list(sums.values())), _by_layer(sums)
    labels = _labels(adapters)
    return Analysis(
        adapters=tuple(
            _profile(label, share, adapter.base, spectrum)
            for label, share, adapter, spectrum in zip(labels, shares, adapters, spectra, strict=True)
        ),
        pairs=tuple(_pair(i, j, labels, whole, by_layer, sums) for j in range(len(labels)) for i in range(j)),
        layers=tuple(_layer(layer, some, sums) for layer, some in by_layer.items()),
        interference=whole.interference,
        modules=len(names),
        sampled=sampled,
        seed=seed,
    )


def layer_of(module: str) -> str:
    """The layer that a module belongs to: its name up to the first number, such as `model.layers.3`.

    A U-Net numbers its stages first, so there the attention or residual block counts: `unet.up_blocks.1.attentions.2`.
    """
    found = re.match(r"(?:.*?\.)??(?:up|down)_blocks\.\d+\.[a-z_]+\.\d+(?=\.|$)", module)
    found = found or re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", module)
    return found[0] if found else ELSEWHERE


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts 2 before 10."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def _finite(adapter: Adapter, name: str) -> LowRank:
    module = adapter.modules[name]
    if not bool(torch.isfinite(module.up).all() & torch.isfinite(module.down).all()):
        raise FormatError(f"{adapter.name}: {name} holds NaN or Inf; leave this adapter out")
    return module


def _labels(adapters: Sequence[Adapter]) -> list[str]:
    """The adapters' names, numbered where several have one name."""
    names = [adapter.name for adapter in adapters]
    return [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _by_layer(sums: Mapping[str, Sums]) -> dict[str, Sums]:
    layers: dict[str, list[Sums]] = {}
    for name, one in sums.items():
        layers.setdefault(layer_of(name), []).append(one)
    return {
        layer: total(layers[layer]) for layer in sorted(layers, key=lambda layer: (layer == ELSEWHERE, _natural(layer)))
    }


def _layer(name: str, whole: Sums, sums: Mapping[str, Sums]) -> Layer:
    norms = tuple(math.sqrt(max(float(square), 0.0)) for square in whole.inner.diagonal())
    return Layer(name, sum(layer_of(module) == name for module in sums), norms, whole.interference)


def _pair(
    i: int, j: int, labels: Sequence[str], whole: Sums, layers: Mapping[str, Sums], modules: Mapping[str, Sums]
) -> Pair:
    def shared(places: Mapping[str, Sums]) -> dict[str, Relation]:
        return {name: sums.relation(i, j) for name, sums in places.items() if sums.shared[i, j]}

    return Pair(labels[i], labels[j], whole.relation(i, j), shared(layers), shared(modules))


def _profile(name: str, weight: float, base: str | None, spectrum: Mapping[str, Tensor]) -> Profile:
    rank = max((len(values) for values in spectrum.values()), default=0)
    squares = torch.zeros(rank, dtype=torch.float64)
    stable = 0.0
    for values in spectrum.values():
        if len(values):
            squares[: len(values)] += values.square()
            square = float(values.square().sum())
            stable += square * square / float(values[0]) ** 2
    whole = float(squares.sum())
    energy = (squares.cumsum(0) / whole).tolist() if whole else []
    return Profile(
        name=name,
        weight=weight,
        base=base,
        norm=math.sqrt(whole),
        rank=rank,
        stable_rank=stable / whole if whole else 0.0,
        energy=tuple(energy),
        rank_90=_reaching(energy, 0.9),
        rank_99=_reaching(energy, 0.99),
        modules=len(spectrum),
    )


def _reaching(energy: Sequence[float], share: float) -> int:
    """The least k whose energy is `share`; 0 of nothing."""
    return next((k for k, kept in enumerate(energy, 1) if kept >= share * (1 - 1e-12)), 0)

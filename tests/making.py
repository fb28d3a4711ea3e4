"""Random adapters for the law tests, and the dense float64 algebra that is their oracle.

Nothing here uses the algebra under test: deltas are multiplied out in float64, whatever the factors are stored in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from lorahub.hub.adapter import Adapter
from lorahub.hub.lowrank import LowRank
from lorahub.merge.run import Merged, merge
from torch import Tensor

LAW = settings(deadline=None, derandomize=True, max_examples=60)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# unit roundoff: the largest relative error of one rounding
ROUNDOFF = {torch.float64: 2**-53, torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}

Deltas = dict[str, Tensor]


@dataclass(frozen=True)
class Place:
    """A module of a base model, as deltas see it; `inputs` counts channels times the kernel's size."""

    outputs: int
    inputs: int
    kernel: tuple[int, ...] = ()
    embedding: bool = False


BASE = {
    "layer.0.query": Place(12, 17),
    "layer.0.value": Place(5, 9),
    "layer.0.narrow": Place(2, 30),
    "conv.pointwise": Place(8, 6, (1, 1)),
    "conv.wide": Place(7, 4 * 9, (3, 3)),
    "conv.line": Place(6, 3 * 5, (5,)),
    "words": Place(10, 21, (), embedding=True),
}


def low_rank(
    place: Place, rank: int, *, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> LowRank:
    """A delta for `place` with normally distributed factors."""
    chance = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, place.inputs, generator=chance, dtype=torch.float64).to(dtype)
    up = torch.randn(place.outputs, rank, generator=chance, dtype=torch.float64).to(dtype)
    return LowRank(down, up, scale, place.kernel, place.embedding)


def adapter(
    *names: str,
    rank: int = 4,
    seed: int = 0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    base: str | None = "tiny",
    called: str = "",
    extras: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """An adapter for `names` of BASE, all of them by default."""
    modules = {
        name: low_rank(BASE[name], rank, seed=1000 * seed + index, scale=scale, dtype=dtype)
        for index, name in enumerate(names or BASE)
    }
    return Adapter(modules, base, dict(extras or {}), {"name": called or f"adapter-{seed}"})


def delta(module: LowRank) -> Tensor:
    """The oracle: the delta as an (outputs, inputs) matrix of float64."""
    return module.scale * (module.up.double() @ module.down.double())


def deltas(some: Adapter) -> Deltas:
    """Every module multiplied out."""
    return {name: delta(module) for name, module in some.modules.items()}


def weighted_sum(adapters: Sequence[Adapter], weights: Sequence[float]) -> Deltas:
    """sum_i weight_i * delta_i over the union of modules."""
    total: Deltas = {}
    for some, weight in zip(adapters, weights, strict=True):
        for name, matrix in deltas(some).items():
            total[name] = total.get(name, torch.zeros_like(matrix)) + weight * matrix
    return total


def sizes(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, float]:
    """What rounding errors are relative to: sum_i |weight_i scale_i| ||up_i|| ||down_i|| of each module."""
    total: dict[str, float] = {}
    for some, weight in zip(adapters, weights, strict=True):
        for name, module in some.modules.items():
            size = abs(weight * module.scale) * float(module.up.double().norm() * module.down.double().norm())
            total[name] = total.get(name, 0.0) + size
    return total


def merged(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    method: str = "exact",
    dtype: torch.dtype | None = torch.float32,
    **given: Any,
) -> Deltas:
    """A merge by the public call, multiplied out."""
    return deltas(merge(adapters, method, weights, dtype=dtype, given=given).adapter)


def carried_out(result: Merged) -> Merged:
    """The same merge with every module read, so that its report is complete."""
    for name in result.adapter.modules:
        _ = result.adapter.modules[name]
    return result


def assert_equal(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], allowed: Mapping[str, float]) -> None:
    """The same modules, and no delta further off than `allowed` for it (Frobenius norm)."""
    assert set(got) == set(wanted)
    for name, matrix in wanted.items():
        distance = float((got[name] - matrix).norm())
        assert distance <= allowed[name], f"{name}: off by {distance:.3e}, allowed {allowed[name]:.3e}"


def rounding(
    adapters: Sequence[Adapter], weights: Sequence[float], dtype: torch.dtype = torch.float32, factor: float = 8.0
) -> dict[str, float]:
    """Errors that a correct merge may make: a few roundings in the arithmetic's dtype and in the result's."""
    computed = torch.float64 if all(m.dtype == torch.float64 for a in adapters for m in a.modules.values()) else None
    unit = max(ROUNDOFF[computed or torch.float32], ROUNDOFF[dtype])
    return {name: factor * unit * size for name, size in sizes(adapters, weights).items()}


def times(some: Mapping[str, Tensor], weight: float) -> Deltas:
    """Every delta multiplied by a number."""
    return {name: weight * matrix for name, matrix in some.items()}


# --- strategies ---------------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**20)
weight_values = st.one_of(st.floats(1 / 16, 4), st.floats(-4, -1 / 16), st.just(0.0))


@st.composite
def places(draw: st.DrawFn) -> Place:
    """Any kind of module: linear, convolutions of one and two dimensions, embedding."""
    kernel = draw(st.sampled_from([(), (), (1, 1), (3, 3), (5,)]))
    channels, outputs = draw(st.integers(1, 16)), draw(st.integers(1, 20))
    embedding = not kernel and draw(st.booleans())
    return Place(outputs, channels * math.prod(kernel), kernel, embedding)


@st.composite
def scales(draw: st.DrawFn, rank: int) -> float:
    """alpha/r or, for rsLoRA, alpha/sqrt(r)."""
    alpha = draw(st.sampled_from([1.0, 4.0, 16.0, float(rank)]))
    return alpha / (math.sqrt(rank) if draw(st.booleans()) else rank)


@st.composite
def low_ranks(draw: st.DrawFn, place: Place | None = None, dtype: torch.dtype | None = None) -> LowRank:
    """A delta of any rank (also above what its shape can hold), scale and dtype."""
    rank = draw(st.integers(1, 9))
    return low_rank(
        place or draw(places()),
        rank,
        seed=draw(seeds),
        scale=draw(scales(rank)),
        dtype=dtype or draw(st.sampled_from(DTYPES)),
    )


@st.composite
def adapters(draw: st.DrawFn, dtype: torch.dtype | None = None, *, complete: bool = False) -> Adapter:
    """An adapter of BASE: some of its modules (all if `complete`), every one with its own rank and scale."""
    held = list(BASE) if complete else draw(st.lists(st.sampled_from(list(BASE)), min_size=1, unique=True))
    stored = dtype or draw(st.sampled_from(DTYPES))
    modules = {name: draw(low_ranks(BASE[name], stored)) for name in held}
    return Adapter(modules, draw(st.sampled_from(["tiny", None])), {}, {"name": f"a{draw(seeds)}"})

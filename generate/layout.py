"""Layout: adapters of one structure as flat vectors, and back.

A vector holds module after module, of each `down` and then `up`, row by row. Modules are in natural order: by layer
(2 before 10), in a layer queries, keys, values, outputs and then the rest. Importing this needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..hub.adapter import Adapter
from ..hub.bases import same_base
from ..hub.errors import BadOption, FormatError, GenerationError
from ..hub.lowrank import LowRank, Shape

Gauge = Literal["none", "canonical"]

_LEAVES = ("query|q|q_proj|to_q", "key|k|k_proj|to_k", "value|v|v_proj|to_v", "o|out|o_proj|out_proj|to_out", "up_proj",
           "gate_proj", "down_proj")  # fmt: skip
SMALLEST = 1e-8  # spread below which a coordinate counts as constant
_LIMIT = 2**31  # numbers in a vector: what a damaged file may ask for


@dataclass(frozen=True)
class Place:
    """Where a module stands in a vector: `down` (rank, inputs) from `start` on, then `up` (outputs, rank).

    `inputs` counts channels times the kernel's size for a convolution.
    """

    name: str
    rank: int
    inputs: int
    outputs: int
    start: int
    kernel: tuple[int, ...] = ()
    embedding: bool = False

    @property
    def down(self) -> slice:
        return slice(self.start, self.start + self.rank * self.inputs)

    @property
    def up(self) -> slice:
        return slice(self.down.stop, self.down.stop + self.outputs * self.rank)

    @property
    def shape(self) -> Shape:
        return Shape(self.rank, self.outputs, self.inputs, self.kernel, self.embedding)

    def factors(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Views of (..., size) vectors: down (..., rank, inputs) and up (..., outputs, rank)."""
        leading = vectors.shape[:-1]
        return (
            vectors[..., self.down].reshape(*leading, self.rank, self.inputs),
            vectors[..., self.up].reshape(*leading, self.outputs, self.rank),
        )


@dataclass(frozen=True)
class Layout:
    """How adapters of one structure become vectors.

    gauge: "none" takes the factors as they are, for experts that began at one point; "canonical" the balanced factors
    of the delta's SVD with fixed signs, which do not depend on how a delta is split into factors, for experts trained
    independently. Scales are shared evenly by the two factors.
    """

    base: str | None
    places: tuple[Place, ...]
    gauge: Gauge = "none"

    @classmethod
    def of(cls, adapters: Sequence[Adapter], *, gauge: Gauge = "none") -> Layout:
        """The structure that all the adapters have. Raises GenerationError that names the module where they differ."""
        if not adapters or not adapters[0].shapes:
            raise GenerationError("there is no adapter with modules; expected at least one to know the structure")
        base = next((one.base for one in adapters if one.base is not None), None)
        layout = cls(base, _places(adapters[0].shapes), _gauge(gauge))
        for adapter in adapters:
            layout.check(adapter)
        return layout

    @property
    def size(self) -> int:
        """Numbers in a vector."""
        return self.places[-1].start + self.places[-1].shape.parameters

    @cached_property
    def tensors(self) -> tuple[slice, ...]:
        """Where each factor stands, in order: two for every module."""
        return tuple(side for place in self.places for side in (place.down, place.up))

    @cached_property
    def lengths(self) -> Tensor:
        """Numbers of each factor: int64, two for every module."""
        return torch.tensor([side.stop - side.start for side in self.tensors])

    def check(self, adapter: Adapter) -> None:
        """Raise GenerationError, naming the module, for an adapter of another structure or base, or with extras."""
        if adapter.extras:
            raise GenerationError(
                f"{adapter.name}: also holds {next(iter(adapter.extras))}, which is not low-rank and has no place in a "
                "vector; leave this adapter out"
            )
        if not same_base(adapter.base, self.base):
            raise GenerationError(f"{adapter.name}: is for {adapter.base}, expected an adapter of {self.base}")
        _check(adapter.name, adapter.shapes, self._shapes)

    def match(self, other: Layout, name: str = "the library") -> None:
        """Raise GenerationError, naming the module, unless the other layout's vectors mean the same."""
        if not same_base(other.base, self.base):
            raise GenerationError(f"{name}: is for {other.base}, expected one of {self.base}")
        _check(name, other._shapes, self._shapes)
        if other.gauge != self.gauge:
            raise GenerationError(f"{name}: its vectors are in the gauge {other.gauge!r}, expected {self.gauge!r}")

    def flatten(self, adapter: Adapter) -> Tensor:
        """The adapter as a vector: float32 (size,). Raises GenerationError as `check` does, and for NaN or Inf."""
        self.check(adapter)
        vector = torch.empty(self.size)
        for place in self.places:
            module = adapter.modules[place.name]
            if not all(bool(torch.isfinite(side).all()) for side in (module.down, module.up)):
                raise GenerationError(f"{adapter.name}: {place.name} holds NaN or Inf; leave this adapter out")
            down, up = _balanced(module, place) if self.gauge == "canonical" else _as_it_is(module)
            vector[place.down], vector[place.up] = down.flatten(), up.flatten()
        return vector

    def adapter(self, vector: Tensor, *, name: str = "generated") -> Adapter:
        """The adapter of a vector (size,), in float32 and with scale 1."""
        if vector.shape != (self.size,):
            raise BadOption(f"the vector has shape {tuple(vector.shape)}; expected ({self.size},)")
        values = vector.detach().float()
        modules = {}
        for place in self.places:
            down, up = (side.clone() for side in place.factors(values))
            modules[place.name] = LowRank(down, up, 1.0, place.kernel, place.embedding)
        return Adapter(modules, self.base, meta={"name": name})

    def widened(self, rank: int) -> Layout:
        """The same modules with this rank, or with the smaller of their sides where that is less."""
        return self.reranked(lambda _: rank)

    def reranked(self, rank: Callable[[Place], int]) -> Layout:
        """The same modules with other ranks, or with the smaller of their sides where that is less; gauge none."""
        shapes = {
            place.name: replace(place.shape, rank=min(rank(place), place.inputs, place.outputs))
            for place in self.places
        }
        return Layout(self.base, _placed(shapes))

    def inner(self, some: Tensor, others: Tensor, theirs: Layout | None = None) -> Tensor:
        """Inner products of deltas: float64 (n, m) of vectors (n, size) and (m, size).

        theirs: the layout of the others, of the same modules and any ranks, None for this one.
        """
        total = torch.zeros(len(some), len(others), dtype=torch.float64)
        for place, other in zip(self.places, (theirs or self).places, strict=True):
            (down, up), (far_down, far_up) = place.factors(some.double()), other.factors(others.double())
            left = torch.einsum("nor,mos->nmrs", up, far_up)
            total += (left * torch.einsum("nri,msi->nmrs", down, far_down)).sum(dim=(2, 3))
        return total

    def cosines(self, vector: Tensor, others: Tensor, theirs: Layout | None = None) -> Tensor:
        """Cosines of one vector's deltas (size,) with others' (m, size): float64 (m,), 0 where a side is zero.

        theirs: as in `inner`.
        """
        product = (self.squares(vector[None]) * (theirs or self).squares(others)).sqrt()
        return torch.where(product > 0, self.inner(vector[None], others, theirs)[0] / product.clamp_min(1e-300), 0.0)

    def squares(self, vectors: Tensor) -> Tensor:
        """Squared Frobenius norms of deltas: float64 (n,) of vectors (n, size)."""
        total = torch.zeros(len(vectors), dtype=torch.float64)
        for place in self.places:
            down, up = place.factors(vectors.double())
            total += ((up.mT @ up) * (down @ down.mT)).sum(dim=(1, 2))
        return total.clamp_min(0)

    def error(self, vector: Tensor, wanted: Tensor) -> float:
        """||delta - wanted delta|| / ||wanted delta||, over all modules."""
        pair = torch.stack([vector, wanted])
        products = self.inner(pair, pair)
        square = products[0, 0] - 2 * products[0, 1] + products[1, 1]
        return float((square.clamp_min(0) / products[1, 1].clamp_min(1e-300)).sqrt())

    def as_json(self) -> dict[str, Any]:
        """Plain data; offsets follow from the shapes."""
        places = [[p.name, p.rank, p.inputs, p.outputs, list(p.kernel), p.embedding] for p in self.places]
        return {"base": self.base, "gauge": self.gauge, "places": places}

    @classmethod
    def from_json(cls, data: Any) -> Layout:
        """The inverse of `as_json`. Raises FormatError for data of another form."""
        places = data.get("places") if isinstance(data, Mapping) else None
        if not isinstance(places, list) or not places or not all(_is_place(entry) for entry in places):
            raise FormatError("there is no list of modules with ranks and sizes; expected a layout")
        if not isinstance(data.get("base"), str | None) or data.get("gauge") not in ("none", "canonical"):
            raise FormatError(f"base {data.get('base')!r} or gauge {data.get('gauge')!r} makes no sense in a layout")
        if len({entry[0] for entry in places}) < len(places):
            raise FormatError("a module is named twice; expected a layout")
        shapes = {
            name: Shape(rank, outputs, inputs, tuple(kernel), embedding)
            for name, rank, inputs, outputs, kernel, embedding in places
        }
        layout = cls(data["base"], _placed(shapes), data["gauge"])
        if layout.size > _LIMIT:
            raise FormatError(f"a vector of {layout.size} numbers is beyond all adapters; the layout is damaged")
        return layout

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        return {place.name: place.shape for place in self.places}


@dataclass(frozen=True)
class Statistics:
    """Mean and spread of every coordinate over a library's checkpoints: (size,) each."""

    mean: Tensor
    spread: Tensor

    @classmethod
    def of(cls, vectors: Tensor) -> Statistics:
        """Per coordinate, of vectors (n, size)."""
        wide = vectors.double()
        mean, spread = wide.mean(dim=0), wide.std(dim=0, correction=0)
        return cls(mean.float(), spread.clamp_min(SMALLEST).float())

    @classmethod
    def by_tensor(cls, vectors: Tensor, layout: Layout) -> Statistics:
        """One mean and one spread for each factor, as ICM-LoRA has them: constant over the factor's coordinates."""
        wide = vectors.double()
        mean, spread = torch.empty(layout.size), torch.empty(layout.size)
        for side in layout.tensors:
            mean[side], spread[side] = wide[:, side].mean(), wide[:, side].std(correction=0).clamp_min(SMALLEST)
        return cls(mean, spread)

    def standardise(self, vectors: Tensor) -> Tensor:
        """(vectors - mean) / spread: (..., size)."""
        return (vectors - self.mean) / self.spread

    def restore(self, values: Tensor) -> Tensor:
        """The inverse: (..., size)."""
        return values * self.spread + self.mean


class Projection(NamedTuple):
    """Values (..., size) as fewer coordinates (..., count): axes (count, size) have orthonormal rows."""

    axes: Tensor

    def reduce(self, values: Tensor) -> Tensor:
        return values @ self.axes.T

    def restore(self, coordinates: Tensor) -> Tensor:
        return coordinates @ self.axes


def principal(values: Tensor, count: int) -> Projection:
    """The `count` directions in which rows (n, size) vary most about zero, or fewer where they span fewer.

    With all of them nothing of the rows is lost. Signs are fixed: each axis' largest entry is positive.
    """
    wide = values.double()
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    kept = [int(at) for at in squares.argsort(descending=True)[:count] if squares[at] > 1e-10 * squares.max()]
    axes = torch.linalg.qr(wide.T @ vectors[:, kept]).Q.T
    peaks = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    return Projection((axes * torch.where(peaks < 0, -1.0, 1.0)).float().contiguous())


# --- order and structure --------------------------------------------------------------------------------------------


def _order(name: str) -> tuple[Any, ...]:
    found = re.match(r"(.*(?<![^.])[0-9]+)\.(.+)", name, re.DOTALL)
    layer, rest = found.groups() if found else ("", name)
    words = [word for word in re.split(r"\W", rest) if word and not re.fullmatch("[0-9]+", word)]
    leaf = words[-1] if words else rest
    kind = next((at for at, known in enumerate(_LEAVES) if re.fullmatch(known, leaf)), len(_LEAVES))
    return _natural(layer), kind, _natural(rest)


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"([0-9]+)", name)
    return [(at % 2 == 0, int(part) if at % 2 else 0, part) for at, part in enumerate(parts)]


def _places(shapes: Mapping[str, Shape]) -> tuple[Place, ...]:
    return _placed({name: shapes[name] for name in sorted(shapes, key=_order)})


def _placed(shapes: Mapping[str, Shape]) -> tuple[Place, ...]:
    places, start = [], 0
    for name, shape in shapes.items():
        places.append(Place(name, shape.rank, shape.inputs, shape.outputs, start, shape.kernel, shape.embedding))
        start += shape.parameters
    return tuple(places)


def _check(name: str, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    if apart := sorted(found.keys() ^ expected.keys(), key=_order):
        module, what = apart[0], "has no" if apart[0] in expected else "has a"
        raise GenerationError(
            f"{name}: {what} module {module}, unlike the others; expected the {len(expected)} modules of one structure"
        )
    for module, shape in expected.items():
        if found[module] != shape:
            raise GenerationError(
                f"{name}: {module} is {found[module]} of rank {found[module].rank}, expected {shape} of rank "
                f"{shape.rank}; adapters of another structure cannot be mixed in"
            )


def _gauge(gauge: str) -> Gauge:
    if gauge not in ("none", "canonical"):
        raise BadOption(f"gauge is {gauge!r}; expected none or canonical")
    return gauge  # type: ignore[return-value]


def _is_place(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 6
        and isinstance(entry[0], str)
        and all(type(number) is int and 0 < number < _LIMIT for number in entry[1:4])
        and isinstance(entry[4], list)
        and all(type(number) is int and 0 < number < _LIMIT for number in entry[4])
        and isinstance(entry[5], bool)
    )


# --- factors --------------------------------------------------------------------------------------------------------


def _as_it_is(module: LowRank) -> tuple[Tensor, Tensor]:
    folded = module.folded()
    return folded.down.detach().float(), folded.up.detach().float()


def _balanced(module: LowRank, place: Place) -> tuple[Tensor, Tensor]:
    """up = U sqrt(S), down = sqrt(S) V^T in float64, padded with zeros to the rank of the layout."""
    whole = module.to(torch.float64).truncate(place.rank)
    down = torch.zeros(place.rank, place.inputs, dtype=torch.float64)
    up = torch.zeros(place.outputs, place.rank, dtype=torch.float64)
    down[: whole.rank], up[:, : whole.rank] = whole.down, whole.up
    return down, up

"""What a weight encoder knows of an architecture: its modules by name, kind and shape. Nothing here needs torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from ..hub.bases import same_base
from ..hub.errors import FormatError, IncompatibleAdapters

if TYPE_CHECKING:
    from ..hub.adapter import Adapter
    from ..hub.lowrank import Shape


@dataclass(frozen=True)
class Place:
    """A module of the base. `kind` is its path without layer numbers: "transformer.blocks.*.attn1.to_q".

    `inputs` counts channels times the kernel's size for a convolution.
    """

    name: str
    kind: str
    inputs: int
    outputs: int


class Group(NamedTuple):
    """The places of one kind and one shape; `rows` are their indices in the manifest."""

    kind: str
    inputs: int
    outputs: int
    rows: tuple[int, ...]


class Fit(NamedTuple):
    """How many of an adapter's modules the manifest knows, how many it does not, how many of its own are missing."""

    known: int
    unknown: int
    missing: int


@dataclass(frozen=True)
class Manifest:
    """The modules that an encoder was made for, by name, and their base."""

    base: str | None
    places: tuple[Place, ...]

    @classmethod
    def of(cls, adapters: Iterable[Adapter], base: str | None = None) -> Manifest:
        """The union of the adapters' modules. `base`: None for the first one that an adapter names.

        Raises IncompatibleAdapters where two adapters name different bases or have one module in two shapes, and where
        there is no module at all.
        """
        found: dict[str, Place] = {}
        for adapter in adapters:
            base = base or adapter.base
            _check_base(adapter, base)
            for name, shape in adapter.shapes.items():
                known = found.setdefault(name, _place(name, shape))
                _check_shape(adapter, known, shape)
        if not found:
            raise IncompatibleAdapters("there is no adapter with modules; an encoder needs at least one to know a base")
        return cls(base, tuple(found[name] for name in sorted(found)))

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Every kind once, sorted."""
        return tuple(sorted({place.kind for place in self.places}))

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The places by kind and shape: what one weight matrix can serve."""
        rows: dict[tuple[str, int, int], list[int]] = {}
        for index, place in enumerate(self.places):
            rows.setdefault((place.kind, place.inputs, place.outputs), []).append(index)
        return tuple(Group(*key, tuple(rows[key])) for key in sorted(rows))

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The places' indices by shape alone: what can be computed in one batch."""
        rows: dict[tuple[int, int], list[int]] = {}
        for index, place in enumerate(self.places):
            rows.setdefault((place.outputs, place.inputs), []).append(index)
        return tuple(tuple(rows[key]) for key in sorted(rows))

    def check(self, adapter: Adapter) -> Fit:
        """How the adapter fits; modules that the manifest lacks are counted and otherwise ignored.

        Raises IncompatibleAdapters for another base, a known module of another shape, or no known module at all.
        """
        _check_base(adapter, self.base)
        shapes = adapter.shapes
        known = [place for place in self.places if place.name in shapes]
        for place in known:
            _check_shape(adapter, place, shapes[place.name])
        if not known:
            example = next(iter(shapes), "none at all")
            raise IncompatibleAdapters(
                f"{adapter.name}: none of its {len(shapes)} modules ({example}, ...) is one of the {len(self.places)} "
                f"that the encoder knows ({self.places[0].name}, ...); use an encoder for its own base"
            )
        return Fit(len(known), len(shapes) - len(known), len(self.places) - len(known))

    def as_json(self) -> dict[str, Any]:
        """Plain data: {"base": ..., "places": [[name, inputs, outputs], ...]}."""
        return {"base": self.base, "places": [[place.name, place.inputs, place.outputs] for place in self.places]}

    @classmethod
    def from_json(cls, data: Any) -> Manifest:
        """The inverse of `as_json`. Raises FormatError for data of another form."""
        if not isinstance(data, Mapping) or not isinstance(data.get("places"), list):
            raise FormatError("there is no list of modules; expected the manifest of a weight encoder")
        base, places = data.get("base"), data["places"]
        if not (base is None or isinstance(base, str)) or not places or not all(_is_place(entry) for entry in places):
            raise FormatError("a module is no (name, inputs, outputs); expected the manifest of a weight encoder")
        if len({entry[0] for entry in places}) < len(places):
            raise FormatError("a module is named twice; expected the manifest of a weight encoder")
        return cls(base, tuple(Place(name, kind_of(name), inputs, outputs) for name, inputs, outputs in places))


def kind_of(name: str) -> str:
    """A module's path with every layer number replaced by a star."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _place(name: str, shape: Shape) -> Place:
    return Place(name, kind_of(name), shape.inputs, shape.outputs)


def _is_place(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 3
        and isinstance(entry[0], str)
        and all(type(size) is int and size > 0 for size in entry[1:])
    )


def _check_base(adapter: Adapter, base: str | None) -> None:
    if not same_base(adapter.base, base):
        raise IncompatibleAdapters(
            f"{adapter.name}: is for {adapter.base}, the encoder for {base}; fit or choose an encoder for its base"
        )


def _check_shape(adapter: Adapter, place: Place, shape: Shape) -> None:
    if (shape.inputs, shape.outputs) != (place.inputs, place.outputs):
        raise IncompatibleAdapters(
            f"{adapter.name}: {place.name} is {shape.outputs}x{shape.inputs}, the encoder's base has "
            f"{place.outputs}x{place.inputs} there; it belongs to another architecture"
        )

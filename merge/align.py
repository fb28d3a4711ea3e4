"""What any merge needs before its method runs: one base, matching shapes, the union of modules, a rule for extras."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..hub.adapter import Adapter, LazyModules
from ..hub.bases import same_base
from ..hub.errors import BadOption, IncompatibleAdapters
from ..hub.lowrank import LowRank, Shape

if TYPE_CHECKING:
    from torch import Tensor

EXTRAS = ("refuse", "drop", "first", "average")

Combine = Callable[[list[LowRank], list[float]], LowRank]


def check(adapters: Sequence[Adapter], weights: Sequence[float], *, base: str | None = None) -> None:
    """Raise IncompatibleAdapters unless all adapters change one base in matching shapes.

    `base` is the user's word that they do; shapes are compared all the same. Raises BadOption for weights that are
    not one finite number for each adapter.
    """
    if not adapters:
        raise BadOption("no adapters were given; a merge needs at least one")
    if len(weights) != len(adapters):
        raise BadOption(f"{len(weights)} weights for {len(adapters)} adapters; give one for each, or none")
    for adapter, weight in zip(adapters, weights, strict=True):
        if not abs(weight) < float("inf"):
            raise BadOption(f"the weight of {adapter.name} is {weight}; expected a finite number")
        if not adapter.shapes:
            raise IncompatibleAdapters(f"{adapter.name}: has no low-rank modules; leave it out of the merge")
    if base is None:
        _check_bases(adapters)
    _check_shapes(adapters)


def _check_bases(adapters: Sequence[Adapter]) -> None:
    known = [adapter for adapter in adapters if adapter.base is not None]
    for other in known[1:]:
        if not same_base(known[0].base, other.base):
            raise IncompatibleAdapters(
                f"{known[0].name} is for base {known[0].base}, {other.name} for {other.base}: "
                "adapters of different bases cannot be added; if a name is wrong, say --base"
            )


def _check_shapes(adapters: Sequence[Adapter]) -> None:
    seen: dict[str, tuple[Adapter, Shape]] = {}
    for adapter in adapters:
        for name, shape in adapter.shapes.items():
            first, known = seen.setdefault(name, (adapter, shape))
            if not known.fits(shape):
                raise IncompatibleAdapters(
                    f"{name} is {known} in {first.name} and {shape} in {adapter.name}: they are for different bases"
                )


def by_module(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    combine: Combine,
    rank: Callable[[list[Shape]], int] | None = None,
) -> Mapping[str, LowRank]:
    """Combine module by module over the union of names; an adapter without a module takes no part in it.

    Nor does one of weight 0, so that it changes nothing, whatever the method counts or averages over. Modules are made
    one at a time, when they are read. `rank` foretells the result's rank from the inputs' shapes; without it each
    module is made once before, for its rank alone: twice the work, but never all modules in memory.
    """
    holders = _holders(adapters, weights)

    def load(name: str) -> LowRank:
        return combine([adapters[i].modules[name] for i in holders[name]], [weights[i] for i in holders[name]])

    if rank is None:
        return LazyModules({name: load(name).shape for name in sorted(holders)}, load)
    shapes = {}
    for name in sorted(holders):
        inputs = [adapters[i].shapes[name] for i in holders[name]]
        kernel = max((shape.kernel for shape in inputs), key=len)
        shapes[name] = Shape(rank(inputs), inputs[0].outputs, inputs[0].inputs, kernel, inputs[0].embedding)
    return LazyModules(shapes, load)


def reconciled(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    combine: Callable[[list[LowRank]], LowRank],
    rank: Callable[[list[Shape]], int],
    *,
    limit: int | None = None,
    energy: float | None = None,
) -> Mapping[str, LowRank]:
    """As `by_module`, for methods that settle conflicts between deltas: `combine` gets them with their weights on.

    A module that one adapter alone holds has no conflict to settle: it is passed on, at most truncated to `limit` and
    the share `energy`. With `energy` ranks cannot be foretold.
    """

    def settle(parts: list[LowRank], shares: list[float]) -> LowRank:
        deltas = [part.scaled(share) for part, share in zip(parts, shares, strict=True)]
        if len(deltas) > 1:
            return replace(combine(deltas), kernel=max((part.kernel for part in parts), key=len))
        fits = energy is None and (limit is None or deltas[0].rank <= limit)
        return deltas[0] if fits else deltas[0].truncate(limit, energy=energy)

    def foretold(shapes: list[Shape]) -> int:
        if len(shapes) > 1:
            return rank(shapes)
        only = shapes[0]
        return only.rank if limit is None or only.rank <= limit else min(limit, only.outputs, only.inputs)

    return by_module(adapters, weights, settle, foretold if energy is None else None)


def _holders(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, list[int]]:
    """Module name -> which adapters take part in it; where all have weight 0, the first does."""
    holders: dict[str, list[int]] = {}
    for index, adapter in enumerate(adapters):
        for name in adapter.shapes:
            holders.setdefault(name, []).append(index)
    return {name: [i for i in found if weights[i]] or found[:1] for name, found in holders.items()}


def united_extras(adapters: Sequence[Adapter], weights: Sequence[float], rule: str) -> dict[str, Tensor]:
    """What becomes of biases, saved modules and embeddings: the rule is one of EXTRAS.

    `refuse` raises IncompatibleAdapters where there are any, `drop` leaves them out, `first` keeps the first adapter's
    that has each, `average` averages by the weights' absolute values and raises where shapes differ.
    """
    if rule not in EXTRAS:
        raise BadOption(f"extras is {rule!r}; expected one of {', '.join(EXTRAS)}")
    holders: dict[str, list[tuple[Adapter, float]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name in adapter.extras:
            holders.setdefault(name, []).append((adapter, weight))
    if rule == "drop" or not holders:
        return {}
    if rule == "refuse":
        name, [(adapter, _), *_] = next(iter(holders.items()))
        more = f" and {len(holders) - 1} tensors more" if len(holders) > 1 else ""
        raise IncompatibleAdapters(
            f"{adapter.name} holds {name}{more}, no low-rank delta; "
            "say what to do with such tensors: --extras drop, first or average"
        )
    if rule == "first":
        return {name: group[0][0].extras[name] for name, group in holders.items()}
    return {name: _average(name, group) for name, group in holders.items()}


def _average(name: str, group: list[tuple[Adapter, float]]) -> Tensor:
    shapes = {tuple(adapter.extras[name].shape) for adapter, _ in group}
    if len(shapes) > 1:
        raise IncompatibleAdapters(
            f"{name} has shapes {' and '.join(map(str, sorted(shapes)))}: they cannot be averaged; "
            "use --extras first or drop"
        )
    total = sum(abs(weight) for _, weight in group) or 1.0
    first = group[0][0].extras[name]
    mean = sum((abs(weight) / total) * adapter.extras[name].double() for adapter, weight in group)
    return mean.to(first.dtype)  # type: ignore[union-attr]


def united_meta(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Configuration and header entries on which all adapters that have any agree."""
    return {key: _agreed([adapter.meta.get(key) or {} for adapter in adapters]) for key in ("config", "metadata")}


def _agreed(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    filled = [table for table in tables if table]
    if not filled:
        return {}
    return {key: value for key, value in filled[0].items() if all(table.get(key) == value for table in filled[1:])}

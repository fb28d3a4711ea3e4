"""Merging: one call for every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..hub import plugins
from ..hub.adapter import Adapter, LazyModules
from ..hub.errors import BadOption
from ..hub.lowrank import LowRank, Shape, check_limits
from ..hub.writing import ready
from .align import by_module, check, united_extras, united_meta
from .report import Report

if TYPE_CHECKING:
    import torch

METHODS = f"{__package__}.methods"
LIMITS = ("rank", "energy")  # what every method's result can be cut to


@dataclass(frozen=True)
class Merged:
    """A merge that is carried out as its modules are read; `report` is complete once all were.

    options: all that the method ran with, defaults and seeds included.
    """

    adapter: Adapter
    report: Report
    options: Mapping[str, Any]


def methods() -> list[str]:
    """The merging methods there are."""
    return plugins.names(METHODS)


def options(method: str) -> dict[str, plugins.Option]:
    """A method's options with types and defaults. Raises UnknownMethod."""
    return plugins.options(plugins.load(METHODS, method))


def merge(
    adapters: Sequence[Adapter],
    method: str = "exact",
    weights: Sequence[float] | None = None,
    *,
    dtype: torch.dtype | None = None,
    extras: str = "refuse",
    base: str | None = None,
    given: Mapping[str, Any] | None = None,
    where: Mapping[str, Sequence[float]] | None = None,
) -> Merged:
    """Merge adapters of one base into one, module by module over the union of their modules.

    weights: one for each adapter, of any sign; default 1 each. dtype: of the result's factors, the inputs' widest if
    None. extras: what to do with tensors that are no deltas, see `align.united_extras`. given: the method's options;
    `rank` and `energy` are known to every method: one that does not have them itself gets its result truncated.
    where: glob of module names -> other weights for those modules; the last glob that fits a name counts.
    Raises IncompatibleAdapters, UnknownMethod, BadOption. Nothing large is computed before a module is read.
    """
    shares = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    check(adapters, shares, base=base)
    function = plugins.load(METHODS, method)
    limits, chosen = _split(function, dict(given or {}))
    kept = united_extras(adapters, shares, extras)
    named = ", ".join(adapter.name for adapter in adapters)
    adapters = [_remembering(adapter) for adapter in adapters]
    if where:
        adapters, shares = _weighted(adapters, shares, where), [1.0] * len(adapters)
    combined = _truncated(function(adapters, shares, **chosen), limits)
    known = base or next((adapter.base for adapter in adapters if adapter.base), None)
    meta = {**united_meta(adapters), "name": f"{method} of {named}"}
    result = ready(replace(combined, base=known, extras=kept, meta=meta), dtype or _widest(adapters))
    report = Report()
    defaults = {name: option.default for name, option in plugins.options(function).items()}
    return Merged(_measured(result, adapters, shares, report), report, {**defaults, **chosen, **limits})


def _split(function: Any, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The limits that the method leaves to us, and its own options, both checked."""
    known = plugins.options(function)
    own = {name: value for name, value in given.items() if name in known or name not in LIMITS}
    limits = plugins.check_options(_limits, {name: value for name, value in given.items() if name not in own})
    check_limits(limits.get("rank"), limits.get("energy"))
    return limits, plugins.check_options(function, own)


def _limits(*, rank: int | None = None, energy: float | None = None) -> None:
    """The options that every method has."""


def _truncated(adapter: Adapter, limits: Mapping[str, Any]) -> Adapter:
    rank, energy = limits.get("rank"), limits.get("energy")
    if rank is None and energy is None:
        return adapter

    def foretold(shapes: list[Shape]) -> int:
        return min(rank or shapes[0].rank, shapes[0].rank, shapes[0].outputs, shapes[0].inputs)

    def cut(parts: list[LowRank], _: list[float]) -> LowRank:
        return parts[0].truncate(rank, energy=energy)

    return replace(adapter, modules=by_module([adapter], [1.0], cut, None if energy is not None else foretold))


def _weighted(
    adapters: Sequence[Adapter], shares: Sequence[float], where: Mapping[str, Sequence[float]]
) -> list[Adapter]:
    """The adapters with their weights on, those of `where` for the modules that it names."""
    names = {name for adapter in adapters for name in adapter.shapes}
    for glob, weights in where.items():
        if len(weights) != len(adapters):
            raise BadOption(f"{len(weights)} weights for {glob!r} and {len(adapters)} adapters; give one for each")
        if not any(fnmatchcase(name, glob) for name in names):
            raise BadOption(f"no module fits {glob!r}; modules have names such as {min(names)}")
    tables = [{name: (_last(where, name) or shares)[i] for name in one.shapes} for i, one in enumerate(adapters)]
    heard = {name for table in tables for name, weight in table.items() if weight}
    # a module at weight 0 is one that the adapter does not have, but no module is lost by that
    kept = [{name: weight for name, weight in table.items() if weight or name not in heard} for table in tables]
    return [_scaled(adapter, table) for adapter, table in zip(adapters, kept, strict=True)]


def _last(where: Mapping[str, Sequence[float]], name: str) -> Sequence[float] | None:
    return next((weights for glob, weights in reversed(list(where.items())) if fnmatchcase(name, glob)), None)


def _scaled(adapter: Adapter, weights: Mapping[str, float]) -> Adapter:
    """Only the modules that have weights, each times its own."""
    source = adapter.modules
    shapes = {name: adapter.shapes[name] for name in weights}
    return replace(adapter, modules=LazyModules(shapes, lambda name: source[name].scaled(weights[name])))


def _remembering(adapter: Adapter) -> Adapter:
    """The adapter, with the module that was read last at hand: method and report read each one after the other."""
    return replace(adapter, modules=LazyModules(adapter.shapes, lru_cache(maxsize=1)(adapter.modules.__getitem__)))


def _measured(result: Adapter, adapters: Sequence[Adapter], weights: Sequence[float], report: Report) -> Adapter:
    """The result, with each module compared with the exact sum at the moment when it is read."""

    def load(name: str) -> LowRank:
        module = result.modules[name]
        holders = [i for i, adapter in enumerate(adapters) if name in adapter.modules]
        parts = [adapters[i].modules[name] for i in holders]
        report.record(name, parts, [weights[i] for i in holders], module)
        return module

    return replace(result, modules=LazyModules(result.shapes, load))


def _widest(adapters: Sequence[Adapter]) -> torch.dtype:
    import torch

    dtype: torch.dtype | None = None
    for adapter in adapters:
        stored = adapter.modules[next(iter(adapter.shapes))].dtype
        dtype = stored if dtype is None else torch.promote_types(dtype, stored)
    assert dtype is not None
    return dtype

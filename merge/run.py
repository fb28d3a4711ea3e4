"""Merging: one call for every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..hub import plugins
from ..hub.adapter import Adapter, LazyModules
from ..hub.lowrank import LowRank
from ..hub.writing import ready
from .align import check, united_extras, united_meta
from .report import Report

if TYPE_CHECKING:
    import torch

METHODS = f"{__package__}.methods"


@dataclass(frozen=True)
class Merged:
    """A merge that is carried out as its modules are read; `report` is complete once all were."""

    adapter: Adapter
    report: Report


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
) -> Merged:
    """Merge adapters of one base into one, module by module over the union of their modules.

    weights: one for each adapter, of any sign; default 1 each. dtype: of the result's factors, the inputs' widest if
    None. extras: what to do with tensors that are no deltas, see `align.united_extras`. given: the method's options.
    Raises IncompatibleAdapters, UnknownMethod, BadOption. Nothing large is computed before a module is read.
    """
    shares = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    check(adapters, shares, base=base)
    function = plugins.load(METHODS, method)
    chosen = plugins.check_options(function, dict(given or {}))
    kept = united_extras(adapters, shares, extras)
    adapters = [_remembering(adapter) for adapter in adapters]
    combined = function(adapters, shares, **chosen)
    known = base or next((adapter.base for adapter in adapters if adapter.base), None)
    meta = {**united_meta(adapters), "name": f"{method} of {', '.join(adapter.name for adapter in adapters)}"}
    result = ready(replace(combined, base=known, extras=kept, meta=meta), dtype or _widest(adapters))
    report = Report()
    return Merged(_measured(result, adapters, shares, report), report)


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

"""How open gates are while a picture is painted: a mean for every adapter, layer and timestep.

Importing this needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ..hub.adapter import Adapter
from .gated import fused
from .gates import Gates

GLOBAL = "global"


@dataclass(frozen=True, eq=False)
class GateMap:
    """Mean openings g (0 shut, 1 open) over pictures, tokens and channels.

    adapters: their names, then "global" where there is a global adapter. layers: paths, in the order in which they ran.
    times: timesteps, in the order in which they were painted. openings: (adapters, layers, times); NaN where an adapter
    does not change a layer, and where a layer did not run at a timestep.
    """

    adapters: tuple[str, ...]
    layers: tuple[str, ...]
    times: tuple[float, ...]
    openings: NDArray[np.float64]


class Collector:
    """To be given to `fused` as `watch`, for the same adapters and component; `map` is what was seen so far.

    A model without timesteps has them all at 0.
    """

    def __init__(self, adapters: Sequence[Adapter], gates: Gates, *, component: str = "") -> None:
        self._adapters, self._prefix = list(adapters), f"{component}." if component else ""
        self._names = [one.name for one in adapters] + ([GLOBAL] if gates.recipe.global_rank else [])
        self._rows: dict[str, list[int]] = {}  # of each layer, which adapters change it; in the order of running
        self._seen: dict[tuple[str, float], tuple[NDArray[np.float64], int]] = {}

    def __call__(self, path: str, openings: Tensor, time: float | None) -> None:
        """Count one run of one layer."""
        if path not in self._rows:
            rows = [i for i, one in enumerate(self._adapters) if f"{self._prefix}{path}" in one.shapes]
            self._rows[path] = rows + list(range(len(self._adapters), len(self._names)))
        key = (path, 0.0 if time is None else time)
        total, count = self._seen.get(key, (np.zeros(len(self._rows[path])), 0))
        means = openings.detach().flatten(1).double().mean(dim=1).cpu().numpy()
        self._seen[key] = (total + means, count + 1)

    def map(self) -> GateMap:
        """The means over all runs."""
        layers = list(self._rows)
        times = list(dict.fromkeys(time for _, time in self._seen))
        openings = np.full((len(self._names), len(layers), len(times)), np.nan)
        for (path, time), (total, count) in self._seen.items():
            openings[self._rows[path], layers.index(path), times.index(time)] = total / count
        return GateMap(tuple(self._names), tuple(layers), tuple(times), openings)


def observe(
    model: nn.Module,
    adapters: Sequence[Adapter],
    gates: Gates,
    paint: Callable[[], Any],
    weights: Sequence[float] | None = None,
    *,
    component: str = "",
) -> GateMap:
    """The map of what the gates do while `paint` runs the model, once or many times. Raises what `fused` raises."""
    collector = Collector(adapters, gates, component=component)
    with fused(model, adapters, gates, weights, component=component, watch=collector):
        paint()
    return collector.map()

"""A gradient-free search of merging weights on a user's metric (LoraHub, Huang et al. 2023), by CMA-ES.

The score is optimistic: the weights were chosen on the very data that gave it. Measure the result on other data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..hub.adapter import Adapter
from ..hub.errors import BadOption
from .run import merge

DIGITS = 4  # weights are tried as they are reported, so that a report repeats a result

Metric = Callable[[Adapter], float]
Weights = tuple[float, ...]


@dataclass(frozen=True)
class Trial:
    """Weights that were tried, what the metric said of the merge, and why they were: "start", "sum", "average", "only
    NAME" or "search"."""

    weights: Weights
    score: float
    kind: str


@dataclass(frozen=True)
class Found:
    """The chosen weights with their score, the start's score, every trial in order, and a remark if there is one."""

    weights: Weights
    score: float
    start_score: float
    trace: tuple[Trial, ...]
    note: str | None = None

    def record(self, **facts: Any) -> dict[str, Any]:
        """Plain data for lineage and cards; `facts` (the metric's command, the seed) are put before the rest."""
        trace = [{**asdict(trial), "weights": list(trial.weights)} for trial in self.trace]
        return {**facts, **asdict(self), "weights": list(self.weights), "evaluations": len(trace), "trace": trace}


def search(
    adapters: Sequence[Adapter],
    method: str,
    metric: Metric,
    *,
    start: Sequence[float] | None = None,
    evaluations: int = 40,
    seed: int = 0,
    penalty: float = 0.05,
    bounds: tuple[float, float] = (-1.5, 1.5),
    step: float = 0.3,
    given: Mapping[str, Any] | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    **merging: Any,
) -> Found:
    """The weights with which the merge by `method` scores best on `metric`; higher is better.

    Tried first are the start (1/T each unless given), the average, the sum and, if the number of evaluations allows
    one round of the search besides, each adapter alone; the search goes on from the best of them. It maximises
    score - penalty * mean|weight| (LoraHub's regularisation), and what it returns scores no less than any of these.

    metric: called with a merged adapter, lazy as `merge` makes it. evaluations: the most calls of the metric; weights
    are rounded to 4 digits and none are tried twice. bounds: of every weight. step: the first standard deviation.
    given: the method's options; other keywords are those of `merge`. progress: sees (evaluations done, at most).
    The outcome is determined by the seed, and the global random state is left alone. Raises BadOption for options out
    of range and for a metric that fails or returns no finite number, naming the weights.
    """
    low, high = bounds
    begin = tuple(float(w) for w in (start if start is not None else [1.0 / max(len(adapters), 1)] * len(adapters)))
    _check(len(adapters), begin, evaluations, penalty, bounds, step)

    def combined(weights: Weights) -> Adapter:
        return merge(adapters, method, weights, given=given, **merging).adapter

    trials = _Trials(combined, metric, evaluations, penalty, progress)
    generation = 4 + int(3 * math.log(len(adapters)))
    everything = evaluations >= 3 + len(adapters) + generation
    for kind, weights in _baselines([adapter.name for adapter in adapters], begin, alone=everything):
        if low <= min(weights) and max(weights) <= high:
            trials.add(kind, weights)
    firm = max(trial.score for trial in trials.trace)
    if len(adapters) == 1:
        _search_scalar(trials, bounds)
    else:
        _search_weights(trials, bounds, step, seed, generation)
    return trials.found(firm)


def _check(
    count: int, begin: Weights, evaluations: int, penalty: float, bounds: tuple[float, float], step: float
) -> None:
    if not count:
        raise BadOption("no adapters were given; a search of weights needs at least one")
    if len(begin) != count:
        raise BadOption(f"{len(begin)} weights to start from and {count} adapters; give one for each")
    if evaluations < 1:
        raise BadOption(f"evaluations is {evaluations}; expected at least 1")
    if not (bounds[0] < bounds[1] and math.isfinite(bounds[1] - bounds[0])):
        raise BadOption(f"bounds are {bounds}; expected a lower and a higher finite number")
    outside = [weight for weight in begin if not bounds[0] <= weight <= bounds[1]]
    if outside:
        raise BadOption(f"weight {outside[0]} to start from lies outside the bounds {bounds[0]} to {bounds[1]}")
    if not 0 <= penalty < math.inf:
        raise BadOption(f"penalty is {penalty}; expected a finite number of at least 0")
    if not 0 < step < math.inf:
        raise BadOption(f"step is {step}; expected a finite number above 0")


def _baselines(names: Sequence[str], begin: Weights, *, alone: bool) -> list[tuple[str, list[float]]]:
    count = len(names)
    first = [("start", list(begin)), ("average", [1.0 / count] * count), ("sum", [1.0] * count)]
    corners = [(f"only {name}", [float(i == j) for j in range(count)]) for i, name in enumerate(names)]
    return [*first, *corners] if alone else first


@dataclass
class _Trials:
    """The metric, asked once for each weights and never more than `most` times."""

    combined: Callable[[Weights], Adapter]
    metric: Metric
    most: int
    penalty: float
    progress: Callable[[int, int | None], None] | None
    trace: list[Trial] = field(default_factory=list)
    known: dict[Weights, float] = field(default_factory=dict)

    @property
    def exhausted(self) -> bool:
        return len(self.trace) >= self.most

    @property
    def flat(self) -> bool:
        """Whether the metric has given one and the same number to all weights so far."""
        return len({trial.score for trial in self.trace}) == 1

    def add(self, kind: str, weights: Sequence[float] | np.ndarray) -> float | None:
        """The penalised score of the rounded weights, or None if they are new and no evaluation is left."""
        rounded = tuple(round(float(weight), DIGITS) + 0.0 for weight in weights)
        if rounded not in self.known:
            if self.exhausted:
                return None
            self.known[rounded] = self._measured(rounded)
            self.trace.append(Trial(rounded, self.known[rounded], kind))
            if self.progress:
                self.progress(len(self.trace), self.most)
        return self.value(rounded, self.known[rounded])

    def value(self, weights: Weights, score: float) -> float:
        return score - self.penalty * sum(map(abs, weights)) / len(weights)

    def best(self, firm: float = -math.inf) -> Trial:
        """The trial of the highest penalised score among those that score at least `firm`; the first of equals."""
        return max(
            (trial for trial in self.trace if trial.score >= firm),
            key=lambda trial: self.value(trial.weights, trial.score),
        )

    def found(self, firm: float) -> Found:
        first = self.trace[0]
        if self.flat:
            note = f"the metric gives {first.score:g} to all {len(self.trace)} weights tried: it cannot tell them apart"
            return Found(first.weights, first.score, first.score, tuple(self.trace), note)
        best = self.best(firm)
        return Found(best.weights, best.score, first.score, tuple(self.trace))

    def _measured(self, weights: Weights) -> float:
        shown = ", ".join(f"{weight:g}" for weight in weights)
        adapter = self.combined(weights)
        try:
            score = float(self.metric(adapter))
        except Exception as error:  # a metric is foreign code: whatever it raises is told with the weights
            raise BadOption(f"the metric failed at weights {shown}: {error or type(error).__name__}") from error
        if not math.isfinite(score):
            raise BadOption(f"the metric returned {score} at weights {shown}; expected a finite number")
        return score


def _search_weights(trials: _Trials, bounds: tuple[float, float], step: float, seed: int, generation: int) -> None:
    """CMA-ES (Hansen 2016) from the best trial so far, until it converges or no evaluation is left."""
    if trials.exhausted:
        return
    import cma

    chance = np.random.default_rng(seed)
    settings = {
        "bounds": list(bounds),
        "popsize": generation,
        "randn": lambda *size: chance.standard_normal(size),
        "seed": math.nan,  # with a generator of our own none is needed, and the global one is left alone
        "verbose": -10,
        "verb_log": 0,
    }
    strategy = cma.CMAEvolutionStrategy(list(trials.best().weights), step, settings)
    while not strategy.stop():
        asked = strategy.ask()
        values = [trials.add("search", weights) for weights in asked]
        told = [-value for value in values if value is not None]
        if len(told) < len(asked) or trials.flat:
            return
        strategy.tell(asked, told)


def _search_scalar(trials: _Trials, bounds: tuple[float, float]) -> None:
    """One weight: a grid over the bounds with a third of the evaluations, then Brent's method beside the best of it."""
    from scipy.optimize import minimize_scalar

    grid = np.linspace(*bounds, max((trials.most - len(trials.trace)) // 3, 0))
    for weight in grid:
        trials.add("search", [weight])
    left = trials.most - len(trials.trace)
    if left < 1 or not len(grid) or trials.flat:
        return
    width = grid[1] - grid[0] if len(grid) > 1 else bounds[1] - bounds[0]
    best = trials.best().weights[0]
    around = max(bounds[0], best - width), min(bounds[1], best + width)

    def loss(weight: float) -> float:
        value = trials.add("search", [weight])
        return math.inf if value is None else -value

    minimize_scalar(loss, bounds=around, method="bounded", options={"maxiter": left, "xatol": 10.0**-DIGITS})

"""Which singular triplets to keep when all modules share one budget: a knapsack, solved exactly.

Modules of one cost compete by value alone, so the best choice takes the largest triplets of each cost class, and all
that is to be found is how many of each: `sum_c value_c(n_c)` at most large with `sum_c cost_c n_c` within the budget.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Any

_BITS = 64  # of the critical density as an integer: how close the bound comes to the linear programme's
_PROBES = ((100, 4), (300, 8))  # states and triplets of a class that the first, incomplete searches look at
_PATIENCE = 1_000_000  # states of the last search, some five seconds
_MANY = 64  # options: a class of more is looked at last, when little of the budget is open


@dataclass(frozen=True)
class Allocation:
    """Ranks by module, and how much more squared norm another choice might keep: 0, for the best choice is found.

    `missed` is above 0 only where the search was given up: seen for thirty and more different costs without a common
    divisor whose values are in proportion to them, or all alike.
    """

    ranks: dict[str, int]
    missed: float = 0.0


def allocate(spectra: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int) -> Allocation:
    """How many singular triplets each module keeps, so that their squared values add up to the most there can be.

    spectra: module -> singular values. costs: module -> parameters of one of its triplets (outputs + inputs). budget:
    parameters in all. A triplet of value zero is never kept. Of equal triplets the first module's is taken first, and
    each module keeps its largest. Exact: the comparison is of integers, and nothing is cut off that could be better.
    """
    unit = math.gcd(*costs.values())
    pools: dict[int, list[tuple[float, str]]] = {}
    for name, values in spectra.items():
        if costs[name] <= budget:
            pools.setdefault(costs[name] // unit, []).extend((value * value, name) for value in values if value)
    for pool in pools.values():
        pool.sort(key=lambda one: -one[0])
    counts, missed = _counts({cost: [value for value, _ in pool] for cost, pool in pools.items()}, budget // unit)
    ranks = dict.fromkeys(spectra, 0)
    for cost, pool in pools.items():
        for _, name in pool[: counts[cost]]:
            ranks[name] += 1
    return Allocation(ranks, missed)


def _counts(pools: Mapping[int, Sequence[float]], budget: int) -> tuple[dict[int, int], float]:
    """How many of each cost class's values, largest first, make the best sum within the budget; and what is missed."""
    greedy, critical = _greedy(pools, budget)
    if critical is None:
        return greedy, 0.0
    whole, scale = _integers(pools, *critical)
    value, cost = critical
    density = whole[cost][pools[cost].index(value)] // cost  # any density bounds; this one is nearly the best
    surplus = {cost: [value - density * cost for value in values] for cost, values in whole.items()}
    above = {cost: sum(one > 0 for one in values) for cost, values in surplus.items()}
    room = budget - sum(cost * count for cost, count in above.items())
    # What a choice has less than the bound `density * budget + sum of what lies above the density`: the budget left
    # over at the critical density, and the surplus of every triplet that is chosen against the density.
    loss = density * (budget - sum(cost * count for cost, count in greedy.items()))
    for cost, values in surplus.items():
        low, high = sorted((above[cost], greedy[cost]))
        loss += sum(abs(one) for one in values[low:high])
    search = _Search(density, room, _classes(surplus, above, loss), loss)
    found, proved = search.best()
    missed = 0.0 if proved else search.loss / scale
    return greedy if found is None else {cost: above[cost] + found.get(cost, 0) for cost in pools}, missed


def _greedy(pools: Mapping[int, Sequence[float]], budget: int) -> tuple[dict[int, int], tuple[float, int] | None]:
    """The choice by density, and the value and cost of the first triplet that found no room: the critical one."""
    queue = sorted(
        ((value / cost, cost, value) for cost, values in pools.items() for value in values),
        key=lambda one: (-one[0], one[1]),
    )
    counts = dict.fromkeys(pools, 0)
    critical = None
    for _, cost, value in queue:
        if cost <= budget:
            counts[cost] += 1
            budget -= cost
        elif critical is None:
            critical = value, cost
    return counts, critical


def _integers(pools: Mapping[int, Sequence[float]], value: float, cost: int) -> tuple[dict[int, list[int]], int]:
    """All values times a power of two that makes them whole, and the critical density (value / cost) a long number.

    Floats are whole numbers times powers of two, so nothing is rounded.
    """
    ratios = {one: [number.as_integer_ratio() for number in values] for one, values in pools.items()}
    denominator = max(below for pairs in ratios.values() for _, below in pairs)
    above, below = value.as_integer_ratio()
    shift = max(0, _BITS - (above * (denominator // below) // cost).bit_length())
    scale = denominator << shift
    return {one: [a * (scale // b) for a, b in pairs] for one, pairs in ratios.items()}, scale


@dataclass(frozen=True)
class _Class:
    """Triplets of one cost that may deviate from the bound's choice, and what that loses.

    more, fewer: the losses of 1, 2, ... triplets more than the bound's choice takes, and of 1, 2, ... fewer.
    """

    cost: int
    more: Sequence[int]
    fewer: Sequence[int]

    @property
    def options(self) -> int:
        return len(self.more) + len(self.fewer)

    @property
    def first(self) -> int:
        """The least loss of any deviation."""
        return min([*self.more[:1], *self.fewer[:1]])

    def within(self, low: int, high: int, gap: int, limit: int | None) -> Iterator[tuple[int, int]]:
        """(triplets, loss) of the deviations by `low` to `high` parameters that lose less than `gap`.

        limit: of triplets in each direction.
        """
        if low <= 0 <= high:
            yield 0, 0
        end = bisect_left(self.more, gap, hi=min(len(self.more), limit or len(self.more)))
        for count in range(max(1, -(-low // self.cost)), min(end, high // self.cost) + 1):
            yield count, self.more[count - 1]
        end = bisect_left(self.fewer, gap, hi=min(len(self.fewer), limit or len(self.fewer)))
        for count in range(max(1, -(high // self.cost)), min(end, -low // self.cost) + 1):
            yield -count, self.fewer[count - 1]


def _classes(surplus: Mapping[int, Sequence[int]], above: Mapping[int, int], gap: int) -> list[_Class]:
    """The classes with what they can do at a loss below the gap; all other triplets are fixed."""
    classes = [
        _Class(cost, _running((-one for one in values[above[cost] :]), gap), _running(values[: above[cost]][::-1], gap))
        for cost, values in surplus.items()
    ]
    # the most promising first, for good solutions early; the longest last, where the budget leaves few choices open
    return sorted((one for one in classes if one.options), key=lambda one: (max(one.options, _MANY), one.first))


def _running(losses: Iterable[int], gap: int) -> list[int]:
    """The running totals that stay below the gap."""
    return list(takewhile(lambda total: total < gap, accumulate(losses)))


@dataclass(frozen=True)
class _Open:
    """What the classes yet to come can do in one direction: take triplets, or give them up."""

    reach: int = 0  # parameters in all
    first: int | None = None  # the least loss of a triplet; None: there is none
    ratio: tuple[int, int] = (0, 1)  # the least loss for each parameter, as a fraction

    def joined(self, cost: int, losses: Sequence[int]) -> _Open:
        """With one more class, whose 1, 2, ... triplets lose so much."""
        if not losses:
            return self
        reach, loss = self.reach + cost * len(losses), losses[0]
        if self.first is None:
            return _Open(reach, loss, (loss, cost))
        ratio = (loss, cost) if loss * self.ratio[1] < self.ratio[0] * cost else self.ratio
        return _Open(reach, min(loss, self.first), ratio)

    def least(self, amount: int) -> int | None:
        """A bound on the loss of moving by `amount` parameters or more; None where it is impossible."""
        if self.first is None:
            return None
        return max(self.first, self.ratio[0] * amount // self.ratio[1])


# (parameters above the bound's choice, loss, the deviations so far as a linked list)
_State = tuple[int, int, Any]


class _Search:
    """The Pareto list of parameters and loss, class by class.

    A state is let go when another needs no more and is worth no less, or when the least that it can still lose
    reaches the best loss known.
    """

    def __init__(self, density: int, room: int, classes: Sequence[_Class], loss: int) -> None:
        self.density = density  # the loss of a parameter that stays unused
        self.room = room  # parameters that the bound's choice leaves; negative where it takes too many
        self.classes = classes
        self.loss = loss
        self.trail: Any = None
        self.improved = False

    def best(self) -> tuple[dict[int, int] | None, bool]:
        """Deviations from the bound's choice, by cost, that lose less than `loss`, or None; and whether it is proved.

        The first searches mostly find the best; the last one has little left to do then.
        """
        self._offer((0, 0, None))
        proved = any(self._run(width, triplets) for width, triplets in _PROBES) or self._run(None, None)
        if not self.improved:
            return None, proved
        found, trail = {}, self.trail
        while trail is not None:
            trail, cost, more = trail
            found[cost] = more
        return found, proved

    def _run(self, width: int | None, options: int | None) -> bool:
        """Search the classes, keeping at most `width` states and trying so many options; whether none was left out."""
        rest = [(_Open(), _Open())]
        for one in reversed(self.classes):
            more, fewer = rest[-1]
            rest.append((more.joined(one.cost, one.more), fewer.joined(one.cost, one.fewer)))
        states: list[_State] = [(0, 0, None)]
        complete, steps = True, 0
        for one, (more, fewer) in zip(self.classes, reversed(rest[:-1]), strict=True):
            if options is not None:
                complete &= all(loss >= self.loss for side in (one.more, one.fewer) for loss in side[options:][:1])
            found = self._extended(states, one, options, more.reach, fewer.reach)
            steps += len(found)
            if steps > _PATIENCE:
                return False
            states = self._bounded(found, more, fewer)
            if width is not None and len(states) > width:
                complete = False
                states = sorted(states, key=lambda state: state[1] + self.density * abs(self.room - state[0]))[:width]
        return complete

    def _extended(
        self, states: Sequence[_State], one: _Class, limit: int | None, more: int, fewer: int
    ) -> list[_State]:
        """Every state with every deviation of a class from which the budget can still be met."""
        found: list[_State] = []
        for size, loss, trail in states:
            if len(found) > _PATIENCE:
                break  # to be given up
            low = self.room - (self.loss - loss) // self.density - more - size
            high = self.room + fewer - size
            for count, extra in one.within(low, high, self.loss - loss, limit):
                link = (trail, one.cost, count) if count else trail
                found.append((size + count * one.cost, loss + extra, link))
        for state in found:
            self._offer(state)
        return found

    def _offer(self, state: _State) -> None:
        """Keep a state that is a solution by itself, if it is better than all before."""
        size, loss, trail = state
        if size <= self.room and loss + self.density * (self.room - size) < self.loss:
            self.loss, self.trail, self.improved = loss + self.density * (self.room - size), trail, True

    def _bounded(self, states: list[_State], more: _Open, fewer: _Open) -> list[_State]:
        """The states that no other dominates and that may still lead to a better solution; the smallest first."""
        kept = []
        least = None
        for state in sorted(states, key=lambda one: one[:2]):
            size, loss, _ = state
            deficit = loss - self.density * size
            if least is not None and deficit >= least:
                continue
            least = deficit
            if loss + self._least(self.room - size, more, fewer) < self.loss:
                kept.append(state)
        return kept

    def _least(self, room: int, more: _Open, fewer: _Open) -> int:
        """What a state with so much room must still lose."""
        if room < 0:
            bound = fewer.least(-room)
            return self.loss if bound is None else bound
        unused = self.density * room
        bound = more.least(room)
        return unused if bound is None else min(unused, bound)

"""Which merging method to expect best for adapters, from their analysis: a table of rules, the first that fits counts.

Winners are those of benchmarks/merging.py where it has such adapters, thresholds are judgements; no data of the user's
task is seen. Measure the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..hub.bases import family
from .analyze import Analysis

COPY = 0.9  # every cosine above: the deltas are nearly one
SHARED = 0.1  # cosines, and overlaps beyond chance, below it count as none
CANCELLED = 0.5  # interference below: the sum is weaker than half of what orthogonal deltas give
CLASH = 0.55  # share of clashing size above: more than the half that independent deltas have
MEASURED = (
    "Measured on eight experts of one base with cosines below 0.04 (benchmarks/merging.py): at weight 1 the core keeps "
    "92.7 % of the experts' own accuracy and the sum 78.4 %, each at its best weight 93.9 % and 87.6 %"
)
UNEVEN = 5.0  # norms further apart than this factor: the stronger adapter drowns the weaker


def by_default(adapters: int, *, weighted: bool) -> str:
    """The method where the user names none.

    Weights ask for a sum, and get the exact one. Without weights the wish is one adapter that can do what each of them
    can: then it is the method that did best at that, as it comes, in benchmarks/merging.py.
    """
    return "exact" if weighted or adapters < 2 else "core"


@dataclass(frozen=True)
class Figures:
    """What the rules look at. Cosines and overlaps are over all pairs, and None where no pair has any."""

    count: int
    subtracts: bool
    lowest_cosine: float
    highest_cosine: float
    outputs: float
    inputs: float
    clash: float
    interference: float
    shared_modules: int
    rank: int
    ranks: int
    uneven: float
    bases: int

    @classmethod
    def of(cls, analysis: Analysis) -> Figures:
        wholes = [pair.whole for pair in analysis.pairs]
        cosines = [whole.cosine for whole in wholes] or [0.0]
        norms = [one.norm for one in analysis.adapters if one.norm]
        return cls(
            count=len(analysis.adapters),
            subtracts=any(one.weight < 0 for one in analysis.adapters),
            lowest_cosine=min(cosines),
            highest_cosine=max(cosines),
            outputs=max((whole.outputs.beyond_chance for whole in wholes if whole.outputs), default=0.0),
            inputs=max((whole.inputs.beyond_chance for whole in wholes if whole.inputs), default=0.0),
            clash=max((whole.clash for whole in wholes if whole.clash is not None), default=0.0),
            interference=1.0 if analysis.interference is None else analysis.interference,
            shared_modules=max((whole.modules for whole in wholes), default=0),
            rank=max(one.rank for one in analysis.adapters),
            ranks=sum(one.rank for one in analysis.adapters),
            uneven=max(norms) / min(norms) if norms else 1.0,
            bases=len({family(one.base) for one in analysis.adapters if one.base}),
        )


@dataclass(frozen=True)
class Rule:
    """When it applies, the method it advises, and why: `reason` is filled in with the figures.

    average: divide the weights by the sum of their absolute values.
    """

    name: str
    applies: Callable[[Figures], bool]
    method: str
    reason: str
    options: Mapping[str, Any] = field(default_factory=dict)
    average: bool = False


RULES = (
    Rule(
        "alone",
        lambda f: f.count == 1,
        "exact",
        "one adapter has nothing to be reconciled with",
    ),
    Rule(
        "disjoint",
        lambda f: f.shared_modules == 0,
        "exact",
        "no two adapters change the same module, so the sum keeps each as it is",
    ),
    Rule(
        "copies",
        lambda f: f.lowest_cosine > COPY,
        "exact",
        "the deltas are nearly one (lowest cosine {lowest_cosine:.2f}): their average keeps its strength, where the "
        "sum would apply it {count} times",
        average=True,
    ),
    Rule(
        "subtraction",
        lambda f: f.subtracts,
        "exact",
        "a negative weight asks for a difference, which only the exact sum is",
    ),
    Rule(
        "cancelling",
        lambda f: f.interference < CANCELLED,
        "ties",
        "the deltas cancel (interference {interference:.2f}): a sum keeps little of any, electing signs keeps the "
        "stronger side of each entry; no benchmark here has such adapters",
    ),
    Rule(
        "clashing",
        lambda f: f.clash > CLASH,
        "core",
        "signs clash more than by chance (up to {clash:.2f} of the size that two share; chance: 0.50), and what a sum "
        "loses by that it does not get back: a common core with a flat spectrum gives every direction its say",
    ),
    Rule(
        "apart",
        lambda f: max(abs(f.lowest_cosine), f.highest_cosine) < SHARED,
        "core",
        "the deltas are nearly orthogonal (cosines {lowest_cosine:.2f} to {highest_cosine:.2f}), as those of adapters "
        "trained apart always are; they act on the same inputs all the same. " + MEASURED,
    ),
    Rule(
        "related",
        lambda f: True,
        "core",
        "the deltas share a part (cosines {lowest_cosine:.2f} to {highest_cosine:.2f}), which a sum applies once for "
        "each adapter and a flat spectrum once. " + MEASURED,
    ),
)


@dataclass(frozen=True)
class Advice:
    """The method to try first, its options, the weights to give (in the adapters' order), why, and what to mind."""

    method: str
    options: Mapping[str, Any]
    weights: tuple[float, ...]
    reason: str
    rule: str
    cautions: tuple[str, ...] = ()


def advise(analysis: Analysis, *, rank: int | None = None) -> Advice:
    """The method to expect best, by the first rule that fits. rank: the largest that the result may have, if any."""
    figures = Figures.of(analysis)
    rule = next(rule for rule in RULES if rule.applies(figures))
    weights = tuple(one.weight for one in analysis.adapters)
    if rule.average:
        size = sum(abs(weight) for weight in weights)
        weights = tuple(weight / size for weight in weights)
    options = dict(rule.options) | ({} if rank is None else {"rank": rank})
    reason = rule.reason.format(**vars(figures))
    return Advice(rule.method, options, weights, reason, rule.name, _cautions(figures, rank))


def _cautions(figures: Figures, rank: int | None) -> tuple[str, ...]:
    found = []
    if figures.bases > 1:
        found.append(
            f"the adapters name {figures.bases} different bases: what one learned on its base need not hold on another"
        )
    if figures.uneven > UNEVEN:
        found.append(
            f"the strongest delta is {figures.uneven:.3g} times the weakest: weights may balance them, if both count"
        )
    if rank is None and figures.count > 1 and figures.ranks > 2 * figures.rank:
        found.append(f"exact ranks add up to {figures.ranks}: --rank or --energy keeps the result small")
    return tuple(found)

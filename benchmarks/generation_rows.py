"""The rows of the generation benchmark: what each makes for the held-out tasks of a cell, from their descriptions."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from generation_cell import Cell, Vectors, Words
from generation_methods import (
    Blend,
    Mixture,
    Sight,
    in_deltas,
    in_factors,
    mixed,
    near_checkpoint,
    perceptron,
    ridge,
    seen_school,
    sight,
    threshold,
    tuned,
)
from generation_world import Setting
from lorahub.generate.hypernet import Trial
from lorahub.generate.layout import Layout
from lorahub.generate.learned.hyper import Hyper, hyper
from lorahub.generate.learned.icm import Icm, icm
from lorahub.generate.learned.semantic import Mode, Semantic, semantic
from lorahub.generate.priors import NEIGHBOURS, Prototypes
from lorahub.generate.taught import School
from lorahub.hub.adapter import Adapter
from torch import Tensor

HIDDEN = 256  # of SG-LoRA's networks


class Made(NamedTuple):
    """Vectors (held, 1 or queries, size), the layout's trial where it is not the cell's, and what is to be told.

    scores: measures something that is no adapter in place of the vectors, (held, 1 or queries).
    """

    vectors: Tensor
    trial: Trial | None = None
    told: dict[str, Any] = {}  # noqa: RUF012
    scores: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Row:
    """A row. once: in the digits world only in the first cell of a base, whose experts began at one point. only: bases
    of digits in whose first cells it is made, and nowhere else. peeks: at held-out samples. version: of its method;
    what an older one measured is not taken."""

    name: str
    make: Callable[[Desk], Made]
    once: bool = False
    only: tuple[str, ...] = ()
    peeks: bool = False
    version: int = 3


class Desk:
    """What the rows of a cell share: similarities, choices and fitted generators, each made when first asked for."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self._kept: dict[Any, Any] = {}

    @cached_property
    def prototypes(self) -> Prototypes:
        return Prototypes.of(self.cell.school.weights, self.cell.school.keys)

    def keep(self, name: Any, make: Callable[[], Any]) -> Any:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    @cached_property
    def wide(self) -> tuple[Trial, Blend]:
        layout, blend = in_deltas(self.cell.layout, max(NEIGHBOURS))
        return self.cell.trying(layout), blend

    def sight(self, words: Words = "sentences", *, learned: bool = False) -> Sight:
        found: Sight = self.keep(("sight", words, learned), lambda: sight(self.cell, words, learned=learned))
        return found

    def mixture(self, learned: bool, deltas: bool) -> Mixture:
        """Chosen on the taught tasks."""
        trial, blend = self.wide if deltas else (self.cell.trial, in_factors)
        seen = self.sight("tokens" if learned else "sentences", learned=learned)
        found: Mixture = self.keep(("mixture", learned, deltas), lambda: tuned(self.cell, seen, blend, trial))
        return found

    def semantic(self, *, learned: bool = False, leave_out: bool = True, shuffled: bool = False) -> Semantic:
        mixture, seen = self.mixture(learned, False), self.sight("tokens" if learned else "sentences", learned=learned)
        school = seen_school(self.cell.school, seen)
        found: Semantic = self.keep(
            ("semantic", learned, leave_out, shuffled),
            lambda: semantic(
                mingled(school, self.cell.setting.seed) if shuffled else school,
                neighbours=mixture.neighbours if mixture.neighbours > 1 else 4,
                temperature=mixture.temperature,
                hidden=HIDDEN,
                steps=self.cell.plan.semantic,
                batch=32,
                leave_out=leave_out,
                seed=self.cell.setting.seed,
            ),
        )
        return found

    def icm(self) -> Icm:
        found: Icm = self.keep(
            "icm",
            lambda: icm(
                self.cell.school,
                stages=self.cell.plan.icm_stages,
                channels=self.cell.plan.icm_channels,
                steps=self.cell.plan.icm,
                rate=1e-3,
                seed=self.cell.setting.seed,
            ),
        )
        return found

    def hyper(
        self, words: Words, *, fitted_reader: bool = True, from_everything: bool = False, mixed: float = 0.0
    ) -> Hyper:
        found: Hyper = self.keep(
            ("hyper", words, fitted_reader, from_everything, mixed),
            lambda: hyper(
                self.cell.worded if words == "tokens" else self.cell.school,
                self.cell.practice,
                steps=self.cell.plan.hyper,
                rank=self.cell.plan.hyper_rank,
                members=self.cell.plan.hyper_members,
                rate=self.cell.plan.hyper_rates[0],
                moving=self.cell.plan.hyper_rates[1],
                mixed=mixed,
                start=self.cell.everything if from_everything else None,
                similarity=self.cell.similarity(words) if fitted_reader else None,
                seed=self.cell.setting.seed,
            ),
        )
        return found


def mingled(school: School, seed: int) -> School:
    """Every expert with the descriptions of another."""
    places = list(range(len(school.vectors)))
    order = places[:]
    chance = random.Random(seed)
    while any(one == other for one, other in zip(places, order, strict=True)):
        chance.shuffle(order)
    return replace(school, vectors=tuple(school.vectors[place] for place in order))


# --- rows -----------------------------------------------------------------------------------------------------------


def _each(queries: Sequence[Vectors], make: Callable[[Vectors], Tensor]) -> Tensor:
    return torch.stack([torch.stack([make(query) for query in some]) for some in queries])


def _same(desk: Desk, vector: Tensor) -> Made:
    return Made(vector.expand(len(desk.cell.held), 1, -1))


def _base(desk: Desk) -> Made:
    return _same(desk, torch.zeros(desk.cell.layout.size))


def _random(desk: Desk) -> Made:
    chance = random.Random(desk.cell.setting.seed)
    return Made(_each(desk.sight().queries, lambda _: desk.cell.last[chance.randrange(len(desk.cell.last))]))


def _uniform(desk: Desk) -> Made:
    return _same(desk, desk.cell.last.mean(dim=0))


def _everything(desk: Desk) -> Made:
    return _same(desk, desk.cell.everything)


def _oracle(desk: Desk) -> Made:
    return Made(desk.cell.oracles[:, None])


def _hindsight(desk: Desk) -> Made:
    cell, best = desk.cell, []
    for place in range(len(cell.held)):
        best.append(int(cell.tested(cell.last, [place] * len(cell.last), count=cell.plan.choice).argmax()))
    return Made(cell.last[best][:, None])


def _nearest(learned: bool, words: Words = "tokens", *, noise: bool = False) -> Callable[[Desk], Made]:
    def make(desk: Desk) -> Made:
        seen = desk.sight(words if learned else "sentences", learned=learned)
        near = [[int((seen.keys @ torch.as_tensor(query)).argmax()) for query in some] for some in seen.queries]
        told: dict[str, Any] = {}
        if learned:
            told = {"ranking": desk.keep(("ranking", words), lambda: _ranking(desk.cell, words))}
        if noise:
            vectors = [
                [near_checkpoint(desk.prototypes, at, 10 * row + column) for column, at in enumerate(some)]
                for row, some in enumerate(near)
            ]
            return Made(torch.stack([torch.stack(some) for some in vectors]), told=told)
        return Made(desk.cell.last[torch.tensor(near)], told=told)

    return make


def _ranking(cell: Cell, words: Words) -> dict[str, float]:
    """The learned similarity validated on taught tasks that it was not fitted to."""
    from lorahub.index.transfer import ranked

    vectors = (cell.school if words == "sentences" else cell.worded).vectors
    return ranked(vectors, cell.transfer, cell.left_out(words))._asdict()


def _trusted(learned: bool) -> Callable[[Desk], Made]:
    """The nearest expert where it is near enough, else the base as it is."""

    def make(desk: Desk) -> Made:
        seen = desk.sight("tokens" if learned else "sentences", learned=learned)
        least, gain = threshold(desk.cell, seen)

        def one(query: Vectors) -> Tensor:
            cosine, near = (seen.keys @ torch.as_tensor(query)).max(dim=0)
            return desk.cell.last[near] * float(cosine >= least)

        return Made(_each(seen.queries, one), told={"threshold": least, "gain when left out": gain})

    return make


def _equal(desk: Desk) -> Made:
    seen = desk.sight()
    return Made(_each(seen.queries, lambda query: mixed(desk.cell.last, seen.keys, query, 4, 1e9, in_factors)))


def _blend(learned: bool, deltas: bool, *, strange: bool = False) -> Callable[[Desk], Made]:
    def make(desk: Desk) -> Made:
        seen, mixture = desk.sight("tokens" if learned else "sentences", learned=learned), desk.mixture(learned, deltas)
        trial, blend = desk.wide if deltas else (None, in_factors)

        def one(query: Vectors) -> Tensor:
            return mixed(desk.cell.last, seen.keys, query, mixture.neighbours, mixture.temperature, blend)

        told = {"neighbours": mixture.neighbours, "temperature": mixture.temperature, "tries": mixture.scores}
        return Made(_each(seen.strange if strange else seen.queries, one), trial, told)

    return make


def _semantic(mode: Mode, *, learned: bool = False, **given: bool) -> Callable[[Desk], Made]:
    def make(desk: Desk) -> Made:
        fitted = replace(desk.semantic(learned=learned, **given), mode=mode)
        return _sampled(desk, fitted, desk.sight("tokens" if learned else "sentences", learned=learned).queries)

    return make


def _sampled(desk: Desk, fitted: Any, queries: Sequence[Vectors], layout: Layout | None = None, **told: Any) -> Made:
    rows, novelties = [], []
    for some in queries:
        made = [fitted.sample(query, seed=number) for number, query in enumerate(some)]
        rows.append(torch.stack([_flat(one.adapter, layout or desk.cell.layout) for one in made]))
        novelties += [one.novelty for one in made]
    told = {"novelty": sum(novelties) / len(novelties), **fitted.origin.told, **told}
    return Made(torch.stack(rows), desk.cell.trying(layout) if layout else None, told)


def _flat(adapter: Adapter, layout: Layout) -> Tensor:
    """The vector of the adapter, or of the nearest one of the layout's ranks."""
    ranks = {place.name: place.rank for place in layout.places}
    short = {
        name: part if part.rank <= ranks[name] else part.truncate(ranks[name]) for name, part in adapter.modules.items()
    }
    return layout.flatten(replace(adapter, modules=short))


def _icm(desk: Desk) -> Made:
    return _sampled(desk, desk.icm(), desk.sight().queries)


def _ridge(desk: Desk) -> Made:
    made = ridge(desk.cell.school)
    return Made(torch.stack([made(some) for some in desk.sight().queries]))


def _perceptron(desk: Desk) -> Made:
    made = perceptron(desk.cell.school, steps=desk.cell.plan.regression, seed=desk.cell.setting.seed)
    return Made(torch.stack([made(some) for some in desk.sight().queries]))


def asked_hyper(
    words: Words = "tokens", *, wrong: bool = False, strange: bool = False, cut: bool = False, **given: Any
) -> Callable[[Desk], Made]:
    """cut: to the experts' rank, as near as that gets to the delta."""

    def make(desk: Desk) -> Made:
        queries = desk.cell.asked(words, strange=strange)
        if wrong:  # every task's descriptions go to the one half the list away
            middle = len(queries) // 2
            queries = queries[middle:] + queries[:middle]
        fitted = desk.hyper(words, **given)
        return _sampled(desk, fitted, queries, replace(fitted.layout, gauge="none") if cut else fitted.wide)

    return make


BASE, ORACLE, HYPER, HYPER_WRONG = "base", "oracle", "hypernetwork", "hypernetwork, wrong description"
ROWS = (
    Row(BASE, _base),
    Row("random expert", _random),
    Row("nearest expert", _nearest(False)),
    Row("nearest, learned similarity", _nearest(True)),
    Row("nearest, learned similarity of sentences", _nearest(True, "sentences")),
    Row("nearest expert, or the base where it is far", _trusted(False)),
    Row("nearest, learned similarity, or the base", _trusted(True)),
    Row("nearest + checkpoint noise", _nearest(False, noise=True)),
    Row("top 4 equal", _equal),
    Row("blend of factors", _blend(False, False)),
    Row("blend of deltas", _blend(False, True)),
    Row("blend of factors, learned similarity", _blend(True, False)),
    Row("blend of deltas, learned similarity", _blend(True, True)),
    Row("uniform average", _uniform),
    Row("multi-task adapter", _everything),
    Row("SG prior, sample without CVAE", _semantic("gaussian")),
    Row("SG-LoRA", _semantic("sample")),
    Row("SG-LoRA, prior mean", _semantic("mean")),
    Row("SG-LoRA, learned similarity", _semantic("sample", learned=True)),
    Row("SG-LoRA without leave-one-out", _semantic("sample", leave_out=False), once=True),
    Row("SG-LoRA, shuffled descriptions", _semantic("sample", shuffled=True), once=True),
    Row("ICM-LoRA, text", _icm),
    Row("ridge to weights", _ridge),
    Row("perceptron to weights", _perceptron),
    Row(HYPER, asked_hyper(), version=4),
    Row(HYPER_WRONG, asked_hyper(wrong=True), version=4),
    Row("hypernetwork, cut to the experts' rank", asked_hyper(cut=True), once=True, version=4),
    Row("hypernetwork, sentence vectors", asked_hyper("sentences"), only=("B",), version=4),
    Row("hypernetwork, its reader not fitted to transfer", asked_hyper(fitted_reader=False), only=("B",), version=4),
    Row("hypernetwork, from the multi-task adapter", asked_hyper(from_everything=True), only=("B",), version=4),
    Row("best expert in hindsight", _hindsight, peeks=True),
    Row(ORACLE, _oracle, peeks=True),
)
STRANGE_ROWS = (
    Row("hypernetwork, strange words", asked_hyper(strange=True), version=4),
    Row("blend of deltas, learned similarity, strange words", _blend(True, True, strange=True)),
)


def made_by(name: str, desk: Desk) -> Made:
    """What a row of this name makes."""
    return next(row for row in ROWS if row.name == name).make(desk)


def rows(cell: Cell) -> list[Row]:
    """The rows of a cell."""
    some = ROWS + (STRANGE_ROWS if all(one.strange for one in cell.held) else ())
    from generation_mixing import MIXED_ROWS
    from generation_ranks import RANK_ROWS
    from generation_rehearsal import REHEARSAL_ROWS

    own = {"sentences": REHEARSAL_ROWS, "pictures": MIXED_ROWS}
    some += RANK_ROWS + own.get(cell.setting.world, ())
    base = cell.setting.base
    first = cell.setting == Setting(base, "shared", 0, 0)
    there = (row for row in some if first or cell.setting.world != "digits" or not row.once)
    return [row for row in there if not row.only or (first and base in row.only)]


def measure(desk: Desk, row: Row) -> dict[str, Any]:
    """A row's scores (held, queries), what it tells, and seconds of making and testing.

    What several rows share is made, and counted, with the first of them.
    """
    start = time.perf_counter()
    made = row.make(desk)
    middle = time.perf_counter()
    count = made.vectors.shape[1]
    places = [place for place in range(len(desk.cell.held)) for _ in range(count)]
    if made.scores:
        scores = made.scores()
    else:
        scores = desk.cell.tested(made.vectors.flatten(0, 1), places, trial=made.trial).view(-1, count)
    seconds = [round(middle - start, 1), round(time.perf_counter() - middle, 1)]
    return {"scores": scores.tolist(), "told": made.told, "seconds": seconds}

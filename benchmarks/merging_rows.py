"""The rows of merging.py's table, and the options that each may choose from on validation sentences.

Every method of lorahub is here: GRID holds the options of those that have a choice, the others run as they are. PEFT's
rows are all combination types of its `add_weighted_adapter`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorahub.merge.run import methods
from merging_experts import RANK
from merging_search import Row

Grid = tuple[Mapping[str, Any], ...]
DENSITIES = (0.2, 0.5, 0.8)


def over(name: str, values: Sequence[Any], **fixed: Any) -> Grid:
    """One dict of options for each value."""
    return tuple({name: value, **fixed} for value in values)


GRID: Mapping[str, Grid] = {
    "lego": (*over("rank", (None, 16, 32)), *over("rank", (None, 16, 32, 64), gauge="svd")),
    "ties": (*over("density", (0.2, 0.8)), *over("density", (*DENSITIES, 1.0), space="delta")),
    "dare": (*over("density", DENSITIES), *over("density", (0.5, 0.8), space="delta")),
    "magnitude": (*over("density", DENSITIES), *over("density", DENSITIES, space="delta")),
    "knots": over("density", (*DENSITIES, 1.0)),
    "tsv": over("keep", (None, 0.5, 0.25)),
    "iso": over("common", (1.0, 0.8, 0.5)),
    "robust": over("density", DENSITIES),
}
# what one method does in two manners: (label, method, options)
MANNERS: Sequence[tuple[str, str, Grid]] = (
    ("dare, then TIES", "dare", over("density", DENSITIES, unite="total")),
    ("core, ties", "core", over("density", (*DENSITIES, 1.0), rule="ties")),
)
SMALL = ("exact", "lego", "ties", "knots", "core", "tsv", "iso")  # also as small as one expert
# measured with mixed ranks, with fewer adapters and with default options as well
COMPARED = (
    "uniform average",
    *("exact", "lego", "ties", "knots", "core", "tsv", "iso"),
    *("PEFT linear", "PEFT ties", f"PEFT ties_svd, rank {8 * RANK}", f"PEFT svd, rank {RANK}"),
)
WITH_DENSITY = ("ties", "dare_ties", "dare_linear", "magnitude_prune")


def rows(count: int, *, brief: bool = False) -> list[Row]:
    """All rows for `count` adapters; brief: the first options of each, and one weight."""
    average = Row("uniform average", "lorahub", "exact", fixed=1 / count)
    shuffled = Row("modules shuffled (control)", "shuffled", "exact")
    every = [average, shuffled, *lorahub_rows(), *small_rows(), *peft_rows(count)]
    return [replace(row, grid=row.grid[:1], fixed=row.fixed or 1.0) for row in every] if brief else every


def lorahub_rows() -> list[Row]:
    plain = [Row(method, "lorahub", method, GRID.get(method, ({},))) for method in methods()]
    return plain + [Row(label, "lorahub", method, grid) for label, method, grid in MANNERS]


def small_rows() -> list[Row]:
    """Results as small as one of the inputs."""
    return [Row(f"{method}, rank {RANK}", "lorahub", method, _small(method)) for method in methods() if method in SMALL]


def _small(method: str) -> Grid:
    """The method's options with the rank of one expert, each once."""
    cut = [{**options, "rank": RANK} for options in GRID.get(method, ({},))]
    return tuple(options for number, options in enumerate(cut) if options not in cut[:number])


def peft_rows(count: int) -> list[Row]:
    """All types; those that factor a full matrix again do so at the rank that holds the exact sum, and the plain one
    and the best one also at RANK."""
    found = [Row(f"PEFT {kind}", "peft", kind) for kind in ("linear", "cat")]
    for kind in WITH_DENSITY:
        found.append(Row(f"PEFT {kind}", "peft", kind, over("density", DENSITIES)))
    for kind in ("svd", *(f"{kind}_svd" for kind in WITH_DENSITY)):
        for rank in (RANK * count, RANK) if kind in ("svd", "ties_svd") else (RANK * count,):
            grid = ({"svd_rank": rank},) if kind == "svd" else over("density", DENSITIES, svd_rank=rank)
            found.append(Row(f"PEFT {kind}, rank {rank}", "peft", kind, grid))
    return found

"""Sign conflict: in how many entries two deltas pull in opposite directions, and how much of their size is lost there.

Counting needs entries, not factors. A small delta is counted in full; of a large one a sample is multiplied out: rows
and columns drawn at random from the factors, the same for all adapters, and the standard error is stated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..hub.lowrank import LowRank, Shape

EXACT = 2**16  # up to so many entries a delta is counted in full
SAMPLE = 2**14  # of a larger one, so many entries are: 128 rows x 128 columns, if it has as many


@dataclass(frozen=True, eq=False)
class Signs:
    """Sums over entries for each pair of adapters, (T, T) in float64, upper triangle; they add up over modules.

    entries: how many there are. opposite: how many have opposite signs. mass: sum of min(|x|, |y|), all that could
    cancel; clash: the part of it in entries of opposite signs, what does cancel in x + y, on each side. The rest are
    the variances and the covariance of these as estimates, zero where all was counted.
    """

    entries: Tensor
    opposite: Tensor
    opposite_variance: Tensor
    clash: Tensor
    mass: Tensor
    clash_variance: Tensor
    mass_variance: Tensor
    covariance: Tensor


@dataclass(frozen=True, eq=False)
class Grid:
    """Rows and columns of a matrix of `shape` entries to look at; all of them where it is small."""

    rows: Tensor
    columns: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, name: str, shape: Shape, seed: int = 0) -> Grid:
        """The sample for a module: it depends on the seed, the module's name and its size, on nothing else."""
        outputs, inputs = shape.outputs, shape.inputs
        if outputs * inputs <= EXACT:
            return cls(torch.arange(outputs), torch.arange(inputs), (outputs, inputs))
        side = int(SAMPLE**0.5)
        rows = min(outputs, max(side, SAMPLE // inputs))
        columns = min(inputs, max(side, SAMPLE // rows))
        text = f"{seed}/{name}/{outputs}/{inputs}"
        chance = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))
        return cls(
            torch.randperm(outputs, generator=chance)[:rows],
            torch.randperm(inputs, generator=chance)[:columns],
            (outputs, inputs),
        )

    @property
    def complete(self) -> bool:
        return (len(self.rows), len(self.columns)) == self.shape

    @property
    def factor(self) -> float:
        """How many entries each one looked at stands for."""
        return self.shape[0] * self.shape[1] / (len(self.rows) * len(self.columns))

    def entries(self, module: LowRank) -> Tensor:
        """The delta's entries in these rows and columns, (rows, columns) in float64."""
        return module.scale * (module.up[self.rows].double() @ module.down[:, self.columns].double())


def sign_sums(parts: Sequence[LowRank], grid: Grid) -> Signs:
    """Sums over the pairs of `parts`, deltas of one module with their weights on."""
    stack = torch.stack([grid.entries(part) for part in parts])
    size = len(parts)
    sums = [torch.zeros(size, size, dtype=torch.float64) for _ in Signs.__dataclass_fields__]
    for i in range(size - 1):
        for matrix, row in zip(sums, _against(stack[i], stack[i + 1 :], grid), strict=True):
            matrix[i, i + 1 :] = row
    return Signs(*sums)


def _against(one: Tensor, others: Tensor, grid: Grid) -> list[Tensor]:
    """The fields of Signs for one delta (rows, columns) beside several (n, rows, columns): (n,) each."""
    opposite = (one.sign() * others.sign() < 0).double()
    least = torch.minimum(one.abs(), others.abs())
    clash = opposite * least
    found = torch.stack([opposite, clash, least])
    whole = float(grid.shape[0] * grid.shape[1])
    opposites, clashes, mass = whole * found.mean(dim=(2, 3))
    spread = torch.zeros(4, len(others), dtype=torch.float64)
    if not grid.complete:
        # an entry is opposite wholly or not at all, so its square is itself, and clash * least is clash * clash
        squares = [opposite.sum(dim=(1, 2)), clash.square().sum(dim=(1, 2)), least.square().sum(dim=(1, 2))]
        products = torch.stack([*squares, squares[1]])
        spread = whole**2 * _covariances(found, [0, 1, 2, 1], [0, 1, 2, 2], products, grid)
    return [torch.full_like(mass, whole), opposites, spread[0], clashes, mass, *spread[1:]]


def _covariances(found: Tensor, left: list[int], right: list[int], products: Tensor, grid: Grid) -> Tensor:
    """Covariances of means over sampled rows and columns: (k, n) for k pairs of the quantities in `found`.

    found: (quantities, n, rows, columns). products: (k, n), the sums of left * right over the sample. Entries of one
    row are alike, and so are those of one column: the two-way analysis of variance tells how much of the spread belongs
    to rows, columns and single entries. Rows and columns are drawn without replacement, which the finite-population
    factors (0 where all were taken) account for.
    """
    rows, columns = found.shape[2:]
    means = found.mean(dim=(2, 3))
    by_row, by_column = (found.mean(dim=axis) - means[..., None] for axis in (3, 2))
    row_sums = (by_row[left] * by_row[right]).sum(dim=2)
    column_sums = (by_column[left] * by_column[right]).sum(dim=2)
    single = products - rows * columns * means[left] * means[right] - columns * row_sums - rows * column_sums
    free_rows, free_columns = max(rows - 1, 1), max(columns - 1, 1)
    missing_rows, missing_columns = 1 - rows / grid.shape[0], 1 - columns / grid.shape[1]
    return (
        missing_rows * row_sums / free_rows / rows
        + missing_columns * column_sums / free_columns / columns
        - missing_rows * missing_columns * single / (free_rows * free_columns * rows * columns)
    )

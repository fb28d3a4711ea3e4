"""How the deltas of several adapters stand to each other: cosines, shared subspaces, sign conflict.

All figures of a pair follow from sums that add up over modules, so one pass over the modules serves the single module,
its layer and the whole. Everything is computed from thin factors in float64 and is blind to how a delta is factored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..hub.lowrank import LowRank
from .signs import Grid, Signs, sign_sums


@dataclass(frozen=True)
class Overlap:
    """How far two subspaces coincide: ||U^T V||_F^2 / min(ranks) for orthonormal bases U and V.

    1: the smaller lies within the larger. chance: what independent, uniformly random subspaces of these ranks have on
    average, max(ranks) / dimension. Over several modules, numerators and denominators are added up first.
    """

    value: float
    chance: float

    @property
    def beyond_chance(self) -> float:
        """0 at chance, 1 where the smaller space lies within the larger; 0 where chance alone fills it."""
        return (self.value - self.chance) / (1 - self.chance) if self.chance < 1 else 0.0


@dataclass(frozen=True)
class Relation:
    """How one delta compares with another, of a module, a layer or a whole adapter.

    cosine: -1 to 1; a module that one side lacks is zero there, and 0 stands where a delta is zero. norm_ratio: the
    second norm over the first, None where that is zero. outputs, inputs: overlap of the column spaces (what is written)
    and of the row spaces (what is read); None where a delta is zero. conflict: the share of the shared modules' entries
    in which the two have opposite signs (independent deltas: 0.5). clash: the same with each entry weighing
    min(|x|, |y|), what two such entries lose when added; None where nothing could be lost. The errors are standard
    errors, 0 where every entry was counted. modules: how many both have.
    """

    cosine: float
    norm_ratio: float | None
    outputs: Overlap | None
    inputs: Overlap | None
    conflict: float
    conflict_error: float
    clash: float | None
    clash_error: float
    modules: int


@dataclass(frozen=True, eq=False)
class Thin:
    """A delta by its singular values: left (outputs, r), values (r,), right (inputs, r); r is the numerical rank."""

    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def of(cls, module: LowRank) -> Thin:
        """Singular values below the rounding of the stored factors (at best float32) are left out."""
        left, values, right = module.to(torch.float64).svd()
        size = max(module.shape.outputs, module.shape.inputs)
        floor = torch.finfo(module.wide().dtype).eps * size * (float(values[0]) if len(values) else 0.0)
        kept = values > floor
        return cls(left[:, kept], values[kept], right[kept].T)


@dataclass(frozen=True, eq=False)
class Sums:
    """What adds up over modules, (T, T) in float64 each.

    inner: the deltas' inner products. shared: modules that both have. outputs, inputs: ||U^T V||_F^2 of the column
    and the row spaces, and what chance would give; smaller: the smaller of the two ranks.
    """

    inner: Tensor
    shared: Tensor
    outputs: Tensor
    inputs: Tensor
    outputs_chance: Tensor
    inputs_chance: Tensor
    smaller: Tensor
    signs: Signs

    def relation(self, one: int, other: int) -> Relation:
        """How the delta of number `other` compares with that of number `one`, which must be smaller."""
        first, second = (math.sqrt(max(float(self.inner[i, i]), 0.0)) for i in (one, other))
        product = first * second
        cosine = float(self.inner[one, other]) / product if product else 0.0
        told = {field.name: float(getattr(self.signs, field.name)[one, other]) for field in fields(self.signs)}
        entries, mass = told["entries"] or 1.0, told["mass"]
        clash = told["clash"] / mass if mass else 0.0
        # of a ratio of two estimates, to first order
        variance = told["clash_variance"] - 2 * clash * told["covariance"] + clash**2 * told["mass_variance"]
        return Relation(
            cosine=max(-1.0, min(cosine, 1.0)),
            norm_ratio=second / first if first else None,
            outputs=self._overlap(self.outputs, self.outputs_chance, one, other),
            inputs=self._overlap(self.inputs, self.inputs_chance, one, other),
            conflict=told["opposite"] / entries,
            conflict_error=math.sqrt(max(told["opposite_variance"], 0.0)) / entries,
            clash=clash if mass else None,
            clash_error=math.sqrt(max(variance, 0.0)) / mass if mass else 0.0,
            modules=int(self.shared[one, other]),
        )

    @property
    def interference(self) -> float | None:
        """||sum||^2 / sum of ||.||^2 over all: 1 where orthogonal, T for T copies, 0 where they cancel."""
        alone = float(self.inner.diagonal().sum())
        return max(float(self.inner.sum()), 0.0) / alone if alone else None

    def _overlap(self, found: Tensor, chance: Tensor, one: int, other: int) -> Overlap | None:
        most = float(self.smaller[one, other])
        if not most:
            return None
        return Overlap(min(float(found[one, other]) / most, 1.0), float(chance[one, other]) / most)


def module_sums(parts: Sequence[LowRank], thin: Sequence[Thin], holders: Sequence[int], count: int, grid: Grid) -> Sums:
    """The sums of one module: `parts`, with weights on, of the adapters numbered `holders` among `count`."""
    ranks = torch.tensor([len(one.values) for one in thin], dtype=torch.float64)
    outputs, inputs = (_products([getattr(one, side) for one in thin]) for side in ("left", "right"))
    values = torch.cat([one.values for one in thin])
    blocks = [len(one.values) for one in thin]
    chance = ranks[:, None] * ranks
    shape = parts[0].shape
    small = Sums(
        inner=_block_sums(values[:, None] * outputs * inputs * values, blocks),
        shared=torch.ones_like(chance),
        outputs=_block_sums(outputs.square(), blocks),
        inputs=_block_sums(inputs.square(), blocks),
        outputs_chance=chance / shape.outputs,
        inputs_chance=chance / shape.inputs,
        smaller=torch.minimum(ranks[:, None], ranks),
        signs=sign_sums(parts, grid),
    )
    return _spread(small, list(holders), count)


def total(sums: Sequence[Sums]) -> Sums:
    """The sums over several modules."""
    signs = [one.signs for one in sums]
    return Sums(**_added(sums, "signs"), signs=Signs(**_added(signs)))


def _added(items: Sequence[Sums] | Sequence[Signs], without: str = "") -> dict[str, Tensor]:
    names = [field.name for field in fields(items[0]) if field.name != without]
    return {name: torch.stack([getattr(item, name) for item in items]).sum(dim=0) for name in names}


def _spread(small: Sums, holders: list[int], count: int) -> Sums:
    """Pairs of holders among pairs of all adapters; the others' sums are zero."""

    def place(matrix: Tensor) -> Tensor:
        wide = matrix.new_zeros(count, count)
        wide[torch.tensor(holders)[:, None], torch.tensor(holders)] = matrix
        return wide

    signs = Signs(**{field.name: place(getattr(small.signs, field.name)) for field in fields(Signs)})
    names = [field.name for field in fields(Sums) if field.name != "signs"]
    return Sums(**{name: place(getattr(small, name)) for name in names}, signs=signs)


def _products(bases: Sequence[Tensor]) -> Tensor:
    """Inner products of all vectors of all bases: one product for all pairs."""
    joined = torch.cat(list(bases), dim=1)
    return joined.T @ joined


def _block_sums(matrix: Tensor, blocks: Sequence[int]) -> Tensor:
    """(sum of blocks, sum of blocks) -> (T, T): the sum over every block."""
    member = torch.repeat_interleave(torch.eye(len(blocks), dtype=matrix.dtype), torch.tensor(blocks), dim=0)
    return member.T @ matrix @ member

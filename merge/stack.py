"""Stacks: the rank-one terms of several deltas side by side, and their inner products.

A method that works on rank-one terms and the report on its result ask for the same products of the same factors, and
nothing in a merge costs more: the method leaves its stack behind, and the report takes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import Tensor

from ..hub.lowrank import LowRank

_BLOCK = 32  # rows of a Gram matrix that are multiplied at once
_SAMPLE = 32  # numbers of a factor that tell it from another


@dataclass(frozen=True, eq=False)
class Stack:
    """Factors of several deltas, without their scales, in an order that depends on their contents only.

    order: the deltas' places in the sequence that was given; ranks: of each, in that order. down: (terms, inputs) and
    up: (outputs, terms) in float32, or float64 where a factor is.
    """

    order: tuple[int, ...]
    ranks: tuple[int, ...]
    down: Tensor
    up: Tensor

    @classmethod
    def of(cls, parts: Sequence[LowRank]) -> Stack:
        """Stack deltas of matching shapes."""
        order = tuple(sorted(range(len(parts)), key=lambda i: _content(parts[i])) if len(parts) > 1 else [0])
        dtype = reduce(torch.promote_types, (part.dtype for part in parts), torch.float32)
        return cls(
            order,
            tuple(parts[i].rank for i in order),
            torch.cat([parts[i].down for i in order]).to(dtype),
            torch.cat([parts[i].up for i in order], dim=1).to(dtype),
        )

    def by_term(self, values: Sequence[float]) -> Tensor:
        """One value for each delta that was given, as one for each term: (terms,) in float64."""
        ordered = torch.tensor([values[i] for i in self.order], dtype=torch.float64)
        return ordered.repeat_interleave(torch.tensor(self.ranks))

    @cached_property
    def products(self) -> tuple[Tensor, Tensor]:
        """Inner products of all terms' downs and of their ups, multiplied in the factors' dtype: (terms, terms) each,
        in float64."""
        return _gram(self.down), _gram(self.up.T)

    @cached_property
    def exact_products(self) -> tuple[Tensor, Tensor]:
        """As `products`, multiplied in float64: twice the time."""
        return _gram(self.down.double()), _gram(self.up.double().T)


def leave(parts: Sequence[LowRank], stack: Stack) -> None:
    """Keep a method's stack of `parts` for the report, in place of the one that was kept before."""
    _kept.set((_state(parts), stack))


def take(parts: Sequence[LowRank]) -> Stack:
    """The stack of `parts`: the one that was left behind if it is of these very factors, or else a new one."""
    kept = _kept.get()
    _kept.set(None)
    if kept is not None:
        factors, stack = kept
        now = _state(parts)
        if len(now) == len(factors) and all(a is b and m == n for (a, m), (b, n) in zip(now, factors, strict=True)):
            return stack
    return Stack.of(parts)


_kept: ContextVar[tuple[list[tuple[Tensor, int]], Stack] | None] = ContextVar("stack", default=None)


def _state(parts: Sequence[LowRank]) -> list[tuple[Tensor, int]]:
    """The factors, and how often each was changed in place."""
    factors = [factor for part in parts for factor in (part.down, part.up)]
    return [(factor, 0 if factor.is_inference() else factor._version) for factor in factors]


def _gram(rows: Tensor) -> Tensor:
    """rows @ rows.T in float64, from the products above the diagonal: each of them is needed only once."""
    gram = rows.new_zeros(len(rows), len(rows))
    for start in range(0, len(rows), _BLOCK):
        block = slice(start, start + _BLOCK)
        gram[block, start:] = rows[block] @ rows[start:].T
    gram = gram.double().triu()
    return gram + gram.triu(1).T


def _content(part: LowRank) -> list[float]:
    """What orders deltas, whatever the order they came in: their scale and some of their numbers."""
    key = [part.scale]
    for factor in (part.down, part.up):
        flat = factor.flatten()
        key += flat[:: max(1, len(flat) // _SAMPLE)].tolist()
    return key

"""Elementwise rules: a stack (T, m, n), one matrix an adapter, becomes the merged (m, n).

What the matrices are (deltas, factors, coordinates in a common basis) is the affair of `spaces`, and the outcome
depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..hub.errors import BadOption

ROUNDING = 1e-6  # of the largest entry: votes below it are even


@dataclass(frozen=True)
class Elementwise:
    """Which entries of every adapter stay, and how what stays is united.

    pick: "largest" keeps the share `density` of an adapter's entries by absolute value and "random" a random one,
    divided by `density` (DARE); at density 1 all stay. unite: "sum", or TIES' mean of the entries that have the elected
    sign: "total" elects the sign of the sum, "frequency" that of most entries. Raises BadOption.
    """

    pick: str = "largest"
    density: float = 1.0
    unite: str = "sum"

    def __post_init__(self) -> None:
        check_choice("pick", self.pick, ("largest", "random"))
        check_choice("unite", self.unite, ("sum", "total", "frequency"))
        check_share("density", self.density)

    def __call__(self, stack: Tensor, chances: Sequence[torch.Generator] = (), limits: Tensor | None = None) -> Tensor:
        """(T, m, n) -> (m, n). chances: a generator for each adapter. limits: (T,), where the stack is only a part of
        the matrices whose entries are compared; see `limits_for`."""
        if self.density < 1 and self.pick == "random":
            stack = dropped(stack, self.density, chances)
        elif self.density < 1:
            stack = trimmed(stack, limits_for(stack, self.density) if limits is None else limits)
        return stack.sum(dim=0) if self.unite == "sum" else elected(stack, self.unite)


def trimmed(stack: Tensor, limits: Tensor) -> Tensor:
    """Entries of an absolute value below their adapter's limit become zero: (T, m, n), (T,) -> (T, m, n)."""
    return torch.where(stack.abs() >= limits[:, None, None], stack, 0.0)


def limits_for(stack: Tensor, density: float) -> Tensor:
    """For each adapter the absolute value that the share `density` of its entries reaches: (T, m, n) -> (T,)."""
    sizes = stack.abs().flatten(1)
    entries = sizes.shape[1]
    return sizes.kthvalue(entries - kept_of(entries, density) + 1, dim=1).values


def kept_of(entries: int, density: float) -> int:
    """How many of `entries` the share `density` is, at least one."""
    return max(1, round(density * entries))


def dropped(stack: Tensor, density: float, chances: Sequence[torch.Generator]) -> Tensor:
    """DARE (Yu et al. 2024, equation 3): an entry stays with probability `density` and is then divided by it, so that
    the expectation is the input: (T, m, n) -> (T, m, n)."""
    draws = [torch.rand(part.shape, generator=chance) for part, chance in zip(stack, chances, strict=True)]
    return torch.where(torch.stack(draws).to(stack.device) < density, stack / density, 0.0)


def elected(stack: Tensor, elect: str) -> Tensor:
    """TIES' election and disjoint mean (Yadav et al. 2023, algorithm 1): the mean of those entries that are not zero
    and have the elected sign. Even votes of "frequency" are decided by the total; where that is even too, the result is
    zero. A total as small as rounding is even: else the noise of an orthonormal basis would decide between x and -x.
    (T, m, n) -> (m, n)
    """
    total = stack.sum(dim=0)
    sign = torch.where(total.abs() > ROUNDING * stack.abs().amax(), total.sign(), 0.0)
    if elect == "frequency":
        votes = stack.sign().sum(dim=0)
        sign = torch.where(votes == 0, sign, votes.sign())
    agree = stack * sign > 0
    return torch.where(agree, stack, 0.0).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


def check_share(name: str, value: float) -> None:
    """Raise BadOption unless `value` is above 0 and at most 1."""
    if not 0 < value <= 1:
        raise BadOption(f"{name} is {value}; expected a share above 0 and at most 1")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise BadOption unless `value` is one of `choices`."""
    if value not in choices:
        raise BadOption(f"{name} is {value!r}; expected one of {', '.join(choices)}")

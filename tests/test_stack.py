"""Stacks of factors: their inner products, their order, and when the report may take what a method left behind."""

from __future__ import annotations

import math

import pytest
import torch
from lorahub.hub.lowrank import LowRank, concat
from lorahub.merge.report import Fidelity, Report
from lorahub.merge.stack import Stack, leave, take
from making import DTYPES, Place, low_rank

PLACE = Place(300, 200)


def some(dtype: torch.dtype = torch.float32) -> list[LowRank]:
    return [low_rank(PLACE, rank, seed=rank, scale=rank / 3, dtype=dtype) for rank in (3, 50, 1, 12)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_inner_products(dtype: torch.dtype) -> None:
    stack = Stack.of(some(dtype))
    parts = [some(dtype)[i] for i in stack.order]
    down = torch.cat([part.down for part in parts]).double()
    up = torch.cat([part.up for part in parts], dim=1).double()
    assert stack.ranks == tuple(part.rank for part in parts)
    for products, allowed in ((stack.products, 1e-6), (stack.exact_products, 1e-14)):
        for got, rows in zip(products, (down, up.T), strict=True):
            wanted = rows @ rows.T
            assert got.dtype == torch.float64
            assert torch.equal(got, got.T)
            assert float((got - wanted).norm() / wanted.norm()) < allowed


def test_the_order_is_the_contents() -> None:
    forth, back = Stack.of(some()), Stack.of(some()[::-1])
    assert torch.equal(forth.down, back.down)
    assert torch.equal(forth.up, back.up)
    values = [1.0, 2.0, 3.0, 4.0]
    assert torch.equal(forth.by_term(values), back.by_term(values[::-1]))
    assert forth.by_term(values).sum() == 3 * 1 + 50 * 2 + 1 * 3 + 12 * 4


def test_what_was_left_is_taken_once() -> None:
    parts = some()
    stack = Stack.of(parts)
    leave(parts, stack)
    assert take([part.scaled(2.0) for part in parts]) is stack  # a scale is no part of it
    assert take(parts) is not stack


@pytest.mark.parametrize("change", ["copied", "reversed", "shortened", "trained"])
def test_what_was_left_of_other_factors_is_not_taken(change: str) -> None:
    parts = some()
    stack = Stack.of(parts)
    leave(parts, stack)
    if change == "trained":
        parts[0].down.mul_(2.0)
    changed = {"copied": some(), "reversed": parts[::-1], "shortened": parts[:-1], "trained": parts}[change]
    found = take(changed)
    assert found is not stack
    assert torch.equal(found.down, Stack.of(changed).down)


def told(parts: list[LowRank], weights: list[float], result: LowRank) -> Fidelity:
    report = Report()
    report.record("m", parts, weights, result)
    return report.total


@pytest.mark.parametrize("share", [2.0, 0.5, 0.1, 1e-2, 1e-4, 1e-6])
def test_reports_on_float32_agree_with_those_on_float64(share: float) -> None:
    """Also where the result is so near the sum that float32's products could not tell them apart."""
    parts, weights = [low_rank(PLACE, 6, seed=seed) for seed in (1, 2, 3)], [1.0, -0.5, share]
    result = concat(parts[:2], weights[:2]).truncate()  # other factors, or rounding would be the same and cancel
    got = told(parts, weights, result)
    wide = [part.wide().to(torch.float64) for part in parts]
    wanted = told(wide, weights, result.to(torch.float64))
    assert vars(got) == pytest.approx(vars(wanted), rel=2e-5, abs=1e-9)
    total = math.hypot(*(weight * part.norm() for weight, part in zip(weights, parts, strict=True)))
    assert wanted.error == pytest.approx(share * parts[2].norm() / total, rel=0.05, abs=1e-6)


def test_reports_see_through_terms_that_cancel_within_an_adapter() -> None:
    """Large terms that cancel to a small delta: rounding is relative to the terms, and so float64 has to be used."""
    small, large = low_rank(PLACE, 2, seed=1), low_rank(PLACE, 8, seed=2)
    down = torch.cat([small.down, 100 * large.down, 100 * large.down])
    up = torch.cat([small.up, 100 * large.up, -100 * large.up], dim=1)
    assert told([LowRank(down, up)], [1.0], small.scaled(0.7).truncate()).error == pytest.approx(0.3, rel=1e-6)

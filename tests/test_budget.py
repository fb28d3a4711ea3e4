"""The global budget: an exact knapsack, against every choice there is, a dynamic programme and a solver of others."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lorahub.merge import budget as module_under_test
from lorahub.merge.budget import Allocation
from lorahub.merge.budget import allocate as allocation
from making import LAW

Spectra = Mapping[str, Sequence[float]]

# few values, so that ties abound; whole and broken ones, and such as differ in the last digits of float32 only
plain = st.sampled_from([0.0, 1.0, 1.5, 2.0, 3.0])
close = st.integers(-3, 3).map(lambda steps: float(np.float32(1) + np.float32(2**-23) * np.float32(steps)))
broad = st.floats(2**-12, 2**12, width=32)
EQUAL, UNEQUAL = [12], [3, 5, 7, 12, 30, 118]


@st.composite
def problems(draw: st.DrawFn, choices: Sequence[int]) -> tuple[dict[str, list[float]], dict[str, int], int]:
    values = draw(st.sampled_from([plain, close, broad]))
    spectra = {
        f"m{index}": sorted(draw(st.lists(values, min_size=1, max_size=4)), reverse=True)
        for index in range(draw(st.integers(1, 4)))
    }
    costs = {name: draw(st.sampled_from(choices)) for name in spectra}
    whole = sum(costs[name] * len(values) for name, values in spectra.items())
    return spectra, costs, draw(st.integers(0, whole + 2))


def allocate(spectra: Spectra, costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """The ranks, of which none better may exist."""
    found = allocation(spectra, costs, budget)
    assert found.missed == 0.0
    return found.ranks


def value(spectra: Spectra, ranks: Mapping[str, int]) -> Fraction:
    """The sum of the kept squares, without rounding."""
    return sum((Fraction(one * one) for name, kept in ranks.items() for one in spectra[name][:kept]), Fraction(0))


def used(costs: Mapping[str, int], ranks: Mapping[str, int]) -> int:
    return sum(costs[name] * rank for name, rank in ranks.items())


def best_subset(spectra: Spectra, costs: Mapping[str, int], budget: int) -> Fraction:
    """Over all subsets of triplets, not only those that take the largest first."""
    triplets = [(Fraction(one * one), costs[name]) for name, values in spectra.items() for one in values]
    best = Fraction(0)
    for chosen in itertools.product([False, True], repeat=len(triplets)):
        picked = list(itertools.compress(triplets, chosen))
        if sum(cost for _, cost in picked) <= budget:
            best = max(best, sum((worth for worth, _ in picked), Fraction(0)))
    return best


def best_by_table(spectra: Spectra, costs: Mapping[str, int], budget: int) -> float:
    """The textbook's dynamic programme over every parameter of the budget."""
    table = np.zeros(budget + 1)
    for name, values in spectra.items():
        for one in values:
            table[costs[name] :] = np.maximum(table[costs[name] :], table[: budget + 1 - costs[name]] + one * one)
    return float(table[-1])


def linear_bound(spectra: Spectra, costs: Mapping[str, int], budget: int) -> Fraction:
    """The linear programme's optimum: by density, the last triplet in part."""
    triplets = sorted(
        ((Fraction(one * one), costs[name]) for name, values in spectra.items() for one in values),
        key=lambda triplet: -triplet[0] / triplet[1],
    )
    total = Fraction(0)
    for worth, cost in triplets:
        part = min(cost, budget)
        total += worth * part / cost
        budget -= part
    return total


@pytest.mark.parametrize("costs", [EQUAL, UNEQUAL], ids=["equal costs", "unequal costs"])
def test_no_subset_is_worth_more(costs: list[int]) -> None:
    @LAW
    @given(problems(costs).filter(lambda problem: sum(map(len, problem[0].values())) <= 9))
    def law(problem: tuple[dict[str, list[float]], dict[str, int], int]) -> None:
        spectra, prices, budget = problem
        ranks = allocate(spectra, prices, budget)
        assert used(prices, ranks) <= budget
        assert value(spectra, ranks) == best_subset(spectra, prices, budget)

    law()


@LAW
@given(problems(UNEQUAL))
def test_the_linear_bound_holds_and_is_no_further_than_one_triplet(
    problem: tuple[dict[str, list[float]], dict[str, int], int],
) -> None:
    spectra, costs, budget = problem
    found, bound = value(spectra, allocate(spectra, costs, budget)), linear_bound(spectra, costs, budget)
    largest = max(Fraction(one * one) for values in spectra.values() for one in values)
    assert bound - largest <= found <= bound


@LAW
@given(problems(UNEQUAL))
def test_a_larger_budget_is_worth_no_less(problem: tuple[dict[str, list[float]], dict[str, int], int]) -> None:
    spectra, costs, budget = problem
    worth = [value(spectra, allocate(spectra, costs, budget + more)) for more in (0, 1, 5, 30)]
    assert worth == sorted(worth)


def test_equal_costs_keep_the_largest_of_all() -> None:
    spectra = {"a": [5.0, 1.0, 0.5], "b": [4.0, 3.0, 2.0], "c": [0.1]}
    assert allocate(spectra, dict.fromkeys(spectra, 10), 40) == {"a": 1, "b": 3, "c": 0}
    assert allocate(spectra, dict.fromkeys(spectra, 10), 39) == {"a": 1, "b": 2, "c": 0}
    assert allocate(spectra, dict.fromkeys(spectra, 10), 9) == {"a": 0, "b": 0, "c": 0}


def test_of_equal_triplets_the_first_modules_go_first_and_zeros_never() -> None:
    spectra = {"a": [1.0, 1.0], "b": [1.0, 1.0], "c": [0.0, 0.0]}
    costs = dict.fromkeys(spectra, 7)
    assert [allocate(spectra, costs, 7 * triplets) for triplets in (1, 3, 6)] == [
        {"a": 1, "b": 0, "c": 0},
        {"a": 2, "b": 1, "c": 0},
        {"a": 2, "b": 2, "c": 0},
    ]


def test_greed_by_density_is_not_the_optimum_and_not_the_answer() -> None:
    spectra = {"dense": [3.0], "large": [4.0]}  # squares 9 and 16
    assert allocate(spectra, {"dense": 5, "large": 10}, 10) == {"dense": 0, "large": 1}


@pytest.mark.parametrize("seed", range(6))
def test_middling_problems_against_a_table(seed: int) -> None:
    chance = np.random.default_rng(seed)
    spectra = {f"m{index}": sorted(chance.gamma(1.0, size=12).tolist(), reverse=True) for index in range(20)}
    costs = {name: int(chance.integers(20, 200)) for name in spectra}
    for budget in chance.integers(100, 20_000, 5).tolist():
        ranks = allocate(spectra, costs, budget)
        assert used(costs, ranks) <= budget
        assert float(value(spectra, ranks)) == pytest.approx(best_by_table(spectra, costs, budget), rel=1e-12)


SEVEN_B = [8192, 5120, 5120, 8192, 18432, 18432, 18432]
PIPELINE = [640, 1088, 1280, 1408, 2560, 2048, 2880, 1600, 3200]


@pytest.mark.parametrize("shapes", [SEVEN_B, PIPELINE], ids=["7B", "Stable Diffusion"])
@pytest.mark.parametrize("share", [0.05, 0.4])
def test_large_problems_against_a_solver(shapes: list[int], share: float) -> None:
    """The solver's optimum of the same integer programme, proved to one part in 10^9."""
    optimize = pytest.importorskip("scipy.optimize")
    chance = np.random.default_rng(1)
    spectra, costs = {}, {}
    for index in range(60):
        values = chance.gamma(2.0) * np.arange(1, 33) ** -chance.uniform(0.3, 1.5)
        spectra[f"m{index}"], costs[f"m{index}"] = values.tolist(), shapes[index % len(shapes)]
    budget = int(share * sum(32 * cost for cost in costs.values())) + 17
    worth = np.array([one * one for values in spectra.values() for one in values])
    weights = np.array([costs[name] for name, values in spectra.items() for _ in values])
    solved = optimize.milp(
        -worth / worth.max(), constraints=optimize.LinearConstraint(weights / 64, ub=budget / 64),
        integrality=np.ones(len(worth)), bounds=optimize.Bounds(0, 1), options={"mip_rel_gap": 1e-9, "time_limit": 20},
    )  # fmt: skip
    ranks = allocate(spectra, costs, budget)
    assert used(costs, ranks) <= budget
    assert float(value(spectra, ranks)) == pytest.approx(-solved.fun * worth.max(), rel=1e-8)


@pytest.mark.parametrize("kind", ["decaying", "random", "equal", "nearly equal"])
def test_three_hundred_modules_take_no_time(kind: str) -> None:
    chance = np.random.default_rng(2)
    draw = {
        "decaying": lambda: chance.gamma(2.0) * np.exp(-np.arange(128) / chance.uniform(5, 60)),
        "random": lambda: np.sort(1 + 0.5 * chance.random(128))[::-1],
        "equal": lambda: np.ones(128),
        "nearly equal": lambda: np.sort(1 + 1e-7 * chance.standard_normal(128))[::-1],
    }[kind]
    spectra = {f"m{index}": draw().tolist() for index in range(300)}
    for shapes in (SEVEN_B, PIPELINE):
        costs = {name: shapes[index % len(shapes)] for index, name in enumerate(spectra)}
        budget = sum(costs.values()) * 40 + 1
        began = time.process_time()
        ranks = allocate(spectra, costs, budget)
        assert time.process_time() - began < 3.0  # 0.1 s where nothing else runs
        assert budget - used(costs, ranks) < max(shapes)


def test_a_search_that_is_given_up_says_what_it_may_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values in proportion to costs that share no divisor, and no patience."""
    chance = np.random.default_rng(3)
    costs = {f"m{index}": 2 * int(chance.integers(5000, 20_000)) + 1 for index in range(30)}
    spectra = {name: np.sort(np.sqrt(cost + chance.random(10)))[::-1].tolist() for name, cost in costs.items()}
    monkeypatch.setattr(module_under_test, "_PATIENCE", 2000)
    budget = sum(costs.values()) * 4
    found = allocation(spectra, costs, budget)
    assert used(costs, found.ranks) <= budget
    missing = float(linear_bound(spectra, costs, budget) - value(spectra, found.ranks))
    assert 0 < missing <= found.missed <= missing * (1 + 1e-6)
    assert allocation({"a": [1.0]}, {"a": 5}, 5) == Allocation({"a": 1})

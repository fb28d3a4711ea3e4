"""The laws of merging, on the public call, against dense float64 algebra.

Each holds for any dtypes, ranks, alphas, rsLoRA scales, missing modules, convolutions and embeddings; errors are
bounded by a few roundings of the arithmetic (float32, or float64 where all factors are) and of the stored dtype.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lorahub.hub.adapter import Adapter
from lorahub.hub.lowrank import LowRank
from lorahub.merge.run import merge
from making import (
    BASE,
    DTYPES,
    LAW,
    ROUNDOFF,
    adapters,
    assert_equal,
    carried_out,
    delta,
    deltas,
    merged,
    rounding,
    seeds,
    sizes,
    times,
    weight_values,
    weighted_sum,
)

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
ingredients = st.lists(st.tuples(adapters(), weight_values), min_size=1, max_size=4)
Ingredients = list[tuple[Adapter, float]]


def apart(some: Ingredients) -> tuple[list[Adapter], list[float]]:
    return [one for one, _ in some], [weight for _, weight in some]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@LAW
@given(some=ingredients)
def test_a_merge_is_the_weighted_sum(dtype: torch.dtype, some: Ingredients) -> None:
    inputs, weights = apart(some)
    assert_equal(merged(inputs, weights, dtype=dtype), weighted_sum(inputs, weights), rounding(inputs, weights, dtype))


@LAW
@given(adapters())
def test_identity(one: Adapter) -> None:
    assert_equal(merged([one], [1.0]), deltas(one), rounding([one], [1.0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_keeps_factors_without_scale_bit_by_bit(dtype: torch.dtype) -> None:
    one = Adapter({name: LowRank(torch.randn(2, 3).to(dtype), torch.randn(4, 2).to(dtype)) for name in ("a", "b")})
    same = merge([one]).adapter.modules
    for name, module in one.modules.items():
        assert torch.equal(same[name].up, module.up)
        assert torch.equal(same[name].down, module.down)
        assert same[name].dtype == dtype


@LAW
@given(adapters(), weight_values)
def test_homogeneity(one: Adapter, weight: float) -> None:
    assert_equal(merged([one], [weight]), times(deltas(one), weight), rounding([one], [weight]))


@LAW
@given(ingredients, weight_values)
def test_scaling_all_weights_scales_the_merge(some: Ingredients, factor: float) -> None:
    inputs, weights = apart(some)
    scaled = [factor * weight for weight in weights]
    assert_equal(merged(inputs, scaled), times(merged(inputs, weights), factor), rounding(inputs, scaled))


@LAW
@given(ingredients, weight_values)
def test_scaling_before_and_after_are_the_same(some: Ingredients, factor: float) -> None:
    inputs, weights = apart(some)
    before = merged([one.scaled(factor) for one in inputs], weights)
    after = deltas(merge(inputs, weights=weights, dtype=torch.float32).adapter.scaled(factor))
    assert_equal(before, after, rounding(inputs, [factor * weight for weight in weights]))


@LAW
@given(ingredients, ingredients)
def test_additivity(first: Ingredients, second: Ingredients) -> None:
    together = apart(first + second)
    separate = [merge(*_call(apart(part)), dtype=torch.float32).adapter for part in (first, second)]
    assert_equal(merged(*together), weighted_sum(separate, [1.0, 1.0]), rounding(*together))
    assert_equal(merged(separate, [1.0, 1.0]), merged(*together), rounding(*together, factor=16))


def _call(some: tuple[list[Adapter], list[float]]) -> tuple[list[Adapter], str, list[float]]:
    return some[0], "exact", some[1]


@LAW
@given(ingredients, st.randoms(use_true_random=False))
def test_order_does_not_matter(some: Ingredients, chance: object) -> None:
    mixed = list(some)
    chance.shuffle(mixed)  # type: ignore[attr-defined]
    assert_equal(merged(*apart(mixed)), merged(*apart(some)), rounding(*apart(some)))


@LAW
@given(ingredients, st.integers(1, 5))
def test_order_does_not_matter_for_the_error_of_a_truncation(some: Ingredients, rank: int) -> None:
    inputs, weights = apart(some)
    forth = carried_out(merge(inputs, weights=weights, dtype=torch.float64, given={"rank": rank})).report.modules
    back = carried_out(
        merge(inputs[::-1], weights=weights[::-1], dtype=torch.float64, given={"rank": rank})
    ).report.modules
    wanted, size = weighted_sum(inputs, weights), sizes(inputs, weights)
    for name, fidelity in forth.items():
        norm = float(wanted[name].norm())
        if norm > 1e-3 * size[name]:
            slack = 64 * ROUNDOFF[torch.float32] * size[name] / norm
            assert fidelity.error == pytest.approx(back[name].error, abs=slack)


@LAW
@given(adapters())
def test_half_and_half_of_the_same_is_the_same(one: Adapter) -> None:
    assert_equal(merged([one, one], [0.5, 0.5]), deltas(one), rounding([one], [1.0]))


@LAW
@given(adapters(), st.sampled_from(DTYPES), st.sampled_from([{}, {"rank": 2}, {"energy": 1.0}]))
def test_a_difference_with_itself_is_nothing(one: Adapter, dtype: torch.dtype, given: dict[str, Any]) -> None:
    nothing = merged([one, one], [1.0, -1.0], dtype=dtype, **given)
    assert_equal(nothing, times(deltas(one), 0.0), rounding([one, one], [1.0, -1.0], factor=16))
    assert all(bool(torch.isfinite(matrix).all()) for matrix in nothing.values())


@LAW
@given(ingredients)
def test_modules_are_united(some: Ingredients) -> None:
    inputs, weights = apart(some)
    result = merge(inputs, weights=weights, dtype=torch.float32).adapter
    assert list(result.modules) == sorted({name for one in inputs for name in one.modules})
    for name, module in result.modules.items():
        holding = [i for i, one in enumerate(inputs) if name in one.modules]
        holders = [i for i in holding if weights[i]] or holding[:1]  # an adapter of weight 0 takes no part
        assert module.rank == result.shapes[name].rank == sum(inputs[i].modules[name].rank for i in holders)
        assert (module.kernel, module.embedding) == (BASE[name].kernel, BASE[name].embedding)
        if len(holders) == 1:
            (only,) = holders
            wanted = weights[only] * delta(inputs[only].modules[name])
            assert float((delta(module) - wanted).norm()) <= rounding(inputs, weights)[name]


@LAW
@given(ingredients, st.sampled_from([{"rank": 99}, {"energy": 1.0}, {"rank": 99, "energy": 1.0}]))
def test_truncation_at_full_rank_is_the_identity(some: Ingredients, given: dict[str, Any]) -> None:
    inputs, weights = apart(some)
    assert_equal(merged(inputs, weights, **given), weighted_sum(inputs, weights), rounding(inputs, weights, factor=64))


@LAW
@given(ingredients, st.integers(1, 6))
def test_truncation_is_the_best_of_its_rank(some: Ingredients, rank: int) -> None:
    inputs, weights = apart(some)
    allowed, wanted = rounding(inputs, weights, factor=64), weighted_sum(inputs, weights)
    for name, got in merged(inputs, weights, rank=rank).items():
        optimum = float(torch.linalg.svdvals(wanted[name])[rank:].norm())
        assert float((got - wanted[name]).norm()) <= optimum + allowed[name]
        assert int(torch.linalg.matrix_rank(got, atol=allowed[name], rtol=0.0)) <= rank


@LAW
@given(ingredients, st.floats(0.1, 0.999))
def test_energy_is_kept(some: Ingredients, energy: float) -> None:
    inputs, weights = apart(some)
    result = carried_out(merge(inputs, weights=weights, dtype=torch.float64, given={"energy": energy}))
    wanted, size = weighted_sum(inputs, weights), sizes(inputs, weights)
    for name, module in result.adapter.modules.items():
        norm = float(wanted[name].norm())
        if norm > 1e-3 * size[name]:
            assert float(delta(module).norm() / norm) ** 2 >= energy - 1e-4
            values = torch.linalg.svdvals(wanted[name])
            without_last = float((values[: module.rank - 1] ** 2).sum()) / norm**2
            assert without_last <= energy + 1e-4


@LAW
@given(ingredients, st.sampled_from(DTYPES), st.sampled_from([{}, {"rank": 1}, {"rank": 3}, {"energy": 0.7}]))
def test_the_reported_error_is_the_measured_one(some: Ingredients, dtype: torch.dtype, given: dict[str, Any]) -> None:
    """What is stored is compared, cast included, and what is compared with is the exact sum."""
    inputs, weights = apart(some)
    result = carried_out(merge(inputs, weights=weights, dtype=dtype, given=given))
    got, wanted, size = deltas(result.adapter), weighted_sum(inputs, weights), sizes(inputs, weights)
    told = {**result.report.modules, "": result.report.total}
    assert set(told) == {*wanted, ""}
    for name, fidelity in told.items():
        names = [name] if name else list(wanted)
        left, right = (torch.cat([table[n].flatten() for n in names]) for table in (got, wanted))
        norm, whole = float(right.norm()), sum(size[n] for n in names)
        if norm <= 1e-3 * whole:
            continue  # the inputs cancel, see test_report
        slack = 8 * ROUNDOFF[torch.float32] * whole / norm
        assert fidelity.error == pytest.approx(float((left - right).norm()) / norm, abs=slack)
        assert fidelity.norm_ratio == pytest.approx(float(left.norm()) / norm, abs=slack)
        assert fidelity.energy == pytest.approx(fidelity.norm_ratio**2)
        product = float(left.norm()) * norm
        assert fidelity.cosine == pytest.approx(float(left @ right) / product if product else 0.0, abs=2 * slack)


@LAW
@given(st.lists(adapters(torch.float64), min_size=1, max_size=3), seeds, st.sampled_from([{}, {"rank": 3}]))
def test_the_factorisation_does_not_matter(inputs: list[Adapter], seed: int, given: dict[str, Any]) -> None:
    """(up M, M^-1 down) merges like (up, down): to the same delta, or to one of the same error."""
    weights = [1.0, -0.5, 2.0][: len(inputs)]
    mixed = [_remixed(one, seed) for one in inputs]
    wanted = weighted_sum(inputs, weights)
    size = sizes(mixed, weights)
    left, right = (merged(some, weights, dtype=torch.float64, **given) for some in (inputs, mixed))
    for name, matrix in wanted.items():
        apart_left, apart_right = (float((found[name] - matrix).norm()) for found in (left, right))
        assert apart_left == pytest.approx(apart_right, abs=1e-10 * size[name])
    if not given:
        assert_equal(left, right, {name: 1e-12 * bound for name, bound in size.items()})


def _remixed(some: Adapter, seed: int) -> Adapter:
    chance = torch.Generator().manual_seed(seed)

    def remix(module: LowRank) -> LowRank:
        turn = torch.linalg.qr(torch.randn(module.rank, module.rank, generator=chance, dtype=torch.float64)).Q
        stretch = torch.logspace(-1, 1, module.rank, dtype=torch.float64)
        down = (turn.T @ module.down) / stretch[:, None]
        return LowRank(down, (module.up @ turn) * stretch, module.scale, module.kernel, module.embedding)

    return some.mapped(remix)


@LAW
@given(ingredients)
def test_merging_leaves_its_inputs_alone(some: Ingredients) -> None:
    inputs, weights = apart(some)
    before = [deltas(one) for one in inputs]
    carried_out(merge(inputs, weights=weights, given={"rank": 2}))
    for one, table in zip(inputs, before, strict=True):
        assert_equal(deltas(one), table, dict.fromkeys(table, 0.0))

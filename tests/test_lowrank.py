"""The algebra of one module's delta, against dense float64 algebra."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from lorahub.hub.errors import BadOption, IncompatibleAdapters
from lorahub.hub.lowrank import LowRank, Shape, concat
from making import DTYPES, LAW, ROUNDOFF, Place, delta, low_rank, low_ranks, places, scales, seeds, weight_values
from torch import Tensor

pairs = places().flatmap(lambda place: st.tuples(low_ranks(place), low_ranks(place)))
doubles = places().flatmap(lambda place: low_ranks(place, torch.float64))


def size(module: LowRank) -> float:
    """What rounding errors of a delta are relative to."""
    return abs(module.scale) * float(module.up.double().norm() * module.down.double().norm())


def unit(module: LowRank) -> float:
    """The unit roundoff of the arithmetic on a delta."""
    return ROUNDOFF[torch.promote_types(module.dtype, torch.float32)]


def best(matrix: Tensor, rank: int) -> Tensor:
    """Eckart and Young's approximation from the dense singular value decomposition."""
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = (u[:, :rank] * values[:rank]) @ vh[:rank]
    return nearest


@LAW
@given(low_ranks())
def test_dense_is_scale_up_down(module: LowRank) -> None:
    dense = module.dense()
    channels = module.down.shape[1] // math.prod(module.kernel)
    assert dense.shape == (module.up.shape[0], channels, *module.kernel)
    assert dense.dtype == torch.promote_types(module.dtype, torch.float32)
    assert float((dense.double().flatten(1) - delta(module)).norm()) <= 16 * unit(module) * size(module)


@LAW
@given(pairs)
def test_inner_norm_and_cosine_are_those_of_dense_matrices(pair: tuple[LowRank, LowRank]) -> None:
    one, other = pair
    left, right = delta(one), delta(other)
    bound = size(one) * size(other)
    assert one.inner(other) == pytest.approx(float((left * right).sum()), abs=1e-12 * bound)
    assert one.inner(other) == pytest.approx(other.inner(one), abs=1e-12 * bound)
    assert one.norm() == pytest.approx(float(left.norm()), rel=1e-6, abs=1e-7 * size(one))
    expected = float((left * right).sum() / (left.norm() * right.norm()))
    assert one.cosine(other) == pytest.approx(expected, abs=1e-6 * bound / float(left.norm() * right.norm()))


def test_cosine_with_zero_is_zero() -> None:
    module = low_rank(Place(4, 5), 2)
    assert module.cosine(module.scaled(0.0)) == 0.0
    assert module.scaled(0.0).norm() == 0.0


@LAW
@given(low_ranks(), weight_values)
def test_scaling_multiplies_the_delta_and_touches_no_factor(module: LowRank, weight: float) -> None:
    scaled = module.scaled(weight)
    assert scaled.up is module.up
    assert scaled.down is module.down
    torch.testing.assert_close(delta(scaled), weight * delta(module), rtol=1e-12, atol=1e-12)


@LAW
@given(low_ranks(), st.sampled_from([1.0, -1.0, 3.0, -0.5, 0.0]))
def test_folding_moves_the_scale_into_both_factors(module: LowRank, weight: float) -> None:
    scaled = module.scaled(weight)
    folded = scaled.folded()
    assert folded.scale == 1.0
    assert float((delta(folded) - delta(scaled)).norm()) <= 8 * unit(module) * size(scaled)
    if scaled.scale:  # shared evenly: neither factor leaves the range of float16 before the other
        growth = [float(a.double().norm() / b.double().norm()) for a, b in
                  ((folded.up, scaled.up), (folded.down, scaled.down))]  # fmt: skip
        assert growth == pytest.approx([math.sqrt(abs(scaled.scale))] * 2, rel=1e-2)


@LAW
@given(low_ranks(), st.sampled_from(DTYPES))
def test_casting_keeps_all_but_the_dtype(module: LowRank, dtype: torch.dtype) -> None:
    cast = module.to(dtype)
    assert cast.up.dtype == cast.down.dtype == cast.dtype == dtype
    assert (cast.scale, cast.shape) == (module.scale, module.shape)
    assert module.wide().dtype == torch.promote_types(module.dtype, torch.float32)


@LAW
@given(places(), st.data())
def test_concat_is_the_weighted_sum(place: Place, data: st.DataObject) -> None:
    parts = data.draw(st.lists(low_ranks(place), min_size=1, max_size=4))
    weights = data.draw(st.lists(weight_values, min_size=len(parts), max_size=len(parts)))
    total = concat(parts, weights)
    assert total.scale == 1.0
    assert total.shape == Shape(
        sum(part.rank for part in parts), place.outputs, place.inputs, place.kernel, place.embedding
    )
    wanted = sum(weight * delta(part) for part, weight in zip(parts, weights, strict=True))
    bound = sum(abs(weight) * size(part) for part, weight in zip(parts, weights, strict=True))
    assert float((delta(total) - wanted).norm()) <= 8 * max(map(unit, parts)) * bound


def test_concat_without_weights_adds() -> None:
    one, other = (low_rank(Place(4, 5), 2, seed=seed, dtype=torch.float64) for seed in (1, 2))
    torch.testing.assert_close(delta(concat([one, other])), delta(one) + delta(other))


def test_concat_takes_the_kernel_of_a_pointwise_convolution() -> None:
    linear, pointwise = low_rank(Place(4, 5), 2), low_rank(Place(4, 5, (1, 1)), 3)
    for parts in ([linear, pointwise], [pointwise, linear]):
        assert concat(parts).kernel == (1, 1)


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 2.0, 3.0]])
def test_concat_refuses_a_wrong_number_of_weights(weights: list[float]) -> None:
    module = low_rank(Place(4, 5), 2)
    with pytest.raises(BadOption, match=f"{len(weights)} weights for 2 deltas"):
        concat([module, module], weights)


def test_concat_of_nothing_is_refused() -> None:
    with pytest.raises(BadOption, match="at least one"):
        concat([])


@pytest.mark.parametrize(
    ("one", "other", "fit"),
    [
        (Place(4, 5), Place(4, 5), True),
        (Place(4, 5), Place(4, 5, (1, 1)), True),
        (Place(4, 5), Place(5, 4), False),
        (Place(4, 9), Place(4, 9, (3, 3)), False),
        (Place(4, 9, (9,)), Place(4, 9, (3, 3)), False),
        (Place(4, 5), Place(4, 5, (), embedding=True), False),
    ],
)
def test_which_shapes_can_be_added(one: Place, other: Place, fit: bool) -> None:
    left, right = low_rank(one, 1), low_rank(other, 3)
    assert left.shape.fits(right.shape) == right.shape.fits(left.shape) == fit
    if not fit:
        for work in (left.inner, lambda module: concat([left, module])):
            with pytest.raises(IncompatibleAdapters, match=r"do not match") as caught:
                work(right)
            assert str(left.shape) in str(caught.value)
            assert str(right.shape) in str(caught.value)


@pytest.mark.parametrize(("down", "up"), [((3, 5), (4, 2)), ((3,), (4, 3)), ((3, 5, 1, 1), (4, 3))])
def test_factors_that_do_not_multiply_are_refused(down: tuple[int, ...], up: tuple[int, ...]) -> None:
    with pytest.raises(IncompatibleAdapters, match="do not multiply"):
        LowRank(torch.zeros(down), torch.zeros(up))


@LAW
@given(low_ranks())
def test_svd_is_one_and_its_signs_are_fixed(module: LowRank) -> None:
    u, values, vh = module.svd()
    keep = min(module.rank, module.up.shape[0], module.down.shape[1])
    assert (u.shape[1], values.shape[0], vh.shape[0]) == (keep, keep, keep)
    bound = 32 * unit(module)
    torch.testing.assert_close(u.T @ u, torch.eye(keep, dtype=u.dtype), rtol=0, atol=bound)
    torch.testing.assert_close(vh @ vh.T, torch.eye(keep, dtype=u.dtype), rtol=0, atol=bound)
    assert float(((u * values) @ vh - delta(module)).norm()) <= bound * size(module)
    assert (values[:-1] >= values[1:]).all()
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()


@LAW
@given(doubles, st.integers(1, 12))
def test_truncation_is_the_optimum_of_eckart_and_young(module: LowRank, rank: int) -> None:
    wanted, cut = best(delta(module), rank), module.truncate(rank)
    values = torch.linalg.svdvals(delta(module))
    assert cut.rank == min(rank, module.rank, *delta(module).shape)
    assert cut.scale == 1.0
    assert (cut.kernel, cut.embedding, cut.dtype) == (module.kernel, module.embedding, torch.float64)
    optimum = float((wanted - delta(module)).norm())
    assert float((delta(cut) - delta(module)).norm()) == pytest.approx(optimum, abs=1e-10 * size(module))
    if rank >= len(values) or values[rank - 1] - values[rank] > 1e-3 * values[0]:  # else the optimum is not unique
        assert float((delta(cut) - wanted).norm()) <= 1e-10 * size(module)


@LAW
@given(low_ranks())
def test_truncation_at_full_rank_is_the_identity(module: LowRank) -> None:
    for whole in (module.truncate(), module.truncate(module.rank + 3), module.truncate(energy=1.0)):
        assert float((delta(whole) - delta(module)).norm()) <= 32 * unit(module) * size(module)


@LAW
@given(low_ranks())
def test_truncation_balances_the_factors(module: LowRank) -> None:
    cut = module.truncate(3)
    torch.testing.assert_close(cut.up.norm(dim=0), cut.down.norm(dim=1), rtol=1e-3, atol=32 * unit(module) ** 0.5)
    gram = cut.up.T @ cut.up
    off = gram - torch.diag(gram.diagonal())
    assert float(off.norm()) <= 64 * unit(module) * float(gram.norm()) + 1e-12


@LAW
@given(doubles, st.floats(0.05, 1.0))
def test_energy_keeps_the_least_rank_that_suffices(module: LowRank, energy: float) -> None:
    values = torch.linalg.svdvals(delta(module)) ** 2
    shares = torch.cumsum(values, 0) / values.sum()
    assume(float((shares - energy).abs().min()) > 1e-9 or energy == 1.0)
    cut = module.truncate(energy=energy)
    least = int((shares < energy - 1e-12).sum()) + 1
    assert cut.rank == min(least, len(values))
    assert cut.norm() ** 2 >= (energy - 1e-9) * module.norm() ** 2


@LAW
@given(doubles, st.integers(1, 6), st.floats(0.3, 1.0))
def test_of_rank_and_energy_the_stricter_counts(module: LowRank, rank: int, energy: float) -> None:
    both = module.truncate(rank, energy=energy)
    assert both.rank == min(module.truncate(rank).rank, module.truncate(energy=energy).rank)


def test_a_zero_delta_truncates_to_zero() -> None:
    zero = LowRank(torch.zeros(3, 5), torch.zeros(4, 3))
    for cut in (zero.truncate(2), zero.truncate(energy=0.9), zero.truncate()):
        assert cut.norm() == 0.0
        assert bool(torch.isfinite(cut.up).all() & torch.isfinite(cut.down).all())
    assert zero.truncate(energy=0.9).rank == 1


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank: int) -> None:
    with pytest.raises(BadOption, match=f"rank is {rank}"):
        low_rank(Place(4, 5), 2).truncate(rank)


@pytest.mark.parametrize("energy", [0.0, -0.1, 1.5, math.nan, math.inf])
def test_an_energy_that_is_no_share_is_refused(energy: float) -> None:
    with pytest.raises(BadOption, match="energy is"):
        low_rank(Place(4, 5), 2).truncate(energy=energy)


@LAW
@given(places(), st.integers(1, 5), seeds, st.data())
def test_the_factorisation_does_not_matter(place: Place, rank: int, seed: int, data: st.DataObject) -> None:
    """(up M, M^-1 down) is the same delta: every result, and the truncated factors themselves, are the same."""
    module = low_rank(place, rank, seed=seed, scale=data.draw(scales(rank)), dtype=torch.float64)
    mix = torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    mix += 3 * torch.eye(rank, dtype=torch.float64)
    assume(float(torch.linalg.cond(mix)) < 1e3)
    other = LowRank(torch.linalg.solve(mix, module.down), module.up @ mix, module.scale, place.kernel, place.embedding)
    probe = low_rank(place, 2, seed=seed + 2, dtype=torch.float64)
    tolerance = 1e-9 * (size(module) + size(other))
    assert other.norm() == pytest.approx(module.norm(), abs=tolerance)
    assert other.inner(probe) == pytest.approx(module.inner(probe), abs=tolerance * size(probe))
    u, values, _ = module.svd()
    torch.testing.assert_close(values, other.svd()[1], rtol=0, atol=tolerance)
    gaps = torch.cat([values[:-1] - values[1:], values[-1:]])
    assume(float(gaps.min()) > 1e-3 * float(values[0]))  # else singular vectors are not unique
    peaks = u.abs().sort(dim=0, descending=True).values
    assume(len(peaks) == 1 or float((peaks[0] - peaks[1]).min()) > 1e-6)  # else the rule for signs is not
    torch.testing.assert_close(module.truncate(3).up, other.truncate(3).up, rtol=0, atol=1e-5 * size(module))
    torch.testing.assert_close(module.truncate(3).down, other.truncate(3).down, rtol=0, atol=1e-5 * size(module))

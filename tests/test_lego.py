"""LoRA-LEGO: the identities that the method implies, its published weakness, and the definition written out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import BadOption, FormatError
from lorahub.hub.lowrank import LowRank
from lorahub.merge.methods.lego import lego
from lorahub.merge.run import merge
from making import (
    BASE,
    DTYPES,
    LAW,
    Place,
    adapter,
    adapters,
    assert_equal,
    carried_out,
    delta,
    deltas,
    low_rank,
    merged,
    rounding,
    seeds,
    times,
    weighted_sum,
)
from sklearn.cluster import KMeans
from torch import Tensor

FEATURES, GAUGES, REWEIGHTS = ("raw", "unit", "balanced"), ("stored", "svd"), ("inf", "l2", "none")
PLACE = Place(40, 60)
FEW = settings(LAW, max_examples=20)


def alone(module: LowRank) -> Adapter:
    return Adapter({"m": module}, "tiny", {}, {"name": "alone"})


def built(parts: Sequence[LowRank], weights: Sequence[float] | None = None, **options: Any) -> LowRank:
    """The merged module of adapters that have one module each."""
    return lego([alone(part) for part in parts], list(weights or [1.0] * len(parts)), **options).modules["m"]


def distance(got: LowRank, wanted: Tensor) -> float:
    """Relative, of a delta from a matrix."""
    return float((delta(got) - wanted).norm() / wanted.norm())


def shuffled(part: LowRank, seed: int) -> LowRank:
    """The same delta, its terms in another order."""
    order = torch.randperm(part.rank, generator=torch.Generator().manual_seed(seed))
    return replace(part, down=part.down[order], up=part.up[:, order])


def flipped(part: LowRank, seed: int) -> LowRank:
    """The same delta, with the signs of both halves of some terms changed."""
    signs = torch.randint(0, 2, (part.rank,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    signs[0] = -1
    return replace(part, down=part.down * signs[:, None], up=part.up * signs)


def refactored(part: LowRank, seed: int) -> LowRank:
    """The same delta, with an invertible matrix and its inverse between the factors."""
    mix = torch.randn(part.rank, part.rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mix += 3 * torch.eye(part.rank, dtype=torch.float64)
    return replace(part, down=mix @ part.down.double(), up=part.up.double() @ torch.linalg.inv(mix))


def kin(count: int, rank: int, *, noise: float = 0.05, dtype: torch.dtype = torch.float32) -> list[LowRank]:
    """Adapters that share their terms but for noise, each in its own order."""
    first = low_rank(PLACE, rank, seed=1, dtype=dtype)
    others = [low_rank(PLACE, rank, seed=10 + index, dtype=dtype) for index in range(count)]
    mixed = [LowRank(first.down + noise * other.down, first.up + noise * other.up, scale=0.7) for other in others]
    return [shuffled(part, seed) for seed, part in enumerate(mixed)]


# --- identities -----------------------------------------------------------------------------------------------------


@FEW
@given(adapters(), st.sampled_from(FEATURES), st.sampled_from(GAUGES), st.sampled_from(REWEIGHTS))
def test_one_adapter_is_itself(one: Adapter, features: str, gauge: str, reweight: str) -> None:
    got = merged([one], [1.0], method="lego", features=features, gauge=gauge, reweight=reweight)
    assert_equal(got, deltas(one), rounding([one], [1.0], factor=64))


@LAW
@given(seeds, st.integers(2, 6), st.integers(1, 8), st.sampled_from(FEATURES), st.sampled_from(REWEIGHTS))
def test_copies_with_their_terms_in_any_order_are_the_adapter(
    seed: int, copies: int, rank: int, features: str, reweight: str
) -> None:
    """It averages: T copies of a delta are that delta, where the exact sum is T times as much."""
    part = low_rank(PLACE, rank, seed=seed, scale=0.7)
    got = built([shuffled(part, i) for i in range(copies)], features=features, reweight=reweight, seed=seed)
    assert got.rank == rank
    assert distance(got, delta(part)) < 1e-6


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("gauge", GAUGES)
def test_every_term_alone_is_the_sum_by_the_root_of_the_count(features: str, gauge: str) -> None:
    parts, weights = [low_rank(PLACE, 5, seed=seed, scale=0.3) for seed in range(4)], [1.0, -0.5, 2.0, 0.25]
    got = built(parts, weights, rank=20, features=features, gauge=gauge)
    wanted = sum(weight * delta(part) for weight, part in zip(weights, parts, strict=True)) / 2
    assert got.rank == 20
    assert distance(got, torch.as_tensor(wanted)) < 1e-6
    assert built(parts, weights, rank=99, gauge=gauge).rank == 20


@LAW
@given(seeds, st.integers(2, 5), st.integers(1, 8))
def test_the_canonical_gauge_knows_a_delta_however_it_is_factored(seed: int, copies: int, rank: int) -> None:
    part = low_rank(PLACE, rank, seed=seed, scale=0.7, dtype=torch.float64)
    same = [flipped(part, seed), *(refactored(part, seed + i) for i in range(copies))]
    assert distance(built(same, gauge="svd", seed=seed), delta(part)) < 1e-9


@pytest.mark.parametrize("change", [flipped, refactored])
def test_the_stored_gauge_does_not(change: Any) -> None:
    """The weakness of the method as it is published: equal deltas, stored otherwise, are taken for different ones."""
    part = low_rank(PLACE, 8, dtype=torch.float64)
    got = built([part, change(part, 3)])
    assert distance(change(part, 3), delta(part)) < 1e-12
    assert distance(got, delta(part)) > 0.3


@FEW
@given(seeds, st.sampled_from([2.0, 0.25, -1.0, 3.7]), st.sampled_from(FEATURES), st.sampled_from(REWEIGHTS))
def test_weights_times_a_number_give_the_result_times_it(
    seed: int, number: float, features: str, reweight: str
) -> None:
    names = "layer.0.query", "conv.wide"
    inputs, weights = [adapter(*names, seed=seed + i, rank=3 + i, scale=0.5) for i in range(3)], [0.5, -0.3, 1.2]
    options = {"method": "lego", "features": features, "reweight": reweight}
    got = merged(inputs, [number * weight for weight in weights], **options)
    wanted = times(merged(inputs, weights, **options), number)
    assert_equal(got, wanted, rounding(inputs, [number * weight for weight in weights], factor=64))


# --- order, ranks, places -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gauge", GAUGES)
def test_the_order_of_the_adapters_does_not_change_a_bit(dtype: torch.dtype, gauge: str) -> None:
    inputs = [adapter(seed=i, rank=2 + i, dtype=dtype) for i in range(4)]
    forth = merged(inputs, [1, 2, 3, 4], method="lego", gauge=gauge)
    back = merged(inputs[::-1], [4, 3, 2, 1], method="lego", gauge=gauge)
    for name in BASE:
        assert torch.equal(forth[name], back[name])


def test_the_order_of_the_terms_does_not_matter() -> None:
    parts = kin(4, 6, noise=1.0)
    wanted = delta(built(parts))
    for seed in range(5):
        assert distance(built([shuffled(part, seed) for part in parts]), wanted) < 1e-5


def test_different_ranks_go_together() -> None:
    inputs = [adapter(rank=rank, seed=rank) for rank in (3, 7, 5)]
    for given_rank, got in [(None, 7), (4, 4), (15, 15), (16, 15)]:
        result = carried_out(merge(inputs, "lego", given={"rank": given_rank})).adapter
        assert {module.rank for module in result.modules.values()} == {got}
        assert {shape.rank for shape in result.shapes.values()} == {got}


def test_the_canonical_gauge_has_no_more_terms_than_the_delta_has_directions() -> None:
    result = carried_out(merge([adapter(rank=9)], "lego", given={"gauge": "svd"})).adapter
    wanted = {name: min(9, place.outputs, place.inputs) for name, place in BASE.items()}
    assert {name: module.rank for name, module in result.modules.items()} == wanted
    assert {name: shape.rank for name, shape in result.shapes.items()} == wanted


def test_a_module_that_one_adapter_holds_is_passed_on() -> None:
    one, other = adapter("conv.wide", rank=3, seed=1), adapter("words", rank=5, seed=2)
    assert_equal(
        merged([one, other], [0.5, -2.0], method="lego"),
        weighted_sum([one, other], [0.5, -2.0]),
        rounding([one, other], [0.5, -2.0]),
    )


def test_convolutions_and_embeddings_stay_what_they_are() -> None:
    result = merge([adapter(seed=i) for i in range(3)], "lego", given={"rank": 2}).adapter
    for name, place in BASE.items():
        assert result.modules[name].shape == result.shapes[name]
        assert (result.modules[name].kernel, result.modules[name].embedding) == (place.kernel, place.embedding)


# --- the definition, written out ------------------------------------------------------------------------------------


def terms(parts: Sequence[LowRank], weights: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    """Every term as (row of down, column of up), weights and scales shared evenly, the sign on up."""
    found = []
    for part, weight in zip(parts, weights, strict=True):
        root = math.sqrt(abs(weight * part.scale))
        for j in range(part.rank):
            found.append((root * part.down[j].double(), math.copysign(root, weight) * part.up[:, j].double()))
    return found


def even(term: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The same product of halves of equal length."""
    ratio = torch.sqrt(term[1].norm() / term[0].norm())
    return term[0] * ratio, term[1] / ratio


def written_out(
    found: Sequence[tuple[Tensor, Tensor]], labels: Sequence[int], count: int, reweight: str, factor: float
) -> Tensor:
    """The algorithm of the paper, given the clusters: a loop over them, and an (outputs, inputs) matrix."""
    order = {"inf": math.inf, "l2": 2.0}
    total = torch.zeros(PLACE.outputs, PLACE.inputs, dtype=torch.float64)
    for cluster in range(count):
        members = [torch.cat(term) for term, label in zip(found, labels, strict=True) if label == cluster]
        mean = torch.stack(members).mean(dim=0)
        if reweight != "none":
            length = sum(float(torch.linalg.vector_norm(member, order[reweight])) for member in members) / len(members)
            mean = mean * length / torch.linalg.vector_norm(mean, order[reweight])
        total += torch.outer(mean[PLACE.inputs :], mean[: PLACE.inputs])
    return factor * total


def theirs(vectors: Sequence[Tensor], count: int) -> KMeans:
    return KMeans(count, n_init=10, random_state=0).fit(torch.stack(list(vectors)).numpy())


def stretched(part: LowRank, seed: int, down: float, up: float) -> LowRank:
    """Each term's halves times powers of a number of its own."""
    lengths = 10 ** torch.empty(part.rank).uniform_(-1, 1, generator=torch.Generator().manual_seed(seed))
    return replace(part, down=part.down * lengths[:, None] ** down, up=part.up * lengths**up)


# how the kin adapters' terms are changed so that only the features of that name show what belongs together
HIDDEN = {"raw": (0.0, 0.0), "unit": (1.0, 0.5), "balanced": (1.0, -1.0)}


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0, 1.0], [0.6, 0.8, 0.7, 0.75]], ids=str)
@pytest.mark.parametrize("reweight", REWEIGHTS)
@pytest.mark.parametrize("features", FEATURES)
def test_the_result_is_the_definition_on_scikit_learns_clusters(
    features: str, reweight: str, weights: list[float]
) -> None:
    parts = [stretched(part, seed, *HIDDEN[features]) for seed, part in enumerate(kin(4, 6))]
    found = terms(parts, weights)
    compared = {
        "raw": found,
        "unit": [(down / down.norm(), up / up.norm()) for down, up in found],
        "balanced": [even(term) for term in found],
    }[features]
    labels = theirs([torch.cat(term) for term in compared], 6).labels_
    averaged = compared if features == "balanced" else found
    wanted = written_out(averaged, labels.tolist(), 6, reweight, 1.0)
    assert distance(built(parts, weights, features=features, reweight=reweight), wanted) < 1e-6


def test_terms_that_differ_little_are_told_apart() -> None:
    """Adapters trained from one beginning: all terms lie close together, and float32's products could not see how."""
    parts = [replace(part, down=part.down + 10000) for part in kin(4, 6)]
    found = terms(parts, [1.0] * 4)
    labels = theirs([torch.cat(term) for term in found], 6).labels_
    assert distance(built(parts), written_out(found, labels.tolist(), 6, "inf", 1.0)) < 1e-6


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"rank": 3}, math.sqrt(5 / 3)),
        ({"rank": 3, "rescale": False}, 1.0),
        ({"rank": 3, "reference": 12.0}, 2.0),
        ({"rank": 3, "rescale": False, "reference": 12.0}, 1.0),
    ],
    ids=str,
)
def test_pruning_and_output_reweighting(options: dict[str, Any], factor: float) -> None:
    """One adapter of five terms, two of them nearly twins of others, to three: the twins are melted."""
    few, noise = low_rank(PLACE, 3, seed=1), low_rank(PLACE, 5, seed=2)
    twins = LowRank(few.down[[0, 1, 2, 0, 1]] + 0.1 * noise.down, few.up[:, [0, 1, 2, 0, 1]] + 0.1 * noise.up)
    wanted = written_out(terms([twins], [1.0]), [0, 1, 2, 0, 1], 3, "inf", factor)
    assert distance(built([twins], **options), wanted) < 1e-6


def test_the_reference_is_the_mean_rank() -> None:
    parts = [low_rank(PLACE, rank, seed=rank) for rank in (2, 6)]
    assert distance(built(parts, rank=8), sum(map(delta, parts)) * math.sqrt(4 / 8)) < 1e-6  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [2, 6, 11])
def test_random_terms_are_clustered_as_well_as_scikit_learn_does(rank: int) -> None:
    """Told from the result alone: without reweighting the means hold all of the terms but their inertia."""
    parts = [low_rank(PLACE, 6, seed=seed) for seed in range(4)]
    got = built(parts, rank=rank, reweight="none", rescale=False, restarts=10)
    vectors = [torch.cat(term) for term in terms(parts, [1.0] * 4)]
    means = torch.cat([got.down, got.up.T], dim=1).double()
    nearest = torch.cdist(torch.stack(vectors), means).min(dim=1).values
    assert float((nearest**2).sum()) <= 1.01 * theirs(vectors, rank).inertia_


# --- what has no direction, and what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("reweight", REWEIGHTS)
def test_untrained_adapters_are_nothing(features: str, gauge: str, reweight: str) -> None:
    fresh = [replace(low_rank(PLACE, 4, seed=seed), up=torch.zeros(40, 4)) for seed in range(3)]
    for options in ({}, {"rank": 2}):
        got = built(fresh, features=features, gauge=gauge, reweight=reweight, **options)
        assert not delta(got).any()


@pytest.mark.parametrize("reweight", REWEIGHTS)
def test_a_mean_that_is_nothing_is_not_blown_up(reweight: str) -> None:
    """Terms that cancel leave rounding; lengthened to the members' norm it would be noise as loud as they were."""
    part = low_rank(PLACE, 1)
    opposite = replace(part, down=-part.down * (1 + 1e-7), up=-part.up)
    assert float(delta(built([part, opposite], reweight=reweight)).norm()) < 1e-9 * part.norm()


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("reweight", REWEIGHTS)
@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_halves_of_very_different_lengths_are_no_trouble(features: str, reweight: str, size: float) -> None:
    part = low_rank(PLACE, 5)
    far = replace(part, down=part.down * size, up=part.up / size)
    copies = [shuffled(far, seed) for seed in range(3)]
    assert distance(built(copies, features=features, reweight=reweight), delta(part)) < 1e-5


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("features", FEATURES)
def test_what_is_no_number_is_refused(number: float, features: str) -> None:
    broken = adapter("layer.0.query", seed=1)
    broken.modules["layer.0.query"].down[0, 0] = number
    with pytest.raises(FormatError, match="NaN or Inf"):
        merged(
            [broken, adapter("layer.0.query"), adapter("layer.0.query", seed=2)],
            [1.0] * 3,
            method="lego",
            features=features,
        )


def test_all_weights_zero_give_nothing() -> None:
    result = merged([adapter(seed=1), adapter(seed=2)], [0.0, 0.0], method="lego")
    assert not any(matrix.any() for matrix in result.values())


@pytest.mark.parametrize(
    "given_options",
    [
        {"rank": 0},
        {"features": "cooked"},
        {"gauge": "odd"},
        {"reweight": "l3"},
        {"restarts": 0},
        {"reference": 0.0},
        {"reference": -1.0},
        {"reference": math.inf},
        {"reference": math.nan},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_before_any_module_is_read(given_options: dict[str, Any]) -> None:
    name, value = next(iter(given_options.items()))
    with pytest.raises(BadOption, match=f"{name} is {value!r}; expected"):
        merge([adapter()], "lego", given=given_options)


def test_the_seed_counts() -> None:
    """Where nothing tells the terms apart, which of them are melted is chance."""
    parts = [low_rank(PLACE, 12, seed=seed) for seed in range(4)]
    results = [delta(built(parts, seed=seed, restarts=1)) for seed in (0, 0, 1, 2, 3)]
    assert torch.equal(results[0], results[1])
    assert not all(torch.equal(results[0], other) for other in results[2:])

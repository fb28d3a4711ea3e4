"""The analysis against dense algebra: cosines, subspaces, signs, ranks; and what it must not depend on."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import BadOption, FormatError, IncompatibleAdapters
from lorahub.hub.lowrank import LowRank, Shape
from lorahub.merge.analyze import ELSEWHERE, Analysis, analyze, layer_of
from lorahub.merge.compare import Relation
from lorahub.merge.signs import EXACT, SAMPLE, Grid
from making import BASE, DTYPES, LAW, Place, adapter, adapters, delta, low_rank, seeds
from torch import Tensor

LARGE = Place(400, 700)
DOUBLE = torch.float64


def alone(module: LowRank, name: str = "encoder.layer.0.query", called: str = "one") -> Adapter:
    return Adapter({name: module}, "tiny", {}, {"name": called})


def pair(*modules: LowRank, seed: int = 0) -> Relation:
    return analyze([alone(module) for module in modules], seed=seed).pairs[0].whole


# --- oracles -------------------------------------------------------------------------------------------------------


def dense_cosine(one: Tensor, other: Tensor) -> float:
    product = float(one.norm() * other.norm())
    return float((one * other).sum()) / product if product else 0.0


def bases(matrix: Tensor, floor: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the column space and of the row space."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((values > floor * values[0]).sum())
    return left[:, :rank], right[:rank].T


def dense_overlap(one: Tensor, other: Tensor) -> float:
    """By principal angles: the mean squared cosine."""
    return float(torch.linalg.svdvals(one.T @ other).square().sum()) / min(one.shape[1], other.shape[1])


def dense_conflict(one: Tensor, other: Tensor) -> tuple[float, float]:
    """The share of opposite signs, and the same with the weight min(|x|, |y|): what x + y cancels."""
    opposite = one * other < 0
    lost = (one.abs() + other.abs() - (one + other).abs()) / 2
    return float(opposite.double().mean()), float(lost.sum() / torch.minimum(one.abs(), other.abs()).sum())


def assert_same(one: Analysis, other: Analysis, within: float = 1e-6) -> None:
    """Equal numbers everywhere, up to rounding."""

    def flat(data: object) -> list[object]:
        if isinstance(data, dict):
            return [item for key in sorted(data) for item in (key, *flat(data[key]))]
        return [item for part in data for item in flat(part)] if isinstance(data, (list, tuple)) else [data]

    left, right = flat(asdict(one)), flat(asdict(other))
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert b == pytest.approx(a, rel=within, abs=within) if isinstance(a, float) else a == b


# --- one module ----------------------------------------------------------------------------------------------------


@LAW
@given(st.sampled_from(list(BASE)), st.integers(1, 6), st.integers(1, 6), seeds, st.sampled_from(DTYPES))
def test_a_pair_of_modules_equals_dense_algebra(
    name: str, rank: int, other: int, seed: int, dtype: torch.dtype
) -> None:
    """Linear maps, convolutions and embeddings, whatever the ranks and dtypes; small deltas are counted in full."""
    one = low_rank(BASE[name], rank, seed=seed, scale=0.3, dtype=dtype)
    two = low_rank(BASE[name], other, seed=seed + 1, scale=-2.0, dtype=dtype)
    found = analyze([alone(one), alone(two)], [1.0, 0.5])
    told, x, y = found.pairs[0].whole, delta(one), 0.5 * delta(two)
    assert told.cosine == pytest.approx(dense_cosine(x, y), abs=1e-9)
    assert told.norm_ratio == pytest.approx(float(y.norm() / x.norm()), rel=1e-9)
    assert told.outputs is not None
    assert told.inputs is not None
    for side, overlap in ((0, told.outputs), (1, told.inputs)):
        first, second = bases(x)[side], bases(y)[side]
        assert overlap.value == pytest.approx(dense_overlap(first, second), abs=1e-6)
        assert overlap.chance == pytest.approx(max(first.shape[1], second.shape[1]) / first.shape[0])
    conflict, clash = dense_conflict(x, y)
    assert (told.conflict, told.conflict_error) == (pytest.approx(conflict, abs=1e-12), 0.0)
    assert (told.clash, told.clash_error) == (pytest.approx(clash, abs=1e-9), 0.0)
    whole = float((x + y).square().sum() / (x.square().sum() + y.square().sum()))
    assert found.interference == pytest.approx(whole, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("ratio", [1.0, 3.0, -1.0, -0.1])
def test_equal_and_opposite_deltas(ratio: float) -> None:
    one = low_rank(Place(30, 40), 4, dtype=DOUBLE)
    told = pair(one, one.scaled(ratio))
    assert told.cosine == pytest.approx(math.copysign(1.0, ratio))
    assert told.norm_ratio == pytest.approx(abs(ratio))
    assert told.outputs is not None
    assert (told.outputs.value, told.outputs.beyond_chance) == (pytest.approx(1.0), pytest.approx(1.0))
    assert (told.conflict, told.clash) == ((0.0, 0.0) if ratio > 0 else (1.0, 1.0))
    found = analyze([alone(one), alone(one)], [1.0, ratio])
    assert found.interference == pytest.approx((1 + ratio) ** 2 / (1 + ratio**2), abs=1e-9)
    assert analyze([alone(one)] * 5).interference == pytest.approx(5.0)


def test_orthogonal_deltas_of_disjoint_spaces() -> None:
    eye = torch.eye(40, dtype=DOUBLE)
    one, other = LowRank(eye[:4], eye[:30, :4]), LowRank(eye[4:6], eye[:30, 4:6])
    told = pair(one, other)
    assert told.outputs is not None
    assert told.inputs is not None
    assert (told.cosine, told.outputs.value, told.inputs.value, told.conflict) == (0.0, 0.0, 0.0, 0.0)
    assert told.clash is None
    assert analyze([alone(one), alone(other)]).interference == pytest.approx(1.0)
    within = pair(LowRank(eye[:1], eye[:30, :1]), one)
    assert within.outputs is not None
    assert within.outputs.value == pytest.approx(1.0)  # the smaller lies within the larger
    assert within.outputs.chance == pytest.approx(4 / 30)


def test_random_subspaces_overlap_by_chance() -> None:
    told = [pair(low_rank(LARGE, 8, seed=2 * i), low_rank(LARGE, 20, seed=2 * i + 1)) for i in range(8)]
    outputs, inputs = [t.outputs for t in told if t.outputs], [t.inputs for t in told if t.inputs]
    assert sum(o.value for o in outputs) / 8 == pytest.approx(outputs[0].chance, rel=0.05) == 20 / 400
    assert sum(o.value for o in inputs) / 8 == pytest.approx(inputs[0].chance, rel=0.05)
    assert inputs[0].chance == 20 / 700


def test_a_delta_of_zero_has_no_direction() -> None:
    nothing = LowRank(torch.randn(2, 40), torch.zeros(30, 2))
    told = pair(low_rank(Place(30, 40), 3), nothing)
    assert (told.cosine, told.norm_ratio, told.outputs, told.inputs, told.clash) == (0.0, 0.0, None, None, None)
    assert pair(nothing, nothing).norm_ratio is None
    found = analyze([alone(nothing)])
    assert found.interference is None
    assert (found.adapters[0].rank, found.adapters[0].stable_rank, found.adapters[0].rank_99) == (0, 0.0, 0)
    json.dumps(asdict(found), allow_nan=False)


def test_ranks_are_numerical() -> None:
    """A sum of copies has their rank, whatever the number of its columns."""
    one = low_rank(Place(30, 40), 3)
    doubled = LowRank(torch.cat([one.down, one.down]), torch.cat([one.up, one.up], dim=1))
    told = pair(one, doubled)
    assert told.outputs is not None
    assert told.outputs.chance == pytest.approx(3 / 30)
    assert analyze([alone(doubled)]).adapters[0].rank == 3


# --- the sample ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "shared"), [(1, 0.0), (1, 0.7), (16, 0.0), (16, 0.5)])
def test_sampled_signs_lie_within_their_stated_errors(rank: int, shared: float) -> None:
    """Over many seeds: the estimate is right on average, and misses by as much as it says it does."""
    one, other = low_rank(LARGE, rank, seed=1), low_rank(LARGE, rank, seed=2)
    other = replace(other, up=(1 - shared) * other.up + shared * one.up, down=other.down + shared * one.down)
    truth = dense_conflict(delta(one), delta(other))
    told = [pair(one, other, seed=seed) for seed in range(40)]
    for wanted, values, errors in (
        (truth[0], [t.conflict for t in told], [t.conflict_error for t in told]),
        (truth[1], [t.clash or 0.0 for t in told], [t.clash_error for t in told]),
    ):
        misses = torch.tensor(values) - wanted
        stated = torch.tensor(errors).square().mean().sqrt()
        assert 0.7 < float(misses.square().mean().sqrt() / stated) < 1.4
        assert abs(float(misses.mean())) < 3 * float(stated) / math.sqrt(40)
        assert float(stated) < (0.06 if rank == 1 else 0.01)


def test_the_sample_is_drawn_by_seed_and_never_of_all_entries() -> None:
    one, other = low_rank(LARGE, 4, seed=1), low_rank(LARGE, 4, seed=2)
    assert pair(one, other) == pair(one, other)
    assert pair(one, other).conflict != pair(one, other, seed=1).conflict
    state = torch.get_rng_state()
    found = analyze([alone(one), alone(other)])
    assert torch.equal(torch.get_rng_state(), state)
    assert (found.sampled, found.modules) == (1, 1)
    assert SAMPLE < EXACT < LARGE.outputs * LARGE.inputs
    for shape in (one.shape, Shape(4, 3, 10**6), Shape(4, 10**6, 1), Shape(4, 4096, 11008)):
        grid = Grid.of("any", shape)
        assert SAMPLE * 0.99 <= len(grid.rows) * len(grid.columns) <= SAMPLE
    small = low_rank(Place(256, 256), 2)
    assert analyze([alone(small), alone(small)]).sampled == 0


@pytest.mark.parametrize("place", [Place(3, 40000), Place(40000, 1), Place(200, 9 * 100, (3, 3))], ids=str)
def test_long_and_narrow_deltas_are_sampled_too(place: Place) -> None:
    one, other = low_rank(place, 2, seed=1, dtype=DOUBLE), low_rank(place, 2, seed=2, dtype=DOUBLE)
    wanted = dense_conflict(delta(one), delta(other))[0]
    told = pair(one, other)
    assert abs(told.conflict - wanted) <= 4 * told.conflict_error


# --- whole adapters ------------------------------------------------------------------------------------------------


@LAW
@given(adapters(), adapters())
def test_whole_adapters_equal_dense_algebra(one: Adapter, other: Adapter) -> None:
    """Modules that one side lacks are zero there; subspaces and signs are compared where both have a module."""
    found = analyze([one, other], [1.0, 2.0], base="tiny")
    told, shared = found.pairs[0].whole, set(one.modules) & set(other.modules)
    x = {name: delta(module) for name, module in one.modules.items()}
    y = {name: 2 * delta(module) for name, module in other.modules.items()}
    inner = sum(float((x[name] * y[name]).sum()) for name in shared)
    first, second = (math.sqrt(sum(float(m.square().sum()) for m in side.values())) for side in (x, y))
    assert told.cosine == pytest.approx(inner / (first * second), abs=1e-6)
    assert told.norm_ratio == pytest.approx(second / first, rel=1e-6)
    assert told.modules == len(shared)
    assert set(found.pairs[0].modules) == shared
    entries = sum(x[name].numel() for name in shared)
    opposite = sum(int((x[name] * y[name] < 0).sum()) for name in shared)
    assert told.conflict == pytest.approx(opposite / entries if entries else 0.0, abs=1e-9)
    for profile, norm in zip(found.adapters, (first, second), strict=True):
        assert profile.norm == pytest.approx(norm, rel=1e-6)
    wanted = (first**2 + second**2 + 2 * inner) / (first**2 + second**2)
    assert found.interference == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_overlaps_add_up_over_modules() -> None:
    one, other = adapter(rank=2, seed=1), adapter(rank=3, seed=2)
    found = analyze([one, other]).pairs[0]
    parts, smaller = 0.0, 0
    for name in BASE:
        left, right = bases(delta(one.modules[name]))[0], bases(delta(other.modules[name]))[0]
        parts += dense_overlap(left, right) * min(left.shape[1], right.shape[1])
        smaller += min(left.shape[1], right.shape[1])
    assert found.whole.outputs is not None
    assert found.whole.outputs.value == pytest.approx(parts / smaller, rel=1e-6)


def test_adapters_without_a_common_module() -> None:
    found = analyze([adapter("words"), adapter("conv.wide", seed=1), adapter("conv.line", seed=2)])
    for each in found.pairs:
        assert (each.whole.cosine, each.whole.modules, each.layers, each.modules) == (0.0, 0, {}, {})
        assert (each.whole.outputs, each.whole.clash) == (None, None)
    assert found.interference == pytest.approx(1.0)


def refactored(some: Adapter, seed: int) -> Adapter:
    """The same deltas by other factors: (B M, M^-1 A), with another scale."""
    chance = torch.Generator().manual_seed(seed)

    def change(module: LowRank) -> LowRank:
        mix = torch.randn(module.rank, module.rank, generator=chance, dtype=DOUBLE)
        mix += 3 * torch.eye(module.rank, dtype=DOUBLE)
        inverse = torch.linalg.inv(mix)
        return replace(module, up=-0.5 * module.up @ mix, down=inverse @ module.down, scale=-2 * module.scale)

    return some.mapped(change)


def test_the_gauge_does_not_matter() -> None:
    large = {"encoder.layer.3.up": low_rank(LARGE, 4, seed=7, dtype=DOUBLE)}
    inputs = [adapter(seed=seed, dtype=DOUBLE) for seed in range(3)]
    inputs = [replace(one, modules={**one.modules, **large}) for one in inputs]
    assert_same(analyze([refactored(one, 9) for one in inputs]), analyze(inputs), within=1e-8)


def test_order_swaps_pairs_and_a_common_factor_changes_norms_alone() -> None:
    inputs = [adapter(seed=seed, dtype=DOUBLE) for seed in range(3)]
    forth, back = analyze(inputs), analyze(inputs[::-1])
    swapped = {(one.second, one.first): one for one in back.pairs}
    for one in forth.pairs:
        other = swapped[one.first, one.second]
        assert one.whole.cosine == pytest.approx(other.whole.cosine, abs=1e-12)
        assert one.whole.norm_ratio == pytest.approx(1 / (other.whole.norm_ratio or 0.0))
        assert (one.whole.conflict, one.whole.modules) == (other.whole.conflict, other.whole.modules)
    assert forth.interference == pytest.approx(back.interference)
    scaled = analyze(inputs, [1e-6] * 3)
    assert [one.norm for one in scaled.adapters] == pytest.approx([1e-6 * one.norm for one in forth.adapters])
    assert_same(replace(scaled, adapters=(), layers=()), replace(forth, adapters=(), layers=()), within=1e-9)


def test_weights_are_put_on_first() -> None:
    inputs = [adapter(seed=seed, dtype=DOUBLE) for seed in range(2)]
    found, by_hand = analyze(inputs, [0.5, -2.0]), analyze([inputs[0].scaled(0.5), inputs[1].scaled(-2.0)])
    assert_same(replace(found, adapters=()), replace(by_hand, adapters=()))
    assert [one.weight for one in found.adapters] == [0.5, -2.0]


# --- profiles and layers -------------------------------------------------------------------------------------------


def test_a_profile_equals_dense_singular_values() -> None:
    one = adapter(rank=5, dtype=DOUBLE)
    told = analyze([one]).adapters[0]
    values = {name: torch.linalg.svdvals(delta(module)) for name, module in one.modules.items()}
    squares = {name: float(v.square().sum()) for name, v in values.items()}
    whole = sum(squares.values())
    assert told.norm == pytest.approx(math.sqrt(whole))
    stable = sum(squares[name] * squares[name] / float(v[0] ** 2) for name, v in values.items()) / whole
    assert told.stable_rank == pytest.approx(stable)
    energy = [sum(float(v[:k].square().sum()) for v in values.values()) / whole for k in range(1, 6)]
    assert told.energy == pytest.approx(energy)
    assert told.rank_90 == next(k for k in range(1, 6) if energy[k - 1] >= 0.9)
    assert (told.rank, told.modules, told.base) == (5, len(BASE), "tiny")


@pytest.mark.parametrize("rank", [1, 3])
def test_the_stable_rank_of_equal_singular_values_is_the_rank(rank: int) -> None:
    eye = torch.eye(8)
    told = analyze([alone(LowRank(eye[:rank], 5 * eye[:, :rank]))]).adapters[0]
    assert told.stable_rank == pytest.approx(rank)
    assert (told.rank_90, told.rank_99) == (rank, rank)


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("encoder.layer.3.attention.self.query", "encoder.layer.3"),
        ("model.layers.11.mlp.experts.2.w1", "model.layers.11"),
        ("h.7.attn.c_attn", "h.7"),
        ("unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q", "unet.down_blocks.0.attentions.1"),
        ("unet.up_blocks.2.resnets.0.conv1", "unet.up_blocks.2.resnets.0"),
        ("unet.mid_block.attentions.0.proj_in", "unet.mid_block.attentions.0"),
        ("transformer.single_transformer_blocks.12.attn.to_q", "transformer.single_transformer_blocks.12"),
        ("text_encoder_2.text_model.encoder.layers.5.mlp.fc1", "text_encoder_2.text_model.encoder.layers.5"),
        ("classifier.dense", ELSEWHERE),
        ("unet.time_embedding.linear_1", ELSEWHERE),
    ],
)
def test_a_module_belongs_to_a_layer(module: str, layer: str) -> None:
    assert layer_of(module) == layer


def test_layers_gather_their_modules_in_order() -> None:
    names = [f"model.layers.{i}.{part}" for i in (10, 2) for part in ("q", "v")] + ["head"]
    inputs = [
        Adapter({n: low_rank(Place(9, 9), 2, seed=100 * s + i, dtype=DOUBLE) for i, n in enumerate(names)}, "tiny")
        for s in range(2)
    ]
    found = analyze(inputs)
    assert [(layer.name, layer.modules) for layer in found.layers] == [
        ("model.layers.2", 2),
        ("model.layers.10", 2),
        (ELSEWHERE, 1),
    ]
    assert [one.name for one in found.adapters] == ["adapter (1)", "adapter (2)"]
    x, y = (torch.cat([delta(some.modules[f"model.layers.2.{part}"]) for part in "qv"]) for some in inputs)
    told = found.pairs[0].layers["model.layers.2"]
    assert told.cosine == pytest.approx(dense_cosine(x, y))
    assert (told.conflict, told.clash) == pytest.approx(dense_conflict(x, y))
    assert found.layers[0].norms == pytest.approx((float(x.norm()), float(y.norm())))
    whole = float((x + y).square().sum() / (x.square().sum() + y.square().sum()))
    assert found.layers[0].interference == pytest.approx(whole)


# --- refusals ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_merged_cannot_be_compared() -> None:
    with pytest.raises(IncompatibleAdapters, match="gpt2"):
        analyze([adapter(base="gpt2"), adapter(base="roberta-base")])
    assert analyze([adapter(base="gpt2"), adapter(base="roberta-base", seed=1)], base="gpt2").pairs
    with pytest.raises(IncompatibleAdapters, match="30x40"):
        analyze([alone(low_rank(Place(30, 40), 2)), alone(low_rank(Place(40, 30), 2))])
    with pytest.raises(BadOption, match="weight"):
        analyze([adapter(), adapter(seed=1)], [1.0, 0.0])
    with pytest.raises(BadOption):
        analyze([])
    broken = LowRank(torch.full((1, 4), math.nan), torch.ones(4, 1))
    with pytest.raises(FormatError, match="NaN"):
        analyze([alone(broken)])


def test_progress_counts_modules() -> None:
    seen: list[tuple[int, int | None]] = []
    analyze([adapter("words"), adapter("conv.wide")], progress=lambda *told: seen.append(told))
    assert seen == [(1, 2), (2, 2)]

"""Adapters as vectors and back: exact, in one order, independent of the gauge where asked, and strict."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lorahub.generate.layout import Layout, Statistics, principal
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import BadOption, FormatError, GenerationError
from lorahub.hub.lowrank import LowRank
from making import LAW, ROUNDOFF, adapter, adapters, deltas, seeds
from schooling import MODULES, SIZE, expert


@LAW
@given(adapters(torch.float32))
def test_a_round_trip_is_exact_to_the_bit(some: Adapter) -> None:
    plain = some.mapped(lambda module: replace(module, scale=1.0))
    layout = Layout.of([plain])
    back = layout.adapter(layout.flatten(plain), name="back")
    assert set(back.modules) == set(plain.modules)
    assert back.base == plain.base
    assert back.name == "back"
    for name, module in plain.modules.items():
        assert torch.equal(back.modules[name].down, module.down)
        assert torch.equal(back.modules[name].up, module.up)
        assert back.modules[name].shape == module.shape
        assert back.modules[name].scale == 1


@LAW
@given(adapters(torch.float32), st.sampled_from(["none", "canonical"]))
def test_deltas_survive_whatever_the_scale_and_gauge(some: Adapter, gauge: Any) -> None:
    layout = Layout.of([some], gauge=gauge)
    vector = layout.flatten(some)
    assert vector.shape == (layout.size,)
    assert layout.size == some.parameters
    wanted = deltas(some)
    for name, got in deltas(layout.adapter(vector)).items():
        size = some.modules[name].up.double().norm() * some.modules[name].down.double().norm()
        allowed = 16 * ROUNDOFF[torch.float32] * abs(some.modules[name].scale) * float(size)
        assert float((got - wanted[name]).norm()) <= allowed


@LAW
@given(seeds, st.floats(0.25, 8))
def test_the_canonical_gauge_does_not_see_how_a_delta_is_split(seed: int, scale: float) -> None:
    some = adapter(seed=seed, rank=3, scale=scale)
    chance = torch.Generator().manual_seed(seed + 1)

    def turned(module: LowRank) -> LowRank:
        matrix = torch.linalg.qr(torch.randn(3, 3, generator=chance, dtype=torch.float64)).Q @ torch.diag(
            torch.tensor([3.0, 1.0, 0.4], dtype=torch.float64)
        )
        return replace(module, up=module.up.double() @ matrix, down=torch.linalg.inv(matrix) @ module.down.double())

    layout = Layout.of([some], gauge="canonical")
    one, other = layout.flatten(some), layout.flatten(some.mapped(turned))
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max()))
    assert not torch.allclose(Layout.of([some]).flatten(some), one, rtol=1e-2)


def test_the_canonical_factors_are_balanced_with_fixed_signs() -> None:
    some = expert("x", 3)
    layout = Layout.of([some], gauge="canonical")
    for name, module in layout.adapter(layout.flatten(some)).modules.items():
        values = torch.linalg.svdvals(deltas(some)[name])[:2].float()
        assert torch.allclose(module.up.T @ module.up, torch.diag(values), atol=1e-5)
        assert torch.allclose(module.down @ module.down.T, torch.diag(values), atol=1e-5)
        assert bool((module.up.gather(0, module.up.abs().argmax(dim=0, keepdim=True)) > 0).all())


def test_the_canonical_gauge_fills_a_rank_beyond_the_shape_with_zeros() -> None:
    some = Adapter({"thin": LowRank(torch.randn(5, 7), torch.randn(2, 5))}, "tiny")
    layout = Layout.of([some], gauge="canonical")
    module = layout.adapter(layout.flatten(some)).modules["thin"]
    assert module.rank == 5
    assert not module.up[:, 2:].any()
    assert torch.allclose(module.dense(), some.modules["thin"].dense(), atol=1e-5)


def test_modules_stand_by_layer_and_then_by_kind() -> None:
    names = ["h.10.attn.q_proj", "h.2.mlp.down_proj", "h.2.attn.o_proj", "h.2.attn.v_proj", "h.2.attn.k_proj",
             "h.2.attn.q_proj", "head", "h.2.mlp.up_proj", "h.2.extra"]  # fmt: skip
    some = Adapter({name: LowRank(torch.ones(1, 2), torch.ones(3, 1)) for name in names})
    places = Layout.of([some]).places
    assert [place.name for place in places] == [
        "head", "h.2.attn.q_proj", "h.2.attn.k_proj", "h.2.attn.v_proj", "h.2.attn.o_proj", "h.2.mlp.up_proj",
        "h.2.mlp.down_proj", "h.2.extra", "h.10.attn.q_proj",
    ]  # fmt: skip
    assert [(place.down, place.up) for place in places[:2]] == [
        (slice(0, 2), slice(2, 5)),
        (slice(5, 7), slice(7, 10)),
    ]
    backwards = Adapter(dict(reversed(some.modules.items())))
    assert Layout.of([backwards]) == Layout.of([some])
    numbered = Adapter({f"b.{n}.to_out.0": LowRank(torch.ones(1, 2), torch.ones(3, 1)) for n in (11, 2, "²")})
    assert [place.name for place in Layout.of([numbered]).places][1:] == ["b.2.to_out.0", "b.11.to_out.0"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (expert("b", 1, rank=3), r"b: blocks\.2\.attn\.q is 6x4 of rank 3, expected 6x4 of rank 2"),
        (expert("b", 1, base="other"), "b: is for other, expected an adapter of tiny"),
        (replace(expert("b", 1), extras={"bias": torch.ones(2)}), "b: also holds bias"),
        (replace(expert("b", 1), modules={"x.1.q": LowRank(torch.ones(2, 4), torch.ones(6, 2))}), "no module blocks.2"),
        (
            replace(expert("b", 1), modules={**expert("b", 1).modules, "z": expert("b", 1).modules["blocks.2.attn.v"]}),
            "b: has a module z",
        ),
    ],
)
def test_another_structure_is_refused_by_name(other: Adapter, message: str) -> None:
    layout = Layout.of([expert("a", 0)])
    for refusing in (lambda: Layout.of([expert("a", 0), other]), lambda: layout.flatten(other)):
        with pytest.raises(GenerationError, match=message):
            refusing()


def test_layouts_match_only_their_like() -> None:
    layout = Layout.of([expert("a", 0)])
    layout.match(Layout.of([expert("b", 1)]))
    with pytest.raises(GenerationError, match=r"the library: blocks\.2\.attn\.q is 6x4 of rank 3"):
        layout.match(Layout.of([expert("b", 1, rank=3)]))
    with pytest.raises(GenerationError, match="gauge 'canonical', expected 'none'"):
        layout.match(Layout.of([expert("b", 1)], gauge="canonical"))
    with pytest.raises(GenerationError, match="for other"):
        layout.match(Layout.of([expert("b", 1, base="other")]))


def test_what_is_no_number_and_what_has_no_place_are_refused() -> None:
    some = expert("a", 0)
    for gauge in ("none", "canonical"):
        layout = Layout.of([some], gauge=gauge)
        broken = expert("broken", 0)
        broken.modules["blocks.10.attn.q"].up[0, 0] = float("nan")
        with pytest.raises(GenerationError, match=r"broken: blocks\.10\.attn\.q holds NaN"):
            layout.flatten(broken)
    with pytest.raises(BadOption, match=rf"shape \(3,\); expected \({SIZE},\)"):
        layout.adapter(torch.zeros(3))
    with pytest.raises(BadOption, match="gauge is 'svd'"):
        Layout.of([some], gauge="svd")  # type: ignore[arg-type]
    with pytest.raises(GenerationError, match="no adapter"):
        Layout.of([])


def test_a_vectors_adapter_shares_nothing_with_it() -> None:
    layout = Layout.of([expert("a", 0)])
    vector = torch.zeros(layout.size)
    made = layout.adapter(vector)
    vector += 1
    assert not any(module.up.any() or module.down.any() for module in made.modules.values())


@pytest.mark.parametrize("rank", [1, 5])
def test_products_with_adapters_of_another_rank(rank: int) -> None:
    some = [expert(f"e{seed}", seed) for seed in range(3)]
    layout = Layout.of(some)
    other = layout.widened(rank)
    assert {place.rank for place in other.places} == {min(rank, place.inputs, place.outputs) for place in layout.places}
    vector = torch.randn(other.size, generator=torch.Generator().manual_seed(5))
    made, vectors = other.adapter(vector), torch.stack([layout.flatten(one) for one in some])
    inner = torch.tensor([[made.inner(one) for one in some]], dtype=torch.float64)
    assert torch.allclose(other.inner(vector[None], vectors, layout), inner, rtol=1e-5)
    cosines = torch.tensor([made.cosine(one) for one in some], dtype=torch.float64)
    assert torch.allclose(other.cosines(vector, vectors, layout), cosines, rtol=1e-5)


def test_products_are_those_of_adapters() -> None:
    some = [expert(f"e{seed}", seed, scale=0.5 + seed) for seed in range(3)]
    layout = Layout.of(some)
    vectors = torch.stack([layout.flatten(one) for one in some])
    wanted = torch.tensor([[one.inner(other) for other in some] for one in some], dtype=torch.float64)
    assert torch.allclose(layout.inner(vectors, vectors), wanted, rtol=1e-5)
    assert torch.allclose(layout.squares(vectors), wanted.diagonal(), rtol=1e-5)
    cosines = torch.tensor([some[0].cosine(one) for one in some], dtype=torch.float64)
    assert torch.allclose(layout.cosines(vectors[0], vectors), cosines, rtol=1e-5)
    assert float(layout.cosines(torch.zeros(layout.size), vectors).abs().max()) == 0
    away = some[0].inner(some[0]) - 2 * some[0].inner(some[1]) + some[1].inner(some[1])
    assert layout.error(vectors[0], vectors[1]) == pytest.approx((away / some[1].inner(some[1])) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("gauge", ["none", "canonical"])
def test_a_layout_survives_json(gauge: Any) -> None:
    layout = Layout.of([adapter()], gauge=gauge)
    assert Layout.from_json(json.loads(json.dumps(layout.as_json()))) == layout


@pytest.mark.parametrize(
    "change",
    [
        {"places": []}, {"places": "x"}, {"base": 3}, {"gauge": "svd"}, {"places": [["a", 1, 2]]},
        {"places": [["a", 0, 2, 2, [], False]]}, {"places": [["a", 1, 2, 2, [], False]] * 2},
        {"places": [["a", 2**20, 2**20, 2, [], False]]}, {"places": [[3, 1, 2, 2, [], False]]},
    ],
)  # fmt: skip
def test_a_damaged_layout_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        Layout.from_json({**Layout.of([expert("a", 0)]).as_json(), **change})
    with pytest.raises(FormatError):
        Layout.from_json(None)


def test_statistics_are_the_librarys_and_can_be_undone() -> None:
    vectors = torch.randn(40, SIZE, generator=torch.Generator().manual_seed(1)) * 3 + 1
    vectors[:, 5] = 2.0
    known = Statistics.of(vectors)
    values = known.standardise(vectors)
    varied = [at for at in range(SIZE) if at != 5]
    assert torch.allclose(values[:, varied].mean(dim=0), torch.zeros(SIZE - 1), atol=1e-5)
    assert torch.allclose(values[:, varied].std(dim=0, correction=0), torch.ones(SIZE - 1), atol=1e-5)
    assert not values[:, 5].any()
    assert torch.allclose(known.restore(values), vectors, atol=1e-5)


def test_statistics_by_factor_are_constant_in_it() -> None:
    layout = Layout.of([expert("a", 0)])
    vectors = torch.randn(7, SIZE, generator=torch.Generator().manual_seed(1))
    known = Statistics.by_tensor(vectors, layout)
    assert len(layout.tensors) == 2 * len(MODULES)
    for side in layout.tensors:
        assert torch.allclose(known.mean[side], vectors[:, side].mean().expand(side.stop - side.start))
        spread = vectors[:, side].std(correction=0)
        assert torch.allclose(known.spread[side], spread.expand(side.stop - side.start))


def test_all_principal_directions_lose_nothing() -> None:
    values = torch.randn(9, 50, generator=torch.Generator().manual_seed(2))
    values -= values.mean(dim=0)
    whole = principal(values, 9)
    assert whole.axes.shape == (8, 50)  # centred rows span one direction less
    assert torch.allclose(whole.axes @ whole.axes.T, torch.eye(8), atol=1e-5)
    assert torch.allclose(whole.restore(whole.reduce(values)), values, atol=1e-4)
    few = principal(values, 3)
    lost = float((few.restore(few.reduce(values)) - values).square().sum())
    best = float((torch.linalg.svdvals(values)[3:] ** 2).sum())
    assert lost == pytest.approx(best, rel=1e-4)

"""Compressing: Eckart and Young's optimum for every limit, files that keep to their size, and the command."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lorahub.hub.adapter import Adapter, LazyModules
from lorahub.hub.errors import BadOption, FormatError, IncompatibleAdapters, UnknownMethod
from lorahub.hub.lowrank import LowRank
from lorahub.hub.writing import save
from lorahub.merge import compress as module_under_test
from lorahub.merge.compress import Compressed, best_energy, compress, file_size, read_all, singular_values
from lorahub.merge.run import merge
from making import BASE, LAW, ROUNDOFF, Deltas, Place, adapters, assert_equal, delta, deltas, low_rank, seeds
from making import adapter as made
from torch import Tensor

doubles = adapters(torch.float64)
FEW = settings(LAW, max_examples=20)  # an example is an adapter of up to seven modules


def best(matrix: Tensor, rank: int) -> Tensor:
    """The oracle: the nearest matrix of a rank, from the dense singular value decomposition in float64."""
    u, values, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    nearest: Tensor = (u[:, :rank] * values[:rank]) @ vh[:rank]
    return nearest


def truncated(some: Adapter, ranks: Mapping[str, int]) -> Deltas:
    """The oracle for a whole adapter, without what is left out."""
    return {name: best(matrix, ranks[name]) for name, matrix in deltas(some).items() if ranks[name]}


def error(some: Adapter, ranks: Mapping[str, int]) -> float:
    """The relative error over all modules of the best deltas of these ranks."""
    whole = lost = 0.0
    for name, matrix in deltas(some).items():
        squares = torch.linalg.svdvals(matrix) ** 2
        whole, lost = whole + float(squares.sum()), lost + float(squares[ranks[name] :].sum())
    return math.sqrt(lost / whole)


def full(some: Adapter) -> dict[str, int]:
    return {name: min(shape.rank, shape.outputs, shape.inputs) for name, shape in some.shapes.items()}


def carried_out(some: Adapter, **limit: Any) -> Compressed:
    """A compression with every module read, so that its report is complete."""
    found = compress(some, **limit)
    read_all(found.adapter)
    return found


def allowed(some: Adapter, factor: float = 1e-10) -> dict[str, float]:
    """`factor` relative to what rounding errors are relative to."""
    return {
        name: factor * abs(one.scale) * float(one.up.double().norm() * one.down.double().norm())
        for name, one in some.modules.items()
    }


# --- the optimum ----------------------------------------------------------------------------------------------------


@FEW
@given(doubles, st.integers(1, 7))
def test_a_rank_is_eckart_and_youngs_optimum(some: Adapter, rank: int) -> None:
    found = carried_out(some, rank=rank)
    ranks = {name: min(rank, present) for name, present in full(some).items()}
    assert found.after == ranks
    assert_equal(deltas(found.adapter), truncated(some, ranks), allowed(some))
    assert found.report.total.error == pytest.approx(error(some, ranks), abs=1e-7)
    for name, matrix in deltas(some).items():
        lost = float((delta(found.adapter.modules[name]) - matrix).norm())
        tail = float((torch.linalg.svdvals(matrix)[ranks[name] :] ** 2).sum()) ** 0.5
        assert lost == pytest.approx(tail, abs=allowed(some)[name])


@FEW
@given(doubles, st.floats(0.05, 1.0))
def test_a_share_of_energy_is_merges_share(some: Adapter, energy: float) -> None:
    found, merged = carried_out(some, energy=energy), merge([some], dtype=torch.float64, given={"energy": energy})
    assert found.after == {name: shape.rank for name, shape in merged.adapter.shapes.items()}
    assert_equal(deltas(found.adapter), deltas(merged.adapter), allowed(some))
    assert all(one.energy >= energy - 1e-9 for one in found.report.modules.values())


@pytest.mark.parametrize("names", [("layer.0.query", "layer.0.value", "conv.line"), ("same.a", "same.b", "same.c")])
def test_a_budget_is_the_best_of_all_ranks(names: tuple[str, ...]) -> None:
    """Unequal costs and equal ones: no other ranks within the budget lie nearer to the original."""
    places = [BASE.get(name, Place(9, 11)) for name in names]
    modules = {
        name: low_rank(place, 4, seed=index, scale=1.0 + index, dtype=torch.float64)
        for index, (name, place) in enumerate(zip(names, places, strict=True))
    }
    some = Adapter(modules, "tiny")
    costs = {name: shape.outputs + shape.inputs for name, shape in some.shapes.items()}
    options = [dict(zip(names, ranks, strict=True)) for ranks in itertools.product(range(5), repeat=3)]
    sizes = [sum(costs[name] * rank for name, rank in ranks.items()) for ranks in options]
    errors = [error(some, ranks) for ranks in options]
    last = math.inf
    for budget in range(min(costs.values()), sum(4 * cost for cost in costs.values()) + 3):
        found = carried_out(some, parameters=budget)
        assert found.adapter.parameters <= budget
        least = min(lost for lost, size in zip(errors, sizes, strict=True) if size <= budget)
        assert found.report.total.error == pytest.approx(least, abs=1e-7)
        assert error(some, found.after) == least
        assert least <= last
        last = least


@FEW
@given(doubles, st.integers(1, 5), seeds)
def test_how_a_delta_was_factored_does_not_matter(some: Adapter, rank: int, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)

    def refactored(one: LowRank) -> LowRank:
        size = one.rank
        change = torch.linalg.qr(torch.randn(size, size, generator=chance, dtype=torch.float64)).Q
        change = change * (0.5 + torch.rand(size, generator=chance, dtype=torch.float64))
        return replace(one, up=one.up @ change, down=torch.linalg.inv(change) @ one.down)

    other = some.mapped(refactored)
    budget = max(1, some.parameters // 2)
    for limit in ({"rank": rank}, {"energy": 0.7}, {"parameters": budget}):
        if "parameters" in limit and budget < min(s.outputs + s.inputs for s in some.shapes.values()):
            continue
        one, two = carried_out(some, **limit), carried_out(other, **limit)
        assert one.after == two.after
        assert_equal(deltas(one.adapter), deltas(two.adapter), allowed(some, 1e-8))


@FEW
@given(doubles, st.integers(1, 5), st.sampled_from([2.0, -0.5, 1e-3]))
def test_a_scale_passes_through(some: Adapter, rank: int, weight: float) -> None:
    for limit in ({"rank": rank}, {"energy": 0.7}):
        one, two = compress(some, **limit), compress(some.scaled(weight), **limit)  # type: ignore[arg-type]
        assert one.after == two.after
        wanted = {name: weight * matrix for name, matrix in deltas(one.adapter).items()}
        assert_equal(deltas(two.adapter), wanted, {k: abs(weight) * v for k, v in allowed(some).items()})


@FEW
@given(adapters(), st.integers(1, 9))
def test_twice_is_once_and_a_larger_rank_changes_nothing(some: Adapter, rank: int) -> None:
    once = compress(some, rank=rank, dtype=torch.float64)
    twice = compress(once.adapter, rank=rank)
    assert twice.after == once.after
    assert_equal(deltas(twice.adapter), deltas(once.adapter), allowed(some, 1e-5))
    for limit in ({"rank": 100}, {"parameters": some.parameters}, {"size": 10**9}):
        same = carried_out(some, **limit)
        assert same.after == full(some)
        assert same.saves == (full(some) != same.before)
        unit = max(ROUNDOFF[module.dtype] for module in some.modules.values())
        assert_equal(deltas(same.adapter), deltas(some), allowed(some, 16 * unit))


def test_what_is_left_out_is_in_the_report_and_extras_pass_through() -> None:
    head = {"score.weight": torch.ones(3, 5)}
    some = made("layer.0.query", "layer.0.value", "words", dtype=torch.float64, extras=head)
    some.modules["words"].up.mul_(1e-3)  # type: ignore[union-attr]
    found = carried_out(some, parameters=4 * (29 + 14))
    assert found.left_out == ["words"]
    assert "words" not in found.adapter.shapes
    assert (found.report.ranks["words"], found.report.modules["words"].error) == (0, 1.0)
    assert set(found.report.modules) == set(some.shapes)
    assert found.report.total.error == pytest.approx(error(some, found.after), rel=1e-6)
    assert found.adapter.extras == head


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_report_is_of_what_is_stored(dtype: torch.dtype) -> None:
    some = made(dtype=torch.float64)
    found = carried_out(some, rank=2, dtype=dtype)
    assert {module.dtype for module in found.adapter.modules.values()} == {dtype}
    for name, matrix in deltas(some).items():
        lost = float((delta(found.adapter.modules[name]) - matrix).norm() / matrix.norm())
        assert found.report.modules[name].error == pytest.approx(lost, rel=1e-5, abs=1e-7)


def test_one_module_is_held_at_a_time() -> None:
    alive: weakref.WeakSet[LowRank] = weakref.WeakSet()
    most = 0

    def load(name: str) -> LowRank:
        nonlocal most
        module = low_rank(Place(12, 17), 4, seed=int(name))
        alive.add(module)
        most = max(most, len(alive))
        return module

    shape = low_rank(Place(12, 17), 4).shape
    some = Adapter(LazyModules({str(index): shape for index in range(12)}, load), "tiny")
    for limit in ({"rank": 2}, {"energy": 0.5}, {"parameters": 500}, {"size": 4000}):
        carried_out(some, **limit)
    assert most <= 2  # the one that was read last, and the next


# --- limits that cannot be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ({}, "exactly one"),
        ({"rank": 2, "energy": 0.5}, "exactly one"),
        ({"parameters": 10, "size": 10}, "exactly one"),
        ({"rank": 0}, "rank is 0"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({"parameters": 0}, "is 0"),
        ({"size": -1}, "is -1"),
        ({"parameters": 13}, "smallest possible is 14"),
    ],
    ids=str,
)
def test_limits_that_cannot_be_are_refused(limit: dict[str, Any], words: str) -> None:
    with pytest.raises(BadOption, match=words) as caught:
        compress(made(), **limit)
    assert "\n" not in str(caught.value)
    assert carried_out(made(), parameters=14).adapter.parameters == 14


def test_nothing_to_compress_is_said() -> None:
    with pytest.raises(IncompatibleAdapters, match="no low-rank modules"):
        compress(Adapter({}, "tiny"), rank=2)
    zero = made().mapped(lambda module: replace(module, up=module.up * 0))
    with pytest.raises(IncompatibleAdapters, match="zero"):
        compress(zero, parameters=100)
    assert set(compress(zero, rank=2).after.values()) == {2}
    with pytest.raises(UnknownMethod, match="peft"):
        compress(made(), size=5000, to="onnx")


def test_modules_that_diverged_are_named() -> None:
    some = made("layer.0.query", "words")
    some.modules["words"].down[0, 0] = math.nan  # type: ignore[index]
    for limit in ({"rank": 2}, {"energy": 0.5}):
        with pytest.raises(FormatError, match="words"):
            carried_out(some, **limit)


# --- file sizes -------------------------------------------------------------------------------------------------------

PIPELINE = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": Place(32, 32),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": Place(32, 77),
    "unet.down_blocks.0.attentions.0.proj_in": Place(32, 16, (1, 1)),
    "unet.down_blocks.0.resnets.0.conv1": Place(24, 16 * 9, (3, 3)),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": Place(40, 40),
}
FORMS = {"peft": BASE, "kohya": PIPELINE, "diffusers": PIPELINE}


def for_dialect(to: str, *, extras: bool = False) -> Adapter:
    modules = {
        name: low_rank(place, 4 + index, seed=index, scale=1.5**index)
        for index, (name, place) in enumerate(FORMS[to].items())
    }
    beside = {"classifier.weight": torch.ones(7, 5), "classifier.bias": torch.ones(7, dtype=torch.float16)}
    return Adapter(modules, "tiny", beside if extras else {}, {"name": "some", "metadata": {"ss_note": "kept"}})


def written(some: Adapter, folder: Path, to: str) -> int:
    """Bytes on the disk."""
    path = save(some, folder / to, to, force=True)
    return (path / "adapter_model.safetensors" if path.is_dir() else path).stat().st_size


@pytest.mark.parametrize("extras", [False, True], ids=["", "extras"])
@pytest.mark.parametrize("to", FORMS)
def test_files_keep_to_their_size(to: str, extras: bool, tmp_path: Path) -> None:
    some = for_dialect(to, extras=extras)
    with pytest.raises(BadOption, match="smallest possible") as caught:
        compress(some, size=100, to=to)
    assert ("beside the deltas" in str(caught.value)) == extras
    least = int(str(caught.value).split("smallest possible file has ")[1].split(",")[0])
    whole = compress(some, rank=100)
    most = written(whole.adapter, tmp_path, to)
    last = math.inf
    for limit in [least, *range(least + 1, most, max(1, (most - least) // 4)), most - 1, most]:
        found = carried_out(some, size=limit, to=to)
        size = written(found.adapter, tmp_path, to)
        assert size == file_size(found.adapter, to) <= limit
        assert compress(some, size=size, to=to).after == found.after  # to the byte
        lost = found.report.total.error
        assert lost <= last * (1 + 1e-6)
        last = lost
        room = min(shape.outputs + shape.inputs for shape in some.shapes.values()) * 4 + 900  # and a module's header
        assert limit - size < room + max(shape.outputs + shape.inputs for shape in some.shapes.values()) * 4
    assert found.after == full(some)
    assert compress(some, size=most - 1, to=to).after != full(some)


def test_a_narrower_type_leaves_room_for_more() -> None:
    some = for_dialect("peft")
    half, single = (compress(some, size=3000, dtype=dtype) for dtype in (torch.float16, torch.float32))
    assert half.adapter.parameters > 1.5 * single.adapter.parameters
    assert file_size(half.adapter, "peft") <= 3000


# --- the sketch -------------------------------------------------------------------------------------------------------


def decaying(outputs: int, inputs: int, rank: int, power: float, seed: int = 0) -> LowRank:
    module = low_rank(Place(outputs, inputs), rank, seed=seed, scale=-0.7)
    return replace(module, down=module.down * torch.arange(1, rank + 1)[:, None] ** -power)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.5])
def test_a_sketch_is_near_the_optimum_and_says_how_near(power: float) -> None:
    module = decaying(150, 120, 200, power)
    squares = torch.linalg.svdvals(delta(module)) ** 2
    for rank in (1, 8, 20):
        sketch, exact = module.sketch(rank), module.truncate(rank)
        off, least = (float((delta(one) - delta(module)).norm()) for one in (sketch, exact))
        assert least * (1 - 1e-5) <= off <= 1.02 * least
        bound, kept = best_energy(module, sketch), float(squares[:rank].sum())
        assert kept * (1 - 1e-5) <= bound
        # no further than the optimum would be if the next direction counted a little more
        assert bound <= kept + 1.6 * rank * float(squares[rank]) + 1e-4 * kept


def test_a_sketch_is_exact_where_the_rank_suffices_and_repeatable() -> None:
    module = low_rank(Place(60, 50), 5, scale=2.0)
    assert float((delta(module.sketch(5)) - delta(module)).norm()) <= 1e-5 * float(delta(module).norm())
    before = torch.random.get_rng_state()
    one, two = module.sketch(3, seed=4), module.sketch(3, seed=4)
    assert torch.equal(one.up, two.up)
    assert torch.equal(one.down, two.down)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert float(delta(module.scaled(0.0).sketch(2)).norm()) == 0.0
    conv = low_rank(Place(7, 36, (3, 3)), 6).sketch(2)
    assert (conv.kernel, conv.scale, conv.rank) == ((3, 3), 1.0, 2)
    for numbers in ({"rank": 0}, {"rank": 2, "oversample": -1}, {"rank": 2, "iterations": -1}):
        with pytest.raises(BadOption):
            module.sketch(**numbers)


def test_only_wide_modules_are_sketched_and_only_for_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "SKETCHED_ABOVE", 30)
    some = Adapter({"wide": decaying(64, 48, 60, 0.5), "thin": decaying(64, 48, 16, 0.5)}, "tiny", {}, {"name": "x"})
    found = carried_out(some, rank=4)
    assert set(found.sketched) == {"wide"}
    off, least = found.report.modules["wide"].error, error(replace(some, modules={"w": some.modules["wide"]}), {"w": 4})
    assert found.sketched["wide"] <= least * (1 + 1e-5)
    assert least * (1 - 1e-5) <= off <= 1.02 * least
    assert off <= 1.2 * found.sketched["wide"]
    assert not carried_out(some, rank=20).sketched  # more than a quarter: decomposed
    assert not carried_out(some, energy=0.3).sketched
    assert not carried_out(some, parameters=900).sketched


def test_singular_values_are_those_of_the_dense_matrix() -> None:
    for place in BASE.values():
        module = low_rank(place, 6, scale=-1.3, dtype=torch.float64)
        wanted = torch.linalg.svdvals(delta(module))[: min(6, place.outputs, place.inputs)]
        torch.testing.assert_close(torch.tensor(singular_values(module), dtype=torch.float64), wanted)

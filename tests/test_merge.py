"""The one call for every method: what it refuses, what it keeps, how lazily it works."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from lorahub.hub import plugins
from lorahub.hub.adapter import Adapter, LazyModules
from lorahub.hub.errors import BadOption, FormatError, IncompatibleAdapters, UnknownMethod
from lorahub.hub.lowrank import LowRank
from lorahub.hub.reading import read
from lorahub.hub.writing import save
from lorahub.merge.run import merge, methods, options
from making import (
    BASE,
    ROUNDOFF,
    Place,
    adapter,
    assert_equal,
    carried_out,
    delta,
    deltas,
    low_rank,
    merged,
    rounding,
    weighted_sum,
)


def one_line(caught: pytest.ExceptionInfo[Exception]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- what is refused ----------------------------------------------------------------------------------------------


def test_different_bases_are_refused_by_name() -> None:
    with pytest.raises(IncompatibleAdapters) as caught:
        merge([adapter(called="mine", base="gpt2"), adapter(called="yours", base="roberta-base")])
    for word in ("mine", "yours", "gpt2", "roberta-base", "--base"):
        assert word in one_line(caught)


def test_a_later_base_is_compared_too() -> None:
    known = [adapter(base=base) for base in (None, "gpt2", None, "gpt2")] + [adapter(base="gpt2-large", called="big")]
    with pytest.raises(IncompatibleAdapters, match="big"):
        merge(known)


def test_an_unknown_base_fits_any_and_the_known_one_is_kept() -> None:
    assert merge([adapter(base=None), adapter(base="gpt2")]).adapter.base == "gpt2"
    assert merge([adapter(base=None)]).adapter.base is None


def test_spellings_of_one_base_are_one_base() -> None:
    names = ("openai-community/gpt2", "gpt2", "/models/gpt2/")
    assert merge([adapter(base=name) for name in names]).adapter.base == names[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("openai-community/gpt2", "runwayml/stable-diffusion-v1-5"),
        ("liuhaotian/llava-v1-5-7b", "runwayml/stable-diffusion-v1-5"),
        ("google/t5-xl-base", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "runwayml/stable-diffusion-v1-5"),
        ("stabilityai/stable-diffusion-2-1", "runwayml/stable-diffusion-v1-5"),
        ("openai-community/gpt2", "openai-community/gpt2-medium"),
    ],
)
def test_names_of_different_bases_are_told_apart(one: str, other: str) -> None:
    with pytest.raises(IncompatibleAdapters):
        merge([adapter(base=one), adapter(base=other)])


def test_the_users_word_on_the_base_counts() -> None:
    result = merge([adapter(base="gpt2"), adapter(base="copy-of-gpt2")], base="gpt2")
    assert result.adapter.base == "gpt2"


@pytest.mark.parametrize("base", [None, "tiny"])
def test_different_shapes_are_refused_by_name(base: str | None) -> None:
    one = Adapter({"a": low_rank(Place(4, 5), 2), "b.c": low_rank(Place(4, 5), 2)}, meta={"name": "mine"})
    other = Adapter({"b.c": low_rank(Place(4, 6), 2)}, meta={"name": "yours"})
    with pytest.raises(IncompatibleAdapters) as caught:
        merge([one, other], base=base)
    for word in ("b.c", "mine", "yours", "4x5", "4x6"):
        assert word in one_line(caught)


def test_a_convolution_is_no_linear_map() -> None:
    one = Adapter({"a": low_rank(Place(4, 9), 2)})
    other = Adapter({"a": low_rank(Place(4, 9, (3, 3)), 2)})
    with pytest.raises(IncompatibleAdapters, match="kernel 3x3"):
        merge([one, other])


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_weights_must_be_finite(weight: float) -> None:
    with pytest.raises(BadOption, match="yours") as caught:
        merge([adapter(called="mine"), adapter(called="yours")], weights=[1.0, weight])
    assert str(weight) in one_line(caught)


@pytest.mark.parametrize("weights", [[], [1.0], [1.0] * 3])
def test_weights_must_be_as_many_as_adapters(weights: list[float]) -> None:
    with pytest.raises(BadOption, match=f"{len(weights)} weights for 2 adapters"):
        merge([adapter(), adapter()], weights=weights)


def test_no_adapters_are_refused() -> None:
    with pytest.raises(BadOption, match="no adapters"):
        merge([])


def test_an_adapter_without_modules_is_refused_by_name() -> None:
    with pytest.raises(IncompatibleAdapters, match="hollow"):
        merge([adapter(), Adapter({}, meta={"name": "hollow"})])


def test_an_unknown_method_is_refused_with_a_list() -> None:
    for work in (lambda: merge([adapter()], "exakt"), lambda: options("exakt")):
        with pytest.raises(UnknownMethod, match="exakt") as caught:
            work()
        assert all(name in one_line(caught) for name in methods())


def test_an_unknown_option_is_refused_with_a_list() -> None:
    with pytest.raises(BadOption, match="'rnak'") as caught:
        merge([adapter()], given={"rnak": 3})
    assert "rank" in one_line(caught)
    assert "energy" in one_line(caught)


@pytest.mark.parametrize(
    "given",
    [{"rank": "four"}, {"rank": "2.5"}, {"energy": "most"}, {"rank": 0}, {"rank": -3}, {"energy": 0}, {"energy": 1.01}],
    ids=str,
)
def test_option_values_out_of_range_are_refused_before_any_module_is_read(given: dict[str, object]) -> None:
    reads: list[str] = []
    with pytest.raises(BadOption, match=next(iter(given))):
        merge([lazily(adapter(), reads)], given=given)


def test_options_are_read_from_text() -> None:
    assert [m.rank for m in merge([adapter()], given={"rank": "2"}).adapter.modules.values()] == [2] * len(BASE)
    whole = merge([adapter()], given={"rank": "none", "energy": "1.0"}).adapter
    assert_equal(deltas(whole), deltas(adapter()), rounding([adapter()], [1.0], factor=64))


def test_numbers_too_large_for_the_stored_dtype_are_refused() -> None:
    huge = Adapter({"a": LowRank(torch.full((1, 4), 300.0), torch.full((4, 1), 300.0))}, meta={"name": "huge"})
    half = merge([huge], weights=[1e6], dtype=torch.float16).adapter
    with pytest.raises(FormatError, match="a holds NaN or Inf in F16"):
        half.modules["a"]
    full = merge([huge], weights=[1e6], dtype=torch.float32).adapter
    assert float(full.modules["a"].dense().max()) == pytest.approx(9e10)


# --- what is kept -------------------------------------------------------------------------------------------------


def bias(*values: float) -> dict[str, torch.Tensor]:
    return {"head.bias": torch.tensor(values, dtype=torch.float32)}


def test_extras_are_refused_unless_a_rule_is_given() -> None:
    inputs = [adapter(called="mine"), adapter(called="yours", extras=bias(1, 2) | {"other": torch.ones(1)})]
    with pytest.raises(IncompatibleAdapters) as caught:
        merge(inputs)
    for word in ("yours", "head.bias", "1 tensors more", "--extras"):
        assert word in one_line(caught)
    with pytest.raises(BadOption, match="refuse, drop, first, average"):
        merge(inputs, extras="keep")


def test_rules_for_extras() -> None:
    inputs = [adapter(), adapter(extras=bias(1, 2)), adapter(extras=bias(3, 6))]
    weights = [1.0, 1.0, -3.0]
    assert merge(inputs, weights=weights, extras="drop").adapter.extras == {}
    assert merge(inputs, weights=weights, extras="first").adapter.extras["head.bias"].tolist() == [1, 2]
    assert merge(inputs, weights=weights, extras="average").adapter.extras["head.bias"].tolist() == [2.5, 5]


def test_extras_of_different_shapes_are_not_averaged() -> None:
    with pytest.raises(IncompatibleAdapters, match=r"head\.bias"):
        merge([adapter(extras=bias(1, 2)), adapter(extras=bias(1, 2, 3))], extras="average")


def test_averaged_extras_keep_their_dtype() -> None:
    halves = [adapter(extras={"head.bias": torch.ones(2, dtype=torch.bfloat16)}) for _ in range(2)]
    average = merge(halves, weights=[0.0, 0.0], extras="average").adapter.extras["head.bias"]
    assert average.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ([torch.float16], torch.float16),
        ([torch.float16, torch.float16], torch.float16),
        ([torch.float16, torch.bfloat16], torch.float32),
        ([torch.bfloat16, torch.float32], torch.float32),
        ([torch.float64, torch.float16], torch.float64),
    ],
    ids=str,
)
def test_the_result_is_stored_in_the_widest_dtype(stored: list[torch.dtype], expected: torch.dtype) -> None:
    inputs = [adapter(seed=i, dtype=dtype) for i, dtype in enumerate(stored)]
    result = merge(inputs, given={"rank": 3}).adapter
    assert {module.dtype for module in result.modules.values()} == {expected}
    asked = merge(inputs, dtype=torch.bfloat16).adapter
    assert {module.dtype for module in asked.modules.values()} == {torch.bfloat16}


def test_every_module_of_a_result_has_scale_one() -> None:
    inputs = [adapter(scale=3.0), adapter(seed=1, scale=0.1)]
    for given in ({}, {"rank": 2}, {"energy": 0.5}):
        assert {m.scale for m in merge(inputs, weights=[2, -1], given=given).adapter.modules.values()} == {1.0}


def test_what_all_inputs_agree_on_is_kept() -> None:
    inputs = [
        Adapter(adapter().modules, meta={"config": {"task_type": "X", "r": 4}, "metadata": {"ss_v2": "1"}}),
        Adapter(adapter().modules, meta={"config": {"task_type": "X", "r": 8}, "metadata": {}}),
        adapter(),
    ]
    assert merge(inputs).adapter.meta["config"] == {"task_type": "X"}
    assert merge(inputs).adapter.meta["metadata"] == {"ss_v2": "1"}
    assert merge([adapter(called="a"), adapter(called="b")]).adapter.name == "exact of a, b"


def test_a_linear_map_and_a_pointwise_convolution_are_added() -> None:
    linear, pointwise = (Adapter({"a": low_rank(Place(4, 5, kernel), 2, seed=1)}) for kernel in ((), (1, 1)))
    for inputs in ([linear, pointwise], [pointwise, linear]):
        result = merge(inputs, weights=[0.5, 0.5])
        assert result.adapter.shapes["a"].kernel == (1, 1)
        assert_equal(deltas(result.adapter), deltas(linear), rounding(inputs, [0.5, 0.5]))


# --- how it works -------------------------------------------------------------------------------------------------


def lazily(source: Adapter, reads: list[str]) -> Adapter:
    def load(name: str) -> LowRank:
        reads.append(name)
        return source.modules[name]

    return Adapter(LazyModules(source.shapes, load), source.base, source.extras, source.meta)


@pytest.mark.parametrize("given", [{}, {"rank": 2}], ids=str)
def test_modules_are_made_when_they_are_read(given: dict[str, object]) -> None:
    reads: list[str] = []
    result = merge([lazily(adapter(), reads), lazily(adapter(seed=1), reads)], dtype=torch.float32, given=given)
    assert reads == []
    assert result.report.modules == {}
    shapes = dict(result.adapter.shapes)
    module = result.adapter.modules["words"]
    assert set(reads) == {"words"}
    assert set(result.report.modules) == {"words"}
    assert module.shape == shapes["words"]


def test_reading_a_module_twice_counts_once() -> None:
    result = carried_out(merge([adapter(), adapter(seed=1)], given={"rank": 2}))
    before = result.report.total
    carried_out(result)
    assert result.report.total == before


def test_merging_merged_adapters_is_merging_all() -> None:
    x, y, z = (adapter(seed=seed, scale=1.5) for seed in range(3))
    inner = merge([x, y], weights=[0.5, -2.0]).adapter
    wanted = weighted_sum([x, y, z], [0.15, -0.6, 0.7])
    assert_equal(merged([inner, z], [0.3, 0.7]), wanted, rounding([x, y, z], [0.15, -0.6, 0.7], factor=16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_from_disk_to_disk(dtype: torch.dtype, tmp_path: Path) -> None:
    """What lies on the disk is what the report speaks of."""
    sources = [adapter(seed=seed, scale=2.0 - seed, rank=3 + seed, dtype=dtype, base=None) for seed in (0, 1)]
    paths = [save(Adapter({n: m.folded().to(dtype) for n, m in one.modules.items()}), tmp_path / str(i))
             for i, one in enumerate(sources)]  # fmt: skip
    inputs = [read(path) for path in paths]
    result = merge(inputs, weights=[1.25, -0.5], given={"rank": 4})
    again = read(save(result.adapter, tmp_path / "merged"))
    assert json.loads((tmp_path / "merged" / "adapter_config.json").read_text())["use_rslora"] is False
    wanted = weighted_sum(inputs, [1.25, -0.5])
    error = math.sqrt(sum(float((delta(again.modules[n]) - m).norm()) ** 2 for n, m in wanted.items()))
    norm = math.sqrt(sum(float(m.norm()) ** 2 for m in wanted.values()))
    assert result.report.total.error == pytest.approx(error / norm, abs=32 * ROUNDOFF[torch.float32])
    assert {module.dtype for module in again.modules.values()} == {dtype}


def test_methods_and_options_are_listed() -> None:
    assert "exact" in methods()
    assert options("exact")["rank"].default is None
    assert plugins.names("lorahub.merge.methods") == methods()

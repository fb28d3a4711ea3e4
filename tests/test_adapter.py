"""Adapters as values: lazy modules, and the algebra over all of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from lorahub.hub.adapter import Adapter, LazyModules
from lorahub.hub.lowrank import LowRank
from making import BASE, LAW, adapter, adapters, delta, deltas, weight_values


def lazy(source: Adapter, reads: list[str]) -> LazyModules:
    """The modules of `source`, each reading recorded."""

    def load(name: str) -> LowRank:
        reads.append(name)
        return source.modules[name]

    return LazyModules(source.shapes, load)


def test_lazy_modules_know_names_and_shapes_without_reading() -> None:
    source, reads = adapter(), list[str]()
    one = Adapter(lazy(source, reads))
    assert set(one.modules) == set(BASE)
    assert len(one.modules) == len(BASE)
    assert "words" in one.modules
    assert one.shapes == source.shapes
    assert one.parameters == source.parameters
    scaled = one.scaled(2.0)
    assert set(scaled.modules) == set(BASE)
    assert reads == []
    assert scaled.modules["words"].scale == 2.0 * source.modules["words"].scale
    assert reads == ["words"]


def test_lazy_modules_have_only_what_they_promise() -> None:
    modules = lazy(adapter("words"), [])
    assert "other" not in modules
    with pytest.raises(KeyError, match="other"):
        modules["other"]


def test_parameters_are_counted() -> None:
    assert adapter("layer.0.query", "conv.wide", rank=3).parameters == 3 * (12 + 17) + 3 * (7 + 36)


def test_adapters_without_a_name_are_called_adapter() -> None:
    assert Adapter({}).name == "adapter"
    assert adapter(called="mine").name == "mine"


@LAW
@given(adapters(), adapters())
def test_inner_and_norm_add_up_over_modules(one: Adapter, other: Adapter) -> None:
    left, right = deltas(one), deltas(other)
    wanted = sum(float((left[name] * right[name]).sum()) for name in set(left) & set(right))
    norms = [math.sqrt(sum(float(m.norm()) ** 2 for m in table.values())) for table in (left, right)]
    assert one.inner(other) == pytest.approx(wanted, rel=1e-9, abs=1e-9 * math.prod(norms))
    assert one.inner(other) == pytest.approx(other.inner(one), rel=1e-9, abs=1e-9 * math.prod(norms))
    assert [one.norm(), other.norm()] == pytest.approx(norms, rel=1e-6)
    assert one.cosine(other) == pytest.approx(wanted / math.prod(norms), abs=1e-6)


def test_adapters_without_a_common_module_are_orthogonal() -> None:
    assert adapter("words").cosine(adapter("conv.wide")) == 0.0
    assert Adapter({}).cosine(adapter()) == 0.0


@LAW
@given(adapters(), weight_values)
def test_scaling_scales_every_delta(one: Adapter, weight: float) -> None:
    scaled = one.scaled(weight)
    assert (scaled.base, scaled.name) == (one.base, one.name)
    for name, module in one.modules.items():
        torch.testing.assert_close(delta(scaled.modules[name]), weight * delta(module))
    assert scaled.norm() == pytest.approx(abs(weight) * one.norm())


def test_mapping_changes_every_module_alike() -> None:
    one = adapter(rank=4)
    assert {module.rank for module in one.mapped(lambda module: module.truncate(2)).modules.values()} == {2}
    assert {module.rank for module in one.modules.values()} == {4}

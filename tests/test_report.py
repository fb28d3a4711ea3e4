"""The fidelity report against dense algebra, also where sums vanish; and the record that lineage and cards keep."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml
from lorahub.hub.adapter import Adapter
from lorahub.hub.lowrank import LowRank, concat
from lorahub.merge.card import Ingredient, card, record
from lorahub.merge.report import Fidelity, Report
from lorahub.merge.run import merge
from making import BASE, DTYPES, Place, adapter, carried_out, low_rank

PLACE = Place(20, 30)
PERFECT = Fidelity(error=0.0, cosine=1.0, norm_ratio=1.0, energy=1.0)
ZERO = LowRank(torch.zeros(2, 30), torch.zeros(20, 2))


def reported(parts: list[LowRank], weights: list[float], result: LowRank) -> Fidelity:
    report = Report()
    report.record("a", parts, weights, result)
    assert report.modules["a"] == report.total
    assert report.ranks == {"a": result.rank}
    return report.total


def some(seed: int, scale: float = 1.0, rank: int = 4) -> LowRank:
    return low_rank(PLACE, rank, seed=seed, scale=scale, dtype=torch.float64)


def test_an_exact_result_is_perfect() -> None:
    parts, weights = [some(1), some(2, 0.3)], [0.5, -2.0]
    exact = reported(parts, weights, concat(parts, weights))
    assert exact.error == pytest.approx(0.0, abs=1e-7)
    assert (exact.cosine, exact.norm_ratio, exact.energy) == pytest.approx((1.0, 1.0, 1.0), abs=1e-12)


@pytest.mark.parametrize("factor", [2.0, 0.5, 0.0, -1.0])
def test_a_result_of_the_wrong_strength(factor: float) -> None:
    """Cosine alone cannot see a wrong strength: error and norm ratio can."""
    told = reported([some(1)], [1.0], some(1).scaled(factor))
    assert told.error == pytest.approx(abs(1 - factor), abs=1e-7)
    assert told.norm_ratio == pytest.approx(abs(factor))
    assert told.energy == pytest.approx(factor**2)
    assert told.cosine == pytest.approx(math.copysign(1.0, factor) if factor else 0.0)


def test_an_unrelated_result() -> None:
    told = reported([some(1)], [1.0], LowRank(torch.eye(30)[:1].double(), torch.zeros(20, 1).double()))
    assert (told.error, told.cosine, told.norm_ratio, told.energy) == (1.0, 0.0, 0.0, 0.0)


def test_small_errors_are_seen() -> None:
    """A hundred thousandth of noise is reported as that, not lost in the Gram matrices' rounding."""
    noisy = concat([some(1), some(2)], [1.0, 1e-5])
    wanted = 1e-5 * some(2).norm() / some(1).norm()
    assert reported([some(1)], [1.0], noisy).error == pytest.approx(wanted, rel=1e-3)


def test_zero_inputs() -> None:
    assert reported([ZERO, ZERO], [1.0, 2.0], ZERO) == PERFECT
    assert reported([some(1)], [0.0], ZERO) == PERFECT
    assert reported([ZERO], [1.0], some(1)).error == math.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [{}, {"rank": 2}, {"energy": 0.9}], ids=str)
def test_where_inputs_cancel_the_error_is_relative_to_them(dtype: torch.dtype, given: dict[str, object]) -> None:
    """x - x is nothing: what rounding leaves of it is small beside the inputs and is reported so."""
    one = adapter(scale=0.7, dtype=torch.float32)
    told = carried_out(merge([one, one], weights=[1.0, -1.0], dtype=dtype, given=given)).report
    for fidelity in (told.total, *told.modules.values()):
        assert fidelity.error < 1e-5
        assert (fidelity.cosine, fidelity.norm_ratio, fidelity.energy) == (1.0, 1.0, 1.0)


def test_a_result_where_nothing_should_be_is_an_error() -> None:
    told = reported([some(1), some(1)], [1.0, -1.0], some(1))
    assert told.error == pytest.approx(1 / math.sqrt(2), rel=1e-6)


def test_the_total_weighs_modules_by_their_norm() -> None:
    report = Report()
    report.record("small", [some(1, 0.01)], [1.0], ZERO)
    report.record("large", [some(2, 10.0)], [1.0], some(2, 10.0))
    assert report.modules["small"].error == 1.0
    assert report.modules["large"].error == pytest.approx(0.0, abs=1e-7)
    wanted = some(1, 0.01).norm() / math.hypot(some(1, 0.01).norm(), some(2, 10.0).norm())
    assert report.total.error == pytest.approx(wanted, rel=1e-4)
    assert report.total.energy == pytest.approx(1 - wanted**2, rel=1e-9)


def test_an_empty_report_is_perfect() -> None:
    assert Report().total == PERFECT


def test_truncation_loses_what_it_cuts() -> None:
    module = some(1, rank=10)
    values = torch.linalg.svdvals(module.dense()) ** 2
    kept = float(values[:3].sum() / values.sum())
    told = reported([module], [1.0], module.truncate(3))
    assert told.energy == pytest.approx(kept, rel=1e-9)
    assert told.error == pytest.approx(math.sqrt(1 - kept), rel=1e-9)
    assert told.cosine == pytest.approx(math.sqrt(kept), rel=1e-9)


INPUTS = [Ingredient("a: b", "0" * 64, 0.5, "tiny"), Ingredient("c", "1" * 64, -1.0, None)]


def made(given: dict[str, object]) -> tuple[dict[str, object], Adapter]:
    result = carried_out(merge([adapter(), adapter(seed=1)], weights=[0.5, -1.0], given=given))
    return record("exact", INPUTS, given, result.report, {"lorahub": "1"}), result.adapter


@pytest.mark.parametrize("given", [{}, {"rank": 2}], ids=str)
def test_a_record_is_plain_json_and_says_all(given: dict[str, object]) -> None:
    told, _ = made(given)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert set(told) == {"method", "inputs", "options", "versions", "modules", *vars(PERFECT)}
    first = told["inputs"][0]  # type: ignore[index]
    assert [first[key] for key in ("name", "digest", "weight", "base")] == ["a: b", "0" * 64, 0.5, "tiny"]
    assert set(told["modules"]) == set(BASE)  # type: ignore[call-overload]


def test_a_card_has_a_front_matter_and_names_its_inputs() -> None:
    told, result = made({"rank": 2})
    text = card(told, result, command="lorahub merge a c --rank 2")
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "peft",
        "base_model": "tiny",
        "base_model_relation": "adapter",
        "tags": ["lora", "peft", "merge", "lorahub"],
    }
    for word in ("a: b", "-1", "0" * 16, "rank=2", "lorahub 1", "    lorahub merge a c --rank 2", *BASE):
        assert word in body

"""Elementwise and spectral methods against their definitions on dense matrices, and PEFT's own functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import BadOption
from lorahub.hub.lowrank import LowRank
from lorahub.merge import spaces
from lorahub.merge.rules import Elementwise, limits_for
from lorahub.merge.run import merge, methods, options
from making import BASE, Place, adapter, assert_equal, deltas, low_rank, merged, rounding, weighted_sum
from peft.utils import merge_utils
from torch import Tensor

WEIGHTS = [0.5, -0.8, 1.2]


def wide(rank: int = 6) -> list[Adapter]:
    """Three adapters whose ranks together fill every module, so that nothing is lost by a limited rank."""
    return [adapter(rank=rank + seed, seed=seed, dtype=torch.float64, scale=0.5 + seed) for seed in range(3)]


def stacks(adapters: list[Adapter], weights: list[float]) -> dict[str, Tensor]:
    """Weighted dense deltas of every module: (T, outputs, inputs)."""
    tables = [deltas(one) for one in adapters]
    return {name: torch.stack([w * table[name] for w, table in zip(weights, tables, strict=True)]) for name in BASE}


def close(got: dict[str, Tensor], wanted: dict[str, Tensor], share: float = 1e-5) -> None:
    assert_equal(got, wanted, {name: share * (float(matrix.norm()) + 1e-3) for name, matrix in wanted.items()})


def peft_ties(stack: Tensor, density: float, elect: str = "total") -> Tensor:
    return merge_utils.ties(list(stack), torch.ones(len(stack), dtype=stack.dtype), density, elect)


# --- what must be the exact sum -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("core", {"rule": "sum"}),
        ("core", {"rule": "magnitude", "density": 1}),
        ("core", {"rule": "dare", "density": 1}),
        ("knots", {"unite": "sum", "density": 1}),
        ("magnitude", {"density": 1, "space": "delta"}),
        ("magnitude", {"density": 1, "space": "core"}),
        ("dare", {"density": 1, "space": "delta"}),
        ("robust", {"density": 1}),
        ("robust", {"density": 1, "gauge": "stored"}),
    ],
    ids=str,
)
def test_a_rule_that_changes_nothing_gives_the_exact_merge(method: str, given: dict[str, Any]) -> None:
    inputs = wide(2)
    exact = weighted_sum(inputs, WEIGHTS)
    assert_equal(merged(inputs, WEIGHTS, method=method, **given), exact, rounding(inputs, WEIGHTS, factor=64))


# --- TIES, magnitude, DARE ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_ties_on_deltas_is_pefts_on_dense_matrices(density: float) -> None:
    inputs = wide()
    wanted = {name: peft_ties(stack, density) for name, stack in stacks(inputs, WEIGHTS).items()}
    kept = {name: round(density * w.numel()) == int(density * w.numel()) for name, w in wanted.items()}
    got = merged(inputs, WEIGHTS, method="ties", space="delta", density=density)
    same = [name for name in wanted if kept[name]]  # PEFT rounds the number of entries down, lorahub to the nearest
    assert len(same) >= 2
    close({name: got[name] for name in same}, {name: wanted[name] for name in same})


@pytest.mark.parametrize("method", ["ties", "magnitude"])
def test_factors_as_stored_are_merged_as_by_peft(method: str) -> None:
    inputs = [adapter("layer.0.query", rank=4, seed=seed, dtype=torch.float64) for seed in range(3)]
    ups, downs = ([getattr(one.modules["layer.0.query"], side) for one in inputs] for side in ("up", "down"))
    function = merge_utils.ties if method == "ties" else merge_utils.magnitude_prune
    up, down = (function(side, torch.ones(3, dtype=torch.float64), 0.25) for side in (ups, downs))
    got = merged(inputs, [1.0] * 3, method=method, space="factors", gauge="stored", density=0.25)
    close(got, {"layer.0.query": up @ down})


def test_ties_in_the_core_is_ties_on_coordinates_in_the_stacked_bases() -> None:
    inputs = wide(2)
    wanted = {}
    for name, stack in stacks(inputs, WEIGHTS).items():
        thin = [np.linalg.svd(matrix.numpy(), full_matrices=False) for matrix in stack]
        ranks = [min(one.modules[name].rank, *stack.shape[1:]) for one in inputs]
        ups = np.hstack([u[:, :r] * np.sqrt(s[:r]) for (u, s, _), r in zip(thin, ranks, strict=True)])
        downs = np.hstack([vh[:r].T * np.sqrt(s[:r]) for (_, s, vh), r in zip(thin, ranks, strict=True)])
        left, right = (torch.tensor(np.linalg.svd(side, full_matrices=False)[0]) for side in (ups, downs))
        core = torch.stack([left.T @ matrix @ right for matrix in stack])
        wanted[name] = left @ Elementwise("largest", 0.5, "total")(core) @ right.T
        np.testing.assert_allclose(left @ core.sum(0) @ right.T, stack.sum(0), atol=1e-9)
    close(merged(inputs, WEIGHTS, method="ties", space="core", density=0.5), wanted)
    close(merged(inputs, WEIGHTS, method="core", rule="ties", density=0.5), wanted)


def test_the_elementwise_rule_is_pefts() -> None:
    stack = torch.randn(5, 20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for density in (0.1, 0.5, 1.0):
        assert torch.allclose(Elementwise("largest", density, "total")(stack), peft_ties(stack, density))
        settled = Elementwise("largest", density, "frequency")(stack)
        votes = torch.stack([merge_utils.prune(one, density, "magnitude") for one in stack]).sign().sum(dim=0)
        even = votes == 0  # which PEFT counts as positive, and lorahub decides by the total
        assert bool(even.any()) == (density < 1)
        assert torch.allclose(settled[~even], peft_ties(stack, density, "frequency")[~even])
        assert torch.allclose(settled[even], Elementwise("largest", density, "total")(stack)[even])
        pruned = merge_utils.magnitude_prune(list(stack), torch.ones(5, dtype=torch.float64), density)
        assert torch.allclose(Elementwise("largest", density, "sum")(stack), pruned)


def test_knots_is_ties_on_the_aligned_right_vectors() -> None:
    inputs = wide(2)
    wanted = {}
    for name, stack in stacks(inputs, WEIGHTS).items():
        joined = np.hstack(list(stack.numpy()))
        size = sum(min(one.modules[name].rank, stack.shape[2]) for one in inputs)
        left, values, right = np.linalg.svd(joined, full_matrices=False)
        keep = values[:size] > 1e-5 * values[0]
        aligned = torch.tensor(right[:size] * keep[:, None]).reshape(-1, len(inputs), stack.shape[2]).transpose(0, 1)
        whole = Elementwise("largest", 0.3, "total")(aligned)
        wanted[name] = torch.tensor(left[:, :size] * values[:size]) @ whole
    close(merged(inputs, WEIGHTS, method="knots", density=0.3), wanted)


def test_dare_is_the_sum_in_expectation_and_copies_draw_alike() -> None:
    inputs = [adapter("layer.0.query", rank=6, seed=seed) for seed in range(2)]
    exact = weighted_sum(inputs, [1.0, 1.0])["layer.0.query"]
    for space in ("delta", "core"):
        draws = [merged(inputs, [1.0, 1.0], method="dare", space=space, seed=seed) for seed in range(400)]
        one = float((draws[0]["layer.0.query"] - exact).norm())
        mean = sum(draw["layer.0.query"] for draw in draws) / len(draws)
        assert 0.5 * float(exact.norm()) < one
        assert float((mean - exact).norm()) < 2 * one / 400**0.5
        assert not torch.equal(draws[0]["layer.0.query"], draws[1]["layer.0.query"])


def test_dare_drops_the_share_it_says() -> None:
    stack, chances = torch.ones(2, 300, 300), [torch.Generator().manual_seed(seed) for seed in range(2)]
    out = Elementwise("random", 0.2, "sum")(stack, chances)
    kinds, counts = out.unique(return_counts=True)
    assert kinds.tolist() == [0.0, 5.0, 10.0]
    assert [count / out.numel() for count in counts.tolist()] == pytest.approx([0.64, 0.32, 0.04], abs=0.01)


# --- TSV and Iso ----------------------------------------------------------------------------------------------------


def polar(matrix: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def dense_tsv(stack: Tensor, size: int) -> Tensor:
    """The published algorithm, on full matrices."""
    parts = [torch.linalg.svd(matrix, full_matrices=False) for matrix in stack]
    left = torch.cat([u[:, :size] for u, _, _ in parts], dim=1)
    right = torch.cat([vh[:size] for _, _, vh in parts])
    values = torch.cat([s[:size] for _, s, _ in parts])
    return polar(left) * values @ polar(right)


def dense_iso(stack: Tensor, common: float = 1.0) -> Tensor:
    """The published algorithm, where the sum is of full rank."""
    u, s, vh = torch.linalg.svd(stack.sum(dim=0), full_matrices=False)
    specific = int(len(s) * (1 - common)) // len(stack)
    shared = len(s) - specific * len(stack)
    if specific:
        lefts, spectra, rights = [u[:, :shared]], [s[:shared]], [vh[:shared]]
        for matrix in stack:
            rest = torch.linalg.svd(matrix - lefts[0] @ lefts[0].T @ matrix, full_matrices=False)
            lefts, spectra, rights = (
                [*table, part]
                for table, part in zip(
                    (lefts, spectra, rights), (rest.U[:, :specific], rest.S[:specific], rest.Vh[:specific]), strict=True
                )
            )
        u, s, vh = polar(torch.cat(lefts, dim=1)), torch.cat(spectra), polar(torch.cat(rights))
    return s.mean() * (u @ vh)


@pytest.mark.parametrize("place", [Place(12, 17), Place(20, 9), Place(40, 50)], ids=str)
def test_tsv_is_the_dense_definition(place: Place) -> None:
    parts = [low_rank(place, 20, seed=seed, dtype=torch.float64) for seed in range(3)]
    inputs = [Adapter({"m": part}, "tiny", {}, {"name": str(i)}) for i, part in enumerate(parts)]
    stack = torch.stack([w * p.dense() for w, p in zip(WEIGHTS, parts, strict=True)])
    size = min(min(place.outputs, place.inputs) // 3, 20)
    close(merged(inputs, WEIGHTS, method="tsv"), {"m": dense_tsv(stack, size)})


@pytest.mark.parametrize("common", [1.0, 0.8, 0.5])
@pytest.mark.parametrize("place", [Place(12, 17), Place(20, 9), Place(40, 50)], ids=str)
def test_iso_is_the_dense_definition(place: Place, common: float) -> None:
    parts = [low_rank(place, 20, seed=seed, dtype=torch.float64) for seed in range(3)]
    inputs = [Adapter({"m": part}, "tiny", {}, {"name": str(i)}) for i, part in enumerate(parts)]
    stack = torch.stack([w * p.dense() for w, p in zip(WEIGHTS, parts, strict=True)])
    close(merged(inputs, WEIGHTS, method="iso", common=common), {"m": dense_iso(stack, common)})


def test_thin_adapters_get_a_flat_spectrum_over_what_they_span() -> None:
    parts = [low_rank(Place(60, 70), 4, seed=seed) for seed in range(3)]
    inputs = [Adapter({"m": part}, "tiny", {}, {"name": str(i)}) for i, part in enumerate(parts)]
    total = torch.linalg.svdvals(weighted_sum(inputs, [1.0] * 3)["m"])[:12]
    for method, given in (("iso", {}), ("core", {"rule": "iso"})):
        values = torch.linalg.svdvals(merged(inputs, [1.0] * 3, method=method, **given)["m"])
        assert torch.allclose(values[:12], total.mean().expand(12), rtol=1e-5)
        assert float(values[12:].max()) < 1e-5 * float(values[0])
    aligned = torch.linalg.svdvals(merged(inputs, [1.0] * 3, method="core", rule="tsv_iso")["m"])
    assert float(aligned[0] - aligned[11]) < 1e-5 * float(aligned[0])
    assert float(aligned[12:].max()) < 1e-5 * float(aligned[0])


def test_tsv_keeps_what_does_not_overlap() -> None:
    """Adapters in orthogonal subspaces do not interfere: TSV is their exact sum."""
    eye = torch.eye(12)
    inputs = [
        Adapter(
            {"m": LowRank(eye[4 * i : 4 * i + 4], eye[:, 4 * i : 4 * i + 4], i + 1.0)}, "tiny", {}, {"name": str(i)}
        )
        for i in range(3)
    ]
    close(merged(inputs, WEIGHTS, method="tsv"), weighted_sum(inputs, WEIGHTS))


# --- gauges, blocks, ranks ------------------------------------------------------------------------------------------


def refactored(one: Adapter, seed: int) -> Adapter:
    """The same deltas, factored otherwise: (up M, M^-1 down)."""

    def change(module: LowRank) -> LowRank:
        mix = torch.randn(module.rank, module.rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        mix += 3 * torch.eye(module.rank)
        return LowRank(mix.inverse() @ module.down, module.up @ mix, module.scale, module.kernel, module.embedding)

    return one.mapped(change)


GAUGED = [m for m in methods() if "gauge" not in options(m) or options(m)["gauge"].default == "svd"]


@pytest.mark.parametrize("method", [method for method in GAUGED if method != "dare"])
def test_results_do_not_depend_on_how_deltas_are_factored(method: str) -> None:
    inputs = wide(2)
    again = [refactored(one, seed) for seed, one in enumerate(inputs)]
    close(merged(again, WEIGHTS, method=method), merged(inputs, WEIGHTS, method=method), 1e-4)


@pytest.mark.parametrize("method", ["ties", "magnitude", "dare"])
def test_blocks_of_the_delta_are_the_whole(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [adapter("layer.0.query", "conv.wide", rank=9, seed=seed) for seed in range(3)]
    wanted = merged(inputs, WEIGHTS, method=method, space="delta", density=1.0 if method == "dare" else 0.4)
    monkeypatch.setattr(spaces, "BLOCK", 200)
    close(merged(inputs, WEIGHTS, method=method, space="delta", density=1.0 if method == "dare" else 0.4), wanted)


def test_limits_found_by_histogram_are_the_exact_ones() -> None:
    chance = torch.Generator().manual_seed(1)
    stack = torch.randn(4, 50, 60, generator=chance) * torch.tensor([1.0, 1e-6, 1e6, 0.0])[:, None, None]
    stack[1, :, :30] = 0.0
    for keep in (1, 7, 1000, 2999, 3000):
        wanted = limits_for(stack, keep / 3000)
        assert torch.equal(spaces._limits_of(lambda: stack.split(7, dim=2), keep), wanted)


def test_factors_of_a_wide_matrix_are_nearly_optimal() -> None:
    chance = torch.Generator().manual_seed(2)
    matrix = torch.randn(300, 400, generator=chance) + 3 * torch.randn(300, 5, generator=chance) @ torch.randn(
        5, 400, generator=chance
    )
    up, down = spaces.factored(lambda: matrix.split(64, dim=1), 300, 400, 10)
    optimum = float(torch.linalg.svdvals(matrix)[10:].norm())
    assert float((matrix - up @ down).norm()) <= 1.01 * optimum


def test_ties_in_the_delta_keeps_the_rank_it_is_asked_for() -> None:
    inputs = wide()
    full = merged(inputs, WEIGHTS, method="ties", space="delta")
    for name, matrix in merged(inputs, WEIGHTS, method="ties", space="delta", rank=3).items():
        u, s, vh = torch.linalg.svd(full[name], full_matrices=False)
        best = u[:, :3] * s[:3] @ vh[:3]
        assert float((matrix - best).norm()) <= 1e-4 * float(full[name].norm())


# --- RobustMerge ----------------------------------------------------------------------------------------------------


def test_robust_gives_back_what_pruning_takes() -> None:
    one, two = adapter("layer.0.query", rank=3, seed=1), adapter("layer.0.query", rank=5, seed=2)
    ups, downs, lost = [], [], []
    for some, weight in ((one, 0.5), (two, -0.8)):
        u, s, vh = some.modules["layer.0.query"].scaled(weight).svd()
        ups.append(np.asarray(u * s.sqrt()))
        downs.append(np.asarray(s.sqrt()[:, None] * vh))
    for side in (ups, downs):
        for factor in side:
            factor[np.abs(factor) < np.sort(np.abs(factor), axis=None)[::-1][round(0.5 * factor.size) - 1]] = 0
    for (some, weight), down in zip(((one, 0.5), (two, -0.8)), downs, strict=True):
        _, s, vh = some.modules["layer.0.query"].scaled(weight).svd()
        before = np.abs(np.asarray(s.sqrt()[:, None] * vh)).sum(axis=1)
        lost.append(before / np.abs(down).sum(axis=1))
    means = [(lost[0][i] + lost[1][i]) / 2 if i < 3 else lost[1][i] for i in range(5)]
    wanted = sum((up * (share / means[: len(share)])) @ down for up, down, share in zip(ups, downs, lost, strict=True))
    close(merged([one, two], [0.5, -0.8], method="robust"), {"layer.0.query": torch.tensor(wanted)})


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "given", "says"),
    [
        ("ties", {"density": "0"}, "density is 0.0"),
        ("ties", {"density": 1.5}, "density is 1.5"),
        ("ties", {"space": "nowhere"}, "delta, core, factors"),
        ("ties", {"elect": "nobody"}, "total, frequency"),
        ("dare", {"gauge": "steam"}, "svd, stored"),
        ("core", {"rule": "thumb"}, "tsv_iso"),
        ("knots", {"pick": "best"}, "largest, random"),
        ("iso", {"common": 0.0}, "common is 0.0"),
        ("tsv", {"keep": 2.0}, "keep is 2.0"),
        ("robust", {"density": -1.0}, "density is -1.0"),
        ("magnitude", {"rank": 0}, "rank is 0"),
        ("tsv", {"rank": 0}, "rank is 0"),
        ("tsv", {"rank": "few"}, "rank is 'few'"),
        ("iso", {"energy": 2.0}, "energy is 2.0"),
        ("iso", {"density": 0.5}, "has no option 'density'"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_in_one_line(method: str, given: dict[str, Any], says: str) -> None:
    with pytest.raises(BadOption) as error:
        merge(wide(2), method, WEIGHTS, given=given)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_flat_spectrum_of_few_directions_has_the_leading_ones() -> None:
    """Cut off afterwards, which directions stay would be left to rounding: all weigh the same."""
    parts = [low_rank(Place(60, 70), 4, seed=seed) for seed in range(3)]
    inputs = [Adapter({"m": part}, "tiny", {}, {"name": str(i)}) for i, part in enumerate(parts)]
    for method, given in (("iso", {}), ("core", {"rule": "iso"})):
        u, s, vh = torch.linalg.svd(weighted_sum(inputs, [1.0] * 3)["m"])
        wanted = s[:5].mean() * u[:, :5] @ vh[:5]
        close(merged(inputs, [1.0] * 3, method=method, rank=5, **given), {"m": wanted})
    u, s, vh = torch.linalg.svd(merged(inputs, [1.0] * 3, method="tsv", keep=1.0)["m"])
    wanted = s[:5].mean() * u[:, :5] @ vh[:5]
    close(merged(inputs, [1.0] * 3, method="core", rule="tsv_iso", rank=5), {"m": wanted})
    total = weighted_sum(inputs, [1.0] * 3)["m"]
    kept = merge(inputs, "core", given={"rule": "iso", "energy": 0.9}).adapter.modules["m"]
    values = torch.linalg.svdvals(total) ** 2
    assert float(values[: kept.rank].sum()) >= 0.9 * float(values.sum()) > float(values[: kept.rank - 1].sum())

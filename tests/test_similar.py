"""Laws of the weight space: sketches keep inner products, and neighbours are found however a delta is written down."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from lorahub.hub.adapter import Adapter
from lorahub.hub.catalog import Catalog
from lorahub.hub.errors import BadOption, IncompatibleAdapters
from lorahub.hub.lowrank import LowRank, concat
from lorahub.index import similar as module
from lorahub.index.encoders._probes import signs
from lorahub.index.encoders.columns import column_basis, columns
from lorahub.index.encoders.delta import delta
from lorahub.index.similar import Likeness, column_overlap, compare, similar
from making import LAW, adapter, adapters, deltas
from safetensors.torch import save_file
from torch import Tensor


def regauged(some: Adapter, seed: int = 0) -> Adapter:
    """The same deltas: other factors (up M, M^-1 down), one spare rank of zeros, scale folded in."""
    chance = torch.Generator().manual_seed(seed)

    def change(part: LowRank) -> LowRank:
        wide = LowRank(part.down.double(), part.up.double(), part.scale, part.kernel, part.embedding)
        turn = torch.linalg.qr(torch.randn(part.rank, part.rank, generator=chance, dtype=torch.float64))[0]
        turn = turn * torch.linspace(0.5, 2, part.rank, dtype=torch.float64)
        down = torch.linalg.solve(turn, wide.down)
        spare = torch.zeros(1, down.shape[1], dtype=torch.float64)
        up = torch.cat([wide.up @ turn * wide.scale, torch.ones(len(wide.up), 1, dtype=torch.float64)], dim=1)
        return replace(wide, down=torch.cat([down, spare]), up=up, scale=1.0)

    return some.mapped(change)


def close(got: Tensor, wanted: Tensor, size: float, tolerance: float = 1e-4) -> None:
    assert float((got - wanted).norm()) <= tolerance * max(size, 1e-12)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads, on a busy machine a hundred times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- sketches -------------------------------------------------------------------------------------------------------


def test_probes_are_the_same_for_ever() -> None:
    """Stored sketches are compared with new ones: if this fails, every stored vector has lost its meaning."""
    assert signs("golden", 16).tolist() == GOLDEN


GOLDEN = [1, 1, -1, 1, 1, -1, 1, -1, -1, -1, 1, 1, 1, -1, -1, 1]


def test_sketches_are_the_same_in_another_process() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests'); from making import adapter; from lorahub.index.encoders.NAME "
        "import NAME; print(NAME(adapter(seed=3), dim=8).tolist())"
    )
    for sketch in (delta, columns):
        told = [sys.executable, "-c", code.replace("NAME", sketch.__name__)]
        done = subprocess.run(told, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
        assert torch.allclose(torch.tensor(eval(done.stdout)), sketch(adapter(seed=3), dim=8), rtol=1e-4)


@LAW
@given(adapters(dtype=torch.float32))
def test_sketches_do_not_see_the_factorisation(some: Adapter) -> None:
    other = regauged(some)
    close(delta(other, dim=32), delta(some, dim=32), some.norm())
    close(columns(other, dim=32), columns(some, dim=32), math.sqrt(len(some.modules)), 1e-3)


@LAW
@given(adapters(dtype=torch.float32, complete=True), adapters(dtype=torch.float32, complete=True))
def test_delta_is_linear(one: Adapter, two: Adapter) -> None:
    both = Adapter({name: concat([m, two.modules[name]], [0.5, -2]) for name, m in one.modules.items()})
    close(delta(both, dim=32), 0.5 * delta(one, dim=32) - 2 * delta(two, dim=32), one.norm() + two.norm())


def test_delta_sees_alpha_as_scale_and_columns_does_not() -> None:
    some = adapter(scale=2.0, seed=1)
    doubled = some.mapped(lambda part: replace(part, up=part.up * 2, scale=1.0))
    close(delta(doubled), delta(some), some.norm())
    close(delta(some.scaled(-3)), -3 * delta(some), some.norm())
    close(columns(some.scaled(-3)), columns(some), 1)


def test_delta_keeps_inner_products() -> None:
    one, two = adapter(seed=1), adapter(seed=2)
    mixed = Adapter({name: concat([m, two.modules[name]], [1, 1]) for name, m in one.modules.items()})
    for left, right in ((one, one), (one, two), (one, mixed)):
        estimate = float(delta(left, dim=4096) @ delta(right, dim=4096))
        assert estimate == pytest.approx(left.inner(right), abs=0.1 * left.norm() * right.norm())


def test_the_error_shrinks_with_the_root_of_dim() -> None:
    pairs = [(adapter(seed=2 * k), adapter(seed=2 * k + 1)) for k in range(30)]
    for dim in (64, 512):
        errors = [
            float(torch.cosine_similarity(delta(a, dim=dim), delta(b, dim=dim), dim=0)) - a.cosine(b) for a, b in pairs
        ]
        spread = math.sqrt(sum(e * e for e in errors) / len(errors))
        assert 0.4 / math.sqrt(dim) < spread < 2 / math.sqrt(dim)
        assert abs(sum(errors) / len(errors)) < 3 * spread / math.sqrt(len(errors))


def test_modules_of_other_names_have_nothing_in_common() -> None:
    some = adapter("layer.0.query", seed=1)
    moved = Adapter({"layer.1.query": some.modules["layer.0.query"]})
    for sketch in (delta, columns):
        one, two = sketch(some, dim=4096), sketch(moved, dim=4096)
        assert abs(float(torch.cosine_similarity(one, two, dim=0))) < 0.08


def test_nothing_has_a_sketch_of_zeros() -> None:
    none = Adapter({"m": LowRank(torch.zeros(2, 5), torch.zeros(4, 2))})
    full = Adapter({"m": LowRank(torch.eye(4, 5), torch.eye(4))})
    for sketch, some in ((delta, none), (columns, none), (columns, full), (delta, Adapter({})), (columns, Adapter({}))):
        assert not sketch(some, dim=8).any()


def test_columns_estimates_the_overlap_above_chance() -> None:
    one, two = wide(seed=1), wide(seed=2)
    shared = Adapter({n: replace(p, down=torch.randn(p.down.shape)) for n, p in one.modules.items()})
    for other, wanted in ((two, 0.0), (shared, 1.0)):
        got = float(columns(one, dim=4096) @ columns(other, dim=4096)) / len(one.modules)
        assert got == pytest.approx(wanted, abs=0.08)


def wide(seed: int, rank: int = 3) -> Adapter:
    chance = torch.Generator().manual_seed(seed)
    return Adapter(
        {f"m{k}": LowRank(torch.randn(rank, 30, generator=chance), torch.randn(60, rank, generator=chance))
         for k in range(4)}
    )  # fmt: skip


def test_a_long_module_is_projected_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorahub.index.encoders import _probes

    rows = torch.randn(2, 9000)
    whole = torch.cat([_probes._block("x", k, 4) for k in range(3)])[:9000]
    assert torch.allclose(_probes.project(rows, "x", 4), rows @ whole, atol=1e-2)
    assert whole.abs().eq(1).all()
    assert abs(float(whole.mean())) < 0.05
    assert torch.allclose(_probes.agreement(9000, "x", "x", 4), torch.full((4,), 9000.0))


# --- comparison -----------------------------------------------------------------------------------------------------


def oracle(one: Adapter, two: Adapter) -> float:
    left, right = deltas(one), deltas(two)
    inner = sum(float((left[name] * right[name]).sum()) for name in left.keys() & right.keys())
    size = math.prod(math.sqrt(sum(float(m.square().sum()) for m in some.values())) for some in (left, right))
    return inner / size if size else 0.0


@LAW
@given(adapters(), adapters())
def test_cosine_is_that_of_the_dense_deltas(one: Adapter, two: Adapter) -> None:
    (found,) = compare(one, [two])
    assert found.cosine == pytest.approx(oracle(one, two), abs=1e-6)
    assert found.shared_modules == len(one.modules.keys() & two.modules.keys())
    (back,) = compare(two, [one])
    assert (back.cosine, back.overlap) == pytest.approx((found.cosine, found.overlap), abs=1e-5)


@LAW
@given(adapters(dtype=torch.float32))
def test_a_delta_written_anew_is_the_same_delta(some: Adapter) -> None:
    same, stronger, opposite = compare(some, [regauged(some), some.scaled(1.5), some.scaled(-1)])
    assert same.same_delta
    assert same.norm_ratio == pytest.approx(1, abs=1e-5)
    assert not stronger.same_delta
    assert (stronger.cosine, stronger.norm_ratio) == pytest.approx((1, 1.5), abs=1e-5)
    assert (opposite.cosine, opposite.overlap) == pytest.approx((-1, same.overlap), abs=1e-4)


def test_a_copy_in_float16_is_the_same_delta_and_a_retrained_one_is_not() -> None:
    some = adapter(seed=1)
    near = some.mapped(lambda part: replace(part, up=part.up + 0.02 * torch.randn(part.up.shape)))
    copied, trained = compare(some, [some.mapped(lambda part: part.to(torch.float16)), near])
    assert copied.same_delta
    assert not trained.same_delta
    assert trained.cosine > 0.99


def test_modules_of_other_shapes_are_not_shared() -> None:
    one = Adapter(
        {"m": LowRank(torch.randn(2, 5), torch.randn(4, 2)), "n": LowRank(torch.ones(1, 3), torch.ones(3, 1))}
    )
    two = Adapter({"m": LowRank(torch.randn(2, 6), torch.randn(4, 2)), "n": one.modules["n"]})
    (found,) = compare(one, [two])
    assert found.shared_modules == 1
    assert 0 < found.cosine < 1


def test_overlap_is_zero_by_chance_and_one_for_containment() -> None:
    torch.manual_seed(0)

    def subspace(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(24, size))[0]

    for a, b in ((3, 3), (2, 9), (8, 5)):
        overlaps = [column_overlap(subspace(a), subspace(b)) or 0.0 for _ in range(400)]
        assert abs(sum(overlaps) / 400) < 0.02
    big = subspace(9)
    assert column_overlap(big, big[:, :4]) == pytest.approx(1, abs=1e-5)
    assert column_overlap(big, subspace(24)) is None
    assert column_overlap(big, big[:, :0]) is None


def test_the_basis_has_the_numerical_rank() -> None:
    some = adapter("layer.0.query", rank=3).modules["layer.0.query"]
    doubled = concat([some, some])
    assert doubled.rank == 6
    basis = column_basis(doubled)
    assert basis.shape == (12, 3)
    assert torch.allclose(basis.T @ basis, torch.eye(3), atol=1e-5)
    assert torch.allclose(basis @ basis.T @ some.up, some.up, atol=1e-4)


@cache
def trained(task: int, seed: int) -> Adapter:
    """A rank-4 LoRA on two layers after 40 steps of Adam, from a random start of its own, on one of three tasks."""
    chance = torch.Generator().manual_seed(1000 + task)
    inputs = torch.randn(64, 300, generator=chance)
    change = torch.randn(32, 3, generator=chance) @ torch.randn(3, 300, generator=chance) / 20
    common = torch.Generator().manual_seed(7)
    first, second = (torch.randn(*s, generator=common) / s[1] ** 0.5 for s in ((36, 300), (32, 36)))
    wanted = torch.relu(inputs @ first.T) @ second.T + inputs @ change.T
    own = torch.Generator().manual_seed(100 * task + seed)
    downs = [torch.randn(4, 300, generator=own) / 17, torch.randn(4, 36, generator=own) / 6]
    ups = [torch.zeros(36, 4), torch.zeros(32, 4)]
    weights = [tensor.requires_grad_() for tensor in (*downs, *ups)]
    optimiser = torch.optim.Adam(weights, lr=3e-4)
    for _ in range(40):
        hidden = torch.relu(inputs @ (first + ups[0] @ downs[0]).T)
        loss = (hidden @ (second + ups[1] @ downs[1]).T - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    parts = [LowRank(down.detach(), up.detach()) for down, up in zip(downs, ups, strict=True)]
    return Adapter({"first": parts[0], "second": parts[1]})


def test_adapters_trained_apart_on_one_task_are_found_by_their_column_spaces() -> None:
    runs = [(task, seed) for task in range(3) for seed in range(3)]
    found: dict[bool, list[Likeness]] = {True: [], False: []}
    for task, seed in runs:
        others = [run for run in runs if run != (task, seed)]
        likenesses = compare(trained(task, seed), [trained(*run) for run in others])
        for other, likeness in zip(others, likenesses, strict=True):
            found[other[0] == task].append(likeness)
        nearest = max(zip(likenesses, others, strict=True), key=lambda pair: pair[0].score)[1]
        assert nearest[0] == task
        sketched = [float(columns(trained(task, seed)) @ columns(trained(*run))) for run in others]
        assert others[sketched.index(max(sketched))][0] == task
    assert max(x.overlap for x in found[False]) < 0.15 < 0.25 < min(x.overlap for x in found[True])
    assert max(x.cosine for x in found[True]) < 0.2  # the deltas hardly show it


# --- in the catalogue -----------------------------------------------------------------------------------------------

PLACES = ("to_q", "to_v")


def written(path: Path, some: Mapping[str, LowRank], base: str = "sd_v1") -> Path:
    prefix = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    tensors = {}
    for name, part in some.items():
        tensors[f"{prefix}.{name}.lora_A.weight"] = part.down.float().contiguous()
        tensors[f"{prefix}.{name}.lora_B.weight"] = (part.up * part.scale).float().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"ss_base_model_version": base})
    return path.resolve()


def random_modules(seed: int, rank: int = 3) -> dict[str, LowRank]:
    chance = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(torch.randn(rank, 20, generator=chance), torch.randn(24, rank, generator=chance))
        for name in PLACES
    }


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Catalog]:
    """x, x factorised anew, x twice as strong, one that writes where x writes, three others, one on another base."""
    x = random_modules(0)
    chance = torch.Generator().manual_seed(77)
    kin = {n: replace(p, down=torch.randn(3, 20, generator=chance)) for n, p in x.items()}
    some = {
        "x": x,
        "again": dict(regauged(Adapter(x)).modules),
        "twice": {name: part.scaled(2) for name, part in x.items()},
        "kin": kin,
        **{f"other{seed}": random_modules(seed) for seed in (1, 2, 3)},
    }
    paths = [written(tmp_path / "library" / f"{name}.safetensors", modules) for name, modules in some.items()]
    paths.append(written(tmp_path / "library" / "elsewhere.safetensors", x | random_modules(9), "sdxl_base_v1-0"))
    with Catalog(tmp_path / "home") as catalog:
        added = list(catalog.add(paths))
        assert [a.status for a in added] == ["added"] * 8, added
        yield catalog


def check(catalog: Catalog) -> None:
    found = similar(catalog, catalog.entry("x"), limit=4)
    assert [neighbour.entry.name for neighbour in found][:3] == ["again", "twice", "kin"]
    assert [n.entry.name for n in found if n.same_delta] == ["again"]
    by_name = {neighbour.entry.name: neighbour for neighbour in found}
    assert "elsewhere" not in by_name
    assert by_name["twice"].norm_ratio == pytest.approx(2, rel=1e-5)
    assert by_name["twice"].why == ("same delta at 2 times the strength over 2 shared modules",)
    assert by_name["again"].why[0].startswith("same delta over 2 shared modules")
    assert by_name["kin"].overlap == pytest.approx(1, abs=1e-5)
    assert abs(by_name["kin"].cosine) < 0.5
    assert "column spaces overlap 1.00" in by_name["kin"].why[1]


def test_neighbours_are_found_and_duplicates_marked(library: Catalog) -> None:
    check(library)
    assert len(similar(library, library.entry("x"), limit=50)) == 6
    assert library.vector_state("delta")[0] == 0  # so few need no sketch


def test_a_large_library_is_narrowed_by_sketches_first(library: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXHAUSTIVE", 2)
    monkeypatch.setattr(module, "SHORTLIST", 3)
    steps: list[tuple[int, int]] = []
    similar(library, library.entry("x"), limit=1, progress=lambda *step: steps.append(step))
    assert (7, 7) in steps
    assert steps[-1] == (2, 2)
    assert library.vector_state("delta")[0] == library.vector_state("columns")[0] == 7  # not those of other bases
    check(library)


def test_a_file_that_is_gone_is_left_out_with_a_warning(library: Catalog, caplog: pytest.LogCaptureFixture) -> None:
    Path(library.entry("kin").locations[0]).unlink()
    with caplog.at_level(logging.WARNING):
        found = similar(library, library.entry("x"))
    assert "kin" not in {neighbour.entry.name for neighbour in found}
    assert "kin" in caplog.text


def test_what_cannot_be_compared_is_said(library: Catalog) -> None:
    with pytest.raises(BadOption, match="limit is 0"):
        similar(library, library.entry("x"), limit=0)
    entry = replace(library.entry("x"), mergeable=False, reason="DoRA")
    with pytest.raises(IncompatibleAdapters, match="x has no low-rank deltas to compare: DoRA"):
        similar(library, entry)


def test_sketches_are_stored_once_and_change_no_result(library: Catalog) -> None:
    from lorahub.index.embed import fill_weights

    assert fill_weights(library) == 8
    assert fill_weights(library) == 0
    check(library)

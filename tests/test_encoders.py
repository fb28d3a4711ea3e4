"""Laws of the weight encoders: blind to how a delta is written down, to order and company; absent is absent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import BadOption, IncompatibleAdapters
from lorahub.hub.lowrank import LowRank, concat
from lorahub.index.encoders._energies import Sizes, sketches
from lorahub.index.encoders._factors import by_group, canonical, decomposed
from lorahub.index.encoders.autolora import PUBLISHED, autolora
from lorahub.index.encoders.probe import probe
from lorahub.index.encoders.spectral import spectral
from lorahub.index.encoders.w2t import PUBLISHED as W2T_PUBLISHED
from lorahub.index.encoders.w2t import w2t
from lorahub.index.modules import Manifest
from lorahub.index.ridge import ridge
from making import BASE, Place, adapter, delta, low_rank
from torch import Tensor, nn

Encode = Callable[[Adapter], Tensor]
SMALL = {**PUBLISHED, "width": 24, "heads": 3}
KINDS: dict[str, Callable[[Manifest], nn.Module]] = {
    "energy": lambda m: autolora(m, dim=24, width=16, left=32, right=16, both=16, start=8),
    "energy alone": lambda m: autolora(m, dim=24, width=16, left=32, right=16, both=16, start=0),
    "response": lambda m: autolora(m, dim=24, width=16, reading="response"),
    "published": lambda m: autolora(m, dim=24, **SMALL),
    "w2t": lambda m: w2t(m, dim=24, width=16),
    "w2t published": lambda m: w2t(m, dim=24, **W2T_PUBLISHED),
    "ridge": lambda m: ridge(m, dim=24, left=32, right=16, both=16, components=8),
}
ALL = [*KINDS, "spectral", "probe"]
MANIFEST = Manifest.of([adapter()])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads, on a busy machine a hundred times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(kind: str, manifest: Manifest = MANIFEST) -> Any:
    """As if fitted: no weight is zero, and every part has a say."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        made = KINDS[kind](manifest)
        for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
            if not tensor.any() and tensor.is_floating_point() and not name.endswith("common"):
                tensor.data.normal_(0, 0.3)
    return made.eval().requires_grad_(False)


def encoding(kind: str, manifest: Manifest = MANIFEST) -> Encode:
    """Adapter -> vector."""
    if kind in KINDS:
        made = network(kind, manifest)
        return lambda some: made([made.features(some)])[0]
    return {"spectral": spectral, "probe": probe}[kind]


def same(one: Tensor, two: Tensor) -> bool:
    return float((one - two).abs().max()) < 1e-5


def regauged(some: Adapter) -> Adapter:
    """(up M, M^-1 down) for a random M, the scale moved into `up`."""
    chance = torch.Generator().manual_seed(1)

    def change(part: LowRank) -> LowRank:
        turn = torch.linalg.qr(torch.randn(part.rank, part.rank, generator=chance, dtype=torch.float64))[0]
        turn = turn * torch.linspace(0.5, 2, part.rank, dtype=torch.float64)
        down = torch.linalg.solve(turn, part.down.double())
        return replace(part, down=down.float(), up=(part.up.double() @ turn * part.scale).float(), scale=1.0)

    return some.mapped(change)


def padded(some: Adapter) -> Adapter:
    """Two more ranks: zeros in `down`, and zeros in `up`, with anything across from them."""

    def change(part: LowRank) -> LowRank:
        down = torch.cat([part.down, torch.zeros(1, part.down.shape[1]), torch.ones(1, part.down.shape[1])])
        up = torch.cat([part.up, torch.ones(len(part.up), 1), torch.zeros(len(part.up), 1)], dim=1)
        return replace(part, down=down, up=up)

    return some.mapped(change)


REWRITTEN: dict[str, Callable[[Adapter], Adapter]] = {
    "gauge": regauged,
    "padding": padded,
    "alpha": lambda a: a.mapped(lambda p: replace(p, down=p.down * 4, up=p.up / 2, scale=p.scale / 2)),
    "both signs": lambda a: a.mapped(lambda p: replace(p, down=-p.down, up=-p.up)),
    "float64": lambda a: a.mapped(lambda p: p.to(torch.float64)),
    "order": lambda a: replace(a, modules=dict(reversed(list(a.modules.items())))),
}


@pytest.mark.parametrize("how", REWRITTEN)
@pytest.mark.parametrize("kind", ALL)
def test_an_embedding_does_not_see_how_a_delta_is_written(kind: str, how: str) -> None:
    encode, some = encoding(kind), adapter(seed=3, scale=0.5, rank=3)
    assert same(encode(REWRITTEN[how](some)), encode(some))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ALL)
def test_an_embedding_does_not_see_the_dtype(kind: str, dtype: torch.dtype) -> None:
    encode, some = encoding(kind), adapter(seed=3, rank=3, dtype=dtype)
    assert same(encode(some), encode(some.mapped(lambda part: part.to(torch.float32))))


@pytest.mark.parametrize("kind", ALL)
def test_different_deltas_have_different_embeddings(kind: str) -> None:
    encode = encoding(kind)
    assert float((encode(adapter(seed=1)) - encode(adapter(seed=2))).norm()) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_units_and_do_not_depend_on_company(kind: str) -> None:
    made = network(kind)
    some = [made.features(adapter(seed=seed, rank=rank)) for seed, rank in enumerate((1, 7, 3))]
    together = made(some)
    assert torch.allclose(together.norm(dim=1), torch.ones(3), atol=1e-5)
    for item, row in zip(some, together, strict=True):
        assert same(made([item])[0], row)


@pytest.mark.parametrize("kind", ALL)
def test_a_module_that_does_nothing_is_as_good_as_absent(kind: str) -> None:
    encode, some = encoding(kind), adapter(seed=3)
    modules = dict(some.modules)
    lost = modules.pop("layer.0.query")
    nothing = {**modules, "layer.0.query": replace(lost, up=torch.zeros_like(lost.up))}
    left = encode(replace(some, modules=modules))
    assert same(left, encode(replace(some, modules=nothing)))
    assert float((left - encode(some)).norm()) > 0.005


@pytest.mark.parametrize("kind", KINDS)
def test_modules_that_are_unknown_are_ignored_and_others_refused(kind: str) -> None:
    names = ("layer.0.query", "layer.0.value", "words")
    encode = encoding(kind, Manifest.of([adapter(*names)]))
    assert same(encode(adapter(seed=4)), encode(Adapter({n: adapter(seed=4).modules[n] for n in names}, "tiny")))
    with pytest.raises(IncompatibleAdapters, match="gpt2"):
        encode(adapter(base="gpt2"))
    with pytest.raises(IncompatibleAdapters, match=r"words is 10x22"):
        encode(Adapter({"words": low_rank(Place(10, 22), 2)}, "tiny"))


def test_fixed_encoders_are_the_same_for_ever() -> None:
    """Stored vectors are compared with new ones: if this fails, every stored vector has lost its meaning."""
    some = adapter("layer.0.query", "conv.wide", seed=5)
    for encode, golden in ((spectral, SPECTRAL), (probe, PROBE)):
        assert torch.allclose(encode(some, dim=6)[:6], torch.tensor(golden), atol=2e-4), encode(some, dim=6)


SPECTRAL = [-0.20387, -0.6903, 0.64598, 0.60112, 0.45824, 0.88874]
PROBE = [-0.31732, -0.12049, -0.13083, -0.13335, 0.49054, 0.41795]


def test_the_decomposition_is_the_deltas() -> None:
    some = padded(adapter(seed=2, rank=3, scale=-0.7))
    found = canonical(some, MANIFEST)
    assert sorted(row for each in found for row in each.rows) == list(range(len(MANIFEST.places)))
    for each in [*(one.signed() for one in found), *by_group(found, MANIFEST)]:
        for row, left, values, right in zip(each.rows, each.left, each.values, each.right, strict=True):
            dense = delta(some.modules[MANIFEST.places[row].name])
            assert torch.allclose((left * values) @ right.T, dense.float(), atol=1e-4)
            assert torch.allclose(values, torch.linalg.svdvals(dense)[: len(values)].float(), atol=1e-4)
            kept = left[:, values > 0]
            assert torch.allclose(kept.T @ kept, torch.eye(kept.shape[1]), atol=1e-4)
    for each in found:
        peaks = each.signed().left
        assert bool((peaks.gather(1, peaks.abs().argmax(dim=1, keepdim=True)) >= 0).all())


def test_nothing_of_nothing() -> None:
    left, values, right = decomposed(torch.zeros(2, 5, 3), torch.zeros(2, 3, 4))
    assert not values.any()
    assert sketches(nothing(), MANIFEST, Sizes(8, 8, 8))["sketches"].isfinite().all()
    assert not sketches(nothing(), MANIFEST, Sizes(8, 8, 8))["sketches"].any()
    assert not spectral(Adapter({})).any()
    assert not probe(Adapter({})).any()
    assert not probe(nothing()).any()
    assert left.isfinite().all()
    assert right.isfinite().all()


def nothing() -> Adapter:
    return adapter().mapped(lambda part: replace(part, up=torch.zeros_like(part.up)))


def test_the_delta_is_never_formed() -> None:
    """Dense it would take 14 GB, or 256 times what its factors do."""
    large = Adapter({"m": LowRank(torch.ones(1, 60_000) / 100, torch.arange(60_000.0)[:, None] / 1e5)}, "tiny")
    manifest = Manifest.of([large])
    for kind in ("energy", "w2t", "response", "ridge"):
        made = network(kind, manifest)
        assert made([made.features(large)]).isfinite().all()
    assert probe(large, dim=8).isfinite().all()


# --- energies -------------------------------------------------------------------------------------------------------


def written(seed: int, others: int, *, size: int = 60, rank: int = 4, modules: int = 6) -> Adapter:
    """Column spaces and spectra from `seed`, what is read from `others`."""

    def basis(chance: torch.Generator) -> Tensor:
        return torch.linalg.qr(torch.randn(size, rank, generator=chance))[0]

    one, two = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000 + others)
    values = torch.linspace(1, 2, rank)
    return Adapter({f"b.{k}.q": LowRank(basis(two).T, basis(one) * values) for k in range(modules)}, "planted")


def test_energies_see_where_an_adapter_writes_and_not_what_it_reads() -> None:
    manifest = Manifest.of([written(0, 0)])

    def read(some: Adapter, sizes: Sizes) -> Tensor:
        return sketches(some, manifest, sizes)["sketches"]

    one, same_columns, same_rows = written(1, 1), written(1, 2), written(2, 1)
    assert torch.allclose(read(one, Sizes(64, 0, 0)), read(same_columns, Sizes(64, 0, 0)), atol=1e-4)
    assert torch.allclose(read(one, Sizes(0, 64, 0)), read(same_rows, Sizes(0, 64, 0)), atol=0.2)
    for sizes in (Sizes(2048, 0, 0), Sizes(0, 0, 2048)):
        cosines = (read(one, sizes) * read(same_rows, sizes)).sum(dim=1)
        assert float(cosines.abs().max()) < 0.25
    answers = (read(one, Sizes(0, 0, 2048)) * read(same_columns, Sizes(0, 0, 2048))).sum(dim=1)
    assert float(answers.abs().max()) < 0.25, "what is answered to a probe says nothing of equal columns"


def test_energies_keep_the_cosine_of_what_is_written() -> None:
    one, two = written(1, 1, modules=1), written(2, 2, modules=1)
    both = Adapter({"b.0.q": concat([one.modules["b.0.q"], two.modules["b.0.q"]])})

    def matrix(some: Adapter) -> Tensor:
        u, s, _ = torch.linalg.svd(delta(some.modules["b.0.q"]))
        square = (u * s) @ u.T
        return square - torch.eye(60, dtype=torch.float64) * s.sum() / 60

    manifest = Manifest.of([one])
    for left, right in ((one, one), (one, two), (one, both)):
        a, b = matrix(left), matrix(right)
        cosine = float((a * b).sum() / a.norm() / b.norm())
        pair = [sketches(some, manifest, Sizes(4096, 0, 0))["sketches"][0] for some in (left, right)]
        assert float(pair[0] @ pair[1]) == pytest.approx(cosine, abs=0.08)


def test_a_flat_spectrum_over_everything_says_nothing() -> None:
    whole = Adapter({"m": LowRank(torch.eye(6), torch.eye(6))})
    assert not sketches(whole, Manifest.of([whole]), Sizes(8, 8, 0))["sketches"].any()


def test_sizes_must_be_sizes() -> None:
    for sizes in ((0, 0, 0), (-1, 2, 2)):
        with pytest.raises(BadOption, match="sketches"):
            Sizes(*sizes)


# --- AutoLoRA -------------------------------------------------------------------------------------------------------


def test_published_tokens_are_linear_maps_of_the_answers_to_probes() -> None:
    """W (B A x) + c by kind, with the scale inside, from dense deltas in float64."""
    made, some = network("published"), adapter(seed=6, scale=0.3)
    features = made.features(some)
    tokens, _ = made.reader({name: tensor[None] for name, tensor in features.items()})
    for index, group in enumerate(MANIFEST.groups):
        for at, row in enumerate(group.rows):
            answer = delta(some.modules[MANIFEST.places[row].name]).float() @ made.reader.probes[index][at, :, 0]
            wanted = made.reader.kinds.maps[index](answer)
            assert torch.allclose(tokens[0, row], wanted, atol=1e-3)


@pytest.mark.parametrize(("kind", "causal"), [("published", True), ("response", False)])
def test_a_causal_mask_hides_what_comes_after(kind: str, causal: bool) -> None:
    made, states = network(kind), []
    made.blocks.register_forward_hook(lambda module, given, result: states.append(result))
    some = adapter(seed=6)
    last = MANIFEST.places[-1].name
    other = replace(some, modules={**some.modules, last: some.modules[last].scaled(-5)})
    for each in (some, other):
        made([made.features(each)])
    moved = float((states[0] - states[1])[0, :-1].abs().max())
    assert (moved < 1e-6) == causal


def test_strength_is_seen_by_the_published_and_kept_apart_by_the_mended() -> None:
    some = adapter(seed=6)
    for kind in ("response", "energy"):
        made = network(kind)
        made.strength.zero_()
        encode = [made([made.features(some.scaled(weight))])[0] for weight in (1, 100)]
        assert same(*encode)
    published = network("published")
    one, two = (published([published.features(some.scaled(weight))])[0] for weight in (1, 100))
    assert float((one - two).norm()) > 0.01


def test_hidden_modules_are_absent_ones() -> None:
    some = adapter(seed=3)
    fewer = replace(some, modules={n: m for n, m in some.modules.items() if n != "words"})
    present = torch.tensor([[float(place.name != "words") for place in MANIFEST.places]])
    for kind in ("energy", "response", "w2t"):
        made = network(kind)
        assert same(made([made.features(some)], present)[0], made([made.features(fewer)])[0])


def test_options_that_cannot_be_are_refused() -> None:
    for given in ({"reading": "tea leaves"}, {"width": 10, "heads": 4}, {"probes": 0}):
        with pytest.raises(BadOption):
            autolora(MANIFEST, **given)
    for given in ({"width": 10, "heads": 4}, {"rank": -1}):
        with pytest.raises(BadOption):
            w2t(MANIFEST, **given)


# --- W2T ------------------------------------------------------------------------------------------------------------


def test_w2t_reads_the_strongest_directions() -> None:
    made, some = network("w2t"), adapter(seed=3, rank=7)
    cut = some.mapped(lambda part: part.truncate(4))
    assert same(made([made.features(some)])[0], made([made.features(cut)])[0])


def test_w2t_turns_signs_only_while_it_learns() -> None:
    made = w2t(MANIFEST, dim=24, width=16, dropout=0.0)
    items = [made.features(adapter(seed=seed)) for seed in range(3)]
    assert not torch.equal(made.train()(items), made(items))
    made.eval()
    assert torch.equal(made(items), made(items))


def test_shapes_of_the_base_are_all_kinds() -> None:
    """The laws above are of linear maps, convolutions and an embedding, some narrower than the rank."""
    assert any(place.embedding for place in BASE.values())
    assert any(math.prod(place.kernel) > 1 for place in BASE.values())
    assert min(place.outputs for place in BASE.values()) < 3

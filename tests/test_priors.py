"""SG-LoRA's aggregator: total variance is a mixture's, weights are a softmax, and what is left out has no part."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lorahub.generate.priors import Memory, Prototypes, asked, conditions, mixed, novelty, threshold, tuned
from lorahub.generate.taught import Taught, directions, open_school, weights_fingerprint
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import BadOption, GenerationError
from making import LAW, deltas, seeds
from schooling import SIZE, Words, expert, school, taught
from torch import Tensor


def clouds(seed: int, count: int = 4, size: int = 6) -> tuple[Tensor, Tensor]:
    """Means and variances (count, size)."""
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=chance) * 3, torch.rand(count, size, generator=chance) * 2


def test_the_total_variance_is_a_mixtures_sample_variance() -> None:
    means, variances = clouds(0)
    weights = torch.tensor([0.1, 0.4, 0.2, 0.3])
    chance, draws = torch.Generator().manual_seed(1), 200_000
    whose = torch.multinomial(weights, draws, replacement=True, generator=chance)
    samples = means[whose] + variances[whose].sqrt() * torch.randn(draws, 6, generator=chance)
    mean, variance = mixed(means, variances, weights)
    assert torch.allclose(samples.mean(dim=0), mean, atol=6 * float(variance.max() / draws) ** 0.5)
    assert torch.allclose(samples.var(dim=0), variance, rtol=0.02)


@LAW
@given(seeds, st.integers(1, 5), st.integers(1, 4))
def test_of_whole_checkpoints_it_is_exact(seed: int, experts: int, checkpoints: int) -> None:
    """Weights in proportion to whole numbers of copies: mean and variance are those of all the copies."""
    chance = torch.Generator().manual_seed(seed)
    copies = torch.randint(1, 4, (experts,), generator=chance)
    some = [torch.randn(checkpoints, 5, generator=chance) for _ in range(experts)]
    known = Prototypes.of(some, torch.eye(experts))
    mean, variance = mixed(known.means, known.variances, copies / copies.sum())
    pool = torch.cat([one.repeat(int(count), 1) for one, count in zip(some, copies, strict=True)]).double()
    assert torch.allclose(mean.double(), pool.mean(dim=0), atol=1e-5)
    assert torch.allclose(variance.double(), pool.var(dim=0, correction=0), atol=1e-5)


def test_one_checkpoint_leaves_only_what_experts_differ_by() -> None:
    known = Prototypes.of([torch.zeros(1, 3), torch.ones(1, 3)], torch.eye(2))
    assert not known.variances.any()
    prior = known.prior(torch.tensor([1.0, 1.0]) / 2**0.5, 2, 0.1)
    assert torch.allclose(prior.variance, torch.full((3,), 0.25))


def test_weights_are_a_softmax_over_the_nearest() -> None:
    means, variances = clouds(3)
    keys = torch.nn.functional.normalize(torch.randn(4, 5, generator=torch.Generator().manual_seed(4)), dim=1)
    known = Prototypes(means, variances, keys)
    query = keys[2]
    prior = known.prior(query, 3, 0.1)
    cosines = (keys @ query).sort(descending=True, stable=True)
    assert prior.experts == tuple(cosines.indices[:3].tolist())
    assert prior.experts[0] == 2
    wanted = torch.softmax(cosines.values[:3].double() / 0.1, dim=0)
    assert prior.weights == pytest.approx(wanted.tolist(), rel=1e-5)
    assert sum(prior.weights) == pytest.approx(1)
    assert prior.similarities == pytest.approx(cosines.values[:3].tolist())
    rows = list(prior.experts)
    assert torch.allclose(prior.mean, (wanted[:, None] * means[rows]).sum(dim=0).float(), atol=1e-5)
    cold, warm = known.prior(query, 4, 1e-3), known.prior(query, 4, 1e3)
    assert torch.allclose(cold.mean, means[2], atol=1e-4)
    assert torch.allclose(cold.variance, variances[2], atol=1e-3)
    assert torch.allclose(warm.mean, means.mean(dim=0), atol=1e-2)
    assert len(known.prior(query, 99, 0.1).experts) == 4


def test_draws_follow_the_prior_and_the_seed() -> None:
    means, variances = clouds(5, size=3)
    prior = Prototypes(means, variances, torch.eye(4)).prior(torch.eye(4)[1], 2, 0.5)
    assert torch.equal(prior.draw(7), prior.draw(7))
    assert not torch.equal(prior.draw(7), prior.draw(8))
    many = torch.stack([prior.draw(seed) for seed in range(1500)])
    assert torch.allclose(many.mean(dim=0), prior.mean, atol=0.25)
    assert torch.allclose(many.var(dim=0), prior.variance, rtol=0.2)


def test_a_task_is_no_part_of_its_own_condition() -> None:
    taught_here = school()
    known = Prototypes.of(taught_here.weights, taught_here.keys)
    apart = conditions(known, taught_here.vectors, 3, 0.05)
    assert [len(some) for some in apart] == [2, 2, 2, 2]
    for row, some in enumerate(apart):
        rest = taught_here.without([taught_here.names[row]])
        for prior, query in zip(some, taught_here.vectors[row], strict=True):
            assert row not in prior.experts
            other = Prototypes.of(rest.weights, rest.keys).prior(query, 3, 0.05)
            assert torch.equal(prior.mean, other.mean)
            assert torch.equal(prior.variance, other.variance)
    with_itself = conditions(known, taught_here.vectors, 3, 0.05, leave_out=False)
    assert all(row in prior.experts for row, some in enumerate(with_itself) for prior in some)
    with pytest.raises(GenerationError, match="at least two"):
        conditions(Prototypes(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 1)), [torch.ones(1, 1)], 1, 0.1)


def test_the_threshold_lets_the_librarys_own_words_pass() -> None:
    vectors = school("fox owl hen cat cow pig").vectors
    keys = directions(vectors)
    near = []
    for row, some in enumerate(vectors):
        for query in some:
            near.append(max(float(torch.tensor(query) @ keys[k]) for k in range(len(keys)) if k != row))
    assert threshold(vectors, 0.05) == pytest.approx(float(np.quantile(near, 0.05)), abs=1e-6)
    assert threshold(vectors[:1]) == -1


def test_options_are_chosen_by_a_score_on_tasks_that_were_left_out() -> None:
    here = school("fox owl hen cat")
    seen: list[int] = []

    def score(row: int, vector: Tensor) -> float:
        assert vector.shape == (SIZE,)
        seen.append(row)
        return -float((vector - here.weights[row].mean(dim=0)).norm())

    found = tuned(here, score, neighbours=(1, 2, 3), temperatures=(0.01, 10.0), descriptions=1)
    assert set(found.scores) == {(1, 0.01), (2, 0.01), (2, 10.0), (3, 0.01), (3, 10.0)}
    assert seen == [0, 1, 2, 3] * 5
    assert found.scores[found.neighbours, found.temperature] == max(found.scores.values())
    assert (found.neighbours, found.temperature) == (
        3,
        10.0,
    )  # experts have nothing in common here: averages are nearer


def test_options_outside_their_range_and_other_encoders() -> None:
    known = Prototypes(*clouds(0), torch.eye(4))
    for neighbours, temperature in ((0, 0.1), (2, 0.0), (2, float("nan"))):
        with pytest.raises(BadOption, match="neighbours is"):
            known.prior(torch.eye(4)[0], neighbours, temperature)
    with pytest.raises(GenerationError, match=r"shape \(3,\), the generator was fitted to \(4,\)"):
        known.prior(torch.ones(3), 2, 0.1)
    assert asked(np.ones(4, np.float32), known.keys).dtype == torch.float32


def test_memory_says_how_near_and_how_new() -> None:
    here = school()
    means = torch.stack([some.mean(dim=0) for some in here.weights])
    memory = Memory(here.names, here.keys, means)
    [share] = memory.nearest(here.vectors[2][0])
    assert (share.name, share.weight) == ("hen", 1.0)
    copy = memory.generated(here.layout, means[1], (share,), "made")
    assert copy.novelty == pytest.approx(0, abs=1e-6)
    assert copy.adapter.name == "made"
    new = memory.generated(here.layout, torch.randn(SIZE, generator=torch.Generator().manual_seed(0)), (share,), "made")
    wanted = 1 - max(new.adapter.cosine(here.layout.adapter(mean)) for mean in means)
    assert new.novelty == pytest.approx(wanted, abs=1e-5)


def test_novelty_is_in_units_of_an_experts_own_spread() -> None:
    here = school("fox owl", checkpoints=6, noise=0.1)
    more = taught("owl", 8, checkpoints=8, noise=0.1).checkpoints
    row, far = novelty(here.layout, here.layout.flatten(more[7]), here.weights)
    assert row == 1
    assert 0.5 < far < 1.5  # one checkpoint more
    assert novelty(here.layout, here.weights[0][2], here.weights) == (0, pytest.approx(0, abs=1e-3))
    adapters = here.experts[0].checkpoints
    made = here.layout.adapter(torch.randn(SIZE, generator=torch.Generator().manual_seed(1)))
    row, far = novelty(here.layout, here.layout.flatten(made), here.weights[:1])
    gaps = [distance(made, one) for one in adapters]
    own = [distance(one, other) for one in adapters for other in adapters if one is not other]
    assert far == pytest.approx(min(gaps) / (sum(own) / len(own)), rel=1e-3)
    assert novelty(here.layout, here.weights[0][0], [here.weights[1][:1]])[1] == float("inf")


def distance(one: Adapter, other: Adapter) -> float:
    """Between deltas."""
    far = deltas(other)
    return float(sum((delta - far[name]).square().sum() for name, delta in deltas(one).items())) ** 0.5


# --- the school ---------------------------------------------------------------------------------------------------


def test_a_school_holds_what_was_taught() -> None:
    here = open_school([taught("fox", 1), taught("owl", 2, checkpoints=1)], Words(), fingerprint="abc")
    assert here.names == ("fox", "owl")
    assert (here.base, here.space, here.fingerprint) == ("tiny", "words", "abc")
    assert [some.shape for some in here.weights] == [(3, SIZE), (1, SIZE)]
    assert [some.shape for some in here.vectors] == [(2, 12), (2, 12)]
    assert torch.equal(here.weights[0][1], here.layout.flatten(here.experts[0].checkpoints[1]))
    assert np.array_equal(here.vectors[1], Words().encode(here.experts[1].descriptions))
    assert torch.allclose(here.keys.norm(dim=1), torch.ones(2))
    assert len(set(here.hashes.values())) == 2
    assert here.hashes["fox"] == open_school([taught("fox", 1)], Words()).hashes["fox"]
    assert here.hashes["fox"] != open_school([taught("fox", 3)], Words()).hashes["fox"]
    origin = here.origin(steps=3)
    assert (origin.space, origin.fingerprint, dict(origin.told)) == ("words", "abc", {"steps": 3})
    assert here.without(["fox"]).names == ("owl",)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([taught("fox", 1), taught("fox", 2)], "two experts are called fox"),
        ([Taught("fox", ("", " "), (expert("fox", 1),))], "fox: has 1 checkpoints and 2 descriptions"),
        ([Taught("fox", ("a fox",), ())], "fox: has 0 checkpoints"),
        ([taught("fox", 1), Taught("owl", ("an owl",), (expert("owl", 1, rank=3),))], r"owl: blocks\.2\.attn\.q .* 3"),
        ([], "no adapter"),
    ],
)
def test_a_school_refuses_what_cannot_be_taught(experts: list[Taught], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        open_school(experts, Words())


def test_nobody_left_and_strangers() -> None:
    here = school("fox owl")
    with pytest.raises(GenerationError, match="no expert cow"):
        here.without(["cow"])
    with pytest.raises(GenerationError, match="no expert left"):
        here.without(["fox", "owl"])


def test_a_models_fingerprint_is_its_weights() -> None:
    state = torch.nn.Linear(2, 3).state_dict()
    assert weights_fingerprint(state) == weights_fingerprint(dict(reversed(state.items())))
    assert weights_fingerprint(state) != weights_fingerprint({**state, "bias": state["bias"] + 1})

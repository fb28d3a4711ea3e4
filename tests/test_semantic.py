"""SG-LoRA end to end on a small school: what it is made of, its modes, its way without long vectors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from lorahub.generate.learned import semantic as module
from lorahub.generate.learned.semantic import Semantic, semantic
from lorahub.generate.priors import Prototypes
from lorahub.hub.errors import BadOption, GenerationError
from schooling import SIZE, Words, school

QUICK: dict[str, Any] = {"steps": 3, "batch": 4, "latent": 3, "hidden": 8}
QUERY = Words().encode(["a picture of hen"])[0]


@pytest.fixture(scope="module")
def small() -> Semantic:
    return semantic(school(), neighbours=3, temperature=0.1, **QUICK)


def test_an_adapter_comes_with_its_experts(small: Semantic) -> None:
    made = small.sample(QUERY, seed=0)
    assert made.adapter.shapes == school().experts[0].checkpoints[0].shapes
    assert made.adapter.base == "tiny"
    assert made.experts[0].name == "hen"
    assert len(made.experts) == 3
    assert sum(share.weight for share in made.experts) == pytest.approx(1)
    assert made.experts[0].similarity == pytest.approx(float(school().keys[2] @ torch.tensor(QUERY)), abs=1e-5)
    assert 0 <= made.novelty <= 2


def test_the_seed_decides(small: Semantic) -> None:
    def vector(seed: int, mode: Any = "sample") -> torch.Tensor:
        return small.layout.flatten(replace(small, mode=mode).sample(QUERY, seed=seed).adapter)

    assert torch.equal(vector(0), vector(0))
    assert not torch.equal(vector(0), vector(1))
    assert torch.equal(vector(0, "mean"), vector(1, "mean"))
    assert not torch.equal(vector(0, "gaussian"), vector(1, "gaussian"))


def test_without_the_cvae_it_is_the_prior(small: Semantic) -> None:
    """Mean and total variance of the experts' own weights: standardising changes neither."""
    here = school()
    prior = Prototypes.of(here.weights, here.keys).prior(QUERY, 3, 0.1)
    average = replace(small, mode="average").sample(QUERY, seed=0)
    assert torch.allclose(small.layout.flatten(average.adapter), prior.mean, atol=1e-5)
    drawn = replace(small, mode="gaussian").sample(QUERY, seed=5)
    assert torch.allclose(small.layout.flatten(drawn.adapter), prior.draw(5), atol=1e-4)


def test_a_decoded_mean_is_the_networks(small: Semantic) -> None:
    prior = small.prior(QUERY)
    network = small._network
    condition = torch.cat([prior.mean, prior.variance.sqrt()])[None]
    with torch.no_grad():
        wanted = network.decode(network.prior(condition).mean, condition)[0]
    made = replace(small, mode="mean").sample(QUERY, seed=0)
    assert torch.allclose(small.layout.flatten(made.adapter), small.statistics.restore(wanted), atol=1e-6)


def test_training_conditions_leave_the_task_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the network is shown for a task does not change with that task's own weights, beyond the library's scale."""
    shown: list[list[torch.Tensor]] = []
    real = module.fit

    def watched(recipe: Any, lessons: Any, *rest: Any, **options: Any) -> Any:
        shown.append(list(lessons.conditions))
        return real(recipe, lessons, *rest, **options)

    monkeypatch.setattr(module, "fit", watched)
    here = school()
    found = semantic(here, neighbours=9, temperature=0.1, **QUICK)
    semantic(here, neighbours=9, temperature=0.1, leave_out=False, **QUICK)
    values = [found.statistics.standardise(some) for some in here.weights]
    means = torch.stack([some.mean(dim=0) for some in values])
    left_out, kept = shown
    for row, some in enumerate(left_out):
        rest = [other for other in range(4) if other != row]
        for condition in some:  # the mean is a mixture of the other three: what they do not span is not in it
            shares = torch.linalg.lstsq(means[rest].T, condition[:SIZE, None]).solution
            assert torch.allclose(means[rest].T @ shares, condition[:SIZE, None], atol=1e-4)
            assert float(shares.sum()) == pytest.approx(1, abs=1e-3)
    assert not torch.allclose(torch.cat(left_out), torch.cat(kept), atol=0.1)


def test_one_task_is_learned_by_heart() -> None:
    """Two experts, each other's only condition: the mean of the wanted one comes out within 1 %."""
    here = school("fox owl", noise=0.0)
    found = semantic(here, neighbours=1, mode="mean", steps=500, batch=8, latent=4, hidden=48, rate=3e-3)
    for row, other in ((0, 1), (1, 0)):  # asked with one's own words, the other one's condition is at hand
        made = here.layout.flatten(found.sample(here.vectors[row][0], seed=0).adapter)
        wanted = here.weights[other][0]
        assert float((made - wanted).norm() / wanted.norm()) < 0.01
    assert found.origin.told["error"] < 0.01


def test_projected_onto_all_directions_the_priors_are_the_same() -> None:
    here = school()
    plain, short = (
        semantic(here, neighbours=3, temperature=0.1, components=count, mode="average", **QUICK) for count in (0, 99)
    )
    assert plain.projection is None
    assert short.projection is not None
    assert len(short.projection.axes) == 11  # twelve checkpoints about their mean
    one, other = (found.layout.flatten(found.sample(QUERY, seed=0).adapter) for found in (plain, short))
    assert torch.allclose(one, other, atol=1e-4)
    assert float(short.fitted.tensors["spread"].max()) > 1
    made = [replace(short, mode="sample").sample(QUERY, seed=3).adapter for _ in range(2)]
    assert torch.equal(short.layout.flatten(made[0]), short.layout.flatten(made[1]))
    few = semantic(here, components=2, **QUICK)
    assert few.fitted.recipe.size == 2


def test_long_vectors_are_projected_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert semantic(school(), **QUICK).projection is None
    monkeypatch.setattr(module, "LARGE", SIZE - 1)
    assert semantic(school(), **QUICK).projection is not None
    assert semantic(school(), components=0, **QUICK).projection is None


def test_it_says_where_it_comes_from(small: Semantic) -> None:
    assert dict(small.origin.library) == school().hashes
    assert small.origin.space == "words"
    assert {"error", "kl", "steps", "seed", "leave_out", "near"} <= set(small.origin.told)


@pytest.mark.parametrize("given", [{"neighbours": 0}, {"temperature": 0.0}, {"mode": "best"}, {"components": -1}])
def test_options_outside_their_range(given: dict[str, Any]) -> None:
    with pytest.raises(BadOption):
        semantic(school(), **{**QUICK, **given})


def test_one_expert_is_not_enough_and_other_encoders_are_refused(small: Semantic) -> None:
    with pytest.raises(GenerationError, match="at least two"):
        semantic(school("fox"), **QUICK)
    with pytest.raises(GenerationError, match="fitted to"):
        small.sample(np.ones(5, np.float32), seed=0)

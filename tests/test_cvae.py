"""The networks and their loop: shapes as published, the KL, what they can learn, the same for the same seed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from lorahub.generate.cvae import (
    Convolutions,
    Course,
    Fitted,
    Gaussian,
    Layers,
    Lessons,
    divergence,
    fit,
    objective,
    padded,
    rebuilt,
    recipe_from,
    recipe_json,
)  # fmt: skip
from lorahub.hub.errors import BadOption, FormatError, GenerationError
from torch import Tensor, nn

SMALL = Convolutions(40, 3, latent=4, channels=4, stages=3)
COURSE = Course(steps=3, batch=4, rate=1e-3, weight=0.1, mean=True)


def lessons(size: int = 40, owners: int = 2, each: int = 2, width: int = 3) -> Lessons:
    chance = torch.Generator().manual_seed(0)
    values = torch.randn(owners * each, size, generator=chance)
    given = [torch.randn(2 + owner, width, generator=chance) for owner in range(owners)]
    return Lessons(values, torch.arange(owners).repeat_interleave(each), given)


def gaussian(seed: int, batch: int = 3, latent: int = 5) -> Gaussian:
    chance = torch.Generator().manual_seed(seed)
    return Gaussian(torch.randn(batch, latent, generator=chance), torch.randn(batch, latent, generator=chance))


# --- the divergence -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("standard", [False, True])
def test_the_divergence_is_what_sampling_finds(standard: bool) -> None:
    some, prior = gaussian(1), gaussian(2)
    if standard:
        prior = Gaussian(torch.zeros(3, 5), torch.zeros(3, 5))
    chance = torch.Generator().manual_seed(3)
    noise = torch.randn(200_000, 3, 5, generator=chance)
    codes = some.mean + (some.log_variance / 2).exp() * noise

    def log_density(of: Gaussian) -> Tensor:
        return torch.distributions.Normal(of.mean, (of.log_variance / 2).exp()).log_prob(codes).sum(dim=2)

    found = log_density(some) - log_density(prior)
    error = 5 * found.std(dim=0) / len(found) ** 0.5
    assert bool(((found.mean(dim=0) - divergence(some, prior)).abs() < error).all())


def test_the_divergence_is_torchs_and_the_papers() -> None:
    some, prior = gaussian(4), gaussian(5)
    normals = [torch.distributions.Normal(one.mean, (one.log_variance / 2).exp()) for one in (some, prior)]
    wanted = torch.distributions.kl_divergence(*normals).sum(dim=1)
    assert torch.allclose(divergence(some, prior), wanted, rtol=1e-5)
    assert torch.allclose(divergence(some, some), torch.zeros(3), atol=1e-6)
    nothing = Gaussian(torch.zeros(3, 5), torch.zeros(3, 5))
    mean, log = some
    published = -0.5 * (1 + log - mean.square() - log.exp()).sum(dim=1)
    assert torch.allclose(divergence(some, nothing), published, rtol=1e-5)


def test_codes_are_drawn_from_the_gaussian() -> None:
    some = gaussian(6, batch=1, latent=2)
    codes = some.at(torch.randn(100_000, 2, generator=torch.Generator().manual_seed(1)))
    assert torch.allclose(codes.mean(dim=0), some.mean[0], atol=0.03)
    assert torch.allclose(codes.var(dim=0).log(), some.log_variance[0], atol=0.03)


# --- shapes -------------------------------------------------------------------------------------------------------


def test_the_published_network_has_the_published_size() -> None:
    recipe = Convolutions(1_929_928, 768)
    with torch.device("meta"):
        network = recipe.build()
    assert network.reach == 472 * 4096
    assert recipe.widths == [8, 16, 32, 64, 128, 256, 256, 128, 64, 32, 16, 8]
    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    counted = sum(parameter.numel() for layer in linear for parameter in layer.parameters())
    assert counted == 3776 * 256 + 256 + 2 * (1024 * 256 + 256) + 1024 * 3776 + 3776 == 5_362_112
    assert sum(parameter.numel() for parameter in network.parameters()) == 7_508_369
    kinds = [type(layer) for layer in network.decoder if not isinstance(layer, nn.Unflatten)]
    assert kinds == [nn.Linear, *[nn.ConvTranspose1d, nn.BatchNorm1d, nn.ELU] * 12, nn.Conv1d]
    ways = [(one.in_channels, one.out_channels) for one in network.modules() if isinstance(one, nn.Conv1d)]
    assert ways[:12] == list(zip([1, *recipe.widths], recipe.widths, strict=False))
    assert ways[12:] == [(8, 1)]
    back = [(one.in_channels, one.out_channels) for one in network.modules() if isinstance(one, nn.ConvTranspose1d)]
    assert back == [*((b, a) for a, b in reversed(list(zip(recipe.widths, recipe.widths[1:], strict=False)))), (8, 8)]


@pytest.mark.parametrize("size", [1, 39, 40, 41])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_any_length_is_padded_and_comes_back(size: int, norm: Any) -> None:
    network = replace(SMALL, size=size, norm=norm).build()
    assert network.reach == 8 * math.ceil(size / 8)
    values, conditions = torch.randn(2, size), torch.randn(2, 3)
    posterior = network.encode(values, conditions)
    assert posterior.mean.shape == posterior.log_variance.shape == (2, 4)
    assert network.decode(posterior.mean, conditions).shape == (2, network.reach)
    assert not any(part.any() for part in network.prior(conditions))
    if norm == "group":  # nothing depends on who else is in the batch
        alone = network.encode(values[:1], conditions[:1])
        assert torch.allclose(alone.mean, posterior.mean[:1], atol=1e-5)


def test_the_whole_depth_works_for_a_short_vector() -> None:
    network = Convolutions(50, 3, latent=4, channels=1).build()
    assert network.reach == 4096
    made = network.decode(network.encode(torch.randn(2, 50), torch.randn(2, 3)).mean, torch.randn(2, 3))
    assert made.shape == (2, 4096)
    made.sum().backward()


def test_layers_have_the_shapes_of_the_paper() -> None:
    network = Layers(30, 60, latent=7, hidden=20).build()
    shapes = [tuple(layer.weight.shape) for layer in network.modules() if isinstance(layer, nn.Linear)]
    assert shapes == [(20, 90), (20, 20), (14, 20), (20, 60), (20, 20), (14, 20), (20, 67), (20, 20), (30, 20)]
    values, conditions = torch.randn(4, 30), torch.randn(4, 60)
    posterior, prior = network.encode(values, conditions), network.prior(conditions)
    assert posterior.mean.shape == prior.mean.shape == (4, 7)
    assert network.decode(posterior.mean, conditions).shape == (4, 30)
    assert not torch.equal(prior.mean[0], prior.mean[1])  # it depends on the condition


def test_the_loss_is_the_papers() -> None:
    network, given = SMALL.build().eval().requires_grad_(False), lessons()
    values, conditions = given.draw(4, torch.Generator().manual_seed(0))
    for mean in (True, False):
        course = replace(COURSE, mean=mean)
        loss, parts = objective(network, values, conditions, torch.Generator().manual_seed(1), course)
        posterior = network.encode(values, conditions)
        noise = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
        made = network.decode(posterior.mean + (posterior.log_variance / 2).exp() * noise, conditions)
        squares = (made - padded(values, 40)) ** 2
        error = squares.mean() if mean else squares.sum() / 4
        assert float(parts[0]) == pytest.approx(float(error), rel=1e-5)
        assert float(parts[1]) == pytest.approx(
            float(divergence(posterior, network.prior(conditions)).mean()), rel=1e-5
        )
        assert float(loss) == pytest.approx(float(parts[0] + 0.1 * parts[1]), rel=1e-5)


def test_a_value_comes_with_its_owners_conditions() -> None:
    given = lessons(owners=3)
    marked = Lessons(given.owners[:, None].float(), given.owners, [torch.full((k + 1, 1), float(k)) for k in range(3)])
    values, conditions = marked.draw(100, torch.Generator().manual_seed(0))
    assert torch.equal(values, conditions)
    assert set(values.flatten().tolist()) == {0.0, 1.0, 2.0}


# --- fitting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "course"),
    [
        (Convolutions(60, 3, latent=8, channels=4, stages=4, norm="group"), Course(450, 4, 3e-3, 0.005, mean=True)),
        (Layers(60, 3, latent=8, hidden=64), Course(600, 4, 2e-3, 1.0, mean=False)),
    ],
)
def test_a_network_can_learn_one_task_by_heart(recipe: Convolutions | Layers, course: Course) -> None:
    """Numbers without any structure, to within 1 %, decoded from the prior's mean."""
    value = torch.randn(1, 60, generator=torch.Generator().manual_seed(5))
    condition = torch.ones(1, 3)
    found = fit(recipe, Lessons(value, torch.zeros(1, dtype=torch.int64), [condition]), course)
    network = rebuilt(recipe, found.tensors)
    made = network.decode(network.prior(condition).mean, condition)[:, :60]
    assert float((made - value).norm() / value.norm()) < 0.01


@pytest.mark.parametrize("recipe", [SMALL, Layers(40, 3, latent=4, hidden=8)])
def test_equal_seeds_give_equal_bytes(recipe: Convolutions | Layers) -> None:
    torch.manual_seed(9)
    before = torch.random.get_rng_state()
    one = fit(recipe, lessons(), COURSE)
    torch.randn(3)
    two, other = fit(recipe, lessons(), COURSE), fit(recipe, lessons(), replace(COURSE, seed=1))
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)
    assert not all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    assert one.told == two.told
    torch.random.set_rng_state(before)
    fit(recipe, lessons(), COURSE)
    assert torch.equal(torch.random.get_rng_state(), before)  # a caller's chance is not touched


def test_progress_and_what_is_told() -> None:
    seen: list[tuple[int, float]] = []
    found = fit(SMALL, lessons(), COURSE, progress=lambda done, loss: seen.append((done, loss)))
    assert [done for done, _ in seen] == [1, 2, 3]
    assert seen[-1][1] == pytest.approx(found.told["error"] + 0.1 * found.told["kl"], rel=1e-5)


def test_a_loss_that_is_no_number_stops() -> None:
    broken = lessons()
    broken.values[:] = float("inf")
    with pytest.raises(GenerationError, match="the loss is nan after 0 steps"):
        fit(SMALL, broken, COURSE)


def test_the_rate_falls_as_asked() -> None:
    """Half a cosine over twice the steps, as published, ends at half the rate."""
    from lorahub.generate.cvae import _falling

    assert _falling(0.0, 0.5) == 1
    assert _falling(1.0, 0.5) == pytest.approx(0.5)
    assert _falling(1.0, 1.0) == pytest.approx(0)
    assert _falling(0.7, 0.0) == 1


def test_coordinates_of_unequal_size_are_seen_as_equals() -> None:
    spread = torch.linspace(0.01, 100, 40)
    recipe = Layers(40, 3, latent=4, hidden=8)
    found = fit(recipe, lessons(), COURSE, spread=spread)
    assert torch.equal(found.tensors["spread"], spread)
    network, plain = rebuilt(recipe, found.tensors), rebuilt(recipe, {**found.tensors, "spread": torch.ones(40)})
    conditions, codes, values = torch.ones(1, 3), torch.ones(1, 4), torch.randn(1, 40)
    assert torch.allclose(network.decode(codes, conditions), plain.decode(codes, conditions) * spread)
    assert torch.equal(network.encode(values * spread, conditions).mean, plain.encode(
        values * spread / spread, conditions).mean)  # fmt: skip


# --- fitted -------------------------------------------------------------------------------------------------------


def fitted() -> Fitted:
    return fit(SMALL, lessons(), COURSE)


def test_a_rebuilt_network_is_the_same() -> None:
    found = fitted()
    network = rebuilt(SMALL, found.tensors)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(network.state_dict()[name], part) for name, part in found.tensors.items())
    half = {name: part for name, part in found.tensors.items() if name.startswith("decoder")}
    codes, conditions = torch.ones(2, 4), torch.ones(2, 3)
    made = rebuilt(SMALL, half, only="decoder").decode(codes, conditions)
    assert torch.equal(made, network.decode(codes, conditions))


@pytest.mark.parametrize("harm", ["missing", "shape", "unknown"])
def test_tensors_that_do_not_fit_are_refused(harm: str) -> None:
    tensors = dict(fitted().tensors)
    if harm == "missing":
        del tensors["encoder.flat.weight"]
    elif harm == "shape":
        tensors["encoder.flat.weight"] = torch.ones(2, 2)
    else:
        tensors["more"] = torch.ones(2)
    with pytest.raises(FormatError, match="do not fit") as caught:
        rebuilt(SMALL, tensors)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("recipe", [SMALL, Layers(40, 3)])
def test_a_recipe_survives_json(recipe: Convolutions | Layers) -> None:
    assert recipe_from(recipe_json(recipe), type(recipe)) == recipe
    for harm in ({"size": 0}, {"size": 2.5}, {"size": True}, {"size": 2**40}, {"more": 1}):
        with pytest.raises(FormatError):
            recipe_from({**recipe_json(recipe), **harm}, type(recipe))
    with pytest.raises(FormatError):
        recipe_from(None, type(recipe))


@pytest.mark.parametrize(
    "make",
    [
        lambda: replace(SMALL, stages=0).build(), lambda: replace(SMALL, stages=40).build(),
        lambda: replace(SMALL, norm="layer").build(), lambda: Layers(40, 3, latent=0).build(),
        lambda: replace(COURSE, steps=0), lambda: replace(COURSE, rate=0.0), lambda: replace(COURSE, weight=-1.0),
        lambda: replace(COURSE, falling=2.0), lambda: replace(COURSE, batch=0),
    ],
)  # fmt: skip
def test_options_outside_their_range(make: Any) -> None:
    with pytest.raises(BadOption):
        make()

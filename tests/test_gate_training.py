"""Laws of the gates' training: what is drawn, the loss and its hinge, what learns, seeds and checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import BadOption, FormatError, IncompatibleAdapters
from lorahub.hub.lowrank import LowRank
from lorahub.merge.gate_objectives import Noised, diffusion, flow, objective_of
from lorahub.merge.gate_training import Deck, Drawn, Progress, Settings, Showcase, backward, errors, fit
from lorahub.merge.gated import fused
from lorahub.merge.gates import Gates, Recipe
from test_gated import COMPONENT, adapter, gates_for, off, painted, transformer
from torch import Tensor, nn

BLANK = {"encoder_hidden_states": torch.zeros(1, 5, 12)}


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def showcase(*adapters: Adapter, seed: int = 0, count: int = 3, weight: float = 1.0) -> Showcase:
    pictures = torch.rand(count, 3, 8, 8, generator=chance(seed)) * 2 - 1
    words = torch.randn(count, 5, 12, generator=chance(seed + 1))
    return Showcase(adapters, pictures, {"encoder_hidden_states": words}, weight)


def tagged(owner: int, adapters: tuple[Adapter, ...], count: int = 4, weight: float = 1.0) -> Showcase:
    """Pictures and words that carry their showcase's number and their own."""
    marks = torch.stack([torch.full((count,), float(owner)), torch.arange(count).float()], dim=1)
    return Showcase(adapters, marks.reshape(count, 2, 1, 1), {"words": marks}, weight)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return transformer()


@pytest.fixture(scope="module")
def three(model: nn.Module) -> list[Adapter]:
    return [adapter(model, seed, rank=2) for seed in range(3)]


# --- what a step is made of -----------------------------------------------------------------------------------------


def test_a_step_is_as_published(three: list[Adapter]) -> None:
    """Two distinct adapters; pictures and words of the first; words of the second; words are left out three in ten."""
    deck = Deck(
        [tagged(i, (one,)) for i, one in enumerate(three)], {"words": torch.full((1, 2), -1.0)}, Settings(batch=2)
    )
    pairs, silent = Counter[tuple[int, int]](), 0
    for step in range(600):
        drawn = deck.draw(chance(step))
        first = int(drawn.pictures[0, 0, 0, 0])
        assert bool((drawn.pictures[:, 0] == first).all())
        assert len({int(number) for number in drawn.pictures[:, 1]}) == 2  # distinct pictures
        for picture, words in zip(drawn.pictures[:, :, 0, 0], drawn.conditions["words"], strict=True):
            silent += int(words[0] == -1)
            assert words[0] == -1 or torch.equal(words, picture)
        assert drawn.mismatched is not None
        [second] = {int(words[0]) for words in drawn.mismatched["words"]}
        assert drawn.adapters == tuple(three[i] for i in sorted((first, second)))
        pairs[first, second] += 1
    assert len(pairs) == 6
    assert min(pairs.values()) > 60
    assert abs(silent / 1200 - 0.3) < 0.06


def test_a_step_may_show_what_several_make(three: list[Adapter]) -> None:
    style, content, other = three
    cases = [tagged(0, (style, content), weight=3.0), tagged(1, (style,)), tagged(2, (other,), weight=0.0)]
    settings = Settings(batch=1, fewest=0, most=1, margin=None, blank=0.0)
    loaded = Counter[tuple[int, tuple[Adapter, ...]]]()
    for step in range(400):
        drawn = Deck(cases, {}, settings).draw(chance(step))
        assert drawn.mismatched is None
        loaded[int(drawn.pictures[0, 0, 0, 0]), drawn.adapters] += 1
    first = {adapters: count for (number, adapters), count in loaded.items() if number == 0}
    assert set(first) == {(style, content), (style, content, other)}
    assert abs(sum(first.values()) / 400 - 0.75) < 0.08
    assert abs(first[style, content] / sum(first.values()) - 0.5) < 0.1
    # with a hinge, the words are of pictures that none of the showcase's own adapters has made
    hinged = Deck(cases, {}, replace(settings, fewest=1, margin=0.5))
    for step in range(50):
        drawn = hinged.draw(chance(step))
        if drawn.pictures[0, 0, 0, 0] == 0:
            assert drawn.mismatched is not None
            assert drawn.mismatched["words"][0, 0] == 2
    chosen = Deck(cases, {}, settings, lambda case, rest, _: [one for one in rest if one is other])
    assert all(other in chosen.draw(chance(step)).adapters for step in range(20))


def test_what_cannot_be_trained_is_refused(model: nn.Module, three: list[Adapter], tmp_path: Path) -> None:
    one = showcase(three[0])
    with pytest.raises(BadOption, match="at most 0"):
        fit(model, [one], BLANK, Recipe(), component=COMPONENT)
    with pytest.raises(BadOption, match="nothing to learn"):
        fit(model, [replace(one, weight=0.0)], BLANK, Recipe(), component=COMPONENT)
    with pytest.raises(BadOption, match="blank lacks encoder_hidden_states"):
        fit(model, [one, showcase(three[1])], {}, Recipe(), component=COMPONENT)
    with pytest.raises(BadOption, match="not offered"):
        Deck([one], BLANK, Settings(), lambda case, *_: case.adapters).draw(chance())
    with pytest.raises(IncompatibleAdapters, match="no linear layer of unet"):
        fit(model, [one, showcase(three[1])], BLANK, Recipe(), component="unet")
    for wrong in ({"steps": 0}, {"fewest": 2}, {"blank": 1.5}, {"rate": 0.0}, {"start": "shut"}):
        with pytest.raises(BadOption, match="expected"):
            Settings(**wrong)
    with pytest.raises(BadOption, match="another number of words"):
        Showcase((three[0],), torch.zeros(2, 3, 8, 8), {"words": torch.zeros(3, 1)})
    (tmp_path / "torn").write_bytes(b"no checkpoint")
    with pytest.raises(FormatError, match="torn is no checkpoint"):
        fit(model, [one, showcase(three[1])], BLANK, Recipe(), component=COMPONENT, checkpoint=tmp_path / "torn")


# --- objectives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", ["uniform", "logit-normal"])
def test_flow_matching(times: str) -> None:
    pictures = torch.randn(4000, 2, 1, 1, generator=chance())
    value, time, target = flow(times=times)(pictures, chance(1))
    share = (time / 1000).reshape(-1, 1, 1, 1)
    noise = target + pictures
    torch.testing.assert_close(value, (1 - share) * pictures + share * noise)
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05
    assert abs(float((share < 0.25).float().mean()) - (0.25 if times == "uniform" else 0.136)) < 0.02
    with pytest.raises(BadOption, match="logit-normal"):
        flow(times="normal")


@pytest.mark.parametrize("target", ["epsilon", "v_prediction", "sample"])
def test_diffusion_is_that_of_diffusers(target: str) -> None:
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=target)
    pictures = torch.randn(6, 2, 3, 3, generator=chance())
    value, time, wanted = objective_of(scheduler)(pictures, chance(1))
    noise = torch.randn(pictures.shape, generator=chance(1))
    assert time.dtype == torch.int64
    torch.testing.assert_close(value, scheduler.add_noise(pictures, noise, time))
    velocity = scheduler.get_velocity(pictures, noise, time)
    torch.testing.assert_close(wanted, {"epsilon": noise, "v_prediction": velocity, "sample": pictures}[target])
    matching = objective_of(FlowMatchEulerDiscreteScheduler())(pictures, chance(1))
    assert torch.equal(matching.value, flow()(pictures, chance(1)).value)
    with pytest.raises(BadOption, match="expected epsilon"):
        diffusion(torch.ones(3), target="noise")


# --- the loss -------------------------------------------------------------------------------------------------------


def plain(pictures: Tensor, _: torch.Generator) -> Noised:
    """In place of noising: the target is twice the picture."""
    return Noised(pictures, torch.zeros(len(pictures)), 2 * pictures)


def predictor(weight: Tensor) -> object:
    return lambda noised, conditions: weight * noised.value + conditions["words"].reshape(-1, 1, 1, 1)


def slope(margin: float | None, weight: float = 1.5) -> tuple[float, float, float | None]:
    """dL/dweight, L1 and L2 for two pictures of one pixel, 1 and 2; matched words 0, mismatched 0.25 and 3."""
    w = torch.tensor(weight, requires_grad=True)
    pictures = torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1)
    drawn = Drawn((), pictures, {"words": torch.zeros(2)}, {"words": torch.tensor([0.25, 3.0])})
    matched, mismatched = backward(predictor(w), drawn, plain, margin, chance())
    assert w.grad is not None
    return float(w.grad), matched, mismatched


def test_the_hinge_by_hand() -> None:
    """Matched errors ((w - 2) x)^2: 0.25 and 1. Mismatched ((w - 2) x + c)^2: 0.0625 and 4, so with a margin of 0.5
    only the first picture's hinge is active, and pushes its error up: -2 ((w - 2) x + c) x = 0.5."""
    matched = (2 * -0.5 * 1 * 1 + 2 * -0.5 * 2 * 2) / 2  # the mean over pictures of 2 (w - 2) x x
    assert slope(None) == pytest.approx((matched, 0.625, None))
    assert slope(0.5) == pytest.approx((matched + 0.5 / 2, 0.625, 2.03125))
    assert slope(5.0) == pytest.approx((matched + (0.5 - 2 * 2.0 * 2) / 2, 0.625, 2.03125))


def test_an_inactive_hinge_costs_no_gradient() -> None:
    kept = slope(0.01)
    assert kept[:2] == slope(None)[:2]
    assert kept[2] == pytest.approx(2.03125)


def test_the_loss_in_a_model_is_the_formula(model: nn.Module, three: list[Adapter]) -> None:
    """Gradients of all gates against autograd on L as one expression."""
    gates, again = (gates_for(model, three[:2]).requires_grad_(True) for _ in range(2))
    deck = Deck([showcase(one, seed=7 * i) for i, one in enumerate(three[:2])], BLANK, Settings(batch=3, blank=0.5))
    drawn, objective = deck.draw(chance(5)), flow()

    def predict(noised: Noised, conditions: Mapping[str, Tensor]) -> Tensor:
        predicted: Tensor = model(noised.value, timestep=noised.time, **conditions, return_dict=False)[0]
        return predicted

    random = chance(8)
    with fused(model, drawn.adapters, gates, component=COMPONENT):
        first, second = (
            errors(predict(noised, words), noised.target)
            for words in (drawn.conditions, drawn.mismatched or {})
            for noised in [objective(drawn.pictures, random)]
        )
        margin = float(second.detach().median())
        (first.mean() + torch.relu(margin - second).mean()).backward()
    with fused(model, drawn.adapters, again, component=COMPONENT):
        losses = backward(predict, drawn, objective, margin, chance(8))
    assert losses == pytest.approx((first.detach().mean().item(), second.detach().mean().item()))
    for one, other in zip(gates.parameters(), again.parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-7)


# --- the run --------------------------------------------------------------------------------------------------------


def trained(model: nn.Module, three: list[Adapter], **given) -> Gates:
    cases = [showcase(one, seed=10 * i) for i, one in enumerate(three)]
    settings = Settings(**{"steps": 5, "batch": 2, "rate": 1e-2, "seed": 3, "save_every": 2, **given.pop("with_", {})})
    return fit(model, cases, BLANK, given.pop("gates", Recipe()), settings, component=COMPONENT, **given)


def test_only_gates_learn(three: list[Adapter]) -> None:
    model = transformer().requires_grad_(True).train()
    parameters = {name: value.clone() for name, value in model.state_dict().items()}
    factors = {(one.name, name, side): getattr(module, side).clone() for one in three
               for name, module in one.modules.items() for side in ("down", "up")}  # fmt: skip
    random = torch.get_rng_state()
    start = gates_for(model, three, variant="full", timestep=True)
    before = {name: value.clone() for name, value in start.tensors().items()}
    gates = trained(model, three, gates=start)
    assert not [name for name, value in gates.tensors().items() if torch.equal(value, before[name])]
    assert all(torch.equal(value, before[name]) for name, value in start.tensors().items())
    assert all(torch.equal(value, parameters[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None and value.requires_grad for value in model.parameters())
    assert all(module.training for module in model.modules())
    for one in three:
        for name, module in one.modules.items():
            for side in ("down", "up"):
                factor = getattr(module, side)
                assert torch.equal(factor, factors[one.name, name, side])
                assert factor.grad is None
                assert not factor.requires_grad
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(value.requires_grad for value in gates.parameters())
    assert not any(layer._forward_hooks for layer in model.modules())


def test_the_same_seed_gives_the_same_gates(model: nn.Module, three: list[Adapter]) -> None:
    told: list[Progress] = []
    first, again, other = (
        trained(model, three, with_={"steps": 3, "seed": seed}, progress=told.append).tensors() for seed in (3, 3, 4)
    )
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())
    assert [one.step for one in told] == [1, 2, 3] * 3
    assert told[:3] == told[3:6]
    assert all(one.mismatched is not None and one.matched > 0 for one in told)


class Stopped(Exception):
    """In place of a power cut."""


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_is_the_uninterrupted_one(
    model: nn.Module, three: list[Adapter], stop: int, tmp_path: Path
) -> None:
    def cut(told: Progress) -> None:
        if told.step == stop:
            raise Stopped

    place = tmp_path / "run.safetensors"
    whole = trained(model, three).tensors()
    with pytest.raises(Stopped):
        trained(model, three, checkpoint=place, progress=cut)
    assert place.exists() is (stop > 1)
    steps: list[int] = []
    parts = trained(model, three, checkpoint=place, progress=lambda told: steps.append(told.step)).tensors()
    assert steps == list(range({1: 1, 3: 3, 5: 6}[stop], 6))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]
    with pytest.raises(IncompatibleAdapters, match=r"another run \(settings differ\)"):
        trained(model, three, checkpoint=place, with_={"rate": 1e-3})
    with pytest.raises(IncompatibleAdapters, match="adapters, material differ"):
        trained(model, three[:2], checkpoint=place)


# --- does it learn --------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """A linear model of eight channels, pictures of one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8, bias=False)
        nn.init.orthogonal_(self.layer.weight, generator=chance())

    def forward(self, value: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.layer(value.flatten(1)).reshape(value.shape),)


def test_gates_close_for_the_harmful_and_open_for_the_useful() -> None:
    """The target is what base and useful adapter make together; the harmful one changes the same channels, the other
    way and twice as much, so that open gates would not do for the one and shut ones not for the other."""
    model, random = Toy(), chance(4)
    up = (torch.rand(8, 1, generator=random) + 0.5) * torch.tensor([1.0, -1.0] * 4)[:, None]
    useful = Adapter({"toy.layer": LowRank(torch.rand(1, 8, generator=random), up)}, meta={"name": "useful"})
    harmful = Adapter({"toy.layer": LowRank(torch.rand(1, 8, generator=random), -2 * up)}, meta={"name": "harmful"})
    right = model.layer.weight.detach() + useful.modules["toy.layer"].dense()
    pictures = torch.rand(64, 8, 1, 1, generator=random)

    def known(some: Tensor, _: torch.Generator) -> Noised:
        return Noised(some, torch.zeros(len(some)), (some.flatten(1) @ right.T).reshape(some.shape))

    cases = [Showcase((useful,), pictures, {}), Showcase((harmful,), pictures, {}, weight=0.0)]
    settings = Settings(steps=300, batch=16, rate=0.05, margin=None, seed=1)
    losses: list[float] = []
    gates = fit(model, cases, {}, Recipe(global_rank=0), settings, component="toy", objective=known,
                progress=lambda told: losses.append(told.matched))  # fmt: skip
    seen: list[Tensor] = []
    with torch.no_grad(), fused(model, [useful, harmful], gates, component="toy", watch=lambda *of: seen.append(of[1])):
        model(pictures, torch.zeros(64))
    passed = (gates.at("layer").out * seen[0]).mean(dim=1)  # w_o g: (adapters, channels)
    assert sum(losses[-20:]) < 0.05 * sum(losses[:20])
    assert float((passed[0] - 1).abs().max()) < 0.2
    assert float(passed[1].abs().max()) < 0.1


def test_gates_may_start_open(model: nn.Module, three: list[Adapter]) -> None:
    paths = gates_for(model, three).widths
    gates = Gates(paths, Recipe(global_rank=0), seed=1, start="open")
    total, base = painted(model, three), painted(model, [])
    assert off(painted(model, three, gates) - base, total - base) < 0.15
    assert off(painted(model, three, gates_for(model, three, global_rank=0)) - base, total - base) > 0.5
    with pytest.raises(BadOption, match="published, open"):
        Gates(paths, start="shut")

"""Laws of training many adapters at once: it is training them one by one, and PEFT agrees."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from learning import RATE, World, painter, reader
from lorahub.generate import experts
from lorahub.generate.experts import Pupil, Trained, constant, cosine, generator, linear_paths, one_cycle, train
from lorahub.generate.lessons import Noised, flow_matching
from lorahub.generate.stacked import owned
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import BadOption, IncompatibleAdapters, LoraHubError
from lorahub.merge.gated import fused
from torch import Tensor, nn

STEPS, CLIP = 50, 0.05
CLOSE = 1e-4


@pytest.fixture(scope="module", params=[painter, reader])
def world(request: pytest.FixtureRequest) -> World:
    return request.param()


@pytest.fixture(scope="module")
def sixteen(world: World) -> Trained:
    """Sixteen adapters of mixed ranks, scales and seeds, trained at once."""
    return world.train(world.pupils(16), STEPS, clip=CLIP, schedule=one_cycle, checkpoints=[0])


def deltas(adapter: Adapter) -> Tensor:
    return torch.cat([module.dense().flatten().double() for _, module in sorted(adapter.modules.items())])


def off(got: Adapter, wanted: Adapter) -> float:
    """How far apart all deltas are, relative to what was learned."""
    assert got.shapes == wanted.shapes
    return float((deltas(got) - deltas(wanted)).norm() / deltas(wanted).norm())


def identical(got: Adapter, wanted: Adapter) -> bool:
    pairs = [(got.modules[name], wanted.modules[name]) for name in wanted.modules]
    return all(torch.equal(a.down, b.down) and torch.equal(a.up, b.up) and a.scale == b.scale for a, b in pairs)


# --- at once is one by one ------------------------------------------------------------------------------------------


def test_sixteen_at_once_equal_sixteen_alone(world: World, sixteen: Trained) -> None:
    for pupil, adapter, losses in zip(world.pupils(16), sixteen.adapters, sixteen.losses.T, strict=True):
        alone = world.train([pupil], STEPS, clip=CLIP, schedule=one_cycle)
        assert off(adapter, alone.adapters[0]) < CLOSE
        torch.testing.assert_close(losses, alone.losses[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", [1, 6, 15])
def test_peft_trained_alone_agrees(world: World, sixteen: Trained, number: int) -> None:
    peft = pytest.importorskip("peft")
    pupil, start = world.pupils(16)[number], sixteen.checkpoints[0][number]
    config = peft.LoraConfig(r=pupil.rank, lora_alpha=pupil.scale * pupil.rank, target_modules=world.paths)
    model = peft.get_peft_model(copy.deepcopy(world.model).eval(), config)
    layers = {path: model.base_model.model.get_submodule(path) for path in world.paths}
    for path, layer in layers.items():
        layer.lora_A["default"].weight.data = start.modules[path].down.clone()
        assert not start.modules[path].up.any()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=RATE)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        loss = world.alone(model, pupil.batch(step, generator(pupil.seed, f"batch {step}")))
        assert loss.item() == pytest.approx(float(sixteen.losses[step, number]), rel=1e-4, abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning, CLIP)
        optimizer.step()
        rates.step()
    factors = {path: (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for path, layer in layers.items()}
    wanted = {
        path: replace(start.modules[path], down=down.detach(), up=up.detach()) for path, (down, up) in factors.items()
    }
    assert off(sixteen.adapters[number], Adapter(wanted)) < CLOSE


def test_in_float64_they_are_equal_to_rounding() -> None:
    one = reader()
    model = one.model.double()
    pupils = one.pupils(5)
    together = train(model, one.paths, pupils, one.loss, steps=5, clip=CLIP).adapters
    for pupil, adapter in zip(pupils, together, strict=True):
        assert adapter.modules[one.paths[0]].down.dtype == torch.float64
        assert off(adapter, train(model, one.paths, [pupil], one.loss, steps=5, clip=CLIP).adapters[0]) < 1e-6


def test_order_does_not_matter(world: World) -> None:
    pupils = world.pupils(4)
    there, back = world.train(pupils).adapters, world.train(pupils[::-1]).adapters[::-1]
    assert all(off(a, b) < CLOSE for a, b in zip(there, back, strict=True))


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_company_does_not_matter(world: World, clip: float | None) -> None:
    first, *_ = world.pupils(1)
    wild = replace(first, name="wild", seed=9, rank=7, scale=1e3)
    calm, rough = (world.train([first, other], clip=clip).adapters[0] for other in (world.pupils(2)[1], wild))
    assert off(calm, rough) < CLOSE


def test_passes_of_a_few_are_one_pass(world: World) -> None:
    pupils = world.pupils(5)
    whole, parts = world.train(pupils), world.train(pupils, together=2)
    assert all(off(a, b) < CLOSE for a, b in zip(whole.adapters, parts.adapters, strict=True))
    torch.testing.assert_close(whole.losses, parts.losses, rtol=1e-4, atol=1e-5)


def test_samples_may_come_in_any_order() -> None:
    """A loss may mix the adapters' samples as it likes where it says whose they are."""
    one = painter()

    def loss(model: nn.Module, batches: Sequence[Noised]) -> Tensor:
        owners = torch.arange(len(batches)).repeat_interleave(3)
        order = torch.randperm(len(owners), generator=torch.Generator().manual_seed(len(owners)))
        parts = []
        for rows in order.split(4):

            def mixed(name: str, rows: Tensor = rows) -> Tensor:
                return torch.cat([getattr(batch, name) for batch in batches])[rows]

            words = {key: torch.cat([b.conditions[key] for b in batches])[rows] for key in batches[0].conditions}
            with owned(owners[rows]):
                made = model(mixed("value"), timestep=1000 * mixed("time"), return_dict=False, **words)[0]
            parts.append((made - mixed("aim")).square().mean(dim=(1, 2, 3)))
        return torch.cat(parts)[order.argsort()].view(-1, 3).mean(dim=1)

    pupils = one.pupils(5)
    got, wanted = train(one.model, one.paths, pupils, loss, steps=5, rate=RATE), one.train(pupils, 5)
    assert all(off(a, b) < CLOSE for a, b in zip(got.adapters, wanted.adapters, strict=True))
    with (
        pytest.raises(IncompatibleAdapters, match="does not divide into 4 parts for 2 adapters"),
        owned(torch.arange(4)),
    ):
        train(one.model, one.paths, one.pupils(2), flow_matching, steps=1)


def test_padding_stays_zero(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = []

    class Watched(experts.Table):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            tables.append(self)

    monkeypatch.setattr(experts, "Table", Watched)
    pupils = world.pupils(4)
    world.train(pupils, 10, decay=0.1)
    for path, side, (row, pupil) in product(world.paths, ("down", "up"), enumerate(pupils)):
        own = getattr(tables[0], side)(path)[row]
        assert own.shape[0] == 4
        assert not own[pupil.rank :].any()
        assert own[: pupil.rank].all(dim=1).any()


# --- what it leaves alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_chance_are_untouched(world: World, fails: bool) -> None:
    model = world.model
    model.train()
    next(model.children()).eval()
    next(model.parameters()).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    learning = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()

    def loss(model: nn.Module, batches: Sequence[Any]) -> Tensor:
        assert not model.training
        losses = world.loss(model, batches)
        if fails:
            raise ZeroDivisionError
        return losses

    try:
        train(model, world.paths, world.pupils(2), loss, steps=2)
    except ZeroDivisionError:
        assert fails
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == learning
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.requires_grad_(True)


def test_checkpoints_are_shorter_runs(world: World) -> None:
    pupils = world.pupils(3)
    long = world.train(pupils, 5, checkpoints=[3, 0, 5])
    assert list(long.checkpoints) == [0, 3, 5]
    assert long.checkpoints[5] == long.adapters
    short = world.train(pupils, 3)
    assert all(identical(a, b) for a, b in zip(long.checkpoints[3], short.adapters, strict=True))
    assert torch.equal(long.losses[:3], short.losses)


def test_losses_are_those_of_the_adapters(world: World) -> None:
    """Acting as adapters do elsewhere, they give the losses that training saw."""
    pupils = world.pupils(3)
    result = world.train(pupils, 4, checkpoints=[3], component="transformer", base="tiny", rate=0.02)
    for pupil, adapter, seen in zip(pupils, result.checkpoints[3], result.losses[3], strict=True):
        assert (adapter.base, adapter.name, adapter.meta["steps"]) == ("tiny", pupil.name, 3)
        with torch.no_grad(), fused(world.model.eval(), [adapter], component="transformer") as model:
            now = world.alone(model, pupil.batch(3, generator(pupil.seed, "batch 3")))
        assert float(now) == pytest.approx(float(seen), rel=1e-4)


# --- beginnings, schedules, arithmetic ------------------------------------------------------------------------------


def test_beginnings_follow_from_path_and_seed_alone(world: World) -> None:
    path = world.paths[1]
    pupils = [*world.pupils(1), Pupil("other", world.draw, seed=5, rank=4, start=0), *world.pupils(3, start=7)[1:]]
    begun = [one.modules[path] for one in world.train(pupils, 1, checkpoints=[0]).checkpoints[0]]
    again = train(world.model, world.paths[1::-1], pupils[:1], lambda m, b: world.loss(m, b), steps=1, checkpoints=[0])
    assert torch.equal(begun[0].down, again.checkpoints[0][0].modules[path].down)
    assert torch.equal(begun[0].down, begun[1].down[: begun[0].rank])  # equal starts, ranks 2 and 4
    assert torch.equal(begun[2].down[:1], begun[3].down[:1])
    assert not torch.equal(begun[0].down[:1], begun[2].down[:1])
    bound = begun[1].down.shape[1] ** -0.5
    assert 0.8 * bound < float(begun[1].down.abs().max()) <= bound
    assert not any(one.up.any() for one in begun)


def rates(schedule: experts.Schedule, steps: int) -> list[float]:
    optimizer, found = torch.optim.AdamW([torch.zeros(1)], lr=3.0), []
    scheduler = schedule(optimizer, steps)
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_schedules() -> None:
    assert rates(constant, 4) == [3.0] * 4
    rise, fall = rates(cosine, 40)[:4], rates(cosine, 40)[4:]
    assert rise == pytest.approx([0.75, 1.5, 2.25, 3.0])
    assert all(a > b > 0 for a, b in pairwise(fall))
    assert fall[18] == pytest.approx(1.5)
    assert max(rates(one_cycle, 40)) == pytest.approx(3.0)
    assert rates(cosine, 1) == [3.0]


def test_bfloat16_learns_much_the_same(world: World) -> None:
    pupils = world.pupils(3)
    exact, rough = world.train(pupils, 12), world.train(pupils, 12, autocast=True)
    for one, other in zip(exact.adapters, rough.adapters, strict=True):
        assert one.modules[world.paths[0]].up.dtype == torch.float32
        assert one.cosine(other) > 0.9
    assert not torch.equal(exact.losses, rough.losses)


def test_a_callers_autocast_and_no_grad_change_nothing(world: World) -> None:
    pupils = world.pupils(2)
    wanted = world.train(pupils).adapters
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got = world.train(pupils).adapters
    assert all(identical(a, b) for a, b in zip(got, wanted, strict=True))


# --- errors ---------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Layers that see the batch in other ways than most."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.clock, self.idle, self.turned = (nn.Linear(4, 4) for _ in range(4))
        self.norm = nn.LayerNorm(4)

    def forward(self, value: Tensor) -> Tensor:
        """(batch, 4, 4)"""
        time = self.clock(torch.ones(1, 4))
        return self.plain(value) + time + self.turned(value.transpose(0, 1)).transpose(0, 1)


def odd_loss(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    return model(torch.cat(list(batches))).square().view(len(batches), -1).mean(dim=1)


def odd_pupils(count: int = 2) -> list[Pupil[Tensor]]:
    return [Pupil(f"p{n}", lambda step, chance: torch.randn(2, 4, 4, generator=chance), n) for n in range(count)]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("clock", r"clock is given an input of shape \(1, 4\).*2 adapters"),
        ("idle", "does not use idle"),
        ("turned", "p0 depends on p1 in turned"),
        ("norm", "no linear layer norm"),
        ("absent", "no linear layer absent"),
    ],
)
def test_layers_that_cannot_learn_are_named(path: str, message: str) -> None:
    with pytest.raises(IncompatibleAdapters, match=message):
        train(Odd(), ["plain", path], odd_pupils(), odd_loss, steps=1)


def test_alone_every_layer_will_do() -> None:
    train(Odd(), ["plain", "clock", "turned"], odd_pupils(1), odd_loss, steps=2)


def test_losses_must_keep_adapters_apart() -> None:
    def mean(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
        return odd_loss(model, batches).mean().expand(len(batches))

    with pytest.raises(IncompatibleAdapters, match="p0 depends on p1 in plain"):
        train(Odd(), ["plain"], odd_pupils(), mean, steps=1)
    with pytest.raises(BadOption, match="one for each of 2"):
        train(Odd(), ["plain"], odd_pupils(), lambda m, b: odd_loss(m, b).mean(), steps=1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_names_its_pupil(bad: float) -> None:
    def draw(step: int, chance: torch.Generator) -> Tensor:
        return torch.full((2, 4, 4), bad if step == 1 else 1.0)

    pupils = [*odd_pupils(), Pupil("broken", draw)]
    with pytest.raises(LoraHubError, match=r"broken: the loss is (nan|inf) after 1 steps"):
        train(Odd(), ["plain"], pupils, odd_loss, steps=3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"rate": -1.0}, "rate is -1"),
        ({"clip": 0.0}, "clip is 0"),
        ({"together": 0}, "together is 0"),
        ({"checkpoints": [4]}, "no checkpoint after 4 of 3"),
        ({"pupils": []}, "no pupil"),
        ({"paths": []}, "0 paths"),
        ({"paths": ["plain", "plain"]}, "none twice"),
    ],
)
def test_options_outside_their_range(given: dict[str, Any], message: str) -> None:
    usual = {"paths": ["plain"], "pupils": odd_pupils(), "loss": odd_loss, "steps": 3}
    with pytest.raises(BadOption, match=message):
        train(Odd(), **{**usual, **given})


def test_pupils_and_endings_are_checked() -> None:
    with pytest.raises(BadOption, match="p: rank is 0"):
        Pupil("p", odd_loss, rank=0)
    with pytest.raises(BadOption, match="p: scale is nan"):
        Pupil("p", odd_loss, scale=float("nan"))
    with pytest.raises(BadOption, match="no linear layer lain; it has plain, clock"):
        linear_paths(Odd(), ["lain"])
    assert linear_paths(nn.ModuleDict({"a": Odd(), "b": Odd()}), ["plain", "b.idle"]) == [
        "a.plain",
        "b.plain",
        "b.idle",
    ]

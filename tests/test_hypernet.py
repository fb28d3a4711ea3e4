"""The hypernetwork: adapters at work as vectors, what it begins with, and that it learns from the loss alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning import squares
from lorahub.generate.cores import Bases
from lorahub.generate.hypernet import HyperNetwork, Practice, Sizes, Trial, mixtures, opening
from lorahub.generate.layout import Layout
from lorahub.generate.learned.hyper import Hyper, hyper
from lorahub.generate.stored import load, save
from lorahub.generate.taught import School, Taught
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import BadOption, FormatError, GenerationError, IncompatibleAdapters, LoraHubError
from lorahub.hub.lowrank import LowRank
from torch import Tensor, nn
from torch.func import functional_call

WIDTH, FEATURES = 10, 6
SPACE = f"words:tokens-1x{WIDTH}"
FIRST, SECOND = ("red", "blue", "green", "gold"), ("disc", "cube", "cone", "ring")
HELD = {("red", "cube"), ("green", "ring"), ("gold", "disc")}
TASKS = [(one, two) for one in FIRST for two in SECOND]
Batch = tuple[Tensor, Tensor]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, 5), nn.Linear(5, FEATURES)

    def forward(self, values: Tensor) -> Tensor:
        return values + self.second(torch.tanh(self.first(values)))


def model() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model().eval()


def mixed_ranks(seed: int = 0, prefix: str = "") -> Adapter:
    chance = torch.Generator().manual_seed(seed)

    def part(outputs: int, inputs: int, rank: int) -> LowRank:
        return LowRank(torch.randn(rank, inputs, generator=chance), torch.randn(outputs, rank, generator=chance))

    modules = {f"{prefix}second": part(FEATURES, 5, 1), f"{prefix}first": part(5, FEATURES, 2)}
    return Adapter(modules, "small", meta={"name": f"a{seed}"})


def batches(count: int) -> list[Batch]:
    chance = torch.Generator().manual_seed(9)
    return [
        (torch.randn(4, FEATURES, generator=chance), torch.randn(4, FEATURES, generator=chance)) for _ in range(count)
    ]


def dense(base: nn.Module, layout: Layout, vector: Tensor, batch: Batch) -> Tensor:
    """The oracle: weights changed, one adapter alone."""
    weights: dict[str, Tensor] = dict(base.named_parameters())
    for place in layout.places:
        down, up = place.factors(vector)
        name = f"{place.name.removeprefix('part.')}.weight"
        weights[name] = weights[name].detach() + up @ down
    return (functional_call(base, weights, (batch[0],)) - batch[1]).square().mean()


# --- at work ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "part."])
def test_vectors_at_work_equal_changed_weights(prefix: str) -> None:
    base, adapters = model(), [mixed_ranks(seed, prefix) for seed in range(3)]
    layout = Layout.of(adapters)
    vectors, some = torch.stack([layout.flatten(one) for one in adapters]), batches(3)
    trial = Trial(base, layout, prefix.rstrip("."))
    leaves = vectors.clone().requires_grad_()
    wanted = torch.stack([dense(base, layout, leaf, batch) for leaf, batch in zip(leaves, some, strict=True)])
    [gradient] = torch.autograd.grad(wanted.sum(), [leaves])
    losses, found = trial.gradient(vectors, squares, some, ["a", "b", "c"], 0)
    assert torch.allclose(losses, wanted, atol=1e-6)
    assert torch.allclose(found, gradient, atol=1e-5)
    assert torch.allclose(trial.measured(vectors, squares, some), wanted, atol=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    base, layout = model(), Layout.of([mixed_ranks()])
    before = {name: part.clone() for name, part in base.state_dict().items()}
    values = torch.randn(2, FEATURES)
    wanted = base(values)
    Trial(base, layout).gradient(torch.randn(2, layout.size), squares, batches(2), ["a", "b"], 0)
    assert all(torch.equal(part, before[name]) for name, part in base.state_dict().items())
    assert all(part.grad is None and part.requires_grad for part in base.parameters())
    assert torch.equal(base(values), wanted)


def test_adapters_of_another_base_and_a_model_in_training_are_refused() -> None:
    with pytest.raises(IncompatibleAdapters, match=r"Model has no linear layer other\.first"):
        Trial(model(), Layout.of([mixed_ranks(prefix="other.")]))
    with pytest.raises(BadOption, match="Model is in training mode"):
        Trial(model().train(), Layout.of([mixed_ranks()]))


# --- where it begins ----------------------------------------------------------------------------------------------


def opened(experts: Layout, weights: Tensor, rank: int, start: Tensor | None = None) -> HyperNetwork:
    network = HyperNetwork(Sizes(WIDTH, 2, 4, 3, 5, rank), experts.widened(rank))
    opening(network, experts, weights, start, torch.Generator().manual_seed(0))
    return network


def deltas(layout: Layout, vectors: Tensor) -> list[Tensor]:
    """By module (n, outputs, inputs)."""
    return [up @ down for down, up in (place.factors(vectors) for place in layout.places)]


def several(count: int = 4) -> tuple[Layout, Tensor]:
    adapters = [mixed_ranks(seed) for seed in range(count)]
    layout = Layout.of(adapters)
    return layout, torch.stack([layout.flatten(one) for one in adapters])


def test_it_begins_at_the_mean_of_the_deltas_whatever_is_asked() -> None:
    experts, weights = several(2)
    network = opened(experts, weights, 5)
    made = network(torch.randn(7, 3, WIDTH))
    for found, wanted in zip(deltas(network.layout, made), deltas(experts, weights), strict=True):
        assert torch.allclose(found, wanted.mean(dim=0).expand_as(found), atol=1e-5)


def test_it_begins_at_the_given_start_exactly() -> None:
    experts, weights = several(1)
    start = experts.flatten(mixed_ranks(9))
    network = opened(experts, weights, 5, start)
    for found, wanted in zip(
        deltas(network.layout, network(torch.randn(2, 3, WIDTH))), deltas(experts, start[None]), strict=True
    ):
        assert torch.allclose(found, wanted.expand_as(found), atol=1e-5)


def test_it_can_reach_every_expert() -> None:
    """Where the rank spans the library, some coefficients make an expert's delta; as a mean square they are 1."""
    experts, weights = several(2)
    network = opened(experts, weights, 5)
    moved = []
    for place, wide, count in zip(experts.places, network.layout.places, network.counts, strict=True):
        bases = Bases.of(place, weights, wide.rank, torch.Generator().manual_seed(0))
        moved.append(bases.cores(place, weights).flatten(1).float())
        assert moved[-1].shape == (2, count)
    coefficients = torch.cat(moved, dim=1) / network.spread - network.start
    for found, wanted in zip(deltas(network.layout, network.made(coefficients)), deltas(experts, weights), strict=True):
        assert torch.allclose(found, wanted, atol=1e-4)
    for part in coefficients.split(network.counts, dim=1):
        assert part.square().mean().item() == pytest.approx(1.0, abs=1e-4)


def test_where_it_begins_does_not_hang_on_how_deltas_are_split() -> None:
    experts, weights = several()
    other = weights.clone()
    for place in experts.places:
        down, up = place.factors(weights)
        change = torch.randn(len(weights), place.rank, place.rank) + 2 * torch.eye(place.rank)
        other[:, place.down] = (torch.linalg.inv(change) @ down).flatten(1)
        other[:, place.up] = (up @ change).flatten(1)
    one, two = opened(experts, weights, 3), opened(experts, other, 3)
    asked = torch.zeros(1, sum(one.counts))
    for found, wanted in zip(deltas(two.layout, two.made(asked)), deltas(one.layout, one.made(asked)), strict=True):
        assert torch.allclose(found, wanted, atol=1e-4)
    assert torch.allclose(two.spread, one.spread, atol=1e-4)


# --- a world of two factors ---------------------------------------------------------------------------------------


def word(name: str) -> np.ndarray:
    seed = int.from_bytes(name.encode()[:6], "little")
    return np.random.default_rng(seed).standard_normal(WIDTH).astype(np.float32)


def vectors(texts: Sequence[str]) -> np.ndarray:
    made = np.zeros((len(texts), 4, WIDTH), np.float32)
    for row, said in enumerate(texts):
        for place, name in enumerate(said.split()):
            made[row, place] = word(name)
    flat = made.reshape(len(texts), -1)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


class Lens(nn.Module):
    """Values -> values; the base does nothing, a task adds its two words' directions of change."""

    def __init__(self) -> None:
        super().__init__()
        self.change = nn.Linear(FEATURES, FEATURES, bias=False)
        nn.init.zeros_(self.change.weight)

    def forward(self, values: Tensor) -> Tensor:
        return self.change(values)


def aim(task: tuple[str, str]) -> Tensor:
    chance = [torch.Generator().manual_seed(int.from_bytes(name.encode(), "little") % 2**31) for name in task]
    return sum(torch.randn(FEATURES, FEATURES, generator=one) for one in chance) / 2


def draw_for(task: tuple[str, str]) -> Any:
    wanted = aim(task)

    def draw(step: int, chance: torch.Generator) -> Batch:
        values = torch.randn(16, FEATURES, generator=chance)
        return values, values @ wanted.T

    return draw


def school() -> School:
    """Experts that say little: one point and some noise."""
    chance = torch.Generator().manual_seed(3)
    down = torch.randn(FEATURES, FEATURES, generator=chance) / FEATURES**0.5
    some, told = [], []
    for task in (task for task in TASKS if task not in HELD):
        up = 0.1 * torch.randn(FEATURES, FEATURES, generator=chance)
        adapter = Adapter({"change": LowRank(down, up)}, "lens", meta={"name": " ".join(task)})
        texts = tuple(f"{manner} {' '.join(task)}" for manner in ("please", "kindly", "well"))
        some.append(Taught(" ".join(task), texts, (adapter,)))
        told.append(vectors(texts))
    layout = Layout.of([one.checkpoints[0] for one in some])
    return School("lens", layout, tuple(some), tuple(told), SPACE)


def practice() -> Practice[Batch]:
    return Practice(Lens().eval(), squares, {" ".join(task): draw_for(task) for task in TASKS if task not in HELD})


def fitted(lessons: Practice[Batch] | None = None, **given: Any) -> Hyper:
    small: dict[str, Any] = {"code": 8, "hidden": 16, "rank": 6, "heads": 4, "channels": 8}
    return hyper(school(), lessons or practice(), **{**small, "steps": 3, "tasks": 4, **given})


def loss(made: Hyper, task: tuple[str, str], words: tuple[str, str]) -> float:
    found = made.sample(vectors([f"ahem {' '.join(words)}"])[0], seed=0).adapter.modules["change"].dense()
    return float((found - aim(task)).square().sum())


def test_it_learns_combinations_that_it_never_saw_from_the_loss_alone() -> None:
    made = fitted(steps=300, tasks=13, rate=1e-2)
    held = sorted(HELD)
    right = sum(loss(made, task, task) for task in held)
    wrong = sum(loss(made, task, other) for task, other in zip(held, held[1:] + held[:1], strict=True))
    nothing = sum(float(aim(task).square().sum()) for task in held)
    assert right < 0.65 * nothing
    assert wrong > nothing


def test_mixtures_are_weights_and_as_many_as_asked_for() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights, never, some = mixtures(400, 1.0), mixtures(5, 0.0), mixtures(400, 0.25)
    assert torch.allclose(weights.sum(dim=1), torch.ones(400), atol=1e-5)
    assert weights.min() >= 0
    assert torch.equal(never, torch.eye(5))
    alone = (some.diagonal() == 1).float().mean()
    assert 0.68 < alone < 0.82


def test_mixed_tasks_make_words_that_say_nothing_serve_all_tasks_better() -> None:
    plain, mixed = (fitted(steps=300, tasks=13, rate=1e-2, mixed=share) for share in (0.0, 1.0))
    strange, held = [("pink", "star"), ("grey", "wedge"), ("brown", "arch")], sorted(HELD)
    one, other = (sum(loss(made, task, words) for task in held for words in strange) for made in (plain, mixed))
    assert other < 0.85 * one


def test_equal_seeds_give_equal_files_and_touch_no_global_chance(tmp_path: Path) -> None:
    lessons = practice()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    made = [fitted(lessons, seed=seed) for seed in (1, 1, 2)]
    one, two, other = (save(some, tmp_path / f"{n}") for n, some in enumerate(made))
    load(one).sample(vectors(["please red cone"])[0], seed=0)
    assert torch.equal(torch.rand(3), wanted)
    assert one.read_bytes() == two.read_bytes() != other.read_bytes()


def test_saved_and_read_it_makes_the_same(tmp_path: Path) -> None:
    made, query = fitted(steps=5), vectors(["please red cone"])[0]
    path = save(made, tmp_path / "hyper.safetensors")
    again = load(path)
    first, second = made.sample(query, seed=0), again.sample(query, seed=1)
    assert torch.equal(first.adapter.modules["change"].dense(), second.adapter.modules["change"].dense())
    assert first.experts == second.experts
    assert first.novelty == second.novelty
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"[10, 4, 8,", b"[10, 4, 9,"))
    with pytest.raises(FormatError, match="tensors are not those of a hypernetwork"):
        load(path)


def test_it_says_which_expert_is_nearest_and_how_new_it_is() -> None:
    made = fitted()
    told = made.sample(vectors(["please blue cone"])[0], seed=0)
    assert {share.name for share in told.experts} <= set(school().names)
    assert sum(share.weight for share in told.experts) == 1.0
    assert 0 <= told.novelty <= 2
    assert told.adapter.base == "lens"


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(BadOption, match="steps is 0"):
        fitted(steps=0)
    with pytest.raises(BadOption, match="mixed is a share, dropped one below 1"):
        fitted(dropped=1.0)
    with pytest.raises(BadOption, match=r"start has shape \(3,\)"):
        fitted(start=torch.zeros(3))
    with pytest.raises(GenerationError, match=r"shape \(1, 9\)"):
        fitted().sample(np.ones(9, np.float32), seed=0)
    few = Practice(Lens().eval(), squares, {"red disc": draw_for(("red", "disc"))})
    with pytest.raises(GenerationError, match="nothing to practise red cone on"):
        hyper(school(), few, steps=1, tasks=2)
    broken = {name: lambda step, chance: (torch.full((2, FEATURES), torch.nan),) * 2 for name in school().names}
    with pytest.raises(LoraHubError, match="the loss is nan after 0 steps"):
        hyper(school(), Practice(Lens().eval(), squares, broken), steps=1, tasks=2)


def test_a_similarity_lends_its_reader() -> None:
    from lorahub.index.transfer import fit_similarity

    some = school()
    chance = np.random.default_rng(0)
    given = {"width": WIDTH, "dim": 5, "heads": 2, "channels": 3, "steps": 2}
    known = fit_similarity(some.vectors, chance.random((13, 13)), **given)
    made = fitted(similarity=known, steps=1, rate=1e-9)
    assert (made.sizes.code, made.sizes.heads, made.sizes.channels) == known.sizes
    assert torch.allclose(made.members[0]["reader.look.weight"], known.tensors["look.weight"], atol=1e-6)
    other = fit_similarity([one[:, :WIDTH] for one in some.vectors], chance.random((13, 13)), width=2, steps=1)
    with pytest.raises(GenerationError, match="reads tokens of 2 numbers, the descriptions have 10"):
        fitted(similarity=other)


def test_several_members_make_the_mean_of_their_deltas(tmp_path: Path) -> None:
    made = fitted(members=3, rank=4, steps=2)
    query = school().vectors[0][0]
    found = made.sample(query, seed=0).adapter
    alone = [replace(made, members=(one,)) for one in made.members]
    for name, part in found.modules.items():
        wanted = torch.stack([one.sample(query, seed=0).adapter.modules[name].dense() for one in alone]).mean(dim=0)
        assert torch.allclose(part.dense(), wanted, atol=1e-5)
        assert part.rank == min(3 * 4, *wanted.shape)
    assert not torch.equal(made.members[0]["straight.weight"], made.members[1]["straight.weight"])
    assert all(torch.equal(part, fitted(rank=4, steps=2).members[0][n]) for n, part in made.members[0].items())
    path = save(made, tmp_path / "three.safetensors")
    again = load(path).sample(query, seed=0).adapter
    assert all(torch.equal(again.modules[name].up, part.up) for name, part in found.modules.items())

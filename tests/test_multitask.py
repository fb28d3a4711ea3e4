"""One adapter for all tasks: trained as one adapter on all data would be, kept in a file, deaf to words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning import squares
from lorahub.generate.experts import Pupil, cosine, generator, train
from lorahub.generate.hypernet import Practice
from lorahub.generate.learned.multitask import MultiTask, multitask
from lorahub.generate.stored import load, save
from lorahub.generate.taught import School, Taught, open_school
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import BadOption, FormatError, GenerationError, LoraHubError
from lorahub.hub.lowrank import LowRank
from schooling import Words
from torch import Tensor, nn

FEATURES, RANK = 6, 2
NAMES = ("fox", "owl", "hen")
Batch = tuple[Tensor, Tensor]


class Lens(nn.Module):
    """Values -> values."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(FEATURES, 5), nn.Linear(5, FEATURES)

    def forward(self, values: Tensor) -> Tensor:
        made: Tensor = self.second(torch.tanh(self.first(values)))
        return made


def draw_for(name: str) -> Any:
    aim = torch.randn(FEATURES, FEATURES, generator=generator(0, name))

    def draw(step: int, chance: torch.Generator) -> Batch:
        values = torch.randn(4, FEATURES, generator=chance)
        return values, values @ aim

    return draw


def school() -> School:
    some = []
    for name in NAMES:
        chance = generator(1, name)
        shapes = {"first": (5, FEATURES), "second": (FEATURES, 5)}
        modules = {
            module: LowRank(torch.randn(RANK, inputs, generator=chance), torch.randn(outputs, RANK, generator=chance))
            for module, (outputs, inputs) in shapes.items()
        }
        adapter = Adapter(modules, "lens", meta={"name": name})
        some.append(Taught(name, (f"a picture of {name}", f"{name} it is"), (adapter,)))
    return open_school(some, Words(), gauge="canonical")


def practice(names: Sequence[str] = NAMES) -> Practice[Batch]:
    return Practice(Lens().eval(), squares, {name: draw_for(name) for name in names})


def asked(said: str) -> Any:
    return Words().encode([said])[0]


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_it_is_the_adapter_that_training_on_all_data_gives(rank: int) -> None:
    steps, seed, rate = 7, 3, 1e-2
    made = multitask(school(), practice(), steps=steps, rank=rank, rate=rate, seed=seed)

    def everything(step: int, _: torch.Generator) -> Batch:
        some = [draw_for(name)(step, generator(seed, f"{name} {step}")) for name in NAMES]
        return torch.cat([values for values, _ in some]), torch.cat([wanted for _, wanted in some])

    pupil = Pupil("fresh", everything, seed=seed, rank=rank or RANK)
    [alone] = train(
        Lens().eval(), ["first", "second"], [pupil], squares, steps=steps, rate=rate, schedule=cosine, clip=1.0
    ).adapters
    found = made.sample(asked("a hen"), seed=0).adapter
    for name, module in alone.modules.items():
        assert torch.allclose(found.modules[name].dense(), module.dense(), atol=1e-6)
        assert found.modules[name].rank == (rank or RANK)


def test_words_say_which_expert_is_near_and_nothing_else() -> None:
    made = multitask(school(), practice(), steps=2, tasks=2)
    one, other = (made.sample(asked(said), seed=seed) for seed, said in enumerate(("fox it is", "picture of hen")))
    assert [share.name for share in (*one.experts, *other.experts)] == ["fox", "hen"]
    for name, module in one.adapter.modules.items():
        assert torch.equal(module.dense(), other.adapter.modules[name].dense())
    assert one.novelty == other.novelty > 0
    with pytest.raises(GenerationError, match="9"):
        made.sample(np.ones(9, np.float32), seed=0)


def test_saved_and_read_it_is_the_same_and_equal_seeds_give_equal_files(tmp_path: Path) -> None:
    some = [multitask(school(), practice(), steps=2, tasks=2, rank=3, seed=seed) for seed in (1, 1, 2)]
    one, two, other = (save(made, tmp_path / str(place)) for place, made in enumerate(some))
    assert one.read_bytes() == two.read_bytes() != other.read_bytes()
    again = load(one)
    assert isinstance(again, MultiTask)
    first, second = (made.sample(asked("a fox"), seed=0) for made in (some[0], again))
    assert first.experts == second.experts
    assert first.novelty == second.novelty
    for name, module in first.adapter.modules.items():
        assert torch.equal(module.dense(), second.adapter.modules[name].dense())
    one.write_bytes(one.read_bytes().replace(b'\\"rank\\": 3', b'\\"rank\\": 2'))
    with pytest.raises(FormatError, match="one adapter of rank 2 for 3 experts"):
        load(one)


def test_what_makes_no_sense_is_refused() -> None:
    for name, value in {"steps": 0, "tasks": 0, "rank": -1, "rate": 0.0}.items():
        with pytest.raises(BadOption, match=f"{name} (is )?{value}"):
            multitask(school(), practice(), **{name: value})  # type: ignore[arg-type]
    with pytest.raises(GenerationError, match="nothing to practise hen on"):
        multitask(school(), practice(("fox", "owl")))
    broken = {name: lambda step, chance: (torch.full((2, FEATURES), torch.nan),) * 2 for name in NAMES}
    with pytest.raises(LoraHubError, match="the loss is nan after 0 steps"):
        multitask(school(), Practice(Lens().eval(), squares, broken), steps=1)

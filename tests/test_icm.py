"""ICM-LoRA: one generator over all tasks, its conditions, its scales; and packs of a library."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning import reader
from lorahub.generate.conditions import task_vector, tuned
from lorahub.generate.learned.icm import Icm, icm, scaled
from lorahub.generate.pack import Pack, load_pack, pack_components, pack_network
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import BadOption, FormatError, GenerationError, IncompatibleAdapters, UnknownAdapter
from lorahub.hub.lowrank import LowRank
from schooling import SIZE, Words, school
from torch import Tensor, nn

QUICK: dict[str, Any] = {"steps": 3, "batch": 4, "latent": 4, "channels": 2, "stages": 3}
QUERY = Words().encode(["a picture of hen"])[0]


@pytest.fixture(scope="module")
def small() -> Icm:
    return icm(school(), **QUICK)


def test_one_generator_serves_all_tasks(small: Icm) -> None:
    made = small.sample(QUERY, seed=0)
    assert made.adapter.shapes == school().experts[0].checkpoints[0].shapes
    assert [share.name for share in made.experts] == ["hen"]
    other = small.sample(school().vectors[0][0], seed=0)
    assert [share.name for share in other.experts] == ["fox"]
    assert not torch.equal(small.layout.flatten(made.adapter), small.layout.flatten(other.adapter))


def test_the_seed_decides_unless_codes_are_not_drawn(small: Icm) -> None:
    def vector(seed: int, random: bool = True) -> Tensor:
        return small.layout.flatten(replace(small, random=random).sample(QUERY, seed=seed).adapter)

    assert torch.equal(vector(0), vector(0))
    assert not torch.equal(vector(0), vector(1))
    assert torch.equal(vector(0, random=False), vector(1, random=False))


@pytest.mark.parametrize("scale", ["library", "tensor", "own"])
def test_scales_can_be_undone(scale: Any) -> None:
    here = school()
    values, means, spreads = scaled(here, scale)
    whole = torch.cat(here.weights)
    assert values.shape == whole.shape
    if scale == "own":
        assert means.shape == spreads.shape == (4, SIZE)
        last = torch.tensor([2, 5, 8, 11])  # of each expert's three checkpoints
        assert torch.allclose(values[last] * spreads + means, whole[last], atol=1e-5)
        for side in here.layout.tensors:
            assert torch.allclose(values[:, side].mean(dim=1), torch.zeros(12), atol=1e-5)
            assert torch.allclose(values[:, side].std(dim=1, correction=0), torch.ones(12), atol=1e-4)
    else:
        assert means.shape == spreads.shape == (1, SIZE)
        assert torch.allclose(values * spreads + means, whole, atol=1e-4)


def test_the_nearest_expert_lends_its_scale() -> None:
    found = icm(school(), scale="own", random=False, **QUICK)
    one = found.layout.flatten(found.sample(QUERY, seed=0).adapter)
    network = found._network
    with torch.no_grad():
        made = network.decode(torch.zeros(1, 4), torch.tensor(QUERY)[None])[0, :SIZE]
    assert torch.allclose(one, made * found.spreads[2] + found.means[2], atol=1e-6)


def test_task_vectors_may_be_the_condition() -> None:
    vectors = [np.eye(5, dtype=np.float32)[[row]] * 3 for row in range(4)]
    found = icm(school(), conditions=vectors, **QUICK)
    assert found.sample(vectors[1][0], seed=0).experts[0].name == "owl"
    assert found.origin.told["condition"] == "task vector"
    with pytest.raises(GenerationError, match=r"shape \(12,\), the generator was fitted to \(5,\)"):
        found.sample(QUERY, seed=0)
    with pytest.raises(BadOption, match="3 conditions for 4 experts"):
        icm(school(), conditions=vectors[:3], **QUICK)
    with pytest.raises(BadOption, match="scale is"):
        icm(school(), scale="best", **QUICK)  # type: ignore[arg-type]


# --- task vectors -------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Two layers over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, value: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.last(torch.tanh(self.first(value)))


def acting(seed: int = 0, scale: float = 0.7) -> Adapter:
    chance = torch.Generator().manual_seed(seed)
    modules = {
        name: LowRank(torch.randn(rank, inputs, generator=chance), torch.randn(outputs, rank, generator=chance), scale)
        for name, rank, inputs, outputs in (("first", 2, 4, 6), ("last", 1, 6, 5))
    }
    return Adapter(modules, meta={"name": "acting"})


def with_deltas(model: Small, adapter: Adapter) -> Small:
    """A copy whose weights hold the deltas."""
    other = Small()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, module in adapter.modules.items():
            other.get_submodule(name).weight += module.dense()
    return other


@pytest.mark.parametrize("position", ["last", "mean", "first"])
def test_a_task_vector_is_the_tuned_models_average(position: Any) -> None:
    torch.manual_seed(0)
    model, adapter = Small(), acting()
    before = {name: part.clone() for name, part in model.state_dict().items()}
    lengths = torch.tensor([3, 1, 2, 3])
    values = torch.randn(4, 3, 4)
    mask = (torch.arange(3) < lengths[:, None]).long()
    batches = [{"value": values[rows], "attention_mask": mask[rows]} for rows in (slice(0, 3), slice(3, 4))]
    found = task_vector(model, "last", batches, acting=tuned(model, adapter), position=position)
    states = with_deltas(model, adapter)(values)
    picked = {
        "last": [states[row, length - 1] for row, length in enumerate(lengths)],
        "mean": [states[row, :length].mean(dim=0) for row, length in enumerate(lengths)],
        "first": [states[row, 0] for row in range(4)],
    }[position]
    assert found.shape == (5,)
    assert np.allclose(found, torch.stack(picked).mean(dim=0).detach().numpy(), atol=1e-5)
    bare = task_vector(model, "last", batches, position=position)
    assert not np.allclose(found, bare, atol=0.01)
    assert all(torch.equal(before[name], part) for name, part in model.state_dict().items())


def test_every_step_of_a_decoder_counts() -> None:
    model = Small()
    steps = [torch.randn(2, 3, 4), torch.randn(2, 1, 4)]  # the prompt, and one token more

    def run(batch: object) -> None:
        for value in steps:
            model(value)

    found = task_vector(model, "last", [{}], run=run)
    wanted = torch.stack([model(value)[:, -1].mean(dim=0) for value in steps]).mean(dim=0)
    assert np.allclose(found, wanted.detach().numpy(), atol=1e-6)


def test_task_vectors_of_a_transformer() -> None:
    world = reader()
    paths = world.paths
    pupils = world.pupils(1)
    adapter = world.train(pupils, steps=1).adapters[0]
    adapter = adapter.mapped(lambda module: replace(module, up=torch.ones_like(module.up)))
    batch = {"input_ids": torch.randint(1, 30, (3, 6)), "attention_mask": torch.ones(3, 6, dtype=torch.int64)}
    world.model.eval()
    found = task_vector(world.model, "encoder.layer.0", [batch], acting=tuned(world.model, adapter), position="mean")
    weights = {
        f"{path}.weight": world.model.get_submodule(path).weight + adapter.modules[path].dense() for path in paths
    }
    with torch.no_grad():
        states = torch.func.functional_call(world.model, weights, kwargs=batch).last_hidden_state
    assert np.allclose(found, states.mean(dim=(0, 1)).numpy(), atol=1e-4)


def test_what_gives_no_task_vector() -> None:
    model = Small()
    value = torch.randn(1, 2, 4)
    with pytest.raises(BadOption, match="no layer 'top'"):
        task_vector(model, "top", [value])
    with pytest.raises(BadOption, match="no sample"):
        task_vector(model, "last", [])
    with pytest.raises(BadOption, match="position is"):
        task_vector(model, "last", [value], position="best")  # type: ignore[arg-type]
    with pytest.raises(BadOption, match=r"puts out \(2, 5\)"):
        task_vector(model, "last", [value[0]])
    with (
        pytest.raises(IncompatibleAdapters, match="acting changes first by 6x4"),
        tuned(nn.Sequential(nn.Linear(4, 6)), acting()),
    ):
        pass


# --- packs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network_pack() -> Pack:
    options = {**QUICK, "steps": 300, "batch": 8, "norm": "group", "channels": 4}
    return pack_network(school("fox owl", noise=0.0), rate=5e-3, weight=1e-5, **options)


def test_a_networks_pack_rebuilds_its_experts(network_pack: Pack) -> None:
    here = school("fox owl", noise=0.0)
    for row, name in enumerate(("fox", "owl")):
        found = network_pack.rebuild(name)
        assert found.adapter.name == name
        wanted = here.weights[row].mean(dim=0)
        vector = here.layout.flatten(found.adapter)
        assert found.error == pytest.approx(here.layout.error(vector, wanted), rel=1e-4)
        assert found.error < 0.2
    assert set(network_pack.tensors) >= {"codes", "keys"}
    assert not any(name.startswith("encoder") for name in network_pack.tensors)
    with pytest.raises(UnknownAdapter, match="'cow'; it holds fox, owl"):
        network_pack.rebuild("cow")


@pytest.mark.parametrize(("bits", "allowed"), [(32, 1e-5), (16, 2e-3), (8, 0.03), (4, 0.4)])
def test_all_components_lose_only_what_rounding_loses(bits: int, allowed: float) -> None:
    here = school()
    pack = pack_components(here, bits=bits)
    assert max(pack.errors) < allowed
    for row, name in enumerate(here.names):
        vector = here.layout.flatten(pack.rebuild(name).adapter)
        assert here.layout.error(vector, here.weights[row].mean(dim=0)) == pytest.approx(pack.errors[row], abs=1e-6)


def test_bytes_decide_how_many_components_there_are() -> None:
    here = school("fox owl hen cat cow pig")
    packs = [pack_components(here, count=count) for count in range(6)]
    sizes = [pack.nbytes for pack in packs]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 6
    for pack in packs:
        for slack in (0, 1, sizes[1] - sizes[0] - 1):
            assert pack_components(here, size=pack.nbytes + slack).nbytes == pack.nbytes
    errors = [sum(pack.errors) for pack in packs]
    assert errors[-1] < 0.02 < errors[0]
    assert pack_components(here).nbytes == sizes[-1]
    assert pack_components(here, size=1).nbytes == sizes[0]  # the mean alone


@pytest.mark.parametrize("kind", ["network", 32, 16, 8, 4])
def test_a_pack_is_one_file(kind: Any, network_pack: Pack, tmp_path: Path) -> None:
    pack = network_pack if kind == "network" else pack_components(school(), bits=kind)
    path = pack.save(tmp_path / "pack.safetensors")
    back = load_pack(path)
    assert (back.kind, back.names, back.errors, back.nbytes) == (pack.kind, pack.names, pack.errors, pack.nbytes)
    for name in pack.names:
        one, other = (pack.layout.flatten(some.rebuild(name).adapter) for some in (pack, back))
        assert torch.equal(one, other)
    assert pack.nbytes < path.stat().st_size < pack.nbytes + 8000
    assert back.save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("harm", ["names", "places", "bits", "scales", "rows", "codes"])
def test_a_damaged_pack_is_refused_in_one_line(harm: str, network_pack: Pack, tmp_path: Path) -> None:
    pack = network_pack if harm == "codes" else pack_components(school(), bits=8)
    tensors: dict[str, Tensor] = dict(pack.tensors)
    if harm == "names":
        pack = replace(pack, names=pack.names[1:])
    elif harm == "bits":
        pack = replace(pack, facts={"bits": 5})
    elif harm == "scales":
        pack = replace(pack, scales=pack.scales[1:])
    else:
        pack = replace(pack, tensors={**tensors, harm: tensors[harm][:1]})
    path = pack.save(tmp_path / "pack.safetensors")
    with pytest.raises(FormatError, match=r"pack\.safetensors: ") as caught:
        load_pack(path)
    assert "\n" not in str(caught.value)


def test_packs_refuse_bits_that_there_are_not() -> None:
    with pytest.raises(BadOption, match="bits is 2"):
        pack_components(school(), bits=2)
    with pytest.raises(BadOption, match="bits is 8"):
        pack_network(school(), bits=8, **QUICK)

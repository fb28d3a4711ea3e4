"""Laws of adapters that act at run time, plain and gated, in small models of diffusers' own classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import BadOption, FormatError, IncompatibleAdapters, TargetExists
from lorahub.hub.lowrank import LowRank
from lorahub.hub.writing import save
from lorahub.merge.gated import carried, fused, load_gates, save_gates, widths
from lorahub.merge.gates import VARIANTS, Gate, Gates, Recipe
from torch import Tensor, nn

COMPONENT = "transformer"


def transformer() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, num_layers=2, sample_size=8,
        patch_size=4, cross_attention_dim=16, caption_channels=12, use_additional_conditions=False,
    ).requires_grad_(False).eval()  # fmt: skip


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=4,
    ).requires_grad_(False).eval()  # fmt: skip


def paint(model: nn.Module, time: float = 500.0) -> Tensor:
    chance = torch.Generator().manual_seed(9)
    value = torch.randn(2, 3, 8, 8, generator=chance)
    words = torch.randn(2, 5, 12, generator=chance)
    result: Tensor = model(value, encoder_hidden_states=words, timestep=torch.full((2,), time), return_dict=False)[0]
    return result


def adapter(
    model: nn.Module, seed: int, component: str = COMPONENT, rank: int = 3, kinds: tuple[str, ...] = ()
) -> Adapter:
    """Normally distributed factors for the attention of a model, and for `kinds` of layers besides."""
    chance, modules = torch.Generator().manual_seed(seed), {}
    for path, layer in model.named_modules():
        if path.endswith(("to_q", "to_v", "to_out.0", *kinds)) and isinstance(layer, (nn.Linear, nn.Conv2d)):
            rows, columns = layer.weight.shape[0], layer.weight[0].numel()
            kernel = tuple(layer.weight.shape[2:])
            down = torch.randn(rank, columns, generator=chance) / columns**0.5
            modules[f"{component}.{path}"] = LowRank(down, torch.randn(rows, rank, generator=chance).T.T, 0.5, kernel)
    assert modules
    return Adapter(modules, "tiny", {}, {"name": f"a{seed}"})


def gates_for(model: nn.Module, adapters: list[Adapter], component: str = COMPONENT, **recipe: Any) -> Gates:
    paths = list(carried(adapters, [1.0] * len(adapters), component))
    return Gates(widths(model, paths), Recipe(**recipe), seed=1).requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return transformer()


@pytest.fixture(scope="module")
def three(model: nn.Module) -> list[Adapter]:
    return [adapter(model, seed, rank=seed + 2) for seed in range(3)]


def painted(model: nn.Module, adapters: list[Adapter], gates: Gates | None = None, **given: Any) -> Tensor:
    with torch.no_grad(), fused(model, adapters, gates, component=COMPONENT, **given):
        return paint(model)


def off(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


# --- the gate itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gate_is_the_formula(variant: str) -> None:
    chance = torch.Generator().manual_seed(3)
    gate = Gate(6, Recipe(variant), chance).requires_grad_(False)
    for norm in (gate.norm_base, gate.norm_delta):
        norm.weight.copy_(torch.rand(6, generator=chance))
        norm.bias.copy_(torch.rand(6, generator=chance))
    base, deltas = torch.randn(2, 4, 6, generator=chance), torch.randn(3, 2, 4, 6, generator=chance)

    def normal(value: Tensor, norm: nn.LayerNorm) -> Tensor:
        centred = value - value.mean(dim=-1, keepdim=True)
        return centred / (value.var(dim=-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias

    wanted = base.clone()
    for delta in deltas:
        logit = gate.weights["delta"] * normal(delta, gate.norm_delta) + gate.weights["bias"]
        if variant != "no_cross":
            logit += gate.weights["cross"] * normal(base, gate.norm_base) * normal(delta, gate.norm_delta)
        if variant == "full":
            logit += gate.weights["base"] * normal(base, gate.norm_base)
        wanted += gate.out / (1 + (-logit).exp()) * delta
    torch.testing.assert_close(gate(base, deltas), wanted)
    assert float(gate.out[0]) == pytest.approx(1.0 if variant == "full" else 0.512)
    assert float(((gate(base, deltas) - base).abs() - (gate.out * deltas).abs().sum(dim=0)).max()) <= 1e-6


# --- laws in a model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [{}, {"variant": "full"}, {"variant": "no_cross"}, {"timestep": True}], ids=str)
def test_order_does_not_matter(model: nn.Module, three: list[Adapter], recipe: dict[str, Any]) -> None:
    gates = gates_for(model, three, **recipe)
    assert off(painted(model, three[::-1], gates), painted(model, three, gates)) < 1e-5


def test_no_adapter_and_no_block_leave_the_base(model: nn.Module, three: list[Adapter]) -> None:
    before = paint(model)
    parameters = {name: value.clone() for name, value in model.state_dict().items()}
    gates = gates_for(model, three)
    assert torch.equal(painted(model, [], gates), before)
    assert off(painted(model, three, gates), before) > 0.01
    assert torch.equal(paint(model), before)
    assert all(torch.equal(value, parameters[name]) for name, value in model.state_dict().items())
    with pytest.raises(ZeroDivisionError), fused(model, three, component=COMPONENT):
        _ = 1 / 0
    assert torch.equal(paint(model), before)


def test_a_zero_adapter_adds_nothing(model: nn.Module, three: list[Adapter]) -> None:
    nothing = three[0].mapped(lambda m: LowRank(m.down, torch.zeros_like(m.up), m.scale))
    gates = gates_for(model, three, global_rank=0)
    assert torch.equal(painted(model, [nothing], gates), paint(model))
    assert off(painted(model, [*three, nothing], gates), painted(model, three, gates)) < 1e-6
    gates = gates_for(model, three, global_rank=2)
    assert torch.equal(painted(model, [nothing], gates), paint(model))


def test_open_gates_are_diffusers_sum(tmp_path: Path) -> None:
    model, theirs = unet(), unet()
    three = [adapter(model, seed, "unet", rank=seed + 2, kinds=("ff.net.2",)) for seed in range(3)]
    gates = gates_for(model, three, "unet", global_rank=0)
    for gate in gates.layers:
        gate.weights["delta"].zero_()
        gate.weights["cross"].zero_()
        gate.weights["bias"].fill_(50.0)
        gate.out.fill_(1.0)
    shares = [0.7, -0.4, 1.2]
    for one in three:
        file = save(one.mapped(LowRank.folded), tmp_path / one.name, "diffusers")
        theirs.load_lora_adapter(str(file), prefix="unet", adapter_name=one.name)
    theirs.set_adapters([one.name for one in three], shares)
    wanted = paint(theirs)
    for chosen in (gates, None):
        with torch.no_grad(), fused(model, three, chosen, shares, component="unet"):
            assert off(paint(model), wanted) < 1e-5
    assert off(wanted, paint(model)) > 0.01


def test_the_global_adapter_is_one_more(model: nn.Module, three: list[Adapter]) -> None:
    """With rank q it is what the best rank-q approximation of the sum would be as an adapter."""
    paths = three[0].modules
    total = {name: sum(one.modules[name].dense() for one in three) for name in paths}
    best = {}
    for name, matrix in total.items():
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        best[name] = LowRank(vh[:2], u[:, :2] * s[:2])
    gates, plain = (gates_for(model, three, global_rank=rank) for rank in (2, 0))
    plain.take(gates.tensors())
    extra = Adapter(best, "tiny", {}, {"name": "global"})
    assert off(painted(model, three, gates), painted(model, [*three, extra], plain)) < 1e-5


def test_gradients_reach_only_the_gates(three: list[Adapter]) -> None:
    model = transformer()
    for recipe in ({"variant": "full"}, {"timestep": True}):
        gates = gates_for(model, three, **recipe).requires_grad_(True)
        with fused(model, three, gates, component=COMPONENT):
            paint(model).square().mean().backward()
        assert all(value.grad is not None and bool(value.grad.any()) for value in gates.parameters())
        assert all(value.grad is None for value in model.parameters())
        assert not any(m.up.requires_grad or m.down.requires_grad for one in three for m in one.modules.values())


def test_gates_may_know_the_time(model: nn.Module, three: list[Adapter]) -> None:
    gates = gates_for(model, three, timestep=True)

    def at(time: float) -> Tensor:
        with torch.no_grad(), fused(model, three, gates, component=COMPONENT):
            return paint(model, time)

    untrained = at(10.0)
    plain = gates_for(model, three)
    plain.take(gates.tensors())
    with torch.no_grad(), fused(model, three, plain, component=COMPONENT):
        assert torch.equal(paint(model, 10.0), untrained)
    for gate in gates.layers:
        gate.clock.weight.fill_(0.3)
    assert off(at(10.0), untrained) > 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_gates_paint_the_same_picture(
    model: nn.Module, three: list[Adapter], variant: str, tmp_path: Path
) -> None:
    gates = gates_for(model, three, variant=variant, global_rank=3, timestep=True)
    for gate in gates.layers:
        gate.clock.weight.normal_()
    save_gates(gates, tmp_path / "gates.safetensors", model)
    again = load_gates(tmp_path / "gates.safetensors", model)
    assert again.recipe == gates.recipe
    assert torch.equal(painted(model, three, again), painted(model, three, gates))
    with pytest.raises(TargetExists):
        save_gates(gates, tmp_path / "gates.safetensors", model)


def test_a_unet_with_convolutions(tmp_path: Path) -> None:
    model = unet()
    two = [adapter(model, seed, "unet", kinds=("conv1", "proj_in", "ff.net.2")) for seed in range(2)]
    theirs = unet()
    for one in two:
        file = save(one.mapped(LowRank.folded), tmp_path / one.name, "diffusers")
        theirs.load_lora_adapter(str(file), prefix="unet", adapter_name=one.name)
    theirs.set_adapters([one.name for one in two], [1.0, -0.5])
    with torch.no_grad(), fused(model, two, weights=[1.0, -0.5], component="unet"):
        assert off(paint(model), paint(theirs)) < 1e-5
    gates = gates_for(model, two, "unet")
    assert not any("conv1" in path for path in gates.paths)
    with torch.no_grad(), fused(model, two, gates, component="unet"):
        assert off(paint(model), paint(theirs)) > 1e-3


def test_openings_can_be_watched(model: nn.Module, three: list[Adapter]) -> None:
    seen: dict[str, Tensor] = {}
    gates = gates_for(model, three)
    painted(model, three, gates, watch=lambda path, g, time: seen.update({path: g, "time": torch.tensor(time)}))
    assert float(seen.pop("time")) == 500.0
    assert set(seen) == set(gates.paths)
    for g in seen.values():
        assert g.shape[0] == len(three) + 1
        assert 0 <= float(g.min()) <= float(g.max()) <= 1


# --- refusals -------------------------------------------------------------------------------------------------------


def refusals() -> list[tuple[Callable[[nn.Module, list[Adapter]], Any], str]]:
    wrong = Adapter({f"{COMPONENT}.proj_out": LowRank(torch.ones(1, 5), torch.ones(4, 1))}, None, {}, {"name": "wrong"})
    absent = Adapter(
        {f"{COMPONENT}.nowhere": LowRank(torch.ones(1, 5), torch.ones(4, 1))}, None, {}, {"name": "absent"}
    )
    return [
        (lambda model, _: painted(model, [wrong]), "4x5 in an adapter"),
        (lambda model, _: painted(model, [absent]), "no linear layer or convolution nowhere"),
        (lambda model, some: painted(model, some, Gates({"proj_out": 48})), "there is no gate for"),
    ]


@pytest.mark.parametrize(("act", "says"), refusals(), ids=lambda value: value if isinstance(value, str) else "")
def test_what_does_not_fit_is_refused(
    model: nn.Module, three: list[Adapter], act: Callable[[nn.Module, list[Adapter]], Any], says: str
) -> None:
    with pytest.raises(IncompatibleAdapters, match=says):
        act(model, three)
    assert not any(layer._forward_hooks for layer in model.modules())


def test_files_that_hold_no_gates_or_others_are_refused(model: nn.Module, three: list[Adapter], tmp_path: Path) -> None:
    (tmp_path / "torn").write_bytes(b"no tensors")
    with pytest.raises(FormatError, match="torn holds no gates"):
        load_gates(tmp_path / "torn")
    with pytest.raises(FormatError, match="holds no gates"):
        load_gates(save(three[0].mapped(LowRank.folded), tmp_path / "one.safetensors", "diffusers"))
    save_gates(gates_for(model, three), tmp_path / "gates", model)
    other = transformer()
    nn.init.normal_(other.proj_out.weight)
    with pytest.raises(IncompatibleAdapters, match="another base"):
        load_gates(tmp_path / "gates", other)
    with pytest.raises(BadOption, match="no_base, full, no_cross"):
        Recipe("half")
    with pytest.raises(BadOption, match="global_rank is -1"):
        Recipe(global_rank=-1)

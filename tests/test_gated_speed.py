"""The short ways through a gate give what the plain one gives: pieces, uneven ranks, prepared factors, narrow types."""

from __future__ import annotations

import pytest
import torch
from lorahub.hub.adapter import Adapter
from lorahub.merge import gated
from lorahub.merge.gated import Shelf, fused
from test_gated import COMPONENT, adapter, gates_for, off, paint, painted, transformer
from torch import Tensor, nn


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return transformer()


@pytest.fixture(scope="module")
def three(model: nn.Module) -> list[Adapter]:
    return [adapter(model, seed, rank=2) for seed in range(3)]


def with_gradients(model: nn.Module, adapters: list[Adapter], gates: nn.Module) -> Tensor:
    with fused(model, adapters, gates, component=COMPONENT):
        return paint(model).detach()


@pytest.mark.parametrize("timestep", [False, True])
def test_pieces_and_gradients_change_nothing(
    model: nn.Module, three: list[Adapter], timestep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates = gates_for(model, three, timestep=timestep)
    for gate in gates.layers:
        if timestep:
            gate.clock.weight.normal_(generator=torch.Generator().manual_seed(1))
    whole = painted(model, three, gates)
    assert off(with_gradients(model, three, gates), whole) < 1e-6
    monkeypatch.setattr(gated, "PIECE", 1)  # a token at a time
    assert off(painted(model, three, gates), whole) < 1e-6


def test_uneven_ranks_are_not_padded(model: nn.Module) -> None:
    wide, narrow = adapter(model, 1, rank=40), [adapter(model, seed, rank=1) for seed in (2, 3)]
    padded = [one.mapped(lambda module: gated.concat([module] + [module.scaled(0.0)] * 39)) for one in narrow]
    gates = gates_for(model, [wide, *narrow], global_rank=0)
    assert off(painted(model, [wide, *narrow], gates), painted(model, [wide, *padded], gates)) < 1e-6
    assert off(with_gradients(model, [wide, *narrow], gates), painted(model, [wide, *narrow], gates)) < 1e-6


def test_a_shelf_keeps_what_is_ready(model: nn.Module, three: list[Adapter]) -> None:
    gates, shelf = gates_for(model, three), Shelf()
    wanted = painted(model, three[:2], gates), painted(model, three[1:], gates, weights=[0.5, 2.0])
    for _ in range(2):
        assert torch.equal(painted(model, three[:2], gates, shelf=shelf), wanted[0])
        assert torch.equal(painted(model, three[1:], gates, weights=[0.5, 2.0], shelf=shelf), wanted[1])
    assert all(bool(module.up.isfinite().all()) for module in three[0].modules.values())


def test_gates_that_change_inside_the_block_act_at_once(model: nn.Module, three: list[Adapter]) -> None:
    gates, other = gates_for(model, three), gates_for(model, three, variant="no_base")
    for parameter in other.parameters():
        parameter.mul_(0.5)
    with torch.no_grad(), fused(model, three, gates, component=COMPONENT):
        before = paint(model)
        gates.take(other.tensors())
        after = paint(model)
    assert torch.equal(after, painted(model, three, other))
    assert off(after, before) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models(three: list[Adapter], dtype: torch.dtype) -> None:
    """A model in a narrow type: gates stay as they are, and what they do is right to the type's precision."""
    model = transformer()
    gates = gates_for(model, three)
    wanted = painted(model, three, gates)
    model.to(dtype)
    with torch.no_grad(), fused(model, three, gates, component=COMPONENT):
        got = paint_as(model, dtype)
    assert got.dtype == dtype
    assert off(got.float(), wanted) < 0.05
    assert {value.dtype for value in gates.parameters()} == {torch.float32}


def paint_as(model: nn.Module, dtype: torch.dtype) -> Tensor:
    chance = torch.Generator().manual_seed(9)
    value, words = torch.randn(2, 3, 8, 8, generator=chance), torch.randn(2, 5, 12, generator=chance)
    times = torch.full((2,), 500.0)
    result: Tensor = model(value.to(dtype), words.to(dtype), times, return_dict=False)[0]
    return result

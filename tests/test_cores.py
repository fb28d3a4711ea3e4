"""Cores: the bases that keep most of a library's deltas, against dense singular value decompositions."""

from __future__ import annotations

import pytest
import torch
from lorahub.generate.cores import Bases
from lorahub.generate.layout import Layout
from lorahub.hub.adapter import Adapter
from lorahub.hub.lowrank import LowRank
from torch import Tensor

INPUTS, OUTPUTS, RANK, COUNT = 9, 12, 2, 3


def library(count: int = COUNT, seed: int = 0) -> tuple[Layout, Tensor]:
    chance = torch.Generator().manual_seed(seed)

    def one() -> Adapter:
        down, up = torch.randn(RANK, INPUTS, generator=chance), torch.randn(OUTPUTS, RANK, generator=chance)
        return Adapter({"layer": LowRank(down, up, 0.5)}, "base")

    adapters = [one() for _ in range(count)]
    layout = Layout.of(adapters)
    return layout, torch.stack([layout.flatten(adapter) for adapter in adapters])


def dense(layout: Layout, vectors: Tensor) -> Tensor:
    down, up = layout.places[0].factors(vectors.double())
    return up @ down


def made(layout: Layout, vectors: Tensor, rank: int) -> Bases:
    return Bases.of(layout.places[0], vectors, rank, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_bases_are_the_leading_singular_vectors_of_all_deltas(rank: int) -> None:
    layout, vectors = library()
    bases, deltas = made(layout, vectors, rank), dense(layout, vectors)
    for found, unfolded in (
        (bases.outputs, deltas.transpose(0, 1).flatten(1)),
        (bases.inputs.mT, deltas.permute(2, 0, 1).flatten(1)),
    ):
        wanted = torch.linalg.svd(unfolded, full_matrices=False).U[:, :rank]
        torch.testing.assert_close(found @ found.mT, wanted @ wanted.mT)


def test_nothing_is_lost_where_the_bases_span_the_library() -> None:
    layout, vectors = library()
    bases = made(layout, vectors, COUNT * RANK)
    cores = bases.cores(layout.places[0], vectors)
    torch.testing.assert_close(bases.outputs @ cores @ bases.inputs, dense(layout, vectors))


def test_cores_are_linear_in_the_deltas_and_best() -> None:
    layout, vectors = library()
    bases, deltas = made(layout, vectors, 4), dense(layout, vectors)
    cores = bases.cores(layout.places[0], vectors)
    torch.testing.assert_close(cores, bases.outputs.mT @ deltas @ bases.inputs.mT)
    lost = (deltas - bases.outputs @ cores @ bases.inputs).square().sum()
    aside = (deltas - bases.outputs @ (cores + 0.01 * torch.randn_like(cores)) @ bases.inputs).square().sum()
    assert lost < aside


@pytest.mark.parametrize("count", [1, 2])
def test_a_small_library_is_filled_up_at_right_angles(count: int) -> None:
    layout, vectors = library(count)
    bases = made(layout, vectors, 8)
    unit = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(bases.outputs.mT @ bases.outputs, unit)
    torch.testing.assert_close(bases.inputs @ bases.inputs.mT, unit)
    cores = bases.cores(layout.places[0], vectors)
    torch.testing.assert_close(bases.outputs @ cores @ bases.inputs, dense(layout, vectors))
    again = made(layout, vectors, 8)
    assert torch.equal(again.outputs, bases.outputs)
    empty = made(layout, torch.zeros_like(vectors), 8)
    torch.testing.assert_close(empty.outputs.mT @ empty.outputs, unit)

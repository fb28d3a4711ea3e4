"""ICM-LoRA in its closed world: the library's own adapters packed into few bytes and rebuilt, beside plain ways."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from generation_cell import Cell
from generation_tables import part_of
from lorahub.generate.pack import Pack, pack_components, pack_network
from torch import Tensor

SHARE = 0.01  # of the checkpoints' bytes: what a pack may take


def packed(cell: Cell) -> list[dict[str, Any]]:
    """A line for each way: score on the taught tasks' test samples and gain over the base, both as shares of the last
    checkpoints' own, and bytes, as a share of all checkpoints' too."""
    whole = sum(some.nbytes for some in cell.school.weights)
    original = _score(cell, cell.last)
    plain = _score(cell, torch.zeros_like(cell.last))
    lines = []
    for name, vectors, size in _ways(cell, whole):
        found = _score(cell, vectors)
        lines.append(
            {
                "row": name,
                "kept": found / original,
                "gain kept": part_of(found - plain, original - plain),
                "bytes": size,
                "of checkpoints": size / whole,
            }
        )
    return lines


def _ways(cell: Cell, whole: int) -> Iterator[tuple[str, Tensor, int]]:
    school, seed = cell.school, cell.setting.seed
    yield "last checkpoints", cell.last, cell.last.nbytes
    means = torch.stack([some.mean(dim=0) for some in school.weights])
    yield "mean checkpoints", means, means.nbytes
    given: dict[str, Any] = {"stages": cell.plan.icm_stages, "steps": 2 * cell.plan.icm, "rate": 1e-3, "seed": seed}
    for name, more in (
        ("ICM-LoRA's network", {"channels": cell.plan.icm_channels}),
        ("ICM-LoRA's network, small", {"channels": 1, "latent": 32}),
    ):
        pack = pack_network(school, **given, **more)
        yield name, _rebuilt(cell, pack), pack.nbytes
        same = pack_components(school, size=pack.nbytes)
        yield f"components, bytes of {name}", _rebuilt(cell, same), same.nbytes
    for bits in (16, 8, 4):
        least = pack_components(school, size=int(SHARE * whole), bits=bits)
        yield f"components of {bits} bits in {SHARE:.0%}", _rebuilt(cell, least), least.nbytes


def _rebuilt(cell: Cell, pack: Pack) -> Tensor:
    return torch.stack([cell.layout.flatten(pack.rebuild(name).adapter) for name in cell.school.names])


def _score(cell: Cell, vectors: Tensor) -> float:
    return float(cell.tested_at_home(vectors).mean())

"""Random signs that never change: the probes of the weight sketches.

The signs come from SHAKE-256, not from a library's generator, because sketches are stored in a database and must mean
the same under every version of every library, on every machine and in every process.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import shake_256

import numpy as np
import torch
from torch import Tensor

BLOCK = 4096  # rows made at once (4 MiB at 256 columns): a vocabulary of 250,000 needs no more memory than a layer


def project(rows: Tensor, label: str, dim: int) -> Tensor:
    """rows (r, n) -> (r, dim): times the first n rows of an endless matrix of independent signs named `label`."""
    return project_all(rows, ((label, dim),))[0]


def project_all(rows: Tensor, probes: tuple[tuple[str, int], ...]) -> tuple[Tensor, ...]:
    """rows (r, n) -> (r, dim) for each of the probes (label, dim), as `project` has it, in one product."""
    widths = [dim for _, dim in probes]
    total = rows.new_zeros(rows.shape[0], sum(widths))
    for start in range(0, rows.shape[1], BLOCK):
        part = rows[:, start : start + BLOCK]
        total.addmm_(part, _blocks(probes, start // BLOCK)[: part.shape[1]])
    return total.split_with_sizes(widths, dim=1)


@lru_cache(maxsize=256)
def agreement(count: int, left: str, right: str, dim: int) -> Tensor:
    """(dim,): for every column, the sum over the first `count` rows of the product of two sign matrices."""
    total = torch.zeros(dim)
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        index = start // BLOCK
        total += (_block(left, index, dim)[:size] * _block(right, index, dim)[:size]).sum(dim=0)
    return total


@lru_cache(maxsize=4096)
def signs(label: str, dim: int) -> Tensor:
    """(dim,) signs that depend on `label` alone."""
    return _unpacked(label, dim)


@lru_cache(maxsize=16)
def _blocks(probes: tuple[tuple[str, int], ...], index: int) -> Tensor:
    return torch.cat([_block(label, index, dim) for label, dim in probes], dim=1)


@lru_cache(maxsize=16)
def _block(label: str, index: int, dim: int) -> Tensor:
    return _unpacked(f"{label}/{index}", BLOCK * dim).reshape(BLOCK, dim)


def _unpacked(label: str, count: int) -> Tensor:
    data = np.frombuffer(shake_256(label.encode()).digest((count + 7) // 8), np.uint8)
    return torch.from_numpy(np.unpackbits(data, count=count)).to(torch.float32) * 2 - 1

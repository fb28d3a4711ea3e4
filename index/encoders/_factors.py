"""The deltas of many modules at once, in the one form that does not depend on how they were factorised.

Modules of one shape are stacked, so that an adapter takes a few batched products however many layers it has. The dense
delta is never formed: the r x r Gram matrices of both factors say all that is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...hub.adapter import Adapter
from ..modules import Manifest, Place

NOTHING = 1e-6  # a singular value below this share of the module's largest is rounding of float32 factors


@dataclass(frozen=True, eq=False)
class Canonical:
    """The thin singular value decompositions of deltas of one shape, float32.

    rows: the modules' indices in the manifest. left (modules, outputs, k), values (modules, k) descending, right
    (modules, inputs, k). A module that is absent, and a direction beyond a delta's rank, is zero throughout. The signs
    of pairs of vectors are as they come; see `signed`.
    """

    rows: tuple[int, ...]
    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def norms(self) -> Tensor:
        """Frobenius norms (modules,)."""
        found: Tensor = self.values.norm(dim=1)
        return found

    def signed(self) -> Canonical:
        """With the largest entry of every left vector positive."""
        peaks = self.left.gather(1, self.left.abs().argmax(dim=1, keepdim=True))
        signs = torch.where(peaks < 0, -1.0, 1.0)
        return replace(self, left=self.left * signs, right=self.right * signs)


def canonical(adapter: Adapter, manifest: Manifest) -> list[Canonical]:
    """One for each shape that the manifest's modules have. Raises IncompatibleAdapters as `Manifest.check` does."""
    manifest.check(adapter)
    found = []
    for rows in manifest.shapes:
        up, down = _stacked(adapter, [manifest.places[row] for row in rows])
        found.append(Canonical(rows, *decomposed(up, down)))
    return found


def decomposed(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """up (m, outputs, r), down (m, r, inputs), float32: left, values and right of their products.

    From the Gram matrices: with down down^T = R R^T, the squared singular values are the eigenvalues of
    R^T (up^T up) R. In float64, which leaves half of its digits to the singular values: as many as the factors have.
    """
    rank = min(up.shape[1], up.shape[2], down.shape[2])
    wide_up, wide_down = up.double(), down.double()
    gram_up = wide_up.mT @ wide_up
    root = _root(wide_down @ wide_down.mT)
    squares, turn = torch.linalg.eigh(root.mT @ gram_up @ root)
    values = squares.flip(1)[:, :rank].clamp_min(0).sqrt()
    turn = root @ turn.flip(2)[:, :, :rank]
    kept = values > NOTHING * values[:, :1]
    inverse = torch.where(kept, 1 / values, 0.0)[:, None]
    left = up @ (turn * inverse).float()
    right = down.mT @ (gram_up @ (turn * inverse.square())).float()
    return left, (values * kept).float(), right


def _root(gram: Tensor) -> Tensor:
    """R with R R^T = gram, for positive semidefinite matrices (m, r, r)."""
    root: Tensor
    root, failures = torch.linalg.cholesky_ex(gram)
    if bool(failures.any()):
        energy, axes = torch.linalg.eigh(gram)
        root = axes * energy.clamp_min(0).sqrt()[:, None]
    return root


def _stacked(adapter: Adapter, places: Sequence[Place]) -> tuple[Tensor, Tensor]:
    """The factors of modules of one shape in float32, scale in `up`, ranks filled up with zeros."""
    shapes = adapter.shapes
    rank = max([shapes[place.name].rank for place in places if place.name in shapes], default=1) or 1
    up = torch.zeros(len(places), places[0].outputs, rank)
    down = torch.zeros(len(places), rank, places[0].inputs)
    for index, place in enumerate(places):
        if place.name in shapes:
            module = adapter.modules[place.name]
            up[index, :, : module.rank] = module.up * module.scale if module.scale != 1 else module.up
            down[index, : module.rank] = module.down
    return up, down


def joined(parts: Sequence[Tensor], deltas: Sequence[Canonical]) -> Tensor:
    """Tensors (modules of a shape, ...), one for each of `deltas`, as one (places, ...) in the manifest's order."""
    order = torch.tensor([row for each in deltas for row in each.rows])
    whole = torch.cat(list(parts))
    return torch.empty_like(whole).index_copy_(0, order, whole)


def by_group(deltas: Sequence[Canonical], manifest: Manifest) -> list[Canonical]:
    """The same decompositions, one for each of the manifest's groups."""
    where = {row: (each, index) for each in deltas for index, row in enumerate(each.rows)}
    found = []
    for group in manifest.groups:
        each = where[group.rows[0]][0]
        at = torch.tensor([where[row][1] for row in group.rows])
        found.append(Canonical(group.rows, each.left[at], each.values[at], each.right[at]))
    return found

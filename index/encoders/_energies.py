"""Even readings of a delta: how much it writes along fixed directions, whatever the sign or mixture of what it reads.

For adapters trained from independent random `down`, what `up @ down` answers to a probe is a mixture of the columns of
`up` with random signs and weights; only the space that they span, and how strongly, is shared between adapters of one
task. So these readings are quadratic in the columns: for |delta^T| = U S U^T they sketch U S U^T itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...hub.adapter import Adapter
from ...hub.errors import BadOption
from ..modules import Manifest
from ._factors import Canonical, canonical, joined
from ._probes import agreement, project_all
from ._tokens import Features, log_norms

_LEAST = 1e-30


@dataclass(frozen=True)
class Sizes:
    """How many numbers are read of each module: `left_energies`, `right_energies`, `responses`."""

    left: int
    right: int
    both: int

    def __post_init__(self) -> None:
        if min(self) < 0 or not sum(self):
            raise BadOption(f"sketches are of {tuple(self)} numbers; expected none below 0 and one above")

    def __iter__(self) -> Iterator[int]:
        return iter((self.left, self.right, self.both))


def sketches(adapter: Adapter, manifest: Manifest, sizes: Sizes) -> Features:
    """The fixed readings of every module: "sketches" (places, sum of the sizes), "norms" and "present" (places,).

    Every sketch is of unit length in expectation, and zero where a module is absent. Raises IncompatibleAdapters as
    `Manifest.check` does.
    """
    deltas = canonical(adapter, manifest)
    logs, present = log_norms(joined([each.norms for each in deltas], deltas))
    return {"sketches": joined([_read(each, sizes) for each in deltas], deltas), "norms": logs, "present": present}


def left_energies(deltas: Canonical, dim: int) -> Tensor:
    """(modules, dim): sketches of U S U^T less its trace's share, each of unit length in expectation.

    The inner product of two is the cosine of the two matrices without their isotropic part: 0 in expectation for
    independent column spaces, 1 for equal ones with equal spectra. Zero for an absent module, and for a delta that
    writes to all directions alike.
    """
    return _read(deltas, Sizes(dim, 0, 0))


def responses(deltas: Canonical, dim: int) -> Tensor:
    """(modules, dim): p_k^T delta q_k over the delta's norm, for fixed signs p and q: odd, and linear in the delta."""
    return _read(deltas, Sizes(0, 0, dim))


def _read(deltas: Canonical, sizes: Sizes) -> Tensor:
    """(modules, sum of sizes): energies of the left vectors, of the right ones, and responses, side by side."""
    shares = deltas.values / deltas.norms.clamp_min(_LEAST)[:, None]
    left = _projected(deltas.left, ("left", sizes.left), ("right", sizes.left), ("outputs", sizes.both))
    right = _projected(deltas.right, ("left", sizes.right), ("right", sizes.right), ("inputs", sizes.both))
    parts = []
    if sizes.left:
        parts.append(_energies(left[0], left[1], shares, deltas.left.shape[1]))
    if sizes.right:
        parts.append(_energies(right[0], right[1], shares, deltas.right.shape[1]))
    if sizes.both:
        parts.append(_weighted(left[2], right[2], shares) / sizes.both**0.5)
    return torch.cat(parts, dim=1)


def _energies(one: Tensor, other: Tensor, shares: Tensor, size: int) -> Tensor:
    """(modules, dim) from two projections (modules, k, dim) of vectors of `size` numbers."""
    dim = one.shape[2]
    level = shares.sum(dim=1, keepdim=True) / size
    sketch = _weighted(one, other, shares) - level * agreement(size, "left", "right", dim)
    spread = shares.square().sum(dim=1, keepdim=True) - size * level.square()
    # a flat, full spectrum has no spread but rounding; it says nothing
    weight = torch.where(spread > 1e-5, spread.clamp_min(1e-5).rsqrt(), 0.0)
    sketched: Tensor = sketch * weight / dim**0.5
    return sketched


def _weighted(one: Tensor, other: Tensor, shares: Tensor) -> Tensor:
    """(modules, dim): the sum over k of shares (modules, k) times products of projections (modules, k, dim)."""
    found: Tensor = torch.einsum("mk,mkd->md", shares, one * other)
    return found


def _projected(vectors: Tensor, *probes: tuple[str, int]) -> list[Tensor]:
    """(modules, n, k) -> (modules, k, dim) for each of the probes (label, dim)."""
    modules, size, rank = vectors.shape
    rows = vectors.mT.reshape(modules * rank, size)
    return [part.reshape(modules, rank, part.shape[1]) for part in project_all(rows, probes)]

"""What an adapter writes, how strongly, and along how many directions: no training, and no word of what it reads."""

from __future__ import annotations

import torch
from torch import Tensor

from ...hub.adapter import Adapter
from ..modules import Manifest
from ._energies import left_energies
from ._factors import canonical
from .delta import module_signs

SPECTRUM = 16  # singular values of a module that are looked at
TAIL = 0.25  # length of the spectrum's part, where the columns' part has 1


def spectral(adapter: Adapter, *, dim: int = 512) -> Tensor:
    """(dim + 16,) float32: a sketch of the canonical column spaces, weighted by singular values, and the mean spectrum.

    The first `dim` numbers sketch U S U^T of every module's delta U S V^T, less what all directions share, each at unit
    length and of equal weight: their inner product is the mean over modules of the matrices' cosines (a module that one
    side lacks counts as zero). Unlike `columns`, a direction counts by its singular value, so noise in weak ones does
    not. The last 16 are the mean over modules of the singular values' shares, at a quarter of the length. Blind to
    factorisation and scale.
    """
    signature, spectrum, count = torch.zeros(dim), torch.zeros(SPECTRUM), 0
    if adapter.shapes:
        manifest = Manifest.of([adapter])
        for deltas in canonical(adapter, manifest):
            names = [manifest.places[row].name for row in deltas.rows]
            signs = torch.stack([module_signs(name, adapter.shapes[name], dim) for name in names])
            signature += (signs * left_energies(deltas, dim)).sum(dim=0)
            norms = deltas.norms
            shares = (deltas.values / norms.clamp_min(1e-30)[:, None]).sum(dim=0)[:SPECTRUM]
            spectrum[: len(shares)] += shares
            count += int((norms > 0).sum())
    size = max(count, 1)
    return torch.cat([signature / size**0.5, TAIL * spectrum / size])

"""What an adapter answers to fixed random inputs: the encoder of AutoLoRA with nothing learned."""

from __future__ import annotations

import torch
from torch import Tensor

from ...hub.adapter import Adapter
from ..modules import Manifest
from ._energies import responses
from ._factors import canonical
from .delta import module_signs


def probe(adapter: Adapter, *, dim: int = 512) -> Tensor:
    """(dim,) float32: number k sums p_k^T delta q_k / ||delta|| over the modules, for fixed inputs q and outputs p.

    As `delta`, but every module counts alike however large its delta is, so that long training does not drown the rest.
    Inner products are means over modules of the deltas' cosines, in expectation: near 0 for adapters that were trained
    apart from independent `down`, whatever they learned. Linear in each delta's direction: blind to factorisation and
    to positive scale.
    """
    total, count = torch.zeros(dim), 0
    if adapter.shapes:
        manifest = Manifest.of([adapter])
        for deltas in canonical(adapter, manifest):
            names = [manifest.places[row].name for row in deltas.rows]
            signs = torch.stack([module_signs(name, adapter.shapes[name], dim) for name in names])
            total += (signs * responses(deltas, dim)).sum(dim=0)
            count += int((deltas.norms > 0).sum())
    answers: Tensor = total / max(count, 1) ** 0.5
    return answers

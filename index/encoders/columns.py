"""Where an adapter writes to: a sketch of the column spaces of its deltas.

Adapters trained apart on one task have deltas that are nearly orthogonal, because the random start of `down` decides
what each reads. What they write is decided by the task's gradients, so their column spaces overlap. (`up` starts at
zero and is moved by gradient @ down^T: its columns lie where the gradient's columns lie.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...hub.adapter import Adapter
from ...hub.lowrank import LowRank
from ._probes import agreement, project
from .delta import module_signs


def columns(adapter: Adapter, *, dim: int = 512) -> Tensor:
    """(dim,) float32: a sketch of M = U U^T - (r / n) I over the modules, each M at unit length and of equal weight.

    U (n, r) is an orthonormal basis of a delta's column space; r / n is the level that any subspace of dimension r has,
    so <M_a, M_b> is ||U_a^T U_b||^2 less its chance level r_a r_b / n. E<columns(a), columns(b)> is the sum over shared
    modules of cos(M_a, M_b). Blind to factorisation, to scale and to which inputs are read. A column space that is
    everything (r = n) or nothing says nothing, and its module counts as zero.
    """
    total: Tensor = torch.zeros(dim)
    for name, module in adapter.modules.items():
        basis = column_basis(module)
        size, rank = basis.shape
        if 0 < rank < size:
            left, right = project(basis.T, "left", dim), project(basis.T, "right", dim)
            level = rank / size
            sketch = (left * right).sum(dim=0) - level * agreement(size, "left", "right", dim)
            total += module_signs(name, module.shape, dim) * sketch / math.sqrt(rank * (1 - level))
    return total / math.sqrt(dim)


def column_basis(module: LowRank) -> Tensor:
    """(outputs, r) orthonormal basis of the delta's column space; r is its numerical rank, 0 for a zero delta."""
    left, values, _ = module.svd()
    if not len(values):
        return left.float()
    floor = torch.finfo(values.dtype).eps * max(module.shape.outputs, module.shape.inputs) * values[0]
    return left[:, values > floor].float()

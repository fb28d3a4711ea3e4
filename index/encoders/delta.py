"""The whole delta as a few numbers: a linear sketch whose inner products are those of the deltas, in expectation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...hub.adapter import Adapter
from ...hub.lowrank import Shape
from ._probes import project, signs


def delta(adapter: Adapter, *, dim: int = 256) -> Tensor:
    """(dim,) float32: number k is the sum over modules of sign * p_k^T (scale * up @ down) q_k / sqrt(dim).

    p and q are fixed signs for each row and column, `sign` is one for each module (name and shape) and k, so that
    E<delta(a), delta(b)> = sum over modules of <delta_a, delta_b>; the estimate of a cosine errs by about
    1 / sqrt(dim). It is linear in the delta: blind to how it is factorised, true to scale. A module that one side lacks
    counts as zero.
    """
    total: Tensor = torch.zeros(dim)
    for name, module in adapter.modules.items():
        wide = module.wide()
        left = project(wide.up.T.float(), "outputs", dim)
        right = project(wide.down.float(), "inputs", dim)
        total += module_signs(name, module.shape, dim) * (left * right).sum(dim=0) * module.scale
    return total / math.sqrt(dim)


def module_signs(name: str, shape: Shape, dim: int) -> Tensor:
    """(dim,) signs that tell one module from another, so that the sketches of different modules are uncorrelated."""
    return signs(f"{name} {shape.outputs}x{shape.inputs}", dim)

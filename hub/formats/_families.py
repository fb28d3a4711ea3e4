"""From a module's tensors to a LowRank: plain LoRA, convolutions with a middle factor, LoHa and LoKr, all exactly.

LoHa (Hadamard product of two LoRAs) is a LoRA of rank r^2: row-wise Khatri-Rao of the left factors, column-wise of the
right ones. LoKr (Kronecker product) is one too: kron(A1 B1, A2 B2) = kron(A1, A2) kron(B1, B2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

    from ..lowrank import LowRank

Dims = tuple[int, ...]


class Form(NamedTuple):
    """What the header tells of a module: the shape of its delta and the rank that alpha is divided by."""

    rank: int
    outputs: int
    inputs: int
    kernel: Dims
    embedding: bool
    divisor: int  # the trainer's rank: scale = alpha / divisor
    fixed_scale: bool = False  # LoKr with two dense factors: alpha does not apply


@dataclass(frozen=True)
class Family:
    """A way to store a delta: the roles it needs, its header reading and its factors (before scale)."""

    name: str
    needs: frozenset[str]
    form: Callable[[Mapping[str, Dims]], Form]
    factors: Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]]


def family_of(module: str, roles: Mapping[str, Dims], where: str) -> Family | None:
    """The family of a module, None if it holds nothing of one. Raises FormatError for half a pair."""
    present = set(roles)
    for family in FAMILIES:
        if family.needs <= present and _complete(family, present):
            return family
    parts = present & _ALL_ROLES
    if parts:
        raise FormatError(
            f"{where}: {module} has {', '.join(sorted(parts))} without the matching other factor: damaged"
        )
    return None


def _complete(family: Family, present: set[str]) -> bool:
    if family.name != "lokr":
        return True
    return all(f"lokr_{w}" in present or {f"lokr_{w}_a", f"lokr_{w}_b"} <= present for w in ("w1", "w2"))


def build(family: Family, tensors: Mapping[str, Tensor], form: Form, scale: float) -> LowRank:
    """Read factors as a LowRank of the shape that the header promised."""
    from ..lowrank import LowRank

    up, down = family.factors(tensors)
    return LowRank(down=down, up=up, scale=scale, kernel=form.kernel, embedding=form.embedding)


# --- LoRA ---------------------------------------------------------------------------------------------------------


def _lora_form(dims: Mapping[str, Dims]) -> Form:
    down, up = dims["down"], dims["up"]
    _agree(len(down) >= 2 and len(up) >= 2 and down[0] == up[1], up, down)
    kernel = dims["mid"][2:] if "mid" in dims else down[2:]
    return Form(down[0], up[0], down[1] * _size(kernel), kernel, False, down[0])


def _lora_factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    import torch

    up, down = tensors["up"], tensors["down"]
    if "mid" in tensors:  # Tucker: fold the kernel's core into the down factor, at the same rank
        down = torch.einsum("ijkl,jc->ickl", tensors["mid"].float(), down.flatten(1).float())
    return up.flatten(1), down.flatten(1)


def _transposed_form(dims: Mapping[str, Dims]) -> Form:
    down, up = dims["down_t"], dims["up_t"]
    _agree(len(down) == len(up) == 2 and down[1] == up[0], up, down)
    return Form(down[1], up[1], down[0], (), False, down[1])


def _transposed_factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return tensors["up_t"].T, tensors["down_t"].T


def _embedding_form(dims: Mapping[str, Dims]) -> Form:
    down, up = dims["embedding_down"], dims["embedding_up"]
    _agree(len(down) == len(up) == 2 and down[0] == up[1], up, down)
    return Form(down[0], up[0], down[1], (), True, down[0])


def _embedding_factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    # as a map from the one-hot token to its vector the delta is B A: no transposition is needed
    return tensors["embedding_up"], tensors["embedding_down"]


# --- LoHa ---------------------------------------------------------------------------------------------------------


def _loha_form(dims: Mapping[str, Dims]) -> Form:
    w1_a, w1_b = dims["hada_w1_a"], dims["hada_w1_b"]
    w2_a, w2_b = dims["hada_w2_a"], dims["hada_w2_b"]
    if "hada_t1" in dims:
        kernel = dims["hada_t1"][2:]
        _agree(w1_a[1] == w2_a[1] and w1_b[1] == w2_b[1], w1_a, w1_b)
        return Form(w1_a[0] * w2_a[0], w1_a[1], w1_b[1] * _size(kernel), kernel, False, w1_b[0])
    _agree(w1_a[0] == w2_a[0] and w1_b[1:] == w2_b[1:] and w1_a[1] == w1_b[0] and w2_a[1] == w2_b[0], w1_a, w1_b)
    return Form(w1_a[1] * w2_a[1], w1_a[0], _size(w1_b[1:]), w1_b[2:], False, w1_b[0])


def _loha_factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    (up1, down1), (up2, down2) = (
        _tucker(tensors.get(f"hada_t{n}"), tensors[f"hada_w{n}_a"], tensors[f"hada_w{n}_b"]) for n in (1, 2)
    )
    up = (up1[:, :, None] * up2[:, None, :]).flatten(1)
    down = (down1[:, None, :] * down2[None, :, :]).flatten(0, 1)
    return up, down


def _tucker(core: Tensor | None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Left and right factor of a (possibly Tucker) product; with a core, `a` is stored (rank, outputs)."""
    import torch

    if core is None:
        return a.float(), b.flatten(1).float()
    return a.float().T, torch.einsum("ijkl,jr->irkl", core.float(), b.float()).flatten(1)


# --- LoKr ---------------------------------------------------------------------------------------------------------


class _Factor(NamedTuple):
    """One side of the Kronecker product: its shape, the rank of its cheapest factorisation, the trainer's rank."""

    outputs: int
    inputs: int
    kernel: Dims
    rank: int
    trained_rank: int  # 0 where it is stored dense


def _lokr_factor(which: str, dims: Mapping[str, Dims]) -> _Factor:
    dense = dims.get(f"lokr_{which}")
    if dense is not None:
        outputs, inputs = dense[0], _size(dense[1:])
        return _Factor(outputs, inputs, dense[2:], min(outputs, inputs), 0)
    a, b = dims[f"lokr_{which}_a"], dims[f"lokr_{which}_b"]
    core = dims.get("lokr_t2") if which == "w2" else None
    if core is not None:
        return _Factor(a[1], b[1] * _size(core[2:]), core[2:], a[0], b[0])
    _agree(a[1] == b[0], a, b)
    outputs, inputs = a[0], _size(b[1:])
    return _Factor(outputs, inputs, b[2:], min(a[1], outputs, inputs), b[0])


def _lokr_form(dims: Mapping[str, Dims]) -> Form:
    first, second = _lokr_factor("w1", dims), _lokr_factor("w2", dims)
    trained = second.trained_rank or first.trained_rank
    return Form(
        rank=first.rank * second.rank,
        outputs=first.outputs * second.outputs,
        inputs=first.inputs * second.inputs,
        kernel=second.kernel,
        embedding=False,
        divisor=trained or 1,
        fixed_scale=not trained,
    )


def _lokr_factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    import torch

    sides = []
    for which in ("w1", "w2"):
        dense = tensors.get(f"lokr_{which}")
        if dense is not None:
            sides.append(_cheapest(dense.flatten(1).float()))
            continue
        core = tensors.get("lokr_t2") if which == "w2" else None
        up, down = _tucker(core, tensors[f"lokr_{which}_a"], tensors[f"lokr_{which}_b"])
        sides.append((up, down) if up.shape[1] <= min(up.shape[0], down.shape[1]) else _cheapest(up @ down))
    (up1, down1), (up2, down2) = sides
    return torch.kron(up1.contiguous(), up2.contiguous()), torch.kron(down1.contiguous(), down2.contiguous())


def _cheapest(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as up @ down with an identity on its shorter side."""
    import torch

    rows, columns = matrix.shape
    if columns <= rows:
        return matrix, torch.eye(columns, dtype=matrix.dtype)
    return torch.eye(rows, dtype=matrix.dtype), matrix


def _size(dims: Dims) -> int:
    total = 1
    for dim in dims:
        total *= dim
    return total


def _agree(condition: bool, up: Dims, down: Dims) -> None:
    if not condition:
        raise FormatError(f"factors of shapes {list(up)} and {list(down)} do not multiply")


FAMILIES = (
    Family("lora", frozenset({"down", "up"}), _lora_form, _lora_factors),
    Family("lora", frozenset({"down_t", "up_t"}), _transposed_form, _transposed_factors),
    Family("lora", frozenset({"embedding_down", "embedding_up"}), _embedding_form, _embedding_factors),
    Family("loha", frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}), _loha_form, _loha_factors),
    Family("lokr", frozenset(), _lokr_form, _lokr_factors),
)
_ALL_ROLES = frozenset(
    """down up mid down_t up_t embedding_down embedding_up hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1
    hada_t2 lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2""".split()
)

"""From a module's tensors to a LowRank: plain LoRA, convolutions with a middle factor, LoHa and LoKr, all exactly.

LoHa (Hadamard product of two LoRAs) is a LoRA of rank r^2: row-wise Khatri-Rao of the left factors, column-wise of the
right ones. LoKr (Kronecker product) is one too: kron(A1 B1, A2 B2) = kron(A1, A2) kron(B1, B2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..errors import FormatError
from ..tensorfile import FLOATING, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from ..lowrank import LowRank

Dims = tuple[int, ...]
SIDE_ROLES = {"alpha", "ranknum"}  # belong to a module without being kept on their own
_SIZE_LIMIT = 2**31  # numbers in a module's factors, which LoHa and LoKr can pretend to have in a small file


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


def family_of(module: str, roles: Collection[str], where: str) -> Family | None:
    """The family of a module, None if it holds nothing of one. Raises FormatError for half a pair."""
    present = set(roles)
    for family in FAMILIES:
        if family.needs <= present and _complete(family, present):
            return family
    parts = present & FACTOR_ROLES
    if parts:
        raise FormatError(
            f"{where}: {module} has {', '.join(sorted(parts))} without the matching other factor: damaged"
        )
    return None


def _complete(family: Family, present: set[str]) -> bool:
    if family.name != "lokr":
        return True
    return all(f"lokr_{w}" in present or {f"lokr_{w}_a", f"lokr_{w}_b"} <= present for w in ("w1", "w2"))


def checked_form(family: Family, infos: Mapping[str, TensorInfo]) -> Form:
    """The form of a module from its tensors' header entries.

    Raises FormatError for what no training writes: shapes that do not multiply, empty, whole-numbered or absurdly large
    factors, an alpha of several numbers.
    """
    for role, info in infos.items():
        if 0 in info.shape:
            raise FormatError(f"{role} is empty {list(info.shape)}")
        if role in SIDE_ROLES:
            if math.prod(info.shape) != 1:
                raise FormatError(f"{role} has shape {list(info.shape)}, expected one number")
        elif info.dtype not in FLOATING:
            raise FormatError(f"{role} is of {info.dtype}, expected floating-point numbers")
    form = family.form({role: info.shape for role, info in infos.items()})
    size = form.rank * (form.outputs + form.inputs)
    if size > _SIZE_LIMIT:
        raise FormatError(
            f"rank {form.rank} at {form.outputs}x{form.inputs} takes {size:.1e} numbers, no model has so many"
        )
    return form


def build(family: Family, tensors: Mapping[str, Tensor], form: Form, scale: float) -> LowRank:
    """Read factors as a LowRank of the shape that the header promised."""
    from ..lowrank import LowRank

    up, down = family.factors(tensors)
    return LowRank(down=down, up=up, scale=scale, kernel=form.kernel, embedding=form.embedding)


# --- LoRA ---------------------------------------------------------------------------------------------------------


def _lora_form(dims: Mapping[str, Dims]) -> Form:
    down, up, core = dims["down"], dims["up"], dims.get("mid")
    _agree(len(down) >= 2 and len(up) >= 2 and math.prod(up[2:]) == 1, up, down)
    if core is None:
        _agree(down[0] == up[1], up, down)
        return Form(down[0], up[0], math.prod(down[1:]), down[2:], False, down[0])
    _agree(len(core) >= 3 and core[:2] == (up[1], down[0]) and math.prod(down[2:]) == 1, core, down)
    return Form(up[1], up[0], down[1] * math.prod(core[2:]), core[2:], False, down[0])


def _lora_factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    up, down = tensors["up"].flatten(1), tensors["down"].flatten(1)
    if "mid" in tensors:  # Tucker: fold the kernel's core into the down factor, at the same rank
        down = _folded(tensors["mid"], down)
    return up, down


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
    first, second = (_product(dims[f"hada_w{n}_a"], dims[f"hada_w{n}_b"], dims.get(f"hada_t{n}")) for n in (1, 2))
    same = (first.outputs, first.inputs, first.kernel) == (second.outputs, second.inputs, second.kernel)
    _agree(same, dims["hada_w1_a"], dims["hada_w2_b"])
    rank = min(first.rank * second.rank, first.outputs, first.inputs)
    return Form(rank, first.outputs, first.inputs, first.kernel, False, first.trained_rank)


def _loha_factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    (up1, down1), (up2, down2) = (
        _tucker(tensors.get(f"hada_t{n}"), tensors[f"hada_w{n}_a"], tensors[f"hada_w{n}_b"]) for n in (1, 2)
    )
    if up1.shape[1] * up2.shape[1] > min(up1.shape[0], down1.shape[1]):
        return _cheapest((up1 @ down1) * (up2 @ down2))
    up = (up1[:, :, None] * up2[:, None, :]).flatten(1)
    down = (down1[:, None, :] * down2[None, :, :]).flatten(0, 1)
    return up, down


def _tucker(core: Tensor | None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Left and right factor of a (possibly Tucker) product; with a core, `a` is stored (rank, outputs)."""
    if core is None:
        return a.float(), b.flatten(1).float()
    return a.float().T, _folded(core, b)


def _folded(core: Tensor, down: Tensor) -> Tensor:
    """A core (rank, rank', *kernel) and a factor (rank', channels) as one factor (rank, channels x kernel)."""
    import torch

    return torch.einsum("ijk,jc->ick", core.flatten(2).float(), down.float()).flatten(1)


class _Product(NamedTuple):
    """The header's reading of `a @ b`: shape, rank of the product, and the rank that the trainer's alpha is for."""

    outputs: int
    inputs: int
    kernel: Dims
    rank: int
    trained_rank: int  # 0 where a factor is stored dense


def _product(a: Dims, b: Dims, core: Dims | None) -> _Product:
    if core is None:
        _agree(len(a) == 2 and len(b) >= 2 and a[1] == b[0], a, b)
        return _Product(a[0], math.prod(b[1:]), b[2:], a[1], b[0])
    _agree(len(a) == len(b) == 2 and len(core) >= 3 and core[:2] == (a[0], b[0]), core, b)
    return _Product(a[1], b[1] * math.prod(core[2:]), core[2:], a[0], b[0])


# --- LoKr ---------------------------------------------------------------------------------------------------------


def _lokr_factor(which: str, dims: Mapping[str, Dims]) -> _Product:
    dense = dims.get(f"lokr_{which}")
    if dense is not None:
        _agree(len(dense) >= 2 and (which == "w2" or math.prod(dense[2:]) == 1), dense, dense)
        outputs, inputs = dense[0], math.prod(dense[1:])
        return _Product(outputs, inputs, dense[2:], min(outputs, inputs), 0)
    core = dims.get("lokr_t2") if which == "w2" else None
    found = _product(dims[f"lokr_{which}_a"], dims[f"lokr_{which}_b"], core)
    return found._replace(rank=min(found.rank, found.outputs, found.inputs))


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
    return _kron(up1, up2), _kron(down1, down2)


def _kron(left: Tensor, right: Tensor) -> Tensor:
    """The Kronecker product of two matrices; torch.kron fails on transposed matrices of one column."""
    product = left[:, None, :, None] * right[None, :, None, :]
    return product.reshape(left.shape[0] * right.shape[0], -1)


def _cheapest(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as up @ down with an identity on its shorter side."""
    import torch

    rows, columns = matrix.shape
    if columns <= rows:
        return matrix, torch.eye(columns, dtype=matrix.dtype)
    return torch.eye(rows, dtype=matrix.dtype), matrix


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
FACTOR_ROLES = frozenset(
    """down up mid down_t up_t embedding_down embedding_up hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1
    hada_t2 lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2""".split()
)

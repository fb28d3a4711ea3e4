"""Where an elementwise rule acts: on deltas, on coordinates in the common core, or on factors.

`delta`: the entries of the deltas themselves, as TIES and DARE are published. They are formed column block by column
block, never as a whole, and what comes out is of full rank: the result is its best approximation of the asked-for rank
(randomised subspace iteration over the same blocks). Time grows with outputs x inputs x adapters.

`core` (Core Space, Panariello et al. 2025): coordinates U^T delta_t V in orthonormal bases U of all column spaces and V
of all row spaces, small matrices that lose nothing. Time grows with (outputs + inputs) x rank^2.

`factors`: up and down each for itself, as PEFT does. It depends on how a delta happens to be factored, and sums in it
hold cross terms between adapters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..hub.lowrank import LowRank, Shape
from .rules import Elementwise, check_choice, kept_of

SPACES = ("delta", "core", "factors")
GAUGES = ("svd", "stored")
BLOCK = 2**22  # entries of all adapters' deltas that are formed at once
OVERSAMPLE, ROUNDS = 16, 3  # of the subspace iteration

Columns = Callable[[], Iterable[Tensor]]


def united(
    parts: Sequence[LowRank],
    rule: Elementwise,
    space: str,
    *,
    gauge: str = "svd",
    rank: int | None = None,
    seed: int = 0,
) -> LowRank:
    """Merge deltas by an elementwise rule in one of SPACES; the rank is that of `foretold`.

    gauge: "stored" takes factors as they are, "svd" first brings every delta into the canonical gauge, so that the
    outcome no longer depends on its factorisation; `delta` needs neither. seed: for a rule that draws.
    """
    wide = [part.wide() for part in parts]
    chances = chances_of(parts, seed)
    size = foretold([part.shape for part in parts], space, rank, gauge)
    if space == "delta":
        up, down = _in_delta(wide, rule, chances, size)
        return replace(parts[0], up=up, down=down, scale=1.0)
    folded = [part.truncate() if gauge == "svd" else part.folded() for part in wide]
    merged = _in_core(folded, rule, chances()) if space == "core" else _in_factors(folded, rule, chances())
    return merged.truncate(size) if space == "core" or size < merged.rank else merged


def foretold(shapes: Sequence[Shape], space: str, rank: int | None, gauge: str = "svd") -> int:
    """The rank of what `united` returns."""
    room = min(shapes[0].outputs, shapes[0].inputs)
    if space == "factors":
        own = max(min(shape.rank, room) if gauge == "svd" else shape.rank for shape in shapes)
        return own if rank is None or rank >= own else min(rank, room)
    own = min(sum(shape.rank for shape in shapes), room)
    return own if rank is None else min(rank, own)


def check_space(space: str, gauge: str) -> None:
    """Raise BadOption for a space or gauge that does not exist."""
    check_choice("space", space, SPACES)
    check_choice("gauge", gauge, GAUGES)


def core_bases(parts: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of all column spaces (outputs, p) and all row spaces (inputs, q): left singular vectors of the
    stacked factors, so that they do not depend on the order of the adapters."""
    left = torch.linalg.svd(torch.cat([part.up for part in parts], dim=1), full_matrices=False).U
    right = torch.linalg.svd(torch.cat([part.down.T for part in parts], dim=1), full_matrices=False).U
    return left, right


def _in_core(parts: Sequence[LowRank], rule: Elementwise, chances: Sequence[torch.Generator]) -> LowRank:
    left, right = core_bases(parts)
    cores = torch.stack([(left.T @ part.up) @ (part.down @ right) for part in parts])
    return replace(parts[0], up=left, down=rule(cores, chances) @ right.T, scale=1.0)


def _in_factors(parts: Sequence[LowRank], rule: Elementwise, chances: Sequence[torch.Generator]) -> LowRank:
    size = max(part.rank for part in parts)
    ups = torch.stack([torch.nn.functional.pad(part.up, (0, size - part.rank)) for part in parts])
    downs = torch.stack([torch.nn.functional.pad(part.down, (0, 0, 0, size - part.rank)) for part in parts])
    return replace(parts[0], up=rule(ups, chances), down=rule(downs, chances), scale=1.0)


def chances_of(parts: Sequence[LowRank], seed: int) -> Callable[[], list[torch.Generator]]:
    """Makes fresh generators, one an adapter, seeded by what its factors hold: the order of the adapters plays no part,
    modules differ, and a delta gets the same draws as its own copy, so that their difference is still nothing."""
    seeds = []
    for part in parts:
        digest = hashlib.blake2b(seed.to_bytes(8, "little", signed=True), digest_size=8)
        for factor in (part.up, part.down):
            digest.update(factor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        seeds.append(int.from_bytes(digest.digest(), "little") >> 1)
    return lambda: [torch.Generator().manual_seed(one) for one in seeds]


# --- blocks of the delta --------------------------------------------------------------------------------------------


def _in_delta(
    parts: Sequence[LowRank], rule: Elementwise, chances: Callable[[], list[torch.Generator]], rank: int
) -> tuple[Tensor, Tensor]:
    shape = parts[0].shape
    width = max(1, BLOCK // (shape.outputs * len(parts)))

    def blocks() -> Iterator[Tensor]:
        for start in range(0, shape.inputs, width):
            yield torch.stack([part.scale * (part.up @ part.down[:, start : start + width]) for part in parts])

    limits = None
    if rule.pick == "largest" and rule.density < 1 and width < shape.inputs:
        limits = _limits_of(blocks, kept_of(shape.outputs * shape.inputs, rule.density))

    def columns() -> Iterator[Tensor]:
        drawing = chances()
        for block in blocks():
            yield rule(block, drawing, limits)

    whole = list(columns()) if width >= shape.inputs else None
    read = columns if whole is None else lambda: whole
    return factored(read, shape.outputs, shape.inputs, rank, parts[0].up.dtype)


def _limits_of(blocks: Columns, keep: int) -> Tensor:
    """The `keep`-th largest absolute value of each adapter, exactly, in two passes and without keeping the entries:
    positive floats are ordered as their bits are, so a histogram of the upper half finds the bin, one of the lower half
    the value. (T,) float32."""
    upper = _histogram(blocks, lambda bits: bits >> 16, None)
    bins, above = _place(upper, torch.full((len(upper),), keep))
    lower = _histogram(blocks, lambda bits: bits & 0xFFFF, bins)
    rest, _ = _place(lower, keep - above)
    return ((bins << 16) | rest).to(torch.int32).view(torch.float32)


def _histogram(blocks: Columns, digit: Callable[[Tensor], Tensor], bins: Tensor | None) -> Tensor:
    """Counts of a half of the bits over all entries, (T, 65536); `bins` (T,) names the upper half to look at."""
    counts: Tensor | int = 0
    for block in blocks():
        bits = block.float().abs().flatten(1).view(torch.int32)
        picked = list(bits) if bins is None else [row[row >> 16 == one] for row, one in zip(bits, bins, strict=True)]
        counts = counts + torch.stack([torch.bincount(digit(row), minlength=65536) for row in picked])
    assert isinstance(counts, Tensor)
    return counts


def _place(counts: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """The bin that holds the rank-th entry from above, and how many lie in the bins above it: (T,), (T,)."""
    from_above = counts.flip(1).cumsum(dim=1)
    found = (from_above < rank[:, None]).sum(dim=1)
    above = torch.where(found > 0, from_above.gather(1, (found - 1).clamp(min=0)[:, None]).squeeze(1), 0)
    return counts.shape[1] - 1 - found, above


def factored(
    columns: Columns, outputs: int, inputs: int, rank: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The best factors of rank `rank` of a matrix that is given as column blocks, in the balanced gauge.

    Exact where the matrix is hardly wider than the rank; else by subspace iteration (Halko et al. 2011, algorithm 4.4),
    which reads the blocks 2 x ROUNDS times and comes within a fraction of a percent of the optimal error.
    """
    width = rank + OVERSAMPLE
    if min(outputs, inputs) <= 2 * width:
        left, values, right = torch.linalg.svd(torch.cat(list(columns()), dim=1), full_matrices=False)
    else:
        basis = torch.empty(0)
        rows = torch.randn(inputs, width, generator=torch.Generator().manual_seed(0), dtype=dtype)
        for _ in range(ROUNDS):
            basis = torch.linalg.qr(_times(columns(), rows)).Q
            rows = torch.cat([block.T @ basis for block in columns()])
        left, values, right = torch.linalg.svd(rows.T, full_matrices=False)
        left = basis @ left
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, roots[:, None] * right[:rank]


def _times(blocks: Iterable[Tensor], rows: Tensor) -> Tensor:
    """The matrix of the column blocks times (inputs, k): (outputs, k)."""
    total, start = None, 0
    for block in blocks:
        product = block @ rows[start : start + block.shape[1]]
        total = product if total is None else total + product
        start += block.shape[1]
    assert total is not None
    return total

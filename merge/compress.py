"""Compressing: one adapter in fewer parameters, each module by its singular values, optimal for the limit asked for.

Two passes over lazily read modules: the singular values first, where the limit needs them, then the truncation, at the
moment when a module of the result is read. One module at a time is in memory.
"""

from __future__ import annotations

import json
import math
import struct
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import torch

from ..hub.adapter import Adapter, LazyModules
from ..hub.errors import BadOption, FormatError, IncompatibleAdapters, UnknownMethod
from ..hub.lowrank import LowRank, Shape, check_limits, rank_for
from ..hub.writing import FORMATS, formats, ready, with_pointwise
from .budget import Allocation, allocate
from .report import Report

# Deltas of more singular values are sketched, not decomposed, where only a rank is asked for: the exact way grows with
# the cube of their number (4096 x 4096 on one thread: 0.6 s for 512 of them, 4 s for 1024, 22 s for 2048; the sketch to
# rank 16 of the latter: 1.4 s). Not where more than a quarter of them are asked for: the sketch gains little then.
SKETCHED_ABOVE = 1024
_SKETCHED_SHARE = 4

_SECANT_STEPS = 8  # then the search for a file size halves
_HEADERS_DIFFER = 1024  # bytes, at most, for choices that are worth nearly the same
_CERTAINTY = 1e-6  # how likely the bound on what a sketch may have missed is false
_START, _ROUNDS = 8, 12  # random vectors and power steps of that bound

Spectra = Mapping[str, list[float]]
Ranks = Mapping[str, int]


@dataclass(frozen=True)
class Compressed:
    """A compression that is carried out as its modules are read; `report` and `sketched` are complete once all were.

    after: new ranks by module, over all of the source's; one of rank 0 is left out of `adapter`. sketched: the modules
    that were too wide for an exact decomposition, and the least relative error that any delta of their rank can have.
    missed: a bound on the squared norm that other ranks within the budget might keep more; 0: there are no better ones.
    """

    source: Adapter
    adapter: Adapter
    report: Report
    after: Ranks
    missed: float = 0.0
    sketched: dict[str, float] = field(default_factory=dict)

    @property
    def before(self) -> dict[str, int]:
        """The source's ranks."""
        return {name: shape.rank for name, shape in self.source.shapes.items()}

    @property
    def left_out(self) -> list[str]:
        """Modules of which nothing is kept."""
        return [name for name, rank in self.after.items() if not rank]

    @property
    def saves(self) -> bool:
        """Whether any module has a smaller rank than before."""
        return any(self.after[name] < rank for name, rank in self.before.items())


def compress(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    parameters: int | None = None,
    size: int | None = None,
    to: str = "peft",
    dtype: torch.dtype | None = None,
) -> Compressed:
    """The nearest adapter within one limit; what is no low-rank delta is carried along unchanged.

    rank: the largest of any module. energy: the share of its squared norm that each module keeps. parameters: of all
    factors together, spent where they keep most. size: bytes of the tensor file in the dialect `to`, spent alike.
    dtype: of the result's factors, the input's widest if None. No module's rank grows. Raises BadOption unless exactly
    one limit is given, and for one that leaves nothing; IncompatibleAdapters for an adapter without deltas.
    """
    _check(rank, energy, parameters, size)
    if not adapter.shapes:
        raise IncompatibleAdapters(f"{adapter.name}: has no low-rank modules; there is nothing to compress")
    source = _checked(adapter)
    spectra: dict[str, list[float]] = {}
    stored = dtype
    for name, module in source.modules.items():
        stored = dtype or torch.promote_types(module.dtype, stored or module.dtype)
        if rank is None:
            spectra[name] = singular_values(module)
    assert stored is not None
    whole = {name: _whole(shape) for name, shape in source.shapes.items()}
    if rank is not None:
        chosen = Allocation({name: min(rank, present) for name, present in whole.items()})
    elif energy is not None:
        chosen = Allocation(
            {name: rank_for(torch.tensor(one, dtype=torch.float64), energy) for name, one in spectra.items()}
        )
    elif parameters is not None:
        chosen = _within_parameters(source, whole, spectra, parameters)
    else:
        assert size is not None
        chosen = _within_size(source, whole, spectra, size, to, stored)
    return _truncated(source, chosen, stored, exact=rank is None)


def _check(rank: int | None, energy: float | None, parameters: int | None, size: int | None) -> None:
    if sum(limit is not None for limit in (rank, energy, parameters, size)) != 1:
        raise BadOption("give exactly one limit: a rank, a share of energy, a number of parameters or a file size")
    check_limits(rank, energy)
    for name, limit in (("the budget of parameters", parameters), ("the file size", size)):
        if limit is not None and limit < 1:
            raise BadOption(f"{name} is {limit}; expected a whole number of at least 1")


def singular_values(module: LowRank) -> list[float]:
    """Of the delta, the largest first: min(rank, outputs, inputs) of them."""
    wide = module.wide()
    left, right = (torch.linalg.qr(side, mode="r").R for side in (wide.up, wide.down.T))
    values: list[float] = torch.linalg.svdvals(left @ right.T * wide.scale).tolist()
    return values


def file_size(adapter: Adapter, to: str) -> int:
    """Bytes of the tensor file that `save` would write, to the byte; no module is made.

    The adapter's meta must name its "dtype". Raises UnknownMethod and IncompatibleAdapters as `save` does.
    """
    planned = with_pointwise(adapter)
    if to not in formats():
        raise UnknownMethod(f"cannot write {to!r}; expected one of {', '.join(formats())}")

    def stop(name: str) -> NoReturn:
        raise _HeaderWritten

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "adapter"
        with suppress(_HeaderWritten):  # the header says where the last tensor ends
            import_module(f"{FORMATS}.{to}").write(replace(planned, modules=LazyModules(planned.shapes, stop)), place)
        [file] = [place] if place.is_file() else place.glob("*.safetensors")
        with file.open("rb") as opened:
            length = struct.unpack("<Q", opened.read(8))[0]
            header = json.loads(opened.read(length))
    ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    return 8 + int(length) + max(ends)


class _HeaderWritten(Exception):
    """A writer asks for the first module: all that comes before the tensors is in the file."""


def _checked(adapter: Adapter) -> Adapter:
    """The adapter with finite factors, and the module that was read last at hand: each pass reads one several times.

    Reading a module raises FormatError where it holds NaN or Inf: decompositions do not end there.
    """

    @lru_cache(maxsize=1)
    def load(name: str) -> LowRank:
        module = adapter.modules[name]
        if not (math.isfinite(module.scale) and all(bool(side.isfinite().all()) for side in (module.up, module.down))):
            raise FormatError(
                f"{adapter.name}: {name} holds NaN or Inf; the training diverged or the file is damaged: use another"
            )
        return module

    return replace(adapter, modules=LazyModules(adapter.shapes, load))


# --- how many singular triplets each module keeps -------------------------------------------------------------------


def _within_parameters(source: Adapter, whole: dict[str, int], spectra: Spectra, limit: int) -> Allocation:
    costs = _costs(source)
    if _used(costs, whole) <= limit:
        return Allocation(whole)
    chosen = allocate(spectra, costs, limit)
    if not any(chosen.ranks.values()):
        least = min(costs[name] for name in _alive(source, spectra))
        raise BadOption(
            f"{source.name}: no module fits into a budget of {limit} parameters; the smallest possible is {least}"
        )
    return chosen


def _within_size(
    source: Adapter, whole: dict[str, int], spectra: Spectra, limit: int, to: str, dtype: torch.dtype
) -> Allocation:
    """The best choice whose whole file has at most `limit` bytes.

    What header and other tensors take depends on the choice, so the largest budget of parameters is sought whose best
    choice fits: by what the last file had to spare or too much, and by halving where that does not end. A little above
    it other choices may fit again, whose headers happen to be shorter; the largest such is the answer.
    """
    costs = _costs(source)

    def bytes_of(ranks: Ranks) -> int:
        return file_size(replace(_planned(source, ranks), meta={**source.meta, "dtype": dtype}), to)

    def spent(budget: int) -> tuple[Allocation, int, int]:
        """The best choice, its parameters, and the bytes that it leaves (negative: that it takes too many)."""
        chosen = allocate(spectra, costs, budget)
        used = _used(costs, chosen.ranks)
        return chosen, used, limit - bytes_of(chosen.ranks) if used else 0

    spare = limit - bytes_of(whole)
    if spare >= 0:
        return Allocation(whole)
    low, high = 0, limit // dtype.itemsize + 1  # parameters that fit, parameters that do not
    budget, steps = _used(costs, whole) + spare // dtype.itemsize, 0
    while high - low > 1:
        steps += 1
        if steps > _SECANT_STEPS or not low < budget < high:
            budget = (low + high) // 2
        _, used, spare = spent(budget)
        if spare < 0:
            high = budget
        else:
            low, high = budget, min(high, max(used + spare // dtype.itemsize, low) + 1) if used else high
        budget = used + spare // dtype.itemsize
    budget = low + _HEADERS_DIFFER // dtype.itemsize
    while budget > 0:
        chosen, used, spare = spent(budget)
        if used and spare >= 0:
            return chosen
        budget = used - 1
    return _smallest(source, spectra, limit, bytes_of)


def _smallest(source: Adapter, spectra: Spectra, limit: int, bytes_of: Callable[[Ranks], int]) -> Allocation:
    """The best single triplet that fits. Raises BadOption where none does."""
    sizes = {name: bytes_of({name: 1}) for name in _alive(source, spectra)}
    fitting = [name for name, size in sizes.items() if size <= limit]
    if not fitting:
        extras = sum(tensor.numel() * tensor.element_size() for tensor in source.extras.values())
        among = f", {extras} of them for the {len(source.extras)} tensors beside the deltas" if extras else ""
        raise BadOption(
            f"{source.name}: no module fits into {limit} bytes; the smallest possible file has "
            f"{min(sizes.values())}{among}"
        )
    return Allocation({**dict.fromkeys(source.shapes, 0), max(fitting, key=lambda name: spectra[name][0]): 1})


def _costs(source: Adapter) -> dict[str, int]:
    return {name: shape.outputs + shape.inputs for name, shape in source.shapes.items()}


def _used(costs: Mapping[str, int], ranks: Ranks) -> int:
    return sum(costs[name] * rank for name, rank in ranks.items())


def _alive(source: Adapter, spectra: Spectra) -> list[str]:
    """Modules whose delta is not zero. Raises IncompatibleAdapters where there is none."""
    found = [name for name, values in spectra.items() if values[0]]
    if not found:
        raise IncompatibleAdapters(f"{source.name}: every delta is zero; there is nothing to keep within a budget")
    return found


# --- the result -----------------------------------------------------------------------------------------------------


def _planned(source: Adapter, ranks: Ranks) -> Adapter:
    """An adapter of the shapes that the result has; its modules are those of the source."""
    shapes = {name: replace(shape, rank=ranks[name]) for name, shape in source.shapes.items() if ranks.get(name)}
    return replace(source, modules=LazyModules(shapes, source.modules.__getitem__))


def _truncated(source: Adapter, chosen: Allocation, dtype: torch.dtype, *, exact: bool) -> Compressed:
    after, report = chosen.ranks, Report()
    planned = _planned(source, after)
    made = Compressed(source, planned, report, after, chosen.missed)
    for name in made.left_out:
        module = source.modules[name]
        report.record(name, [module], [1.0], replace(module, up=module.up[:, :0], down=module.down[:0]))

    @lru_cache(maxsize=1)
    def shrink(name: str) -> LowRank:
        module, rank = source.modules[name], after[name]
        return module.truncate(rank) if exact or not _too_wide(module.shape, rank) else module.sketch(rank)

    result = ready(replace(planned, modules=LazyModules(planned.shapes, shrink)), dtype)

    def load(name: str) -> LowRank:
        module, stored = source.modules[name], result.modules[name]
        report.record(name, [module], [1.0], stored)
        if not exact and _too_wide(module.shape, after[name]):
            fidelity = report.modules[name]
            square = stored.norm() ** 2 / fidelity.energy if fidelity.energy else 0.0  # of the module's own norm
            most = best_energy(module, shrink(name))
            made.sketched[name] = math.sqrt(max(0.0, 1 - most / square)) if square else 0.0
        return stored

    meta = {**result.meta, "name": f"{source.name}, compressed"}
    return replace(made, adapter=replace(result, modules=LazyModules(planned.shapes, load), meta=meta))


def _whole(shape: Shape) -> int:
    """How many singular values a delta has."""
    return min(shape.rank, shape.outputs, shape.inputs)


def read_all(adapter: Adapter) -> None:
    """Read every module once and keep none: reports that are filled by reading are complete then."""
    for name in adapter.shapes:
        _ = adapter.modules[name]


def _too_wide(shape: Shape, wanted: int) -> bool:
    return _whole(shape) > SKETCHED_ABOVE and wanted * _SKETCHED_SHARE <= _whole(shape)


def best_energy(module: LowRank, result: LowRank, *, seed: int = 0) -> float:
    """A bound on the squared norm that any delta of the result's rank can keep of the module's, from a near optimum.

    With Q the result's left space and B = delta delta^T, Ky Fan's inequality bounds the k largest eigenvalues of B by
    those of its diagonal blocks Q^T B Q and (1 - Q Q^T) B (1 - Q Q^T), and the nuclear norm of the blocks beside them.
    The second block enters with its norm, from power steps of random vectors by Kuczynski and Wozniakowski's bound:
    false with a probability of 1e-6.
    """
    wide = module.folded().wide()

    def product(vectors: torch.Tensor) -> torch.Tensor:
        return wide.up @ (wide.down @ (wide.down.T @ (wide.up.T @ vectors)))

    basis = torch.linalg.qr(result.up.to(wide.up)).Q
    image = product(basis)
    block = basis.T @ image
    beside = torch.linalg.svdvals(torch.linalg.qr(image - basis @ block, mode="r").R).sum()
    chance = torch.Generator().manual_seed(seed)
    vectors = torch.randn(len(basis), _START, generator=chance, dtype=torch.float64).to(basis)
    for _ in range(_ROUNDS):
        vectors = torch.nn.functional.normalize(vectors - basis @ (basis.T @ vectors), dim=0)
        vectors, before = product(vectors), vectors
    largest = float((before * vectors).sum(dim=0).max())
    likely = (_CERTAINTY ** (1 / _START) / (0.824 * math.sqrt(len(basis)))) ** (1 / (_ROUNDS - 0.5))
    inside = torch.linalg.eigvalsh((block + block.T) / 2).double()
    return float(inside.clamp(min=largest / likely).sum() + beside)

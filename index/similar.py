"""Neighbours in weight space: which adapters change the model in the same way, or write to the same place.

Two exact measures, each blind to how a delta is factorised. The cosine of the deltas finds copies, merges and
continued runs. Adapters trained apart on one task have a cosine near 0 all the same, because each read through its own
random `down`; the overlap of their column spaces finds them (see `encoders.columns`). A weight encoder, where the base
has one, adds a third that was learned: whether they do what the same words would describe. Sketches only choose whom
to measure where there are too many adapters to measure all.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..hub.bases import same_base
from ..hub.errors import BadOption, IncompatibleAdapters, LoraHubError

if TYPE_CHECKING:
    from torch import Tensor

    from ..hub.adapter import Adapter
    from ..hub.catalog import Catalog
    from ..hub.entries import Entry
    from ..hub.lowrank import LowRank, Shape
    from .embed import Progress
    from .weight_encoder import WeightEncoder

EXHAUSTIVE = 200  # up to so many adapters of the base, all are measured and no sketch is needed
SHORTLIST = 100  # of more, so many by each sketch (or ten times the limit)
SAME_COSINE = 1e-5  # rounding of float16 factors stays below it
SAME_NORM = 1e-4

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Likeness:
    """How one adapter's deltas compare with another's.

    cosine: of the whole deltas, -1 to 1; a module that one side lacks is zero there. overlap: of the column spaces,
    averaged over the shared modules, 0 at chance and 1 where the smaller lies within the larger. norm_ratio: the second
    norm over the first (0 if that is zero). shared_modules: how many modules agree in name and shape.
    """

    cosine: float
    overlap: float
    norm_ratio: float
    shared_modules: int

    @property
    def same_delta(self) -> bool:
        """Whether the two are one delta, up to rounding: a copy, re-headered or factorised anew."""
        return self.cosine > 1 - SAME_COSINE and abs(self.norm_ratio - 1) < SAME_NORM

    @property
    def score(self) -> float:
        """The larger of cosine and overlap."""
        return max(self.cosine, self.overlap)


@dataclass(frozen=True)
class Neighbour:
    """An adapter near another one; `score` orders them, `why` says it to a reader. See Likeness for the measures.

    `encoded` is the cosine of the weight encoder's vectors, `confidence` how often the nearest adapter was right at
    such a cosine; both None where no encoder speaks. The score is the largest of cosine, overlap, and `encoded` times
    its confidence.
    """

    entry: Entry
    score: float
    cosine: float
    overlap: float
    same_delta: bool
    norm_ratio: float
    shared_modules: int
    why: tuple[str, ...]
    encoded: float | None = None
    confidence: float | None = None


def similar(
    catalog: Catalog,
    entry: Entry,
    *,
    limit: int = 10,
    encoders: Sequence[WeightEncoder] = (),
    progress: Progress | None = None,
) -> list[Neighbour]:
    """The `limit` nearest neighbours of `entry` among the mergeable adapters of its base, nearest first.

    An adapter whose base is unknown is compared with all that share a module. `encoders`: the catalogue's weight
    encoders (see `fitted.encoders`). `progress` sees (done, total): of adapters encoded, and sketched where there are
    too many to measure all, then of modules.
    Raises BadOption for a limit below 1, IncompatibleAdapters if `entry` has no deltas to compare.
    """

    if limit < 1:
        raise BadOption(f"limit is {limit}; expected at least 1")
    if not entry.mergeable:
        raise IncompatibleAdapters(f"{entry.name} has no low-rank deltas to compare: {entry.reason}")
    others = _others(catalog, entry)
    encoded = _encoded(catalog, entry, others, encoders, progress)
    if len(others) > EXHAUSTIVE:
        size = max(SHORTLIST, 10 * limit)
        chosen = _shortlist(catalog, entry, others, size, progress)
        chosen |= set(sorted(encoded, key=lambda id_: (-encoded[id_][0], id_))[:size])
        others = [other for other in others if other.id in chosen]
    found = _opened(catalog, others)
    likenesses = compare(catalog.read(entry), list(found.values()), progress=progress)
    pairs = zip(found, likenesses, strict=True)
    near = [_neighbour(other, likeness, encoded.get(other.id)) for other, likeness in pairs if likeness.shared_modules]
    return sorted(near, key=_order)[:limit]


def compare(origin: Adapter, others: Sequence[Adapter], *, progress: Progress | None = None) -> list[Likeness]:
    """How each of `others` compares with `origin`, exactly.

    Goes module by module, so that lazy adapters take the memory of two modules however many and large they are, and
    each module is read once.
    """
    from .encoders.columns import column_basis

    sums = [_Sums(other.modules, other.shapes) for other in others]
    square = 0.0
    for done, (name, module) in enumerate(origin.modules.items(), 1):
        square += module.norm() ** 2
        basis = column_basis(module)
        for each in sums:
            if name in each.shapes and each.shapes[name].fits(module.shape):
                each.add(name, module, basis)
        if progress:
            progress(done, len(origin.modules))
    return [each.likeness(math.sqrt(square)) for each in sums]


@dataclass
class _Sums:
    """What has been summed over the modules of one adapter so far."""

    modules: Mapping[str, LowRank]
    shapes: Mapping[str, Shape]
    inner: float = 0.0
    square: float = 0.0
    seen: set[str] = field(default_factory=set)
    overlaps: list[float] = field(default_factory=list)

    def add(self, name: str, reference: LowRank, basis: Tensor) -> None:
        from .encoders.columns import column_basis

        module = self.modules[name]
        self.seen.add(name)
        self.inner += reference.inner(module)
        self.square += module.norm() ** 2
        overlap = column_overlap(basis, column_basis(module))
        if overlap is not None:
            self.overlaps.append(overlap)

    def likeness(self, origin: float) -> Likeness:
        """`origin`: the norm of the adapter compared with."""
        rest = sum(self.modules[name].norm() ** 2 for name in self.shapes if self.seen and name not in self.seen)
        norm = math.sqrt(self.square + rest)
        cosine = self.inner / (origin * norm) if origin and norm else 0.0
        ratio = norm / origin if origin else 0.0
        overlap = sum(self.overlaps) / len(self.overlaps) if self.overlaps else 0.0
        return Likeness(max(-1.0, min(cosine, 1.0)), overlap, ratio, len(self.seen))


def column_overlap(left: Tensor, right: Tensor) -> float | None:
    """How far two subspaces coincide beyond chance; None where either is nothing or chance alone fills it.

    left (n, a), right (n, b): orthonormal bases. The raw overlap ||left^T right||_F^2 / min(a, b) is the mean squared
    cosine of the principal angles. For independent, uniformly random subspaces E||left^T right||_F^2 = a b / n, since
    each of the `a` unit vectors has on average the share b / n of its squared length in the other space: so the raw
    overlap is max(a, b) / n by chance alone. The result is (raw - chance) / (1 - chance): 0 at chance, 1 where the
    smaller space lies within the larger.
    """
    size, fewer, more = left.shape[0], *sorted((left.shape[1], right.shape[1]))
    if not fewer or more >= size:
        return None
    chance = more / size
    raw = float((left.T @ right).square().sum()) / fewer
    return (raw - chance) / (1 - chance)


def _opened(catalog: Catalog, entries: Sequence[Entry]) -> dict[Entry, Adapter]:
    """The entries' adapters, lazily; one that cannot be read now is named in a warning and left out."""

    found = {}
    for entry in entries:
        try:
            found[entry] = catalog.read(entry)
        except LoraHubError as error:
            log.warning("%s is left out: %s", entry.name, error)
    return found


def _others(catalog: Catalog, entry: Entry) -> Sequence[Entry]:
    return [
        other
        for other in catalog.entries()
        if other.mergeable and other.id != entry.id and same_base(entry.base, other.base)
    ]


def _encoded(
    catalog: Catalog,
    entry: Entry,
    others: Sequence[Entry],
    encoders: Sequence[WeightEncoder],
    progress: Progress | None,
) -> dict[str, tuple[float, float]]:
    """Adapter id -> the encoder's cosine with `entry`, and how often such a cosine was right."""
    from .embed import fill_encoded
    from .vector_index import open_index

    allowed = {other.id for other in others}
    found: dict[str, tuple[float, float]] = {}
    for encoder in encoders:
        if not same_base(entry.base, encoder.base):
            continue
        fill_encoded(catalog, encoder, among=allowed | {entry.id}, progress=progress)
        index = open_index(catalog, encoder.space)
        vector = index.vector(entry.id)
        if vector is not None:
            near = index.nearest(vector, len(allowed), allowed)
            found |= {id_: (cosine, encoder.confidence(cosine, of="adapters")) for id_, cosine in near}
    return found


def _shortlist(
    catalog: Catalog, entry: Entry, others: Sequence[Entry], size: int, progress: Progress | None
) -> set[str]:
    from .embed import WEIGHT_SPACES, fill_weights
    from .vector_index import open_index

    allowed = {other.id for other in others}
    fill_weights(catalog, among=allowed | {entry.id}, progress=progress)
    chosen: set[str] = set()
    for space in WEIGHT_SPACES:
        index = open_index(catalog, space)
        vector = index.vector(entry.id)
        if vector is not None:
            chosen.update(id_ for id_, _ in index.nearest(vector, size, allowed))
    return chosen


def _neighbour(entry: Entry, found: Likeness, encoded: tuple[float, float] | None) -> Neighbour:
    cosine, confidence = encoded or (None, None)
    learned = encoded[0] * encoded[1] if encoded else -1.0
    why = _why(found)
    if encoded and not found.same_delta:
        why += (f"the weight encoder's cosine {encoded[0]:.2f}, right in {encoded[1]:.0%} of such cases",)
    return Neighbour(
        entry, max(found.score, learned), found.cosine, found.overlap, found.same_delta, found.norm_ratio,
        found.shared_modules, why, cosine, confidence,
    )  # fmt: skip


def _order(found: Neighbour) -> tuple[bool, float, float, str]:
    # several overlaps of 1 differ by rounding only; the deltas' cosine then says more
    return not found.same_delta, -round(found.score, 4), -found.cosine, found.entry.name


def _why(found: Likeness) -> tuple[str, ...]:
    over = f"over {found.shared_modules} shared module{'s' if found.shared_modules != 1 else ''}"
    if found.same_delta:
        return (f"same delta {over}: a copy, or factorised anew",)
    if found.cosine > 1 - SAME_COSINE:
        return (f"same delta at {found.norm_ratio:.3g} times the strength {over}",)
    return (f"delta cosine {found.cosine:.2f} {over}", f"column spaces overlap {found.overlap:.2f} above chance")

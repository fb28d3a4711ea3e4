"""Library: the experts that a generator learns from, with their descriptions as unit vectors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..hub.bases import same_base
from ..hub.errors import Abstained, GenerationError
from .abstaining import limit

if TYPE_CHECKING:
    from ..hub.adapter import Adapter
    from ..hub.catalog import Catalog
    from ..hub.entries import Entry
    from ..index.encoders.text import TextEncoder

Vectors = NDArray[np.float32]
# Cosine from which on a description counts as close where nobody measured what the library reaches (`abstaining.limit`)
CLOSE = 0.32
GENERATED = "generate:"
"""How the operations that make adapters from descriptions are called in lineage; the method's name comes after it."""


@dataclass(frozen=True)
class Expert:
    """An adapter of the library and what its description says."""

    id: str
    name: str
    description: str
    load: Callable[[], Adapter]


@dataclass(frozen=True)
class Library:
    """Experts of one base, and their descriptions' unit vectors (n, dim) in the order of `experts`.

    close: the similarity to the nearest expert from which on a request is served, see `abstaining.limit`.
    """

    base: str | None
    experts: tuple[Expert, ...]
    vectors: Vectors
    close: float = CLOSE

    def similarities(self, query: Vectors) -> Vectors:
        """Cosines (n,) of a description's unit vector (dim,) with every expert's."""
        return np.asarray(self.vectors @ query, dtype=np.float32)


def expert_name(entry: Entry) -> str:
    """The expert that an adapter is a checkpoint of: the NAME of its tag `expert:NAME`, or its own name."""
    named = [tag.partition(":")[2].strip() for tag in entry.tags if tag.startswith("expert:")]
    return next((name for name in named if name), entry.name)


def open_library(
    catalog: Catalog,
    encoder: TextEncoder,
    *,
    base: str | None = None,
    exclude: Collection[str] = (),
    tags: Collection[str] = (),
) -> Library:
    """The catalogue's mergeable adapters of a base that describe themselves, as experts.

    Adapters that were generated are no experts; of several checkpoints of one expert (`expert_name`) the last by name
    stands for it. `base` None stands for the only base there is. `exclude` holds ids or
    names to leave out, `tags` what all must have. Raises GenerationError where the catalogue has several bases or none
    that fits.
    """
    entries = [entry for entry in catalog.entries(tags=tags) if entry.mergeable and (entry.description or entry.title)]
    left = {*exclude, *catalog.made_by(GENERATED)}
    kept = [entry for entry in entries if not {entry.id, entry.name} & left]
    bases = sorted({entry.base for entry in kept if entry.base})
    if base is None and len({b for b in bases if not same_base(b, bases[0])}) > 0:
        raise GenerationError(f"the catalogue holds adapters of several bases: say --base, one of {', '.join(bases)}")
    base = base or (bases[0] if bases else None)
    fitting = [entry for entry in kept if entry.base and same_base(entry.base, base)]
    if not fitting:
        known = ", ".join(bases) or "none"
        raise GenerationError(f"no described adapter for base {base} in the catalogue (bases there: {known}); add some")
    fitting = list({expert_name(entry): entry for entry in fitting}.values())
    texts = [entry.description or entry.title or entry.name for entry in fitting]
    experts = tuple(
        Expert(entry.id, entry.name, text, partial(catalog.read, entry))
        for entry, text in zip(fitting, texts, strict=True)
    )
    vectors = encoder.encode(texts)
    return Library(base, experts, vectors, limit(vectors, encoder).value)


def reread(library: Library, encoder: TextEncoder | None) -> Library:
    """The library with its descriptions' vectors by another encoder; as it is without one."""
    if encoder is None:
        return library
    return replace(library, vectors=encoder.encode([expert.description for expert in library.experts]))


def nearest_expert(library: Library, query: Vectors) -> tuple[int, float]:
    """The expert whose description is most similar to a request's unit vector, as (index, cosine)."""
    return ranked(library, query, 1)[0]


def ranked(library: Library, query: Vectors, count: int) -> list[tuple[int, float]]:
    """The `count` nearest experts as (index, cosine), nearest first."""
    cosines = library.similarities(query)
    return [(int(index), float(cosines[index])) for index in np.argsort(-cosines, kind="stable")[:count]]


def far(library: Library, query: Vectors) -> Abstained | None:
    """The refusal to serve a request (its unit vector) that no expert is close to; None where one is."""
    best, cosine = nearest_expert(library, query)
    if cosine >= library.close:
        return None
    return Abstained(
        f"nothing for base {library.base} is close to this description: the nearest is {library.experts[best].name} "
        f"with similarity {cosine:.2f}, expected at least {library.close:.2f}; add adapters for the task, say it in "
        "other words, or insist with --force"
    )


def share(similarities: Sequence[float], temperature: float) -> list[float]:
    """softmax(similarity / temperature); the weights add up to 1 (SG-LoRA, arXiv 2509.10535, sparse aggregator)."""
    scaled = np.asarray(similarities, dtype=np.float64) / temperature
    powers = np.exp(scaled - scaled.max())
    return [float(weight) for weight in powers / powers.sum()]

"""What an adapter does, read from its weights alone: the nearest words and adapters, and how sure that is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..hub.bases import same_base
from ..hub.errors import BadOption, IncompatibleAdapters, RetrievalError
from .embed import fill_encoded
from .fitted import every_encoder, said, telling_name
from .vector_index import open_index

if TYPE_CHECKING:
    from pathlib import Path

    from ..hub.adapter import Adapter
    from ..hub.catalog import Catalog
    from ..hub.entries import Entry
    from .embed import Progress
    from .encoders.text import TextEncoder
    from .weight_encoder import WeightEncoder

CERTAIN = 0.5  # confidence from which on a description is more often right than wrong
PHRASES = 2000  # of the catalogue's own, the commonest
SINGLE = 500  # words of its descriptions, the commonest
LONGEST = 60  # characters of a phrase

# words that describe nothing by themselves
_IDLE = set(
    "about above after again also although always another anything because been before being best between both cannot "
    "could does doing done down each else even ever every from give gives good great have having here high into itself "
    "just keep know less like likes little look looks made make makes making many more most much must need needs never "
    "next none nothing only other over play please quite rather really same seem should show since some something such "
    "sure take than that their them then there these they thing things this those through together trained training "
    "trigger under until upon used uses using usually very want well were what when where which while will with within "
    "without word words work works would your yours strength".split()
)


@dataclass(frozen=True)
class Guess:
    """Words near to an adapter's weights; confidence: how often the nearest words were right at such a cosine."""

    words: str
    cosine: float
    confidence: float


@dataclass(frozen=True)
class Near:
    """An adapter near to another's weights, what it says of itself, and how often the nearest one was right."""

    entry: Entry
    cosine: float
    confidence: float
    said: str


@dataclass(frozen=True)
class Description:
    """What an encoder makes of an adapter, nearest first. cases: held-out adapters that the confidence rests on."""

    base: str | None
    space: str
    words: tuple[Guess, ...]
    neighbours: tuple[Near, ...]
    cases: int

    @property
    def certain(self) -> bool:
        """Whether any of it is more likely right than wrong."""
        first = [one.confidence for one in self.words[:1]] + [one.confidence for one in self.neighbours[:1]]
        return max(first, default=0.0) >= CERTAIN


def describe(
    catalog: Catalog,
    adapter: Adapter,
    encoder: WeightEncoder,
    words: TextEncoder,
    *,
    entry: Entry | None = None,
    limit: int = 5,
    progress: Progress | None = None,
) -> Description:
    """The words and the catalogue's adapters nearest to an adapter's weights.

    The words are those that the catalogue uses: tags, trigger words, titles, names and short descriptions of adapters
    of the encoder's base, and single words from all descriptions. `entry`: the adapter's own, which is no neighbour of
    itself. `progress` sees (done, total) of neighbours that must be encoded first.
    Raises IncompatibleAdapters if the encoder cannot read the adapter, RetrievalError for words of another space,
    BadOption for a limit below 1.
    """
    if limit < 1:
        raise BadOption(f"limit is {limit}; expected at least 1")
    if encoder.texts != words.space:
        raise RetrievalError(
            f"the weight encoder for {encoder.base} was fitted to the words of {encoder.texts!r}, not of "
            f"{words.space!r}; use its text model"
        )
    vector = encoder.encode(adapter)
    entries = [one for one in catalog.entries() if entry is None or one.id != entry.id]
    known = vocabulary(entries, encoder.base)
    cosines = words.encode(known) @ vector if known else np.zeros(0, np.float32)
    chosen = _different(known, np.argsort(-cosines, kind="stable").tolist(), limit)
    guesses = [Guess(known[k], float(cosines[k]), encoder.confidence(float(cosines[k]))) for k in chosen]
    fill_encoded(catalog, encoder, progress=progress)
    return Description(
        base=encoder.base,
        space=encoder.space,
        words=tuple(guesses),
        neighbours=_neighbours(catalog, encoder, vector, entries, limit),
        cases=encoder.calibration.cases,
    )


def vocabulary(entries: Iterable[Entry], base: str | None) -> list[str]:
    """What the adapters of a base say of themselves, in pieces, and the single words of all descriptions; no piece
    twice, the commonest first."""
    phrases: Counter[str] = Counter()
    single: Counter[str] = Counter()
    spelled: dict[str, str] = {}
    for entry in entries:
        pieces = [
            *entry.tags,
            *entry.triggers,
            entry.title or "",
            telling_name(entry.name),
            *_clauses(entry.description),
        ]
        tidy = (" ".join(piece.split()).strip(" .,;:") for piece in pieces)
        kept = {piece.casefold(): piece for piece in tidy if 2 < len(piece) <= LONGEST}
        if same_base(entry.base, base):
            spelled = {**kept, **spelled}
            phrases.update(list(kept))
        single.update(set(re.findall(r"[^\W\d_]{4,}", entry.description.casefold())) - _IDLE)
    first = [spelled[key] for key, _ in phrases.most_common(PHRASES)]
    return first + [word for word, _ in single.most_common(SINGLE) if word not in phrases]


def encoder_that_reads(home: Path, adapter: Adapter) -> WeightEncoder:
    """The encoder for an adapter's base; for an unknown base the first that knows its modules.

    Raises RetrievalError where there is none.
    """
    for encoder in every_encoder(home):
        if same_base(encoder.base, adapter.base):
            try:
                encoder.manifest.check(adapter)
            except IncompatibleAdapters:
                if adapter.base is not None:
                    raise
                continue
            return encoder
    raise RetrievalError(
        f"{adapter.name}: there is no weight encoder for its base ({adapter.base or 'unknown'}); fit one with "
        "`lorahub encoder fit` to a catalogue that describes some adapters of this base"
    )


def _different(known: Sequence[str], order: Iterable[int], limit: int) -> list[int]:
    """The first places in `order` whose words do not hold, nor are held by, those of an earlier one."""
    chosen: list[int] = []
    spelled = [piece.casefold() for piece in known]
    for place in order:
        if len(chosen) == limit:
            break
        if not any(spelled[place] in spelled[k] or spelled[k] in spelled[place] for k in chosen):
            chosen.append(place)
    return chosen


def _clauses(text: str) -> Sequence[str]:
    """Sentences, and their parts between commas."""
    return re.split(r"[.;:\n]+\s*|,\s+", text) + re.split(r"[.\n]+\s*", text)


def _neighbours(
    catalog: Catalog, encoder: WeightEncoder, vector: NDArray[np.float32], entries: Sequence[Entry], limit: int
) -> tuple[Near, ...]:
    others = {entry.id: entry for entry in entries}
    found = open_index(catalog, encoder.space).nearest(vector, limit, set(others))
    return tuple(
        Near(others[id_], cosine, encoder.confidence(cosine, of="adapters"), "; ".join(said(others[id_])))
        for id_, cosine in found
    )

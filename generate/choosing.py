"""Which adapters of a catalogue a prompt asks for.

A prompt names several things ("a watercolor fox" a style and a subject), and none of them need be in the catalogue, so
neither a rank nor one cosine with the whole prompt decides. An adapter is wanted where the prompt holds

- its name, its title or one of its trigger words, as they stand (plurals aside), or
- a word, or two neighbouring words, to which the adapter's own words are near (cosine at least NEAR), and no fitting
  adapter's nearer by more than MARGIN; where the adapter's own words hold them as they stand ("banana" in a list of
  fruit), a cosine of HELD is enough. Words that name an adapter are spent: the "art" of "pixel art" asks for nothing
  else;
- where nothing is said of the adapter, words that ask for no other, and to which no fitting adapter's weights are
  nearer (by a weight encoder that is right in SURE or more of such cases).

Of several adapters for the same words the nearest is taken. For 38 adapters (29 styles, 9 subjects, captions of one
sentence), all-MiniLM-L6-v2 and 30 prompts on which nothing here was chosen, that found 83 % of what was meant, and 94 %
of what it found was meant. The nearest three by the whole prompt's cosine, from 0.4 on: 63 % and 85 %; the first three
of a hybrid search: 89 % and 44 %. Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from ..hub.entries import words as apart
from ..hub.errors import BadOption
from ..index.fitted import said as told
from ..index.search import Weighed, search, weight_matches
from ..index.vector_index import open_index

if TYPE_CHECKING:
    from ..hub.catalog import Catalog
    from ..hub.entries import Entry
    from ..index.encoders.text import TextEncoder
    from ..index.weight_encoder import WeightEncoder

NEAR = 0.42  # cosine of a word or two with an adapter's own words
HELD = 0.3  # the same, of words that are among the adapter's own; a list of things is far from each of them
MARGIN = 0.05
SURE = 0.5  # how often a weight encoder must have been right at a cosine
DEPTH = 300  # adapters whose names are looked for in the prompt
SHOWN = 20  # of those that came up and that nothing asks for

# they say nothing of what a picture shows or in which manner; colours alone do not either
_EMPTY = frozenset(
    """a an and are art as at by for from high his her image images in is it its look looks low made of on or paint
    painted photo photograph picture pictures quality some style styles that the their there this to very with
    black blue brown gray green grey pink purple red white yellow""".split()
)
UNASKED = "nothing in the prompt asks for it"
_NOISE = re.compile(r"v?\d+(\.\d+)*|loras?|styles?|sd(xl|\d+)?|xl|flux|fp16|bf16")  # of names

Refusal = Callable[["Entry"], "str | None"]
"""Why an adapter cannot be used, or None."""


@dataclass(frozen=True)
class Chosen:
    """An adapter that the prompt asks for. `score`: 1 where the prompt names it, else the cosine, or where its weights
    speak for it how often that was right; `why`: by what."""

    entry: Entry
    score: float
    why: tuple[str, ...]


@dataclass(frozen=True)
class Spared:
    """An adapter that came up and is not used, and why."""

    entry: Entry
    reason: str


@dataclass
class _Claim:
    """What speaks for an adapter: the places of the prompt's words that ask for it, and how strongly."""

    score: float = 0.0
    places: set[int] = field(default_factory=set)
    why: dict[str, None] = field(default_factory=dict)

    def add(self, places: Collection[int], score: float, why: str) -> None:
        self.score = max(self.score, score)
        self.places |= set(places)
        self.why[why] = None


def choose(
    catalog: Catalog,
    prompt: str,
    refusal: Refusal,
    *,
    limit: int = 3,
    mode: str = "hybrid",
    encoder: TextEncoder | None = None,
    encoders: Sequence[WeightEncoder] = (),
) -> tuple[list[Chosen], list[Spared]]:
    """The adapters that the prompt asks for and that are not refused, strongest first; and what else came up.

    mode: as in `search`; "text" goes by names and trigger words, "meaning" by cosines, "weights" by `encoders` alone.
    `encoder`: None without "meaning". Raises BadOption for a limit below 0, what `search` raises for a mode.
    """
    if limit < 0:
        raise BadOption(f"limit is {limit}; expected 0 for the base's own picture, or how many adapters at most")
    if limit == 0:
        return [], []
    hits = search(catalog, prompt, mode=mode, limit=DEPTH, encoder=encoder, encoders=encoders)
    known = {hit.entry.id: hit.entry for hit in hits}
    came_up = list(known)[:SHOWN]
    said, by_words = _words(prompt), mode not in ("meaning", "weights")
    names = {id_: found for id_, one in known.items() if by_words and (found := _named(one, said))}
    refused = _refusals(known, names, refusal)
    names = {id_: places for id_, places in names.items() if id_ not in refused}
    phrases = _phrases(said, spent={place for places in names.values() for place in places})
    near = _near(catalog, phrases, encoder) if encoder and mode in ("hybrid", "meaning") else {}
    asked = dict.fromkeys(id_ for cosines in near.values() for id_ in cosines)
    _look_up(catalog, known, asked)
    refused |= _refusals(known, asked, refusal)
    claims = _claims(said, names, near, refused)
    if encoder and encoders and mode in ("hybrid", "weights"):

        def usable(id_: str) -> bool:
            _look_up(catalog, known, [id_])
            if mode == "hybrid" and told(known[id_]):
                return False  # its own words have been asked
            refused.update(_refusals(known, [id_], refusal))
            return id_ not in refused

        spent = {place for claim in claims.values() for place in claim.places}
        for places, phrase in _phrases(said, spent).items():
            _claim_by_weights(
                claims, places, phrase, weight_matches(catalog, phrase, DEPTH, encoders, encoder=encoder), usable
            )
    chosen, spared = _strongest(claims, known, limit)
    spared += [Spared(known[id_], reason) for id_, reason in refused.items()]
    dealt = {one.entry.id for one in chosen} | {one.entry.id for one in spared}
    rest = [Spared(known[id_], UNASKED) for id_ in came_up if id_ not in dealt]
    return chosen, spared + rest


def _refusals(known: Mapping[str, Entry], ids: Iterable[str], refusal: Refusal) -> dict[str, str]:
    return {id_: reason for id_ in ids if (reason := refusal(known[id_])) is not None}


def _look_up(catalog: Catalog, known: dict[str, Entry], ids: Iterable[str]) -> None:
    """Adds to `known` the entries that it lacks."""
    known |= {entry.id: entry for entry in catalog.entries(ids=[id_ for id_ in ids if id_ not in known])}


def lacking_triggers(prompt: str, triggers: Sequence[str]) -> list[str]:
    """Those of an adapter's trigger words that the prompt does not hold."""
    said = _words(prompt)
    return [trigger for trigger in triggers if _words(trigger) and not _found(_words(trigger), said)]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:-\w+)*", text.casefold())


def _stem(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _found(sought: Sequence[str], said: Sequence[str]) -> range | None:
    """Where the words stand in the prompt, one after the other."""
    wanted, there = [_stem(word) for word in sought], [_stem(word) for word in said]
    for start in range(len(there) - len(wanted) + 1):
        if wanted and there[start : start + len(wanted)] == wanted:
            return range(start, start + len(wanted))
    return None


def _named(entry: Entry, said: Sequence[str]) -> range | None:
    """The places of the most words by which the prompt names an adapter."""
    name = [word for word in _words(apart(entry.name)) if not _NOISE.fullmatch(word)]
    own = [name, _words(entry.title or ""), *map(_words, entry.triggers)]
    places = [found for text in own if not set(text) <= _EMPTY and (found := _found(text, said))]
    return max(places, key=len, default=None)


def _phrases(said: Sequence[str], spent: Collection[int]) -> dict[tuple[int, ...], str]:
    """The telling words that are not spent, and pairs of neighbours among them (empty words between do not count)."""
    telling = [place for place, word in enumerate(said) if word not in _EMPTY]
    free = [place for place in telling if place not in spent]
    pairs = [pair for pair in pairwise(telling) if not set(pair) & set(spent)]
    return {places: " ".join(said[place] for place in places) for places in [*((one,) for one in free), *pairs]}


def _near(
    catalog: Catalog, phrases: Mapping[tuple[int, ...], str], encoder: TextEncoder
) -> dict[tuple[int, ...], dict[str, float]]:
    """For each phrase the adapters whose words are near it, with their cosines."""
    index = open_index(catalog, encoder.space)
    if not phrases or not len(index):
        return {}
    vectors = encoder.encode(list(phrases.values()))
    found = [index.nearest(vector, len(index)) for vector in vectors]
    close = {
        places: {id_: cosine for id_, cosine in some if cosine >= HELD}
        for places, some in zip(phrases, found, strict=True)
    }
    own = {one.id: {*map(_stem, _words(one.text()))} for one in catalog.entries(ids=_doubtful(close))}
    return {
        places: {
            id_: cosine
            for id_, cosine in some.items()
            if cosine >= NEAR or own.get(id_, set()).issuperset(map(_stem, _words(phrases[places])))
        }
        for places, some in close.items()
    }


def _doubtful(close: Mapping[tuple[int, ...], Mapping[str, float]]) -> list[str]:
    """The adapters that are near enough only if they hold the phrase."""
    return list(dict.fromkeys(id_ for some in close.values() for id_, cosine in some.items() if cosine < NEAR))


def _claims(
    said: Sequence[str],
    names: Mapping[str, range],
    near: Mapping[tuple[int, ...], Mapping[str, float]],
    refused: Collection[str],
) -> dict[str, _Claim]:
    """What speaks for each adapter; phrases of one word come before pairs."""
    claims: dict[str, _Claim] = {}
    for id_, places in names.items():
        phrase = " ".join(said[place] for place in places)
        claims.setdefault(id_, _Claim()).add(places, 1.0, f"named: {phrase}")
    for spots, cosines in near.items():
        rivals = {id_: cosine for id_, cosine in cosines.items() if id_ not in refused}
        best = max(rivals.values(), default=0.0)
        phrase = " ".join(said[place] for place in spots)
        for id_, cosine in rivals.items():
            claim = claims.setdefault(id_, _Claim())
            if cosine >= best - MARGIN and not claim.places & set(spots):  # one word's claim is not a pair's as well
                claim.add(spots, cosine, f"{phrase}: cosine {cosine:.2f}")
    return {id_: claim for id_, claim in claims.items() if claim.places}


def _claim_by_weights(
    claims: dict[str, _Claim],
    places: tuple[int, ...],
    phrase: str,
    weighed: Sequence[Weighed],
    usable: Callable[[str], bool],
) -> None:
    """A phrase for the adapter whose weights answer to it most surely, of those that can be used."""
    for one in weighed:
        if one.confidence < SURE:
            return
        if usable(one.id):
            why = f"{phrase}: weights, score {one.score:.2f}, right in {one.confidence:.0%} of such cases"
            claims.setdefault(one.id, _Claim()).add(places, one.confidence, why)
            return


def _strongest(
    claims: Mapping[str, _Claim], known: Mapping[str, Entry], limit: int
) -> tuple[list[Chosen], list[Spared]]:
    """The strongest claims, each for words that no stronger one has taken."""
    chosen: list[Chosen] = []
    spared: list[Spared] = []
    taken: dict[int, Entry] = {}
    for id_, claim in sorted(claims.items(), key=lambda item: (-item[1].score, -len(item[1].places), item[0])):
        entry = known[id_]
        free = claim.places - set(taken)
        if not free:
            spared.append(Spared(entry, f"{taken[min(claim.places)].name} answers to the same words"))
        elif len(chosen) == limit:
            spared.append(Spared(entry, f"beyond --limit {limit}"))
        else:
            chosen.append(Chosen(entry, claim.score, tuple(claim.why)))
            taken |= dict.fromkeys(free, entry)
    return chosen, spared

"""Search: what adapters say of themselves, by words and by meaning, and what their weights say, joined by rank."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..hub.errors import BadOption, RetrievalError
from .vector_index import open_index as open_index

if TYPE_CHECKING:
    from ..hub.catalog import Catalog
    from ..hub.entries import Entry
    from .ann import Vectors
    from .encoders.text import TextEncoder
    from .vector_index import Index
    from .weight_encoder import WeightEncoder

MODES = ("hybrid", "text", "meaning", "weights")
WIDER = 4  # times as many of the nearest weights are ranked by score as are wanted
DEPTH = 200  # how far down each list fusion looks
RRF_K = 60  # Cormack, Clarke and Buettcher, "Reciprocal rank fusion ...", SIGIR 2009: 60 is near the best everywhere
LIFT = 2.0  # times chance that the weights' word must be right to count in a hybrid search
FLOOR = 0.25  # cosine below which a hit by meaning alone is noise; see `meaning_matches`


@dataclass(frozen=True)
class Hit:
    """A found adapter.

    `score`: 0 to 1 in a hybrid search (1 = first in every list), the cosine in a search by meaning, the encoder's score
    in one by weights, the full text's own in one by words. `why`: what matched, for a reader. `confidence`: how often
    the weight encoder was right at such a score, None where the weights were not asked.
    """

    entry: Entry
    score: float
    why: tuple[str, ...]
    confidence: float | None = None


class Weighed(NamedTuple):
    """What the weights of an adapter say to a query: their score (`WeightEncoder.scores`), how often such a score was
    right, and whether that is more than chance."""

    id: str
    score: float
    confidence: float
    telling: bool = True


def search(
    catalog: Catalog,
    query: str,
    *,
    mode: str = "hybrid",
    base: str | None = None,
    tags: Sequence[str] = (),
    limit: int = 10,
    encoder: TextEncoder | None = None,
    encoders: Sequence[WeightEncoder] = (),
) -> list[Hit]:
    """The adapters that fit `query`, best first; an empty list where none does.

    mode: "text" (full text), "meaning" (embeddings), "weights" (what the weights do) or "hybrid" (all, fused by rank).
    `base` and `tags` restrict what is ranked. `encoder`: None for the packaged text model. `encoders`: the catalogue's
    weight encoders (see `fitted.encoders`); without any, a hybrid search goes by words and meaning. What has no vector
    in an encoder's space is found by the other voices alone.
    Raises BadOption for a mode or limit that is none, RetrievalError where the mode or encoder cannot answer.
    """
    _check(mode, limit)
    if mode == "weights" and not encoders:
        raise RetrievalError(
            "there is no weight encoder for the catalogue's adapters, so words cannot be compared with weights; fit "
            "one with `lorahub encoder fit`, or search in mode hybrid, text or meaning"
        )
    if not query.strip():
        return []
    depth = max(limit, DEPTH)
    words: list[tuple[str, float, str]] = []
    near: list[tuple[str, float]] = []
    weighed: list[Weighed] = []
    if mode in ("hybrid", "text"):
        words = list(catalog.text_matches(query, depth, base=base, tags=tags))
    if mode in ("hybrid", "meaning"):
        near = meaning_matches(catalog, query, depth, base=base, tags=tags, encoder=encoder)
    if encoders and mode in ("hybrid", "weights"):
        weighed = weight_matches(catalog, query, depth, encoders, base=base, tags=tags, encoder=encoder)
    if mode == "hybrid":
        scores = fuse([id_ for id_, _, _ in words], [id_ for id_, _ in near])
        if encoders:
            scores = _with_weights(scores, weighed, _voiced(catalog, encoders))
            weighed = [one for one in weighed if one.telling]  # the rest had no vote, and is no reason
    else:
        scores = {id_: score for id_, score, _ in words} | dict(near) | {one.id: one.score for one in weighed}
    return _hits(catalog, scores, words, near, weighed, limit)


def meaning_matches(
    catalog: Catalog,
    query: str,
    limit: int,
    *,
    base: str | None = None,
    tags: Sequence[str] = (),
    encoder: TextEncoder | None = None,
    floor: float = FLOOR,
) -> list[tuple[str, float]]:
    """(adapter id, cosine) by embeddings, nearest first, of those at or above `floor` on that base with those tags.

    With all-MiniLM-L6-v2 unrelated descriptions have cosines of 0.1 +- 0.06 and words that mean nothing seldom reach
    0.25, while a description that shares no word but the topic ("soccer", sports news) has 0.35 and more.
    """
    from .encoders.text import text

    encoder = encoder or text()
    index = open_index(catalog, encoder.space)
    if not len(index):
        return []
    found = index.nearest(encoder.encode([query])[0], limit, _allowed(catalog, base, tags))
    return [(id_, cosine) for id_, cosine in found if cosine >= floor]


def weight_matches(
    catalog: Catalog,
    query: str,
    limit: int,
    encoders: Iterable[WeightEncoder],
    *,
    base: str | None = None,
    tags: Sequence[str] = (),
    encoder: TextEncoder | None = None,
) -> list[Weighed]:
    """The adapters whose weights fit the query best, on that base with those tags, surest first.

    Of the nearest by cosine WIDER times as many are ranked by score as are returned. Scores of different encoders do
    not compare, confidences do. Raises RetrievalError for an encoder into the space of another text model.
    """
    from .encoders.text import text

    encoder = encoder or text()
    vector, allowed = encoder.encode([query])[0], _allowed(catalog, base, tags)
    best: dict[str, Weighed] = {}
    for one in encoders:
        if one.texts != encoder.space:
            raise RetrievalError(
                f"the weight encoder for {one.base} is into the words of {one.texts!r}, not of {encoder.space!r}; "
                "search with its text model, or fit it anew with this one"
            )
        for id_, score in _scored(open_index(catalog, one.space), one, vector, limit, allowed):
            confidence = one.confidence(score, of="queries")
            found = Weighed(id_, score, confidence, confidence > LIFT * one.queries.chance)
            best[id_] = max(found, best.get(id_, found), key=_certainty)
    return sorted(best.values(), key=lambda one: (*(-x for x in _certainty(one)), one.id))[:limit]


def _scored(
    index: Index, encoder: WeightEncoder, query: Vectors, limit: int, allowed: set[str] | None
) -> Iterable[tuple[str, float]]:
    near = [id_ for id_, _ in index.nearest(query, WIDER * limit, allowed)]
    return zip(near, encoder.scores(query[None], index.vectors(near))[0].tolist(), strict=True) if near else ()


def fuse(*rankings: Sequence[str]) -> dict[str, float]:
    """Reciprocal rank fusion: id -> sum of 1 / (60 + rank) over the rankings, as a share of the most there can be."""
    most = len(rankings) / (RRF_K + 1)
    fused: dict[str, float] = {}
    for ranking in rankings:
        for rank, id_ in enumerate(ranking, 1):
            fused[id_] = fused.get(id_, 0.0) + 1 / (RRF_K + rank) / most
    return fused


def _with_weights(said: Mapping[str, float], weighed: Sequence[Weighed], voiced: Collection[str]) -> dict[str, float]:
    """Scores by words and meaning, joined by the weights' vote, which counts as much as the two where it is certain.

    A vote is the reciprocal rank times the confidence that was measured on held-out adapters, so an encoder that is
    seldom right moves little, and one that is hardly ever right finds nothing. What no encoder can speak of (another
    base) loses nothing by it: its weights are taken to say what its words say, as surely as the best vote.
    """
    votes = {
        one.id: one.confidence * (RRF_K + 1) / (RRF_K + rank) for rank, one in enumerate(weighed, 1) if one.telling
    }
    trust = max((one.confidence for one in weighed), default=0.0)
    assumed = {id_: trust * score for id_, score in said.items() if id_ not in voiced}
    return {id_: (said.get(id_, 0.0) + votes.get(id_, assumed.get(id_, 0.0))) / 2 for id_ in {**said, **votes}}


def _voiced(catalog: Catalog, encoders: Iterable[WeightEncoder]) -> set[str]:
    return {id_ for one in encoders for id_ in open_index(catalog, one.space).places}


def _hits(
    catalog: Catalog,
    scores: Mapping[str, float],
    words: Sequence[tuple[str, float, str]],
    near: Sequence[tuple[str, float]],
    weighed: Sequence[Weighed],
    limit: int,
) -> list[Hit]:
    said = {id_: f"words in {why}" for id_, _, why in words}
    cosines = dict(near)
    votes = {one.id: one for one in weighed}

    def order(id_: str) -> tuple[float, float, float, str]:
        vote = votes.get(id_)
        return -scores[id_], -cosines.get(id_, -1.0), -vote.confidence if vote else 0.0, id_

    # by weights alone they come surest first, which is not by cosine where there are several encoders
    chosen = (sorted(scores, key=order) if near or words else list(scores))[:limit]
    entries = {entry.id: entry for entry in catalog.entries(ids=chosen)} if chosen else {}
    return [
        Hit(
            entries[id_],
            scores[id_],
            _why(said.get(id_), cosines.get(id_), votes.get(id_)),
            votes[id_].confidence if id_ in votes else None,
        )
        for id_ in chosen
        if id_ in entries
    ]


def _why(words: str | None, cosine: float | None, vote: Weighed | None) -> tuple[str, ...]:
    reasons = [words] if words else []
    if cosine is not None:
        reasons.append(f"meaning: cosine {cosine:.2f}")
    if vote is not None:
        reasons.append(f"weights: score {vote.score:.2f}, right in {vote.confidence:.0%} of such cases")
    return tuple(reasons)


def _certainty(one: Weighed) -> tuple[float, float]:
    return one.confidence, one.score


def _allowed(catalog: Catalog, base: str | None, tags: Sequence[str]) -> set[str] | None:
    return catalog.ids(base=base, tags=tags) if base is not None or tags else None


def _check(mode: str, limit: int) -> None:
    if mode not in MODES:
        raise BadOption(f"search has no mode {mode!r}; expected one of {', '.join(MODES)}")
    if limit < 1:
        raise BadOption(f"limit is {limit}; expected at least 1")

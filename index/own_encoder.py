"""Fitting a weight encoder to a catalogue, and judging one by the adapters that it was not fitted to."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..hub.errors import BadOption, LoraHubError
from .embed import fill
from .fitted import ENOUGH, Described, described
from .weight_encoder import encoder_path

if TYPE_CHECKING:
    from ..hub.adapter import Adapter
    from ..hub.catalog import Catalog
    from .encoders.text import TextEncoder
    from .fitting import Progress as Step
    from .fitting import Settings
    from .weight_encoder import WeightEncoder

DEPTHS = (1, 5, 10)
ALONE = 6  # a fit that judges alone is left a sixth of the adapters to judge by
Vectors = NDArray[np.float32]
Pair: TypeAlias = "tuple[Described, Adapter]"

log = logging.getLogger(__name__)


def fit_own(
    catalog: Catalog,
    words: TextEncoder,
    *,
    base: str | None = None,
    kind: str = "ridge",
    settings: Settings | None = None,
    out: Path | None = None,
    progress: Callable[[Step], None] | None = None,
) -> tuple[WeightEncoder, Path]:
    """An encoder fitted to what the catalogue's adapters of a base say of themselves; returns it and its file.

    `told["seen"]` lists the adapters by id. A fit that was stopped goes on from its last checkpoint. out: None for the
    home folder, where it takes the place of an older one. Adapters that cannot be read, or have another shape than
    most, are left out with a warning. Raises what `described` and `fitting.fit` do.
    """
    from .fitting import Settings

    base, shelf = described(catalog, base)
    readable = _readable(catalog, shelf, base)
    place = encoder_path(catalog.home, base)
    encoder, checkpoint = _fitted(readable, words, place, kind, settings or Settings(), {}, progress)
    encoder = replace(encoder, told={**encoder.told, "seen": [one.entry.id for one, _ in readable]})
    encoder.save(out or place)
    _tidy(checkpoint)
    return encoder, out or place


@dataclass(frozen=True)
class Figures:
    """How well queries found what fits them. recall: of depth k, the share of what fits among the first k, of as many
    as can be there; reciprocal_rank: of the first that fits, averaged."""

    recall: Mapping[int, float]
    reciprocal_rank: float


@dataclass(frozen=True)
class Evaluation:
    """An encoder judged by adapters that were not used to fit it; they are the pool in which each is looked for.

    found: adapters by words; beside it `chance`, and the `ceiling`: a search over the true descriptions. named: words
    by adapters. fits: how often the encoder was fitted anew without some adapters, 0 where there are enough that it has
    not seen, or it does not say (`seen` is None then, else how many it was fitted to).
    """

    base: str | None
    kind: str
    space: str
    pool: int
    queries: int
    seen: int | None
    fits: int
    found: Figures
    chance: Figures
    ceiling: Figures
    named: Figures


def evaluate(
    catalog: Catalog,
    encoder: WeightEncoder,
    words: TextEncoder,
    *,
    folds: int | None = None,
    progress: Callable[[Step], None] | None = None,
) -> Evaluation:
    """Leave-out retrieval among the catalogue's described adapters: every distinct thing said of one is a query.

    Adapters that the encoder has not seen judge it as it is. Where there are not ENOUGH, it is fitted anew in the same
    way, `folds` times without another part of them, and judged by those (default: 5 times without a fifth for "ridge",
    which takes seconds; once without a sixth for the others). Raises what `fit_own` does.
    """
    base, shelf = described(catalog, encoder.base)
    seen = encoder.told.get("seen")
    unseen = [one for one in shelf if one.entry.id not in set(seen or ())]
    readable = _readable(catalog, unseen if len(unseen) >= ENOUGH else shelf, base)
    fits = 0
    if len(unseen) >= ENOUGH:
        vectors = encoder.encode_all(adapter for _, adapter in readable)
        crowded = encoder.crowding(vectors)
    else:
        fits = folds or (5 if encoder.kind == "ridge" else 1)
        readable, vectors, crowded = _left_out(
            readable, words, encoder_path(catalog.home, base), encoder, fits, progress
        )
    fill(catalog, words)
    _, owners, matrix = catalog.vectors(words.space)
    truth = dict(zip(owners, matrix, strict=True))
    told = [one.texts for one, _ in readable]
    texts = sorted({text for some in told for text in some})
    fitting = np.array([[text in some for some in told] for text in texts])
    queries = words.encode(texts)
    return Evaluation(
        base=encoder.base,
        kind=encoder.kind,
        space=encoder.space,
        pool=len(readable),
        queries=len(texts),
        seen=None if seen is None else len(seen),
        fits=fits,
        found=figures(queries @ vectors.T - crowded, fitting),
        chance=chance(fitting),
        ceiling=figures(queries @ np.stack([truth[one.entry.id] for one, _ in readable]).T, fitting),
        named=figures(vectors @ queries.T, fitting.T),
    )


def figures(scores: NDArray[Any], fitting: NDArray[np.bool_]) -> Figures:
    """Recall and reciprocal rank of rankings by score (queries, pool), given what fits each query."""
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(fitting, order, axis=1)
    wanted = fitting.sum(axis=1)
    recall = {k: float((ranked[:, :k].sum(axis=1) / np.minimum(wanted, k)).mean()) for k in DEPTHS}
    return Figures(recall, float((1 / (1 + ranked.argmax(axis=1))).mean()))


def chance(fitting: NDArray[np.bool_]) -> Figures:
    """The expectation of `figures` for rankings at random."""
    pool, wanted = fitting.shape[1], fitting.sum(axis=1).tolist()
    recall = {k: float(np.mean([min(k, pool) / pool * m / min(k, m) for m in wanted])) for k in DEPTHS}
    return Figures(recall, float(np.mean([_first(pool, m) for m in wanted])))


def _first(pool: int, wanted: int) -> float:
    """E[1 / rank of the first of `wanted` among `pool` in random order]."""
    ways = math.comb(pool, wanted)
    return sum(math.comb(pool - rank, wanted - 1) / ways / rank for rank in range(1, pool - wanted + 2))


def _opened(catalog: Catalog, shelf: Iterable[Described], base: str) -> Iterable[Pair]:
    for one in shelf:
        try:
            yield one, replace(catalog.read(one.entry), base=base)
        except LoraHubError as error:
            log.warning("%s is left out of the fit: %s", one.entry.name, error)


def _alike(pairs: Iterable[Pair]) -> Iterable[Pair]:
    """Those whose modules have the shapes that most have: one stray file must not prevent a fit."""
    pairs = list(pairs)
    counts: dict[str, Counter[tuple[int, int]]] = {}
    for _, adapter in pairs:
        for name, shape in adapter.shapes.items():
            counts.setdefault(name, Counter())[shape.inputs, shape.outputs] += 1
    usual = {name: count.most_common(1)[0][0] for name, count in counts.items()}
    for one, adapter in pairs:
        odd = [n for n, shape in adapter.shapes.items() if (shape.inputs, shape.outputs) != usual[n]]
        if odd:
            log.warning("%s is left out of the fit: %s is %s", one.entry.name, odd[0], adapter.shapes[odd[0]])
        else:
            yield one, adapter


def _readable(catalog: Catalog, shelf: Iterable[Described], base: str) -> list[Pair]:
    return list(_alike(_opened(catalog, shelf, base)))


def _left_out(
    readable: Sequence[Pair],
    words: TextEncoder,
    place: Path,
    encoder: WeightEncoder,
    folds: int,
    progress: Callable[[Step], None] | None,
) -> tuple[list[Pair], Vectors, Vectors]:
    """The adapters that were left out of fits like the encoder's; their vectors (n, dim) and crowding (n,) by the fit
    that lacks them."""
    from .fitting import Settings

    if not 1 <= folds <= len(readable) // 2:
        raise BadOption(f"folds is {folds}; expected 1 to {len(readable) // 2}, half the number of adapters")
    known = {one.name for one in fields(Settings)}
    told = encoder.told.get("settings", {})
    settings = Settings(**{name: value for name, value in told.items() if name in known})
    order = np.random.default_rng(settings.seed).permutation(len(readable))
    judged: list[Pair] = []
    vectors, crowded = [], []
    for part in np.array_split(order, folds if folds > 1 else ALONE)[:folds]:
        left = set(part.tolist())
        rest = [pair for place_, pair in enumerate(readable) if place_ not in left]
        options = {name: value for name, value in encoder.options.items() if name != "components"}
        fitted, checkpoint = _fitted(rest, words, place, encoder.kind, settings, options, progress)
        some = [readable[place_] for place_ in sorted(left)]
        vectors.append(fitted.encode_all(adapter for _, adapter in some))
        crowded.append(fitted.crowding(vectors[-1]))
        judged += some
        checkpoint.unlink(missing_ok=True)
    return judged, np.concatenate(vectors), np.concatenate(crowded)


def _fitted(
    readable: Sequence[Pair],
    words: TextEncoder,
    place: Path,
    kind: str,
    settings: Settings,
    options: Mapping[str, Any],
    progress: Callable[[Step], None] | None,
) -> tuple[WeightEncoder, Path]:
    """The encoder, and its checkpoint, which may be deleted once the encoder is safe."""
    from .fitting import Example, fit

    checkpoint = _checkpoint(place, kind, settings, [one for one, _ in readable])
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    examples = [Example(adapter, one.texts) for one, adapter in readable]
    encoder = fit(kind, examples, words, settings, options=options, checkpoint=checkpoint, progress=progress)
    return encoder, checkpoint


def _tidy(checkpoint: Path) -> None:
    """Delete the checkpoints of this base, older fits' too."""
    stem = checkpoint.name.split(".")[0]
    for old in checkpoint.parent.glob(f"{stem}.*.checkpoint"):
        old.unlink(missing_ok=True)


def _checkpoint(path: Path, kind: str, settings: Settings, shelf: Sequence[Described]) -> Path:
    """Where this fit's checkpoint lies; one of other adapters, words or settings lies elsewhere."""
    told = [kind, asdict(settings), [(one.entry.digest, one.texts) for one in shelf]]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return path.with_name(f"{hashlib.sha256(path.name.encode()).hexdigest()[:12]}.{digest[:12]}.checkpoint")

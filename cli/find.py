"""Commands that find adapters: by words, by meaning, by weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .settings import algebra_on_one_thread, open_catalog

if TYPE_CHECKING:
    from ..hub.catalog import Catalog
    from ..index.search import Hit
    from ..index.weight_encoder import WeightEncoder


def search(
    query: Annotated[str, typer.Argument(help="What the adapter should do or show.")],
    base: options.Base = None,
    tag: Annotated[list[str] | None, typer.Option(help="Only adapters with this tag; may be repeated.")] = None,
    limit: options.Limit = 10,
    mode: Annotated[
        str, typer.Option(help="hybrid, text, meaning, or weights: what adapters do, whatever is said of them.")
    ] = "hybrid",
    model: Annotated[
        str | None, typer.Option(help="A sentence-transformers model instead of the packaged one.")
    ] = None,
    for_task: Annotated[
        bool,
        typer.Option(
            "--for-task",
            help="Rank adapters of one base by how well they will do a task, as learned by generator measure.",
        ),
    ] = False,
    json: options.Json = False,
) -> None:
    """Search the catalogue by words, by meaning, and by what the weights do where the base has a weight encoder."""
    from ..index.embed import fill
    from ..index.encoders.text import text
    from ..index.search import search as search_index
    from . import show

    if for_task:
        _for_task(query, base, tag, limit, model, json=json)
        return
    with open_catalog() as catalog:
        encoder = text(model) if mode in {"hybrid", "meaning", "weights"} else None
        if encoder and mode != "weights":
            with show.progress("reading descriptions", quiet=json) as advance:
                fill(catalog, encoder, progress=advance)
        asked = encoder if mode != "meaning" else None
        known = encoded(catalog, asked.space, unknown=mode == "weights", quiet=json) if asked else []
        hits = search_index(
            catalog, query, mode=mode, base=base, tags=tag or (), limit=limit, encoder=encoder, encoders=known
        )
    if json:
        show.as_json([_plain(hit) for hit in hits])
        return
    if not hits:
        show.note(f"nothing found for {query!r}")
        return
    show.table(
        ["score", "name", "base", "why", "description"],
        [
            (
                f"{h.score:.3f}",
                h.entry.name,
                show.base_name(h.entry.base),
                "; ".join(h.why),
                _start(h.entry.description),
            )
            for h in hits
        ],
    )


def _for_task(
    query: str, base: str | None, tags: list[str] | None, limit: int, model: str | None, *, json: bool
) -> None:
    """The adapters of a base by how well they will do a task; the learned similarity where it is good, else by text."""
    from ..generate.library import open_library, ranked, reread
    from ..index.encoders.text import text
    from ..index.own_similarity import ranker
    from . import show

    encoder = text(model)
    with open_catalog() as catalog:
        library = open_library(catalog, encoder, base=base, tags=tags or ())
        words, why = ranker(catalog.home, str(library.base), encoder)
    shelf, by = reread(library, words), words or encoder
    found = ranked(shelf, by.encode([query])[0], limit)
    how = "learned" if words else "text"
    if json:
        rows = [(library.experts[row], score) for row, score in found]
        show.as_json(
            [{"id": e.id, "name": e.name, "score": s, "base": library.base, "by": how, "why": [why]} for e, s in rows]
        )
        return
    show.note(f"ranked {why}")
    show.table(
        ["score", "name", "description"],
        [(f"{score:.3f}", shelf.experts[row].name, _start(shelf.experts[row].description)) for row, score in found],
    )


def encoded(catalog: Catalog, texts: str | None, *, unknown: bool = True, quiet: bool) -> list[WeightEncoder]:
    """The weight encoders for the catalogue's bases (into the space `texts`), all adapters encoded that can be.

    unknown: whether adapters of unknown base are tried, too.
    """
    from ..index.embed import fill_encoded
    from ..index.fitted import encoders
    from . import show

    found = encoders(catalog, texts, unknown=unknown)
    for encoder in found:
        with show.progress("reading weights", quiet=quiet) as advance:
            fill_encoded(catalog, encoder, unknown=unknown, progress=advance)
    return found


def _plain(hit: Hit) -> dict[str, object]:
    entry = hit.entry
    found = {"id": entry.id, "name": entry.name, "score": hit.score, "base": entry.base, "why": list(hit.why)}
    return {**found, "confidence": hit.confidence}


def _start(text: str, most: int = 60) -> str:
    """The beginning of a text, cut between words."""
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " ..."


def similar(ref: options.Ref, limit: options.Limit = 10, json: options.Json = False) -> None:
    """Find an adapter's neighbours in weight space; equal deltas are marked, however they are stored."""
    from ..index.fitted import encoders
    from ..index.similar import similar as similar_to
    from . import show

    algebra_on_one_thread()
    with open_catalog() as catalog, show.progress("comparing", quiet=json) as advance:
        entry, known = catalog.entry(ref), encoders(catalog)
        neighbours = similar_to(catalog, entry, limit=limit, encoders=known, progress=advance)
    if json:
        show.as_json(
            [
                {
                    "id": n.entry.id,
                    "name": n.entry.name,
                    "base": n.entry.base,
                    "score": n.score,
                    "same_delta": n.same_delta,
                    "cosine": n.cosine,
                    "overlap": n.overlap,
                    "norm_ratio": n.norm_ratio,
                    "shared_modules": n.shared_modules,
                    "encoded": n.encoded,
                    "confidence": n.confidence,
                    "why": list(n.why),
                }
                for n in neighbours
            ]
        )
        return
    if not neighbours:
        show.note(f"nothing else in the catalogue is for the base of {ref}")
        return
    show.table(
        ["score", "name", "cosine", "overlap", "norm ratio", "encoded", "why"],
        [
            (
                f"{n.score:.3f}",
                n.entry.name,
                f"{n.cosine:.4f}",
                f"{n.overlap:.4f}",
                f"{n.norm_ratio:.4f}",
                None if n.encoded is None else f"{n.encoded:.4f}",
                "; ".join(n.why),
            )
            for n in neighbours
        ],
    )

"""The describe command: what an adapter does, where nobody has said it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .settings import algebra_on_one_thread, open_catalog

if TYPE_CHECKING:
    from ..index.describe import Description


def describe(
    ref: options.Ref,
    limit: Annotated[int, typer.Option("--limit", help="How many words and neighbours to show.")] = 5,
    model: Annotated[
        str | None, typer.Option(help="A sentence-transformers model instead of the packaged one.")
    ] = None,
    alpha: options.Alpha = None,
    allow_pickle: options.AllowPickle = False,
    json: options.Json = False,
) -> None:
    """Say what an adapter does, from its weights alone: the nearest words and adapters, and how sure that is."""
    from ..index.describe import describe as read_off
    from ..index.describe import encoder_that_reads
    from ..index.encoders.text import text
    from . import show
    from .refs import find, load

    algebra_on_one_thread()
    with open_catalog() as catalog, show.progress("reading weights", quiet=json) as advance:
        named = find(catalog, ref)
        adapter = load(named, allow_pickle=allow_pickle, alpha=alpha)
        encoder = encoder_that_reads(catalog.home, adapter)
        adapter = replace(adapter, meta={**adapter.meta, "name": named.name})
        found = read_off(catalog, adapter, encoder, text(model), entry=named.entry, limit=limit, progress=advance)
    if json:
        show.as_json({"ref": ref, "name": named.name, **_plain(found)})
    else:
        _print(named.name, found)


def _plain(found: Description) -> dict[str, Any]:
    return {
        "base": found.base,
        "space": found.space,
        "certain": found.certain,
        "cases": found.cases,
        "words": [{"words": w.words, "cosine": w.cosine, "confidence": w.confidence} for w in found.words],
        "neighbours": [
            {"id": n.entry.id, "name": n.entry.name, "cosine": n.cosine, "confidence": n.confidence, "said": n.said}
            for n in found.neighbours
        ],
    }


def _print(name: str, found: Description) -> None:
    from . import show

    if not found.certain:
        show.note(f"{name}: nothing is certain; the nearest of it is less often right than wrong")
    rows = [(f"{w.cosine:.3f}", f"{w.confidence:.0%}", "words", w.words) for w in found.words]
    rows += [(f"{n.cosine:.3f}", f"{n.confidence:.0%}", n.entry.name, n.said) for n in found.neighbours]
    show.table(["cosine", "right", "nearest", "says"], rows)
    if found.cases:
        show.line(f"right: how often the nearest was at such a cosine, measured on {found.cases} adapters held out")
    else:
        show.line("right: unknown, because this encoder was measured on no adapter held out")

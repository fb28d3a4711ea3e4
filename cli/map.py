"""The map command: the library in two dimensions, as a picture or a page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..hub.errors import BadOption, RetrievalError
from . import options
from .settings import open_catalog

if TYPE_CHECKING:
    from ..hub.catalog import Catalog


def map_(
    out: options.Out,
    base: options.Base = None,
    by: Annotated[
        str | None, typer.Option(help="weights or text; default: weights where there is an encoder for the base.")
    ] = None,
    labels: Annotated[int, typer.Option(help="Names to write at most, where there is room.")] = 60,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Draw the library: adapters that are alike lie together. PNG, or HTML that names what the mouse is over."""
    from ..index.plane import points
    from . import show
    from .plot_map import check_map_target, save_map

    if by not in (None, "weights", "text"):
        raise BadOption(f"--by is {by!r}; expected weights or text")
    check_map_target(out, force=force)
    with open_catalog() as catalog:
        by, spaces = _spaces(catalog, by, base, quiet=json)
        drawn = points(catalog, spaces, base=base)
        missing = len(catalog.ids(base=base)) - len(drawn)
    if not dry_run:
        save_map(drawn, out, title=f"{len(drawn)} adapters by {by}", labels=labels, force=force)
    if json:
        rows = [{"id": p.entry.id, "name": p.entry.name, "x": p.x, "y": p.y, "theme": p.theme} for p in drawn]
        show.as_json({"out": str(out), "by": by, "missing": missing, "points": rows})
        return
    show.line(f"{'would draw' if dry_run else 'drew'} {out}: {len(drawn)} adapters by {by}")
    if missing:
        show.note(f"{missing} adapters have no vector by {by} and are not on the map")


def _spaces(catalog: Catalog, by: str | None, base: str | None, *, quiet: bool) -> tuple[str, list[str]]:
    """What to draw by, and the spaces that hold it, filled."""
    from ..hub.bases import same_base
    from ..index.embed import fill
    from ..index.encoders.text import text
    from . import show
    from .find import encoded

    if by != "text":
        known = [one.space for one in encoded(catalog, None, quiet=quiet) if same_base(one.base, base)]
        if known:
            return "weights", known
        if by == "weights":
            raise RetrievalError(
                f"there is no weight encoder for {base or 'these adapters'}; fit one with `lorahub encoder fit`, or "
                "draw the map --by text"
            )
    words = text()
    with show.progress("reading descriptions", quiet=quiet) as advance:
        fill(catalog, words, progress=advance)
    return "text", [words.space]

"""Commands on the catalogue: add, list, show, tag, remove, verify."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .settings import open_catalog

if TYPE_CHECKING:
    from ..hub.catalog import Catalog
    from ..hub.entries import Added, Entry, Link


MOST_SHOWN = 50  # rows of a long `add`
MOST_PICTURES = 10


def add(
    paths: Annotated[list[Path], typer.Argument(help="Adapter files or folders; folders are searched through.")],
    base: options.Base = None,
    name: Annotated[str | None, typer.Option(help="Name for a single adapter; default: from its path.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Tag to attach; may be repeated.")] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Keep a copy in the home folder.")] = False,
    index: Annotated[bool, typer.Option(help="Make new adapters searchable by meaning at once.")] = True,
    allow_pickle: options.AllowPickle = False,
    json: options.Json = False,
) -> None:
    """Add adapters to the catalogue. Adding a folder again costs a look at what changed."""
    from . import show

    with open_catalog() as catalog:
        results: list[Added] = []
        with show.progress("adding", quiet=json) as advance:
            for result in catalog.add(
                paths, base=base, name=name, tags=tag or (), copy=copy, allow_pickle=allow_pickle
            ):
                results.append(result)
                advance(len(results), None)
        if index and any(result.status == "added" for result in results):
            _embed(catalog, quiet=json)
    if json:
        show.as_json([asdict(result) for result in results])
    else:
        _print_added(results)
    _exit_if_nothing(results)


def _embed(catalog: Catalog, *, quiet: bool) -> None:
    from ..index.embed import fill
    from ..index.encoders.text import text
    from . import show

    with show.progress("reading descriptions", quiet=quiet) as advance:
        fill(catalog, text(), progress=advance)


def _print_added(results: list[Added]) -> None:
    from collections import Counter

    from . import show

    kept = [one for one in results if one.status in {"added", "duplicate"}]
    if kept:
        show.table(
            ["status", "name", "base", "format", "rank", "modules", "remark"],
            [
                (r.status, r.name, show.base_name(r.base), r.format, r.rank, r.modules, r.reason or "")
                for r in kept[:MOST_SHOWN]
            ],
        )
    if len(kept) > MOST_SHOWN:
        show.line(f"... and {len(kept) - MOST_SHOWN} more; `lorahub list` shows all")
    for one in results:
        if one.status == "rejected":
            show.note(f"rejected {one.reason}")
    counts = Counter(one.status for one in results)
    show.note(", ".join(f"{count} {status}" for status, count in sorted(counts.items())) or "no adapter files found")


def _exit_if_nothing(results: list[Added]) -> None:
    """Exit 1 (4 where all were refused for safety) if every file offered was rejected."""
    if results and all(result.status == "rejected" for result in results):
        unsafe = all("--allow-pickle" in (result.reason or "") for result in results)
        raise typer.Exit(4 if unsafe else 1)


def list_(
    base: options.Base = None,
    tag: Annotated[list[str] | None, typer.Option(help="Only adapters with this tag; may be repeated.")] = None,
    json: options.Json = False,
) -> None:
    """List the adapters in the catalogue."""
    from . import show

    with open_catalog() as catalog:
        entries = catalog.entries(base=base, tags=tag or ())
    if json:
        show.as_json([brief(entry) for entry in entries])
        return
    show.table(
        ["id", "name", "base", "format", "rank", "modules", "mergeable", "tags"],
        [
            (e.id[:8], e.name, show.base_name(e.base), e.format, _ranks(e), e.modules, e.mergeable, list(e.tags)[:6])
            for e in entries
        ],
    )


def brief(entry: Entry) -> dict[str, Any]:
    """An entry as `list` shows it."""
    keys = ("id", "name", "base", "format", "modules", "parameters", "mergeable", "reason", "tags")
    return {"rank": entry.rank_max, **{key: getattr(entry, key) for key in keys}}


def _ranks(entry: Entry) -> str:
    same = entry.rank_min == entry.rank_max
    return str(entry.rank_max) if same else f"{entry.rank_min}-{entry.rank_max}"


def show(ref: options.Ref, json: options.Json = False) -> None:
    """Show all that is known of an adapter, and where it came from."""
    from . import show as screen

    with open_catalog() as catalog:
        entry = catalog.entry(ref)
        links = catalog.lineage(ref)
        pictures = catalog.pictures(ref)
    data = {**asdict(entry), "lineage": [asdict(link) for link in links], "pictures": list(map(_picture, pictures))}
    if json:
        screen.as_json(data)
        return
    screen.fields({key: value for key, value in data.items() if key not in ("lineage", "pictures")})
    for link in links:
        screen.line(
            f"made by {link.operation} from {link.parent_name} ({link.parent_digest[:8]}), weight {link.weight:g}"
        )
    for one in data["pictures"][:MOST_PICTURES]:
        screen.line(f"painted {one['out']}: {one['prompt']!r}, weight {one['weight']:g}")
    if len(pictures) > MOST_PICTURES:
        screen.line(f"... and {len(pictures) - MOST_PICTURES} older pictures; --json lists all")


def _picture(link: Link) -> dict[str, Any]:
    """A picture that was painted with an adapter, as `show` lists it."""
    told = {key: link.options.get(key) for key in ("out", "prompt", "seeds")}
    return {**told, "id": link.child, "weight": link.weight, "created": link.created}


def tag(
    ref: options.Ref,
    tags: Annotated[list[str] | None, typer.Argument(metavar="[TAG...]", help="Tags to attach.")] = None,
    drop: Annotated[list[str] | None, typer.Option("--drop", help="Tag to take away; may be repeated.")] = None,
    json: options.Json = False,
) -> None:
    """Attach tags to an adapter, or take them away."""
    from . import show

    with open_catalog() as catalog:
        entry = catalog.tag(ref, tags or (), remove=drop or ())
    show.as_json(brief(entry)) if json else show.line(f"{entry.name}: {', '.join(entry.tags) or 'no tags'}")


def remove(
    refs: Annotated[list[str], typer.Argument(help="Adapters by name or id.")], json: options.Json = False
) -> None:
    """Forget adapters. Files of your own stay where they are."""
    from . import show

    with open_catalog() as catalog:
        entries = [catalog.remove(ref) for ref in refs]
    show.as_json([brief(entry) for entry in entries]) if json else show.line(
        f"removed {', '.join(entry.name for entry in entries)}"
    )


def verify(json: options.Json = False) -> None:
    """Check the catalogue: the database, the stored copies, the files it points to. Exit 3 if anything is amiss."""
    from . import show

    with open_catalog() as catalog:
        problems = catalog.verify()
    if json:
        show.as_json(problems)
    else:
        show.line("\n".join(problems) or "all is well")
    if problems:
        raise typer.Exit(3)

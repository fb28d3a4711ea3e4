"""Commands on single files: inspect, check, convert."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .settings import open_catalog


def inspect(
    path: Annotated[Path, typer.Argument(help="An adapter file or a PEFT folder.")],
    dialect: Annotated[str | None, typer.Option(help="Read by this dialect instead of the one detected.")] = None,
    allow_pickle: options.AllowPickle = False,
    json: options.Json = False,
) -> None:
    """Say what a file is from its header alone: format, base, ranks, scales, metadata, what it cannot do."""
    from ..hub.reading import inspect as inspect_file
    from . import show

    found = asdict(inspect_file(path, allow_pickle=allow_pickle, dialect=dialect))
    if json:
        show.as_json(found)
        return
    low, high = found.pop("ranks")
    metadata = found.pop("metadata")
    found["rank"] = str(high) if low == high else f"{low} to {high}"
    found["dialects"] = [f"{name} ({count})" for name, count in found["dialects"].items()]
    show.fields(found)
    if metadata:
        show.line(f"header: {len(metadata)} entries")
        show.fields({f"  {key}": value[:100] for key, value in metadata.items()})


def check(
    ref: options.Ref,
    base: Annotated[
        Path | None, typer.Option("--base", help="The base: a config.json, model folder, pipeline or safetensors file.")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--for", help="A target to load it in: peft, diffusers or vllm.")
    ] = None,
    allow_pickle: options.AllowPickle = False,
    json: options.Json = False,
) -> None:
    """Would it apply? Counts modules that match the base, have no place in it, or do nothing. Exit 3 if not in full."""
    from ..hub.coverage import base_weights, coverage
    from . import show
    from .refs import find, load

    with open_catalog() as catalog:
        adapter = load(find(catalog, ref), allow_pickle=allow_pickle)
    found = coverage(adapter, base_weights(base) if base else None, target)
    if json:
        show.as_json({**asdict(found), "complete": found.complete})
    else:
        show.line(f"{adapter.name}: {len(found.matched)} of {len(adapter.shapes)} modules apply")
        for kind in ("unmatched", "misfit", "zero", "nonfinite", "problems"):
            items = getattr(found, kind)
            if items:
                more = f" and {len(items) - 5} more" if len(items) > 5 else ""
                show.line(f"{kind}: {len(items)}: {'; '.join(items[:5])}{more}")
    if not found.complete:
        raise typer.Exit(3)


def convert(
    ref: options.Ref,
    out: options.Out,
    to: options.To = None,
    dtype: options.Dtype = None,
    alpha: options.Alpha = None,
    allow_pickle: options.AllowPickle = False,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Rewrite an adapter in another dialect, with scale 1 in every module."""
    from ..hub.writing import ready, save
    from . import show
    from .make import dtype_of, fitting_format
    from .refs import find, load

    with open_catalog() as catalog:
        adapter = load(find(catalog, ref), allow_pickle=allow_pickle, alpha=alpha)
    target = to or fitting_format(adapter)
    path: Any = out
    if not dry_run:
        path = save(ready(adapter, dtype_of(dtype)), out, target, force=force)
    result = {"out": str(path), "format": target, "modules": len(adapter.shapes), "extras": sorted(adapter.extras)}
    if json:
        show.as_json(result)
    else:
        verb = "would write" if dry_run else "wrote"
        show.line(f"{verb} {path} ({target}, {len(adapter.shapes)} modules, {len(adapter.extras)} extra tensors)")

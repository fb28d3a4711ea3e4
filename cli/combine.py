"""The merge command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..merge.card import Ingredient, card, record
from . import options
from .settings import algebra_on_one_thread, open_catalog

if TYPE_CHECKING:
    from ..merge.run import Merged


def merge(
    refs: options.Refs,
    out: options.Out,
    method: Annotated[str, typer.Option(help="The merging method.")] = "exact",
    weight: Annotated[
        list[float] | None, typer.Option("--weight", "-w", help="Weights in the adapters' order, or one for all.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB=W,W", help="Other weights for the modules that a glob names, '*.mlp.*=1,0.5'."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Largest rank of the result.")] = None,
    energy: Annotated[float | None, typer.Option(help="Share of the squared norm to keep, such as 0.97.")] = None,
    option: options.Method = None,
    to: options.To = None,
    dtype: options.Dtype = None,
    extras: Annotated[
        str, typer.Option(help="Biases, heads and embeddings: refuse, drop, first or average.")
    ] = "refuse",
    base: Annotated[str | None, typer.Option("--base", help="Your word that all are for this base.")] = None,
    alpha: options.Alpha = None,
    name: Annotated[str | None, typer.Option(help="Name in the catalogue; default: from --out.")] = None,
    allow_pickle: options.AllowPickle = False,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Merge adapters of one base into one file, exactly or by a method, and report how exact the result is."""
    from ..merge.run import merge as merge_adapters
    from .make import check_name, dtype_of, fitting_format, remember
    from .refs import find, load, weights_of

    algebra_on_one_thread()
    names, weights = weights_of(refs, weight or [])
    given: dict[str, Any] = options.pairs(option)
    given |= {key: value for key, value in (("rank", rank), ("energy", energy)) if value is not None}
    with open_catalog() as catalog:
        check_name(catalog, name, out)
        inputs = [find(catalog, ref) for ref in names]
        adapters = [load(one, allow_pickle=allow_pickle, alpha=alpha) for one in inputs]
        merged = merge_adapters(
            adapters,
            method,
            weights,
            dtype=dtype_of(dtype),
            extras=extras,
            base=base,
            given=given,
            where=options.weight_lists(where),
        )
        target = to or fitting_format(merged.adapter)
        if dry_run:
            _announce(merged.adapter.shapes, out, target, json)
            return
        ingredients = [
            Ingredient(one.name, one.digest(allow_pickle=allow_pickle), share, adapter.base, one.description)
            for one, share, adapter in zip(inputs, weights, adapters, strict=True)
        ]
        path, made = _carry_out(merged, method, where or [], ingredients, out, target, force=force, quiet=json)
        parents = list(zip(inputs, weights, strict=True))
        remember(catalog, path, name, f"merge:{method}", parents, made, base=merged.adapter.base)
    _print(made, path, json)


def _carry_out(
    merged: Merged,
    method: str,
    where: Sequence[str],
    ingredients: Sequence[Ingredient],
    out: Path,
    target: str,
    *,
    force: bool,
    quiet: bool,
) -> tuple[Path, dict[str, Any]]:
    """Write the merge, module by module, with its card; returns where, and the facts about it."""
    from ..hub.writing import save
    from . import show
    from .make import command_line, versions

    history = [{"name": one.name, "weight": one.weight, "sha256": one.digest} for one in ingredients]
    result = replace(merged.adapter, meta={**merged.adapter.meta, "merged_from": history})

    def facts() -> dict[str, Any]:
        chosen = dict(merged.options) | ({"where": list(where)} if where else {})
        return record(method, ingredients, chosen, merged.report, versions())

    def model_card() -> str:
        return card(facts(), result, command=command_line(sys.argv), library=target)

    with show.progress("merging", quiet=quiet) as advance:
        path = save(_counted(result, advance), out, target, force=force, card=model_card)
    return path, facts()


def _counted(adapter: Any, advance: Any) -> Any:
    """The adapter, telling a progress bar whenever a module is read."""
    from ..hub.adapter import LazyModules

    done: set[str] = set()

    def load(module: str) -> Any:
        done.add(module)
        advance(len(done), len(adapter.shapes))
        return adapter.modules[module]

    return replace(adapter, modules=LazyModules(adapter.shapes, load))


def _announce(shapes: Any, out: Any, target: str, json: bool) -> None:
    from . import show

    ranks = sorted({shape.rank for shape in shapes.values()})
    plan = {"out": str(out), "format": target, "modules": len(shapes), "ranks": ranks}
    show.as_json(plan) if json else show.line(f"would write {out} ({target}, {len(shapes)} modules, ranks {ranks})")


def _print(made: dict[str, Any], path: Any, json: bool) -> None:
    from . import show

    if json:
        show.as_json({"out": str(path), **made, "modules": len(made["modules"]), "per_module": made["modules"]})
        return
    inputs = " ".join(f"{one['weight']:+g}*{one['name']}" for one in made["inputs"])
    show.line(f"wrote {path}: {made['method']} of {inputs}, {len(made['modules'])} modules")
    show.line(
        f"against the exact sum: error {made['error']:.3e}, cosine {made['cosine']:.6f}, "
        f"norm ratio {made['norm_ratio']:.6f}, energy {made['energy']:.6f}"
    )
    worst = sorted(made["modules"].items(), key=lambda item: -item[1]["error"])[:3]
    if worst and worst[0][1]["error"] > 1e-6:
        show.table(
            ["least exact modules", "rank", "error", "energy"],
            [(name, one["rank"], f"{one['error']:.3e}", f"{one['energy']:.6f}") for name, one in worst],
        )

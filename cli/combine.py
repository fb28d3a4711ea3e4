"""The merge command."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..merge.card import Ingredient, card, record
from . import options
from .settings import algebra_on_one_thread, open_catalog

if TYPE_CHECKING:
    from ..hub.adapter import Adapter
    from ..merge.run import Merged


def merge(
    refs: options.Refs,
    out: options.Out,
    method: Annotated[
        str | None, typer.Option(help="The merging method; default: exact where there are weights, else core.")
    ] = None,
    weight: options.Weights = None,
    where: options.Where = None,
    rank: Annotated[int | None, typer.Option(help="Largest rank of the result.")] = None,
    energy: Annotated[float | None, typer.Option(help="Share of the squared norm to keep, such as 0.97.")] = None,
    option: options.Method = None,
    optimize: options.Optimize = None,
    evaluations: Annotated[int, typer.Option(help="How often --optimize may run the command.")] = 40,
    seed: Annotated[int, typer.Option(help="Seed of --optimize; a method's own is -o seed=N.")] = 0,
    to: options.To = None,
    dtype: options.Dtype = None,
    extras: options.Extras = "refuse",
    base: options.Word = None,
    alpha: options.Alpha = None,
    name: Annotated[str | None, typer.Option(help="Name in the catalogue; default: from --out.")] = None,
    allow_pickle: options.AllowPickle = False,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Merge adapters of one base into one file, exactly or by a method, and report how exact the result is."""
    from ..merge.advise import by_default
    from ..merge.run import merge as merge_adapters
    from .make import check_name, dtype_of, remember
    from .refs import any_weight, find, load, weights_of

    algebra_on_one_thread()
    names, weights = weights_of(refs, weight or [])
    method = method or by_default(len(names), weighted=bool(weight or where) or any_weight(refs))
    given: dict[str, Any] = options.pairs(option)
    given |= {key: value for key, value in (("rank", rank), ("energy", energy)) if value is not None}
    settings: dict[str, Any] = {"dtype": dtype_of(dtype), "extras": extras, "base": base}
    settings["where"] = options.weight_lists(where)
    with open_catalog() as catalog:
        check_name(catalog, name, out)
        inputs = [find(catalog, ref) for ref in names]
        adapters = [load(one, allow_pickle=allow_pickle, alpha=alpha) for one in inputs]
        noted: dict[str, Any] = {"where": where} if where else {}
        if optimize and not dry_run:
            search = {"to": to, "seed": seed, "evaluations": evaluations, "quiet": json}
            weights, noted["search"] = _searched(adapters, method, optimize, weights, given, search | settings)
        merged = merge_adapters(adapters, method, weights, given=given, **settings)
        target = Target(out, to, force=force, quiet=json)
        if dry_run:
            _announce(merged.adapter, target)
            return
        ingredients = [
            Ingredient(one.name, one.digest(allow_pickle=allow_pickle), share, adapter.base, one.description)
            for one, share, adapter in zip(inputs, weights, adapters, strict=True)
        ]
        path, made = _carry_out(merged, method, noted, ingredients, target)
        parents = list(zip(inputs, weights, strict=True))
        remember(catalog, path, name, f"merge:{method}", parents, made, base=merged.adapter.base)
    _print(made, path, json)


@dataclass(frozen=True)
class Target:
    """Where a result goes, in which dialect (None: the fitting one), and whether it may replace and speak."""

    out: Path
    to: str | None
    force: bool
    quiet: bool

    def dialect(self, adapter: Adapter) -> str:
        from .make import fitting_format

        return self.to or fitting_format(adapter)


def _searched(
    adapters: Sequence[Adapter],
    method: str,
    command: str,
    weights: Sequence[float],
    given: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> tuple[list[float], dict[str, Any]]:
    """Weights found on the user's metric, told to the reader, and the facts of the search."""
    from .optimize import announce, find_weights

    start = None if all(weight == 1 for weight in weights) else weights
    found, facts = find_weights(adapters, method, command, start=start, given=given, **settings)
    if not settings["quiet"]:
        announce(facts, [adapter.name for adapter in adapters])
    return found, facts


def _carry_out(
    merged: Merged,
    method: str,
    noted: Mapping[str, Any],
    ingredients: Sequence[Ingredient],
    target: Target,
) -> tuple[Path, dict[str, Any]]:
    """Write the merge, module by module, with its card; returns where, and the facts about it."""
    from ..hub.writing import save
    from . import show
    from .make import command_line, versions

    history = [{"name": one.name, "weight": one.weight, "sha256": one.digest} for one in ingredients]
    dialect = target.dialect(merged.adapter)
    result = replace(merged.adapter, meta={**merged.adapter.meta, "merged_from": history})

    def facts() -> dict[str, Any]:
        return record(method, ingredients, {**merged.options, **noted}, merged.report, versions())

    def model_card() -> str:
        return card(facts(), result, command=command_line(sys.argv), library=dialect)

    with show.progress("merging", quiet=target.quiet) as advance:
        path = save(_counted(result, advance), target.out, dialect, force=target.force, card=model_card)
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


def _announce(adapter: Adapter, target: Target) -> None:
    from . import show

    ranks = sorted({shape.rank for shape in adapter.shapes.values()})
    dialect, modules = target.dialect(adapter), len(adapter.shapes)
    if target.quiet:
        show.as_json({"out": str(target.out), "format": dialect, "modules": modules, "ranks": ranks})
    else:
        show.line(f"would write {target.out} ({dialect}, {modules} modules, ranks {ranks})")


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

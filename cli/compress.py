"""The compress command."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from json import dumps as as_text
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..hub.errors import BadOption, TargetExists
from . import options
from .settings import algebra_on_one_thread, open_catalog

if TYPE_CHECKING:
    from ..hub.adapter import Adapter
    from ..hub.lowrank import LowRank
    from ..merge.card import Ingredient
    from ..merge.compress import Compressed

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_LISTED = 10  # modules in the terminal's table


def compress(
    ref: options.Ref,
    out: options.Out,
    rank: Annotated[int | None, typer.Option(help="Largest rank of any module.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Share of its squared norm that each module keeps, such as 0.97.")
    ] = None,
    budget_params: Annotated[
        int | None, typer.Option(help="Parameters in all, spent on the modules where they keep most.")
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(help="Size of the tensor file, such as 8MB, 500kB, 4MiB or bytes; spent alike.")
    ] = None,
    to: options.To = None,
    dtype: options.Dtype = None,
    alpha: options.Alpha = None,
    name: Annotated[str | None, typer.Option(help="Name in the catalogue; default: from --out.")] = None,
    allow_pickle: options.AllowPickle = False,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Make an adapter smaller: the nearest one of a rank, a share of energy, a number of parameters or a file size."""
    from ..hub.reading import inspect
    from ..merge.card import Ingredient
    from ..merge.compress import compress as compress_adapter
    from . import show
    from .make import check_name, dtype_of, fitting_format, remember
    from .refs import find, load

    given = _only({"rank": rank, "energy": energy, "budget-params": budget_params, "max-size": max_size})
    size = bytes_of(max_size) if max_size is not None else None
    if out.exists() and not (force or dry_run):  # before any work
        raise TargetExists(f"{out}: exists already; choose another --out, or --force to replace it")
    algebra_on_one_thread()
    with open_catalog() as catalog, show.progress("compressing", quiet=json) as advance:
        check_name(catalog, name, out)
        source = find(catalog, ref)
        adapter = load(source, allow_pickle=allow_pickle, alpha=alpha)
        target = to or fitting_format(adapter)
        watched = _counted(adapter, 2 * len(adapter.shapes), advance)
        made = compress_adapter(
            watched, rank=rank, energy=energy, parameters=budget_params, size=size, to=target, dtype=dtype_of(dtype)
        )
        before = inspect(source.path, allow_pickle=True).size
        digest = source.digest(allow_pickle=True)  # read above, so with consent
        origin = Ingredient(source.name, digest, 1.0, adapter.base, source.description)

        def facts() -> dict[str, Any]:
            return _facts(made, origin, given, before, target)

        path = _carry_out(made, facts, None if dry_run else out, target, force=force) or out
        table = facts()
        if not dry_run:
            remember(catalog, path, name, "compress", [(source, 1.0)], table, base=adapter.base)
    if json:
        show.as_json({"out": str(path), **table, "modules": len(made.adapter.shapes), "per_module": table["modules"]})
    else:
        _print(table, made, f"{'would write' if dry_run else 'wrote'} {path}")


def _only(limits: Mapping[str, Any]) -> dict[str, Any]:
    """The one limit that was given. Raises BadOption where there is none, or are several."""
    given = {key: value for key, value in limits.items() if value is not None}
    if len(given) != 1:
        raise BadOption("give exactly one of --rank, --energy, --budget-params and --max-size")
    return given


def _carry_out(
    made: Compressed, facts: Callable[[], dict[str, Any]], out: Path | None, target: str, *, force: bool
) -> Path | None:
    """Write the result with its card and return where it lies; with `out` None only read it, for its report."""
    from ..hub.reading import inspect
    from ..hub.writing import save
    from ..merge.compress import read_all

    if out is None:
        read_all(made.adapter)
        return None
    path = save(made.adapter, out, target, force=force, card=lambda: _card(facts(), made))
    assert inspect(path).size == facts()["bytes"]["after"], f"{path}: has another size than was planned"
    return path


def bytes_of(text: str) -> int:
    """A file size as people write it: 8MB, 500kB (thousands), 4MiB (of 1024), or plain bytes. Raises BadOption."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([kmg]i?)?b?", text.strip().lower())
    size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if size < 1:
        raise BadOption(f"--max-size is {text!r}; expected a size such as 8MB, 500kB, 4MiB or a number of bytes")
    return size


def _facts(made: Compressed, origin: Ingredient, given: Mapping[str, Any], before: int, target: str) -> dict[str, Any]:
    """Everything about a compression as plain data, once all modules were read."""
    from ..merge.card import record
    from ..merge.compress import file_size
    from .make import versions

    facts = record("compress", [origin], given, made.report, versions())
    modules = {name: {"rank_before": rank, **facts["modules"][name]} for name, rank in made.before.items()}
    for name, least in made.sketched.items():
        modules[name]["least_error"] = least
    return {
        **facts,
        "format": target,
        "parameters": {"before": made.source.parameters, "after": made.adapter.parameters},
        "bytes": {"before": before, "after": file_size(made.adapter, target)},
        "left_out": made.left_out,
        "modules": modules,
    }


def _counted(adapter: Adapter, total: int, advance: Callable[[int, int | None], None]) -> Adapter:
    """The adapter, telling a progress bar whenever a module is read."""
    from ..hub.adapter import LazyModules

    reads = count(1)

    def load(name: str) -> LowRank:
        advance(min(next(reads), total), total)
        return adapter.modules[name]

    return replace(adapter, modules=LazyModules(adapter.shapes, load))


def _share(pair: Mapping[str, int]) -> str:
    return f"{pair['before']:,} -> {pair['after']:,} ({pair['after'] / pair['before']:.1%})"


def _print(facts: Mapping[str, Any], made: Compressed, verb: str) -> None:
    from . import show

    kept, modules = len(made.adapter.shapes), facts["modules"]
    [limit] = facts["options"].items()
    show.line(f"{verb}: {facts['inputs'][0]['name']}, --{limit[0]} {limit[1]}, {kept} modules")
    show.line(f"parameters {_share(facts['parameters'])}, bytes {_share(facts['bytes'])}")
    show.line(
        f"against the original: error {facts['error']:.3e}, cosine {facts['cosine']:.6f}, "
        f"norm ratio {facts['norm_ratio']:.6f}, energy {facts['energy']:.6f}"
    )
    for remark in _remarks(facts, made):
        show.line(remark)
    rows = sorted(modules.items(), key=lambda item: -item[1]["error"])
    show.table(
        ["least exact modules", "rank", "new rank", "energy", "error"],
        [
            (name, one["rank_before"], one["rank"], f"{one['energy']:.6f}", f"{one['error']:.3e}")
            for name, one in rows[:_LISTED]
        ],
    )
    if len(rows) > _LISTED:
        show.line(f"and {len(rows) - _LISTED} more; --json has all")


def _remarks(facts: Mapping[str, Any], made: Compressed) -> list[str]:
    """What the figures alone do not tell, in sentences."""
    found = []
    if not made.saves:
        found.append("nothing could be saved: every module is within the limit as it is; no rank changed")
    elif facts["bytes"]["after"] >= facts["bytes"]["before"]:
        found.append("the file is no smaller: its source is kept in a closer form, or a narrower type")
    if made.missed:
        found.append(f"the budget's best choice is not proved: another may keep {made.missed:.1e} more squared norm")
    if made.left_out:
        found.append(
            f"{len(made.left_out)} modules are left out (new rank 0): nothing of them was worth its parameters"
        )
    if made.sketched:
        names = list(made.sketched)
        found.append(
            f"{len(names)} modules were too wide to decompose and were approximated by a randomised SVD: their errors, "
            f"measured exactly, are at most {_excess(facts, made):.3f} times the least that their rank allows"
        )
    return found


def _excess(facts: Mapping[str, Any], made: Compressed) -> float:
    """How many times the least error that its rank allows a sketched module's is at most."""
    ratios = ((facts["modules"][name]["error"], least) for name, least in made.sketched.items())
    return max(error / least if least else (math.inf if error else 1.0) for error, least in ratios)


def _card(facts: Mapping[str, Any], made: Compressed) -> str:
    """The model card's Markdown: from what, by which limit, how exact, module by module."""
    from .make import command_line

    adapter, [origin], library = made.adapter, facts["inputs"], facts["format"]
    base = f"base_model: {as_text(adapter.base)}\nbase_model_relation: adapter\n" if adapter.base else ""
    words = f" ({origin['description'].rstrip('.')})" if origin["description"] else ""
    rows = "\n".join(
        f"| {name} | {one['rank_before']} | {one['rank']} | {one['energy']:.6f} | {one['error']:.2e} |"
        for name, one in facts["modules"].items()
    )
    remarks = "".join(f"{remark[0].upper()}{remark[1:]}.\n" for remark in _remarks(facts, made))
    versions = ", ".join(f"{key} {value}" for key, value in facts["versions"].items())
    return f"""---
library_name: {library}
{base}tags: [lora, {library}, compressed, lorahub]
---
# {adapter.name}

{origin["name"]}{words}, made smaller.

Made by lorahub ({versions}) from `{origin["digest"][:16]}`.

    {command_line(sys.argv)}

Parameters {_share(facts["parameters"])}, bytes {_share(facts["bytes"])}.
Against the original: relative error {facts["error"]:.3e}, cosine {facts["cosine"]:.6f}, norm ratio
{facts["norm_ratio"]:.6f}, energy {facts["energy"]:.6f}. Every module has scale 1 (alpha equals its rank).
{remarks}
| module | rank | new rank | energy | error |
|---|---|---|---|---|
{rows}
"""

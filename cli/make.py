"""The generate command, and what every command that makes an adapter needs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..hub.errors import BadOption, NameTaken, UnknownAdapter
from . import options
from .settings import open_catalog

if TYPE_CHECKING:
    import torch

    from ..generate.run import Generated
    from ..hub.adapter import Adapter
    from ..hub.catalog import Catalog
    from ..hub.entries import Entry
    from .refs import Named


def generate(
    description: Annotated[str, typer.Argument(help="What the adapter is to do, in a sentence.")],
    out: options.Out,
    base: options.Base = None,
    method: Annotated[str, typer.Option(help="The generator: blend or nearest.")] = "blend",
    option: options.Method = None,
    seed: Annotated[int, typer.Option(help="Seed for generators that draw at random.")] = 0,
    exclude: Annotated[list[str] | None, typer.Option(help="Adapter to leave out; may be repeated.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A sentence-transformers model instead of the packaged one.")
    ] = None,
    to: options.To = None,
    dtype: options.Dtype = None,
    name: Annotated[str | None, typer.Option(help="Name in the catalogue; default: from --out.")] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Replace an existing output, and make an adapter even where nothing is close to the description; that "
            "is recorded.",
        ),
    ] = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Make an adapter for a task from its description and the experts in the catalogue.

    Exit code 3, with the reason, where nothing in the catalogue is close to the description.
    """
    from dataclasses import asdict

    from ..generate.library import GENERATED, open_library
    from ..generate.run import generate as generate_adapter
    from ..hub.writing import ready, save
    from ..index.encoders.text import text
    from . import show
    from .refs import find

    given = options.pairs(option)
    with open_catalog() as catalog:
        check_name(catalog, name, out)
        encoder = text(model)
        library = open_library(catalog, encoder, base=base, exclude=exclude or ())
        made = generate_adapter(library, description, encoder, method=method, seed=seed, given=given, force=force)
        facts: dict[str, Any] = {
            "description": description,
            "method": method,
            "base": library.base,
            "seed": seed,
            "options": given,
        }
        facts |= {"experts": [asdict(one) for one in made.experts], "novelty": made.novelty, "versions": versions()}
        facts |= {"similarity": made.similarity, "close": library.close, "forced": made.forced}
        target = to or fitting_format(made.adapter)
        path = out
        if not dry_run:
            stored = ready(made.adapter, dtype_of(dtype))
            path = save(stored, out, target, force=force, card=lambda: _card(description, facts, made))
            parents = [(find(catalog, expert.id), expert.weight) for expert in made.experts]
            remember(catalog, path, name, GENERATED + method, parents, facts, base=library.base, seed=seed)
            _describe(catalog, path, description)
    if json:
        show.as_json({"out": str(path), **facts})
        return
    show.line(f"{'would write' if dry_run else 'wrote'} {path}: {method} for {description!r}")
    show.table(
        ["expert", "similarity", "weight"],
        [(e.name, f"{e.similarity:.3f}", f"{e.weight:.3f}") for e in made.experts],
    )
    show.line(f"novelty {made.novelty:.3f} (1 - cosine with the nearest of these experts; 0 is a copy)")


def _describe(catalog: Catalog, path: Path, description: str) -> None:
    from ..hub.reading import fingerprint

    catalog.describe(catalog.entry(fingerprint(path)[:16]).id, description)


def _card(description: str, facts: Mapping[str, Any], made: Generated) -> str:
    rows = "\n".join(f"| {e.name} | {e.similarity:.4f} | {e.weight:.4f} |" for e in made.experts)
    return f"""---
library_name: peft
base_model: {facts["base"]}
base_model_relation: adapter
tags: [lora, lorahub, generated]
---
# Generated: {description}

Made by lorahub: generator `{facts["method"]}`, seed {facts["seed"]}. It was trained on nothing: it is made of these
experts, chosen by how similar their descriptions are. Measure it on your task before you rely on it.

| expert | similarity | weight |
|---|---|---|
{rows}

Novelty (1 - cosine with the nearest of these experts): {made.novelty:.4f}.
"""


# --- shared by the commands that write adapters --------------------------------------------------------------------


def fitting_format(adapter: Adapter) -> str:
    """The dialect for an adapter's modules where the user names none: diffusers for pipelines, PEFT for the rest."""
    pipeline = all(re.match(r"(unet|text_encoder(_[23])?|prior)\.", name) for name in adapter.shapes)
    flow = any(re.match(r"transformer\.(single_)?transformer_blocks\.", name) for name in adapter.shapes)
    return "diffusers" if pipeline or flow else "peft"


def dtype_of(name: str | None) -> torch.dtype | None:
    """The torch dtype that the user named. Raises BadOption."""
    if name is None:
        return None
    import torch

    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if name not in known:
        raise BadOption(f"dtype is {name!r}; expected one of {', '.join(known)}")
    return known[name]


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    from importlib.metadata import version

    return {"lorahub": version("lorahub-kit"), "torch": version("torch")}


def command_line(argv: Sequence[str]) -> str:
    """The command as it was typed."""
    return shlex.join(["lorahub", *argv[1:]])


def check_name(catalog: Catalog, name: str | None, out: Path) -> None:
    """Raise NameTaken, before any work, if another adapter than the one at `out` has the name that was asked for."""
    holder = next((entry for entry in catalog.entries() if entry.name == name), None) if name else None
    if holder and str(out.resolve()) not in holder.locations:
        raise NameTaken(
            f"the name {name!r} belongs to {holder.id}; choose another --name, or remove that adapter first"
        )


def remember(
    catalog: Catalog,
    path: Path,
    name: str | None,
    operation: str,
    parents: Sequence[tuple[Named, float]],
    facts: Mapping[str, Any],
    *,
    base: str | None,
    seed: int | None = None,
) -> None:
    """Enter a result into the catalogue, with what it was made from.

    Inputs named by path are entered too: lineage that points at nothing is none.
    """
    strangers = [parent.path for parent, _ in parents if parent.entry is None]
    list(catalog.add(strangers, allow_pickle=True))
    before = _entry_at(catalog, path)
    [added] = catalog.add([path], name=name, base=base)
    assert added.id is not None, added.reason
    if before and before.id != added.id and len(before.locations) == 1 and not before.blob:
        catalog.remove(before.id)  # its only file was this one, and has just been replaced
        if name is None:
            catalog.rename(added.id, before.name)
    ids = [(parent.entry.id if parent.entry else parent.digest(allow_pickle=True)[:16], w) for parent, w in parents]
    if added.id not in {id_ for id_, _ in ids}:  # a copy of an input was made from nothing
        catalog.link(added.id, ids, operation, dict(facts), seed)


def _entry_at(catalog: Catalog, path: Path) -> Entry | None:
    try:
        return catalog.entry(str(path.resolve()))
    except UnknownAdapter:
        return None

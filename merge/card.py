"""The model card that lies beside a merged or generated adapter: how it was made, from what, and how exact it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..hub.adapter import Adapter
    from .report import Report


@dataclass(frozen=True)
class Ingredient:
    """An input of a merge, as lineage and cards name it."""

    name: str
    digest: str
    weight: float
    base: str | None
    description: str = ""


def record(
    method: str,
    ingredients: Sequence[Ingredient],
    options: Mapping[str, Any],
    report: Report,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Everything about a merge as plain data: for lineage, `--json` and the card."""
    return {
        "method": method,
        "inputs": [asdict(one) for one in ingredients],
        "options": dict(options),
        "versions": dict(versions),
        **asdict(report.total),
        "modules": {
            name: {"rank": report.ranks[name], **asdict(fidelity)} for name, fidelity in report.modules.items()
        },
    }


def card(made: Mapping[str, Any], adapter: Adapter, *, command: str, library: str = "peft") -> str:
    """The card's Markdown, with the front matter that model hubs read."""
    base = f"base_model: {json.dumps(adapter.base)}\nbase_model_relation: adapter\n" if adapter.base else ""
    rows = "\n".join(
        f"| {one['name']} | {one['weight']:g} | {one['base'] or 'unknown'} | `{one['digest'][:16]}` |"
        for one in made["inputs"]
    )
    modules = "\n".join(
        f"| {name} | {one['rank']} | {one['error']:.2e} | {one['cosine']:.6f} | {one['norm_ratio']:.6f} "
        f"| {one['energy']:.6f} |"
        for name, one in made["modules"].items()
    )
    plain = {key: value for key, value in made["options"].items() if key != "search" and value is not None}
    options = ", ".join(f"{key}={value}" for key, value in plain.items()) or "none"
    searched = _searched(made["options"].get("search"))
    versions = ", ".join(f"{key} {value}" for key, value in made["versions"].items())
    return f"""---
library_name: {library}
{base}tags: [lora, {library}, merge, lorahub]
---
# {adapter.name}

{_summary(made["inputs"])}

Made by lorahub: method `{made["method"]}`, options {options} ({versions}).{searched}

    {command}

| input | weight | base | content sha256 |
|---|---|---|---|
{rows}

Against the exact weighted sum: relative error {made["error"]:.3e}, cosine {made["cosine"]:.6f},
norm ratio {made["norm_ratio"]:.6f}, energy {made["energy"]:.6f}. Every module has scale 1 (alpha equals its rank).

| module | rank | error | cosine | norm ratio | energy |
|---|---|---|---|---|---|
{modules}
"""


def _summary(inputs: Sequence[Mapping[str, Any]]) -> str:
    """What the merge can do, in the words of its inputs: the paragraph by which it is found again."""
    said = (
        f"{one['name']} ({one['description'].rstrip('.')})" if one["description"] else one["name"] for one in inputs
    )
    return f"A merge of {', '.join(said)}."


def _searched(search: Mapping[str, Any] | None) -> str:
    """How the weights were found, if they were searched."""
    if not search:
        return ""
    return (
        f"\nIts weights were chosen by `{search['metric']}`: {search['score']:.6g}, from {search['start_score']:.6g} "
        f"at the start, in {search['evaluations']} evaluations (seed {search['seed']})."
    )

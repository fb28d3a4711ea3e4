"""From a request to a written picture: variants are painted, put on a sheet, and stored with their recipe."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..generate.choosing import lacking_triggers
from ..generate.painting import Painter, aside, open_painter
from ..hub.entries import identity
from ..hub.errors import BadOption, FormatError
from ..hub.writing import replacing
from ..merge.composed import composed
from ..merge.gated import fingerprint, fused
from . import show
from .fusion import Fusion, by_role, check_kind, fusion
from .make import command_line, dtype_of, versions
from .picking import Picked, found_adapters, named_adapters
from .settings import home
from .sheet import Panel, read_recipe, sheet, write_png

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..generate.choosing import Spared
    from ..hub.adapter import Adapter
    from ..hub.catalog import Catalog
    from ..merge.gates import Gates
    from .fusion import Passes
    from .imagine import Request

BUILT_IN = "built-in"


@dataclass(frozen=True)
class Target:
    """Where the picture goes, and whether it may replace another or is not to be painted at all."""

    out: Path
    force: bool
    dry_run: bool


@dataclass(frozen=True)
class Plan:
    """All that is decided before painting. `prompt` is what the pipeline is given."""

    prompt: str
    picked: Sequence[Picked]
    spared: Sequence[Spared]
    fusion: Fusion


@dataclass(frozen=True)
class Variant:
    """One way to paint: what its panel says, and which adapters act: composed, through gates, or as a sum."""

    label: str
    adapters: Sequence[Adapter]
    weights: Sequence[float]
    gates: Gates | None = None
    composed: bool = False
    passes: Passes | None = None

    def acting(self, painter: Painter) -> AbstractContextManager[Any]:
        """The block in which the painter's denoiser has the adapters."""
        model, part = painter.denoiser, painter.component
        if self.composed:
            return composed(
                model, self.adapters, self.weights, passes=self.passes, component=part, wordless=painter.wordless
            )
        return fused(model, self.adapters, self.gates, self.weights, component=part)


def carry_out(catalog: Catalog, request: Request, target: Target) -> dict[str, Any]:
    """Paint what was asked for; returns the facts, as `--json` prints them.

    Raises TargetExists before any work. The file appears whole or not at all.
    """
    check_kind(request.fuse)
    with nullcontext(None) if target.dry_run else replacing(target.out, force=target.force) as place:
        painter = _painter(request)
        plan = _plan(catalog, painter, request)
        facts = _facts(painter, plan, request, target)
        if place is None:
            return facts
        started = time.monotonic()
        columns = _painted(painter, plan, request)
        facts["seconds"] = time.monotonic() - started
        recipe = _recipe(painter, plan, request, facts, columns[0][0].size)
        before = _digest(target.out)
        write_png(_arranged(columns, plan, request), place, recipe)
    _remember(catalog, plan.picked, target.out, recipe, before)
    return facts


def recalled(request: Request, picture: Path) -> Request:
    """The request that a picture's recipe stands for; device, and where gates and base lie, are the user's to say."""
    recipe = read_recipe(picture)
    try:
        pipeline = None if recipe["pipeline"] == BUILT_IN else Path(recipe["pipeline"])
        return replace(
            request,
            prompt=recipe["prompt"],
            adapters=tuple(str(one["id"]) for one in recipe["adapters"]),
            weights=tuple(float(one["weight"]) for one in recipe["adapters"]),
            limit=0,
            fuse=request.fuse or (recipe["fuse"] if recipe["adapters"] else None),
            pipeline=request.pipeline or pipeline,
            steps=request.steps or recipe["steps"],
            guidance=recipe["guidance"] if request.guidance is None else request.guidance,
            seed=recipe["seeds"][0],
            grid=len(recipe["seeds"]),
            compare=recipe["compare"],
            triggers=False,
            passes=recipe.get("passes"),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise FormatError(f"{picture}: its recipe lacks {error}; expected one that this version wrote") from None


def _painter(request: Request) -> Painter:
    from ..generate.pictures import shipped

    folder = request.pipeline or shipped()
    if request.pipeline is None and not folder.is_dir():
        raise BadOption(f"the built-in picture base is not installed ({folder}); give --pipeline, a diffusers folder")
    return open_painter(
        folder,
        base=request.base,
        device=request.device,
        dtype=dtype_of(request.dtype),
        allow_pickle=request.allow_pickle,
    )


def _plan(catalog: Catalog, painter: Painter, request: Request) -> Plan:
    spared: list[Spared] = []
    if request.adapters:
        picked = named_adapters(catalog, painter, request.adapters, request.weights, allow_pickle=request.allow_pickle)
    else:
        picked, spared = found_adapters(
            catalog, painter, request.prompt, request.weights,
            limit=request.limit, mode=request.mode, quiet=request.quiet,
        )  # fmt: skip
    lacking = [trigger for one in picked for trigger in _lacking(request.prompt, one)] if request.triggers else []
    prompt = ", ".join([request.prompt, *dict.fromkeys(lacking)])
    adapters = [one.adapter for one in picked]
    how = fusion(
        painter, adapters, asked=request.fuse, given=request.gates, home=home(), guidance=request.guidance,
        passes=request.passes or by_role([one.style for one in picked]),
    )  # fmt: skip
    return Plan(prompt, picked, spared, how)


def _lacking(prompt: str, picked: Picked) -> list[str]:
    return lacking_triggers(prompt, picked.named.entry.triggers) if picked.named.entry else []


# --- painting -------------------------------------------------------------------------------------------------------


def variants(picked: Sequence[Picked], fusion: Fusion, *, compare: bool) -> list[Variant]:
    """What is painted: the fusion alone or, to compare, the base, each adapter alone, their sum, composed, and gated.

    Of one adapter there is no sum, without gates nothing gated; composed only where that is how they are fused.
    """
    adapters, weights = [one.adapter for one in picked], [one.weight for one in picked]
    if not compare:
        gates = fusion.gates if fusion.kind == "gated" else None
        return [Variant(fusion.kind, adapters, weights, gates, fusion.kind == "composed", fusion.passes)]
    found = [Variant("base", [], [])]
    found += [Variant(_share(one), [one.adapter], [one.weight]) for one in picked]
    if len(picked) > 1:
        found.append(Variant("sum", adapters, weights))
    if fusion.kind == "composed":
        found.append(Variant("composed", adapters, weights, composed=True, passes=fusion.passes))
    if picked and fusion.gates:
        found.append(Variant("gated", adapters, weights, fusion.gates))
    return found


def _share(picked: Picked) -> str:
    return picked.named.name if picked.weight == 1 else f"{picked.named.name} x {picked.weight:g}"


def _painted(painter: Painter, plan: Plan, request: Request) -> list[list[Image]]:
    """The pictures of each variant, one for every seed."""
    ways = variants(plan.picked, plan.fusion, compare=request.compare)
    settings: dict[str, Any] = {"steps": request.steps, "guidance": request.guidance}
    columns = []
    with show.progress("painting", quiet=request.quiet) as advance:
        for number, way in enumerate(ways):

            def onward(done: int, total: int | None, number: int = number) -> None:
                advance(done + number * (total or 0), len(ways) * total if total else None)

            with way.acting(painter):
                columns.append(painter.paint(plan.prompt, request.seeds, progress=onward, **settings))
    return columns


def _arranged(columns: Sequence[Sequence[Image]], plan: Plan, request: Request) -> Image:
    """The picture as the pipeline made it where it is one, else a sheet: variants beside each other, or seeds."""
    labels = [way.label for way in variants(plan.picked, plan.fusion, compare=request.compare)]
    if not request.compare and len(request.seeds) == 1:
        return columns[0][0]
    if not request.compare:
        panels = [Panel(one, f"seed {seed}") for one, seed in zip(columns[0], request.seeds, strict=True)]
        return sheet(panels, columns=math.ceil(math.sqrt(len(panels))), title=plan.prompt)
    panels = [
        Panel(column[row], label if len(request.seeds) == 1 else f"{label}, seed {seed}")
        for row, seed in enumerate(request.seeds)
        for label, column in zip(labels, columns, strict=True)
    ]
    return sheet(panels, columns=len(labels), title=plan.prompt)


# --- what is said of it ---------------------------------------------------------------------------------------------


def _facts(painter: Painter, plan: Plan, request: Request, target: Target) -> dict[str, Any]:
    """What `--json` prints; `seconds` is None until the picture is painted."""
    return {
        "out": str(target.out),
        "prompt": plan.prompt,
        "fuse": plan.fusion.kind,
        "reason": plan.fusion.reason,
        "gates": str(plan.fusion.path) if plan.fusion.path else None,
        "passes": plan.fusion.passes,
        "adapters": [
            {
                **_identity(one, allow_pickle=request.allow_pickle),
                "weight": one.weight,
                "score": one.score,
                "why": list(one.why),
                "aside": aside(painter, one.adapter),
                "lacking_triggers": _lacking(plan.prompt, one),
            }
            for one in plan.picked
        ],
        "left_out": [{"id": one.entry.id, "name": one.entry.name, "reason": one.reason} for one in plan.spared],
        "searched": request.searches,
        "seeds": request.seeds,
        "steps": painter.steps(request.steps),
        "guidance": painter.guidance(request.guidance),
        "seconds": None,
        "base": painter.base,
        "pipeline": BUILT_IN if request.pipeline is None else str(request.pipeline),
        "panels": [one.label for one in variants(plan.picked, plan.fusion, compare=request.compare)],
    }


def _identity(picked: Picked, *, allow_pickle: bool) -> dict[str, str]:
    digest = picked.named.digest(allow_pickle=allow_pickle)
    return {"id": identity(digest), "name": picked.named.name, "digest": digest}


def _recipe(
    painter: Painter, plan: Plan, request: Request, facts: Mapping[str, Any], size: tuple[int, int]
) -> dict[str, Any]:
    """All that the picture follows from, and nothing that differs from one run to the next. size: of one picture."""
    kept = ("prompt", "fuse", "reason", "gates", "passes", "seeds", "steps", "guidance", "base", "pipeline", "panels")
    return {
        **{key: facts[key] for key in kept},
        "adapters": [{key: one[key] for key in ("id", "name", "digest", "weight")} for one in facts["adapters"]],
        "compare": request.compare,
        "asked": request.prompt,
        "size": list(size),
        "sampler": type(getattr(painter.pipeline, "scheduler", None)).__name__,
        "base_fingerprint": fingerprint(painter.denoiser),
        "dtype": str(next(painter.denoiser.parameters()).dtype).removeprefix("torch."),
        "version": {**versions(), "diffusers": version("diffusers")},
        "command": command_line(sys.argv),
    }


def _remember(
    catalog: Catalog, picked: Sequence[Picked], out: Path, recipe: Mapping[str, Any], replaced: str | None
) -> None:
    """Record the picture's adapters; those named by path are entered too: lineage that points at nothing is none."""
    strangers = [one.named.path for one in picked if one.named.entry is None]
    list(catalog.add(strangers, allow_pickle=True))
    digest = _digest(out)
    assert digest is not None
    parents = [(adapter["id"], adapter["weight"]) for adapter in recipe["adapters"]]
    told = {**recipe, "out": str(out.resolve())}
    catalog.link_picture(digest, parents, told, instead=replaced, version=recipe["version"]["lorahub"])


def _digest(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None

"""Gated or summed: which gates there are for a base, and how adapters are fused in it. Importing this needs torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..generate.painting import Painter, original_denoiser
from ..hub.errors import BadOption, FormatError, IncompatibleAdapters
from ..merge.gated import METADATA_KEY, fingerprint, load_gates

if TYPE_CHECKING:
    from ..hub.adapter import Adapter
    from ..merge.gates import Gates

KINDS = ("gated", "sum")
FILE = "gates.safetensors"  # in a pipeline's folder
FOLDER = "gates"  # in the home folder


@dataclass(frozen=True)
class Fusion:
    """How adapters act together: "gated", "sum" or, where there are none, "none"; and why so.

    gates: those of this base that have a place for all the adapters' layers, whether they are used or not.
    """

    kind: str
    reason: str
    gates: Gates | None = None
    path: Path | None = None


def fusion(
    painter: Painter, adapters: Sequence[Adapter], *, asked: str | None, given: Path | None, home: Path
) -> Fusion:
    """Gated where there are gates for this base, else the sum.

    asked: "gated" or "sum", None for the better of what there is. given: the user's file of gates. Raises BadOption
    where gates were asked for and there are none, IncompatibleAdapters where those given are for another base or other
    layers.
    """
    check_kind(asked)
    gates, path, reason = _gates(painter, given, home)
    lacking = _without_gate(painter, adapters, gates) if gates else []
    if lacking:
        reason = f"the gates in {path} were made for other layers than {lacking[0]}"
        if given or asked == "gated":
            raise IncompatibleAdapters(f"{reason}; train gates for it, or say --fuse sum")
        gates, path = None, None
    if gates is None and asked == "gated":
        raise BadOption(f"--fuse gated: {reason}; give --gates FILE, or say --fuse sum")
    if not adapters:
        return Fusion("none", "no adapters", gates, path)
    if asked == "sum":
        return Fusion("sum", "as asked", gates, path)
    return Fusion("gated", reason, gates, path) if gates else Fusion("sum", reason)


def check_kind(asked: str | None) -> None:
    """Raise BadOption for a way to fuse that there is not."""
    if asked is not None and asked not in KINDS:
        raise BadOption(f"--fuse is {asked!r}; expected one of {', '.join(KINDS)}")


def _gates(painter: Painter, given: Path | None, home: Path) -> tuple[Gates | None, Path | None, str]:
    """The first gates that were trained on the painter's base, where they lie, and what was found."""
    if given:
        return _ready(load_gates(given, original_denoiser(painter)), painter), given, f"gates {given}"
    places = [painter.folder / FILE, *sorted((home / FOLDER).glob("*.safetensors"))]
    there = [place for place in places if place.is_file()]
    if not there:
        return None, None, f"no gates in {painter.folder} or {home / FOLDER}"
    base = fingerprint(original_denoiser(painter))
    for place in there:
        if trained_on(place) == base:
            return _ready(load_gates(place), painter), place, f"gates {place}"
    return None, None, f"the gates in {', '.join(map(str, there[:2]))} were trained on another base"


def trained_on(path: Path) -> str | None:
    """The fingerprint of the base that a file of gates belongs to, from its header; None for any other file."""
    from ..hub.tensorfile import open_tensors

    try:
        settings = json.loads(open_tensors(path).metadata.get(METADATA_KEY, "null"))
    except (FormatError, ValueError, RecursionError):
        return None
    return str(settings["base"]) if isinstance(settings, dict) and "base" in settings else None


def _ready(gates: Gates, painter: Painter) -> Gates:
    return gates.to(next(painter.denoiser.parameters()).device).requires_grad_(False)


def _without_gate(painter: Painter, adapters: Sequence[Adapter], gates: Gates) -> list[str]:
    """Linear layers that an adapter changes and that have no gate."""
    prefix = f"{painter.component}."
    paths = {
        name.removeprefix(prefix) for adapter in adapters for name in adapter.shapes if name.startswith(prefix)
    } - set(gates.paths)
    return [path for path in sorted(paths) if isinstance(painter.denoiser.get_submodule(path), nn.Linear)]

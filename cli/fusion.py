"""Composed, gated or summed: how adapters are fused in a base, and which gates there are for it.

Importing this needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..generate.painting import Painter, original_denoiser
from ..generate.pictures import shipped
from ..hub.errors import BadOption, FormatError, IncompatibleAdapters
from ..merge.composed import refusal
from ..merge.gated import METADATA_KEY, fingerprint, load_gates

if TYPE_CHECKING:
    from ..hub.adapter import Adapter
    from ..merge.gates import Gates

KINDS = ("composed", "gated", "sum")
MEASURED = "styles and things, the best that was measured on the built-in base"
FILE = "gates.safetensors"  # in a pipeline's folder
FOLDER = "gates"  # in the home folder

Passes = Sequence[Sequence[float]]  # of a composition: a weight for every adapter in each


@dataclass(frozen=True)
class Fusion:
    """How adapters act together: "composed", "gated", "sum" or, where there are none, "none"; and why so.

    gates: those of this base that have a place for all the adapters' layers, whether they are used or not. passes: of
    adapters that are composed.
    """

    kind: str
    reason: str
    gates: Gates | None = None
    path: Path | None = None
    passes: Passes | None = None


def fusion(
    painter: Painter,
    adapters: Sequence[Adapter],
    *,
    asked: str | None,
    given: Path | None,
    home: Path,
    guidance: float | None = None,
    passes: Passes | None = None,
) -> Fusion:
    """Gated where there are gates for this base; composed on the built-in one where there are `passes`; else the sum.

    asked: one of KINDS, None for the best of what there is. given: the user's file of gates. guidance: what the user
    says of it. passes: those of a composition, see `by_role`; None for one of its own for each adapter. Raises
    BadOption for what was asked for and cannot be, IncompatibleAdapters where the gates given are for another base or
    other layers.
    """
    check_kind(asked)
    against = uncomposable(painter, guidance)
    if asked == "composed" and against:
        raise BadOption(f"--fuse composed: {against}; say --fuse sum")
    gates, path, reason = _fitting_gates(painter, adapters, asked, given, home)
    if not adapters:
        return Fusion("none", "no adapters", gates, path)
    kind = asked or ("gated" if gates else "sum")
    if asked is None and gates is None and not against and passes and painter.folder.resolve() == shipped():
        kind, reason = "composed", MEASURED
    if asked in ("composed", "sum"):
        reason = "as asked"
    if kind != "composed":
        return Fusion(kind, reason, gates, path)
    alone = [[float(i == k) for i in range(len(adapters))] for k in range(len(adapters))]
    return Fusion(kind, reason, gates, path, passes or alone)


def by_role(styles: Sequence[bool]) -> Passes | None:
    """A pass of all adapters and one of those that are no styles, which are lost else; None without either kind."""
    if all(styles) or not any(styles):
        return None
    return [[1.0] * len(styles), [0.0 if style else 1.0 for style in styles]]


def uncomposable(painter: Painter, guidance: float | None) -> str | None:
    """Why adapters cannot be composed here: that takes a pass without words. guidance: what the user says of it."""
    scale = painter.guidance(guidance)
    if scale is None or scale <= 1:
        return f"it needs a guidance scale above 1, and the {type(painter.pipeline).__name__}'s is {scale}"
    return refusal(painter.denoiser)


def _fitting_gates(
    painter: Painter, adapters: Sequence[Adapter], asked: str | None, given: Path | None, home: Path
) -> tuple[Gates | None, Path | None, str]:
    """Gates with a place for all layers of the adapters, where they lie, and what was found."""
    gates, path, reason = _gates(painter, given, home)
    lacking = _without_gate(painter, adapters, gates) if gates else []
    if lacking:
        reason = f"the gates in {path} were made for other layers than {lacking[0]}"
        if given or asked == "gated":
            raise IncompatibleAdapters(f"{reason}; train gates for it, or say --fuse sum")
        gates, path = None, None
    if gates is None and asked == "gated":
        raise BadOption(f"--fuse gated: {reason}; give --gates FILE, or say --fuse sum")
    return gates, path, reason


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

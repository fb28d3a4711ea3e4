"""diffusers: one file with a component in front of each path; today's `lora_A` names and the older dialects."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import IncompatibleAdapters
from ..source import Source
from ._names import modern, strip_peft, with_component
from ._roles import Claim, split
from .peft import configuration

if TYPE_CHECKING:
    from ..adapter import Adapter

METADATA_KEY = "lora_adapter_metadata"
_COMPONENT = re.compile(r"(unet|text_encoder(_[23])?|prior|transformer(?=\.\w*blocks|\.layers|\.x_embedder|\.proj_))\.")
_BARE = re.compile(r"(down_blocks|up_blocks|mid_block|transformer_blocks|single_transformer_blocks|text_model)\.")
_XLABS = re.compile(r"(double|single)_blocks\.\d+\.processor\.")


def claim(key: str, source: Source) -> Claim | None:
    """Names that begin with a pipeline's component, or an attention processor's old bare path."""
    if source.config and source.config.get("peft_type"):
        return None
    old = _XLABS.match(key) or (_BARE.match(key) and re.search(r"[._]lora(_linear_layer)?\.(down|up)\.weight$", key))
    if not (_COMPONENT.match(key) or old):
        return None
    place = split(key)
    if place is None or re.search(r"\.lora_[AB]$", key):
        return None
    # the old suffix `to_q_lora.down` swallows its module's last mark; put it back for `modern` to read
    marked = place.module
    if re.search(r"\.processor\.to_(q|k|v|out)$", marked):
        marked += "_lora"
    return Claim(marked, place.role)


def names(modules: Collection[str]) -> dict[str, str]:
    """Canonical names of the file's modules."""
    return {module: _canonical(module) for module in modules}


def _canonical(module: str) -> str:
    """Today's path with its component."""
    return with_component(strip_peft(modern(module)))


def scale(source: Source, module: str, rank: int) -> float | None:
    """alpha/r from the header's adapter metadata; without it alpha equals the rank."""
    text = source.metadata.get(METADATA_KEY)
    if not text:
        return 1.0
    try:
        table = json.loads(text)
    except ValueError:
        return 1.0
    component, _, path = _canonical(module).partition(".")
    alpha = table.get(f"{component}.lora_alpha")
    for key, value in (table.get(f"{component}.alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            alpha = value
            break
    if not isinstance(alpha, (int, float)):
        return 1.0
    return float(alpha) / (math.sqrt(rank) if table.get(f"{component}.use_rslora") else rank)


def write(adapter: Adapter, path: Path) -> None:
    """Write `pytorch_lora_weights.safetensors`-style file with scale 1 and the header that mixed ranks need.

    Raises IncompatibleAdapters for modules outside a diffusion pipeline's components.
    """
    from ..writing import Piece, store

    pieces: list[Piece] = []
    for name, shape in adapter.shapes.items():
        if not re.match(r"(unet|transformer|text_encoder(_[23])?|prior)\.", name) or shape.embedding:
            raise IncompatibleAdapters(
                f"{adapter.name}: {name} lies in no component of a diffusion pipeline: write --to peft"
            )
        ones = (1,) * len(shape.kernel)
        channels = shape.inputs // math.prod(shape.kernel)
        pieces += [
            Piece(f"{name}.lora_A.weight", name, "down", (shape.rank, channels, *shape.kernel)),
            Piece(f"{name}.lora_B.weight", name, "up", (shape.outputs, shape.rank, *ones)),
        ]
    header = {"format": "pt", METADATA_KEY: json.dumps(_metadata(adapter), sort_keys=True)}
    store(path, adapter, pieces, dict(adapter.extras), header)


def _metadata(adapter: Adapter) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for component in sorted({name.split(".")[0] for name in adapter.shapes}):
        prefix = f"{component}."
        part = _Part(adapter, prefix)
        table |= {f"{prefix}{key}": value for key, value in configuration(part, prefix).items()}  # type: ignore[arg-type]
    return table


class _Part:
    """One component of an adapter, as `configuration` sees it."""

    def __init__(self, adapter: Adapter, prefix: str) -> None:
        self.meta: dict[str, Any] = {}
        self.base = adapter.base
        self.shapes = {name: shape for name, shape in adapter.shapes.items() if name.startswith(prefix)}

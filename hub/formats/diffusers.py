"""diffusers: one file with a component in front of each path; today's `lora_A` names and the older dialects."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FormatError, IncompatibleAdapters
from ..source import Source
from ._names import component, modern, strip_peft, with_component
from ._patterns import Patterns, number, table
from ._roles import Claim, split
from .peft import configuration

if TYPE_CHECKING:
    from ..adapter import Adapter

METADATA_KEY = "lora_adapter_metadata"
_COMPONENT = re.compile(
    r"(unet|text_encoder(_[23])?|prior"
    r"|transformer(?=\.(\w*blocks|layers|\w+_embed(der)?\b|norm_out|proj_|final_layer|(img|txt|time|vector|guidance)_in)))\."
)
_CLIP = re.compile(r"^(text_encoder(?:_2)?\.)(?=encoder\.layers\.|embeddings\.)")  # as newer transformers flatten it
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
    return _CLIP.sub(r"\1text_model.", with_component(strip_peft(modern(module))))


def scale(source: Source, module: str, rank: int) -> float | None:
    """alpha/r from the header's adapter metadata; without it alpha equals the rank.

    Raises FormatError for metadata that make no sense.
    """
    where = f"{source.path}: {METADATA_KEY}"
    part, _, path = _canonical(module).partition(".")
    settings = _settings(source)
    if part not in source.memo:
        patterns = table(settings.get(f"{part}.alpha_pattern"), f"{where}'s alpha_pattern")
        source.memo[part] = Patterns(patterns, f"{where}'s alpha_pattern", len(source.tensors))
    alpha = source.memo[part].value(path)
    if alpha is None:
        alpha = settings.get(f"{part}.lora_alpha")
    if alpha is None:
        return 1.0
    value = number(alpha, f"{where}'s alpha of {path}")
    return value / (math.sqrt(rank) if settings.get(f"{part}.use_rslora") else rank)


def _settings(source: Source) -> dict[str, Any]:
    """The adapters' configurations that diffusers keeps in the header, their keys led by the component."""
    if METADATA_KEY not in source.memo:
        try:
            settings = json.loads(source.metadata.get(METADATA_KEY) or "{}")
        except (ValueError, RecursionError) as error:
            raise FormatError(
                f"{source.path}: its {METADATA_KEY} is no JSON ({error}); the header is damaged"
            ) from None
        source.memo[METADATA_KEY] = table(settings, f"{source.path}: {METADATA_KEY}")
    found: dict[str, Any] = source.memo[METADATA_KEY]
    return found


def write(adapter: Adapter, path: Path) -> None:
    """Write `pytorch_lora_weights.safetensors`-style file with scale 1 and the header that mixed ranks need.

    Raises IncompatibleAdapters for modules outside a diffusion pipeline's components.
    """
    from ..writing import Piece, store

    pieces: list[Piece] = []
    for name, shape in adapter.shapes.items():
        if not component(name) or shape.embedding:
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
    for part in sorted({name.split(".")[0] for name in adapter.shapes}):
        prefix = f"{part}."
        settings = configuration(_Part(adapter, prefix))  # type: ignore[arg-type]
        table |= {f"{prefix}{key}": value for key, value in settings.items()}
    return table


class _Part:
    """One component of an adapter, as `configuration` sees it."""

    def __init__(self, adapter: Adapter, prefix: str) -> None:
        self.meta: dict[str, Any] = {}
        self.base = adapter.base
        # PEFT takes the end of a path for the path, and newer text encoders have no text_model in theirs
        self.shapes = {
            name.removeprefix(prefix).removeprefix("text_model."): shape
            for name, shape in adapter.shapes.items()
            if name.startswith(prefix)
        }

"""kohya's sd-scripts, A1111 and LyCORIS: one file, flattened module names, an alpha tensor a module."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import IncompatibleAdapters
from ..source import Source
from ._names import flatten, unflatten
from ._roles import Claim, split

if TYPE_CHECKING:
    from ..adapter import Adapter


def claim(key: str, source: Source) -> Claim | None:
    """`lora_unet_…`, `lora_te_…`, `lycoris_…` with any suffix of LoRA, LoHa or LoKr."""
    place = split(key)
    return place if place and "." not in place.module and unflatten(place.module) else None


def names(modules: Collection[str]) -> dict[str, str]:
    """Canonical names of the file's modules."""
    return {module: _canonical(module) for module in modules}


def _canonical(module: str) -> str:
    """The dotted path, by the list of segments that hold an underscore."""
    return unflatten(module) or module


def scale(source: Source, module: str, rank: int) -> float | None:
    """1: where the alpha tensor is missing, alpha equals the rank."""
    return 1.0


def write(adapter: Adapter, path: Path) -> None:
    """Write one safetensors file with alpha equal to the rank of every module.

    Raises IncompatibleAdapters for module names that kohya's scheme cannot hold.
    """
    import torch

    from ..writing import Piece, store

    parts = {name.split(".")[0] for name in adapter.shapes}
    # Stable Diffusion's only text encoder is te; where there are several, as beside a transformer, they have numbers
    encoders = 2 if "transformer" in parts else len({part for part in parts if part.startswith("text_encoder")})
    pieces: list[Piece] = []
    alphas = {}
    for name, shape in adapter.shapes.items():
        flat = flatten(name, encoders)
        if flat is None or shape.embedding:
            raise IncompatibleAdapters(
                f"{adapter.name}: {name} has no name in kohya's scheme (unet, text_encoder, transformer): "
                "write --to peft or --to diffusers"
            )
        ones = (1,) * len(shape.kernel)
        channels = shape.inputs // math.prod(shape.kernel)
        pieces += [
            Piece(f"{flat}.lora_down.weight", name, "down", (shape.rank, channels, *shape.kernel)),
            Piece(f"{flat}.lora_up.weight", name, "up", (shape.outputs, shape.rank, *ones)),
        ]
        alphas[f"{flat}.alpha"] = torch.tensor(float(shape.rank))
    store(path, adapter, pieces, {**adapter.extras, **alphas}, header(adapter))


def header(adapter: Adapter) -> dict[str, str]:
    """The inputs' own ss_* and modelspec.* entries, with the network's as written."""
    origin: dict[str, Any] = dict(adapter.meta.get("metadata") or {})
    kept = {key: str(value) for key, value in origin.items() if key.startswith(("ss_", "modelspec."))}
    ranks = {shape.rank for shape in adapter.shapes.values()}
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    history = json.dumps(adapter.meta.get("merged_from") or [], sort_keys=True)
    return {
        **kept,
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        **({"modelspec.merged_from": history} if history != "[]" else {}),
        "format": "pt",
    }

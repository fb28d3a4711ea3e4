"""PEFT: a directory of adapter_config.json and adapter_model.safetensors, or bare tensors with PEFT's names."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import IncompatibleAdapters
from ..source import CONFIG_FILE, Source
from ._names import strip_peft, with_component
from ._roles import Claim, split

if TYPE_CHECKING:
    from torch import Tensor

    from ..adapter import Adapter

COMPONENTS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.", "prior.")


def claim(key: str, source: Source) -> Claim | None:
    """PEFT's tensors: `….lora_A.weight` and its kin, with or without the `base_model.model.` prefix."""
    place = split(key)
    if place is None:
        return None
    wrapped = key.startswith("base_model.") or (source.config or {}).get("peft_type") is not None
    if wrapped or re.search(r"\.lora_(A|B|embedding_A|embedding_B)(\.\w+)?(\.weight|$)", key):
        bare_loralib = not wrapped and re.search(r"\.lora_[AB]$", key)
        return None if bare_loralib else place
    return None


def names(modules: Collection[str]) -> dict[str, str]:
    """Canonical names of the file's modules."""
    return {module: _canonical(module) for module in modules}


def _canonical(module: str) -> str:
    """The module's path in the base model."""
    return with_component(strip_peft(module))


def scale(source: Source, module: str, rank: int) -> float | None:
    """alpha/r or alpha/sqrt(r) by the configuration's patterns; None where there is no configuration."""
    config = source.config
    if config is None:
        return None
    path = strip_peft(module)
    if str(config.get("peft_type", "LORA")).upper() == "LORA":
        alpha, default = "lora_alpha", rank
    else:
        alpha, default = "alpha", rank
    value = _pattern(config.get("alpha_pattern"), path, config.get(alpha))
    if value is None:
        value = default
    divisor = rank or 1
    return float(value) / (math.sqrt(divisor) if config.get("use_rslora") else divisor)


def _pattern(patterns: Any, path: str, default: Any) -> Any:
    """PEFT's rule: keys are regular expressions for the end of the path, the first match wins."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def write(adapter: Adapter, path: Path) -> None:
    """Write a PEFT directory; alpha equals the rank of every module, so its scale is 1.

    Raises IncompatibleAdapters for an adapter of several models (a pipeline's UNet and text encoder).
    """
    from ..writing import Piece, store

    prefix = _component(adapter)
    pieces: list[Piece] = []
    for name, shape in adapter.shapes.items():
        stem = f"base_model.model.{name.removeprefix(prefix)}"
        if shape.embedding:
            pieces += [
                Piece(f"{stem}.lora_embedding_A", name, "down", (shape.rank, shape.inputs)),
                Piece(f"{stem}.lora_embedding_B", name, "up", (shape.outputs, shape.rank)),
            ]
            continue
        ones = (1,) * len(shape.kernel)
        channels = shape.inputs // math.prod(shape.kernel)
        pieces += [
            Piece(f"{stem}.lora_A.weight", name, "down", (shape.rank, channels, *shape.kernel)),
            Piece(f"{stem}.lora_B.weight", name, "up", (shape.outputs, shape.rank, *ones)),
        ]
    extras: dict[str, Tensor] = {f"base_model.model.{name}": tensor for name, tensor in adapter.extras.items()}
    path.mkdir(parents=True, exist_ok=True)
    store(path / "adapter_model.safetensors", adapter, pieces, extras, {"format": "pt"})
    text = json.dumps(configuration(adapter, prefix), indent=2, sort_keys=True)
    (path / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def configuration(adapter: Adapter, prefix: str = "") -> dict[str, Any]:
    """adapter_config.json for an adapter whose every module has scale 1."""
    origin: Mapping[str, Any] = adapter.meta.get("config") or {}
    shapes = {name.removeprefix(prefix): shape for name, shape in adapter.shapes.items()}
    ranks = {name: shape.rank for name, shape in shapes.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    pattern = {re.escape(name): rank for name, rank in sorted(ranks.items()) if rank != usual}
    kept = {key: origin[key] for key in ("task_type", "fan_in_fan_out", "modules_to_save", "revision") if key in origin}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        **kept,
        "base_model_name_or_path": adapter.base,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "r": usual,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "use_dora": False,
        "use_rslora": False,
    }


def _component(adapter: Adapter) -> str:
    found = {next((c for c in COMPONENTS if name.startswith(c)), "") for name in adapter.shapes}
    # "transformer.h.0" is GPT-2's own path, not a pipeline's component
    if any(name.startswith(("transformer.h.", "transformer.wte", "transformer.wpe")) for name in adapter.shapes):
        found = {part for part in found if part != "transformer."} | {""}
    if len(found) > 1:
        raise IncompatibleAdapters(
            f"{adapter.name}: adapts {', '.join(sorted(part.rstrip('.') for part in found))}; "
            "a PEFT directory holds one model: write --to diffusers or --to kohya"
        )
    return found.pop() if found else ""

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
from ._foreign import declared_type
from ._names import component, strip_peft, with_components
from ._patterns import Patterns, number, table
from ._roles import Claim, split

if TYPE_CHECKING:
    from torch import Tensor

    from ..adapter import Adapter


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
    named = with_components({strip_peft(module) for module in modules})
    return {module: named[strip_peft(module)] for module in modules}


def scale(source: Source, module: str, rank: int) -> float | None:
    """alpha/r or alpha/sqrt(r) by the configuration's patterns; None where there is no configuration.

    `rank` 0 stands for a module whose tensors do not tell it: the configuration's r holds. Raises FormatError for a
    configuration that makes no sense.
    """
    config = source.config
    if config is None:
        return None
    path = strip_peft(module)
    name = "lora_alpha" if declared_type(config) in {"", "LORA"} else "alpha"
    alpha = _patterned(source, "alpha_pattern", path, name)
    divisor = rank or number(_patterned(source, "rank_pattern", path, "r"), f"{source.path}: r") or 1
    if alpha is None:
        return 1.0
    value = number(alpha, f"{source.path}: {name} of {path}")
    return value / (math.sqrt(divisor) if config.get("use_rslora") else divisor)


def _patterned(source: Source, pattern: str, path: str, default: str) -> Any:
    """A setting for a module: by the first pattern that fits its path, or else for all alike."""
    config: Mapping[str, Any] = source.config or {}
    if pattern not in source.memo:
        where = f"{source.path}: {pattern}"
        source.memo[pattern] = Patterns(table(config.get(pattern), where), where, len(source.tensors))
    found = source.memo[pattern].value(path)
    return config.get(default) if found is None else found


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
    # PEFT takes any end of a path for a match: where one name ends another, only anchored expressions tell them apart
    ends = {name[at + 1 :] for name in ranks for at, sign in enumerate(name) if sign == "."}
    anchored = bool(ends & ranks.keys())
    start = "^" if anchored else ""
    pattern = {start + re.escape(name): rank for name, rank in sorted(ranks.items()) if rank != usual}
    targets = "|".join(map(re.escape, sorted(ranks))) if anchored else sorted(ranks)
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
        "target_modules": targets,
        "use_dora": False,
        "use_rslora": False,
    }


def _component(adapter: Adapter) -> str:
    """What all names begin with: a pipeline's component and a dot, or nothing."""
    found = {component(name) for name in adapter.shapes}
    if len(found) > 1:
        raise IncompatibleAdapters(
            f"{adapter.name}: adapts {', '.join(part or 'a language model' for part in sorted(found))}; "
            "a PEFT directory holds one model: write --to diffusers or --to kohya"
        )
    return "".join(f"{part}." for part in found if part)

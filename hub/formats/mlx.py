"""MLX-LM: `lora_a` (inputs, rank) and `lora_b` (rank, outputs), both transposed; the scale is stored as it is used."""

from __future__ import annotations

import re
from collections.abc import Collection

from ..source import Source
from ._names import with_component
from ._patterns import number, table
from ._roles import Claim, split


def claim(key: str, source: Source) -> Claim | None:
    """`….lora_a` and `….lora_b`."""
    return split(key) if re.search(r"\.lora_[ab]$", key) else None


def names(modules: Collection[str]) -> dict[str, str]:
    """Canonical names of the file's modules."""
    return {module: _canonical(module) for module in modules}


def _canonical(module: str) -> str:
    """The module's path, which MLX-LM shares with transformers."""
    return with_component(module)


def scale(source: Source, module: str, rank: int) -> float | None:
    """`lora_parameters.scale` of the configuration; unknown without one. Raises FormatError for what is no number."""
    where = f"{source.path}: lora_parameters"
    value = table((source.config or {}).get("lora_parameters"), where).get("scale")
    return None if value is None else number(value, f"{where}.scale")

"""loralib (microsoft/LoRA) and other bare `.lora_A` / `.lora_B` parameters. The file does not say its alpha."""

from __future__ import annotations

import re
from collections.abc import Collection

from ..source import Source
from ._names import strip_peft, with_component
from ._roles import Claim, split


def claim(key: str, source: Source) -> Claim | None:
    """`….lora_A` and `….lora_B` that end the name, in a file without a PEFT configuration."""
    if re.search(r"\.lora_[AB]$", key) and not key.startswith("base_model.") and not source.config:
        return split(key)
    return None


def names(modules: Collection[str]) -> dict[str, str]:
    """Canonical names of the file's modules."""
    return {module: _canonical(module) for module in modules}


def _canonical(module: str) -> str:
    """The module's path in the base model."""
    return with_component(strip_peft(module))


def scale(source: Source, module: str, rank: int) -> float | None:
    """Unknown: loralib keeps alpha in the training script."""
    return None

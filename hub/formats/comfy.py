"""ComfyUI and ai-toolkit: `diffusion_model.` before the original checkpoint's paths."""

from __future__ import annotations

from collections.abc import Collection

from ..source import Source
from ._names import with_component
from ._native import SD_ROOTS
from ._roles import Claim, split

_PREFIXES = ("diffusion_model.", "model.diffusion_model.")


def claim(key: str, source: Source) -> Claim | None:
    """Any adapter tensor under `diffusion_model.`."""
    return split(key) if key.startswith(_PREFIXES) else None


def names(modules: Collection[str]) -> dict[str, str]:
    """Canonical names of the file's modules."""
    return {module: _canonical(module) for module in modules}


def _canonical(module: str) -> str:
    """The path under `unet.` for Stable Diffusion's blocks, under `transformer.` for everything newer."""
    for prefix in _PREFIXES:
        module = module.removeprefix(prefix)
    if module.startswith(SD_ROOTS):
        return f"unet.{module}"
    named = with_component(module)
    return named if named != module else f"transformer.{module}"


def scale(source: Source, module: str, rank: int) -> float | None:
    """1: ai-toolkit drops alpha when it equals the rank, and writes it where it does not."""
    return 1.0

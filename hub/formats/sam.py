"""Sam_LoRA: numbered pairs `w_a_000`, `w_b_000`, query then value of each attention block of the image encoder."""

from __future__ import annotations

import re
from collections.abc import Collection

from ..source import Source
from ._roles import Claim

_KEY = re.compile(r"w_([ab])_(\d{3})")


def claim(key: str, source: Source) -> Claim | None:
    """`w_a_NNN` is a down factor, `w_b_NNN` its up factor."""
    found = _KEY.fullmatch(key)
    return Claim(found[2], "down" if found[1] == "a" else "up") if found else None


def names(modules: Collection[str]) -> dict[str, str]:
    """Canonical names of the file's modules."""
    return {module: _canonical(module) for module in modules}


def _canonical(module: str) -> str:
    """The rows of `qkv` that the pair changes: even numbers the query's, odd ones the value's."""
    block, part = divmod(int(module), 2)
    return f"image_encoder.blocks.{block}.attn.qkv.{'qv'[part]}"


def scale(source: Source, module: str, rank: int) -> float | None:
    """1: the trainer has no alpha."""
    return 1.0

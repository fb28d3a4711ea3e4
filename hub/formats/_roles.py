"""What a tensor is, by the end of its name: the suffixes that trainers use, each with its role."""

from __future__ import annotations

import re
from typing import NamedTuple


class Claim(NamedTuple):
    """A tensor's place: the module it belongs to (the dialect's own name, dots or not) and its role there."""

    module: str
    role: str


# pattern of the suffix -> role. "_t" roles are stored transposed; the first match wins.
_SUFFIXES: tuple[tuple[str, str], ...] = (
    (r"\.lora_A(?:\.\w+)?\.weight", "down"),
    (r"\.lora_B(?:\.\w+)?\.weight", "up"),
    (r"\.lora_B(?:\.\w+)?\.bias", "bias"),
    (r"\.lora_embedding_A(?:\.\w+)?", "embedding_down"),
    (r"\.lora_embedding_B(?:\.\w+)?", "embedding_up"),
    (r"\.lora_magnitude_vector(?:\.\w+)?(?:\.weight)?", "dora"),
    (r"\.lora_E(?:\.\w+)?", "adalora"),
    (r"\.ranknum(?:\.\w+)?", "ranknum"),
    (r"\.lora_down(?:\.\w+)?\.weight", "down"),
    (r"\.lora_up(?:\.\w+)?\.weight", "up"),
    (r"\.lora_mid\.weight", "mid"),
    (r"\.dora_scale", "dora"),
    (r"\.alpha", "alpha"),
    (r"[._]lora\.down\.weight", "down"),
    (r"[._]lora\.up\.weight", "up"),
    (r"[._]lora(?:_linear_layer)?\.down\.weight", "down"),
    (r"[._]lora(?:_linear_layer)?\.up\.weight", "up"),
    (r"(?<=_lora[12])\.down\.weight", "down"),
    (r"(?<=_lora[12])\.up\.weight", "up"),
    (r"[._]lora\.alpha", "alpha"),
    (r"\.lora_A", "down"),
    (r"\.lora_B", "up"),
    (r"\.lora_a", "down_t"),
    (r"\.lora_b", "up_t"),
    *((rf"\.hada_{part}", f"hada_{part}") for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *((rf"\.lokr_{part}", f"lokr_{part}") for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    (r"\.diff", "diff"),
    (r"\.diff_b", "diff_b"),
)
_COMPILED = [(re.compile(pattern + "$"), role) for pattern, role in _SUFFIXES]


def split(key: str) -> Claim | None:
    """Module and role of a tensor name, or None where the suffix is no adapter's."""
    for pattern, role in _COMPILED:
        found = pattern.search(key)
        if found and found.start():
            return Claim(key[: found.start()], role)
    return None

"""Names for adapters: one from a path that a person recognises, and what a name may be."""

from __future__ import annotations

import re
from pathlib import PurePath

from .entries import storable
from .errors import BadOption

LONGEST = 120

# Stems and folders that say nothing: the folder above them does.
_VAGUE = re.compile(
    r"(adapter|lora|peft|model|weights?|unet|text_encoder|transformer|output|outputs|default|best|last|latest|final"
    r"|adapters|loras|adapter_model|adapter_ckpt|pytorch_lora_weights|pytorch_model|diffusion_pytorch_model|checkpoint"
    r"|checkpoint[-_].*|epoch[-_]?\d+|step[-_]?\d+|v?\d+(\.\d+)*|[0-9a-f]{40})",
    re.IGNORECASE,
)
_VARIANT = re.compile(r"checkpoint|best|last|latest|final|epoch|step|v?\d+(\.\d+)*$", re.IGNORECASE)  # vague, but tells
_WEIGHT_SUFFIX = re.compile(r"[:@](?=[-+]?[\d.]*$)")  # "name:0.7" gives an adapter a weight, so no name ends like that


def name_from_path(path: str, *, folder: bool) -> str:
    """The file's stem or the folder's name; where that says nothing ("adapter_model", "checkpoint-230") with the
    folder above, and for a model in the Hugging Face cache the model's name."""
    place = PurePath(path)
    parts = list(place.parts[1:] if place.anchor else place.parts)
    if not folder and parts:
        parts[-1] = place.stem
    named: list[str] = []
    for part in reversed(parts):
        if part == "snapshots":
            continue
        cached = part.startswith("models--")
        vague = _VAGUE.fullmatch(part) is not None
        if not vague or _VARIANT.match(part):
            named.insert(0, part.rpartition("--")[2] if cached else part)
        if not vague:
            break
    return tidy("-".join(named) or (parts[-1] if parts else ""))


def tidy(name: str) -> str:
    """The nearest name that is allowed."""
    name = "".join(sign if sign.isprintable() else "_" for sign in storable(name))
    return _WEIGHT_SUFFIX.sub("_", name.strip())[:LONGEST].strip() or "adapter"


def checked(name: str) -> str:
    """The name that a user chose. Raises BadOption if it is not allowed."""
    if name != tidy(name):
        raise BadOption(
            f"{name!r} cannot be an adapter's name; expected up to {LONGEST} printable characters that do not end "
            f"like a weight (:0.7); try {tidy(name)!r}"
        )
    return name

"""Which base model an adapter is for: what files say, what shapes betray, and whether two names mean one base."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

# families within which adapters of any checkpoint are exchanged; pattern over the lower-case name -> family
_FAMILIES: tuple[tuple[str, str], ...] = (
    (r"sd[-_]?xl|stable-diffusion-xl|(^|[/_-])(pony|illustrious|noobai)", "sdxl"),
    (r"stable-diffusion-v?3|(^|[/_-])sd[-_ ]?v?3", "sd-3"),
    (r"stable-diffusion[-/]v?2|(^|[/_-])sd[-_ ]?v?2|(^|/)v2-[01]", "sd-2"),
    (r"stable-diffusion[-/]v?1|(^|[/_-])sd[-_ ]?v?1|(^|/)v1-[45]|animefull|(^|[/_-])nai($|[-_.])", "sd-1"),
    (r"flux[-_. ]?2", "flux-2"),
    (r"flux", "flux-1"),
)


class Base(NamedTuple):
    """A base model's name and where the name came from."""

    name: str | None
    origin: str | None


def family(name: str) -> str:
    """The architecture family of an image base, or the last path segment of any other name, in lower case."""
    text = name.lower().replace("\\", "/").rstrip("/")
    for pattern, kind in _FAMILIES:
        if re.search(pattern, text):
            return kind
    return re.sub(r"^models--.*--", "", text.rsplit("/", 1)[-1])


def same_base(one: str | None, other: str | None) -> bool:
    """Whether adapters for these bases may be combined; an unknown base fits any (shapes are still checked)."""
    return one is None or other is None or family(one) == family(other)


def pointwise(module: str, base: str | None) -> bool:
    """Whether a module is a 1x1 convolution in its base, though a file (a product by LyCORIS) may hold a linear map.

    Every UNet's shortcuts are; the projections around its attention only in the first Stable Diffusion.
    """
    leaf = module.rsplit(".", 1)[-1]
    if not module.startswith("unet."):
        return False
    return leaf == "conv_shortcut" or (leaf in ("proj_in", "proj_out") and base is not None and family(base) == "sd-1")


def from_metadata(metadata: Mapping[str, str]) -> Base:
    """The base that a header names: kohya's and ModelSpec's entries."""
    for key in ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name"):
        value = metadata.get(key, "").strip()[:200]
        if value and value.lower() != "none":
            known = re.search("|".join(pattern for pattern, _ in _FAMILIES), value.lower())
            if key != "ss_sd_model_name":
                return Base(family(value) if known else value, f"header's {key}")
            if known:
                return Base(family(value), f"guessed from header's {key} {value!r}")
    if metadata.get("ss_v2", "").lower() == "true":
        return Base("sd-2", "header's ss_v2")
    return Base(None, None)


def from_shapes(widths: Iterable[tuple[str, int, int]]) -> Base:
    """A guess from (module name, inputs, outputs) of an adapter's modules."""
    modules = list(widths)
    for name, inputs, _ in modules:
        if name.startswith("unet.") and re.search(r"attn2\.to_[kv]$", name):
            kind = {768: "sd-1", 1024: "sd-2", 2048: "sdxl"}.get(inputs)
            if kind:
                return Base(kind, f"guessed from a cross-attention width of {inputs}")
    if any(name.startswith("transformer.single_transformer_blocks.") for name, _, _ in modules):
        fused = any(name.endswith("to_qkv_mlp_proj") for name, _, _ in modules)
        return Base("flux-2" if fused else "flux-1", "guessed from its single and double transformer blocks")
    if any(name.startswith("image_encoder.blocks.") for name, _, _ in modules):
        width = next(inputs for name, inputs, _ in modules if name.startswith("image_encoder.blocks."))
        kind = {768: "sam-vit-b", 1024: "sam-vit-l", 1280: "sam-vit-h"}.get(width)
        return Base(kind, f"guessed from an image encoder width of {width}") if kind else Base(None, None)
    return _language_model(modules)


def _language_model(modules: list[tuple[str, int, int]]) -> Base:
    for name, inputs, outputs in modules:
        if re.search(r"(^|\.)h\.\d+\.attn\.c_attn$", name) and outputs == 3 * inputs:
            kinds = {768: "gpt2", 1024: "gpt2-medium", 1280: "gpt2-large", 1600: "gpt2-xl"}
            if inputs in kinds:
                return Base(kinds[inputs], f"guessed from GPT-2's fused attention of width {inputs}")
        if re.match(r"roberta\.encoder\.layer\.\d+\.", name) and inputs in (768, 1024):
            kind = "roberta-base" if inputs == 768 else "roberta-large"
            return Base(kind, f"guessed from RoBERTa's layer names and width {inputs}")
    return Base(None, None)

"""cloneofsimo/lora: pairs numbered in the order in which the trainer walked the model, `unet:0:up`, `unet:0:down`.

The walk visits the transformer blocks (first attention, the gated half of the feed-forward, second attention) of a
Stable Diffusion UNet, down blocks, up blocks, middle last; and every attention of the text encoder. Where the count is
that of Stable Diffusion 1 or 2 the numbers become names, else they stay numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection

from ..source import Source
from ._roles import Claim

_KEY = re.compile(r"(unet|text_encoder):(\d+):(up|down)")
_UNET_LEAVES = (
    *(f"attn1.{leaf}" for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    *(f"attn2.{leaf}" for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
)
_TEXT_LEAVES = ("k_proj", "v_proj", "q_proj", "out_proj")
_UNET_BLOCKS = (
    *(f"down_blocks.{level}.attentions.{layer}" for level in range(3) for layer in range(2)),
    *(f"up_blocks.{level}.attentions.{layer}" for level in range(1, 4) for layer in range(3)),
    "mid_block.attentions.0",
)


def claim(key: str, source: Source) -> Claim | None:
    """`component:number:up|down`."""
    found = _KEY.fullmatch(key)
    return Claim(f"{found[1]}.{int(found[2])}", found[3]) if found else None


def names(modules: Collection[str]) -> dict[str, str]:
    """Canonical names where a component has the count that they need; else the numbers stay."""
    counts = Counter(module.partition(".")[0] for module in modules)
    return {module: _named(module, counts) for module in modules}


def _named(module: str, counts: Counter[str]) -> str:
    component, _, digits = module.partition(".")
    number, count = int(digits), counts[component]
    if component == "unet" and count == len(_UNET_BLOCKS) * len(_UNET_LEAVES):
        block, leaf = divmod(number, len(_UNET_LEAVES))
        if block < len(_UNET_BLOCKS):
            return f"unet.{_UNET_BLOCKS[block]}.transformer_blocks.0.{_UNET_LEAVES[leaf]}"
    if component == "text_encoder" and count % len(_TEXT_LEAVES) == 0:
        layer, leaf = divmod(number, len(_TEXT_LEAVES))
        return f"text_encoder.text_model.encoder.layers.{layer}.self_attn.{_TEXT_LEAVES[leaf]}"
    return module


def scale(source: Source, module: str, rank: int) -> float | None:
    """1: the trainer multiplies by a strength at use, and stores none."""
    return 1.0

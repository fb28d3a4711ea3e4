"""Original checkpoints' module names (Stable Diffusion's, FLUX's) under diffusers' names.

FLUX fuses query, key and value into one matrix. The fused delta is cut by rows, the parts share `down`: exact,
and at the same rank. Parts are what adapters of different trainers have in common.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """A canonical module and the rows of `up` that are its own, in its order (None: all, as they are)."""

    name: str
    rows: Sequence[int] | None = None


_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_BLOCK = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"middle_block\.(\d)\.(.+)")
SD_ROOTS = ("input_blocks.", "output_blocks.", "middle_block.", "time_embed.", "label_emb.", "out.")
_LAYERS = 2  # residual blocks a level, in every Stable Diffusion UNet


def sd_unet(path: str) -> str:
    """A UNet path of an original Stable Diffusion checkpoint (1.x, 2.x, XL) as diffusers names it."""
    middle = _MIDDLE.fullmatch(path)
    if middle:
        index, rest = int(middle[1]), middle[2]
        return f"mid_block.attentions.0.{rest}" if index == 1 else f"mid_block.resnets.{index // 2}.{_resnet(rest)}"
    block = _BLOCK.fullmatch(path)
    if not block:
        return _stem(path)
    side, index, slot, rest = block[1], int(block[2]), int(block[3]), block[4]
    if side == "input_blocks":
        level, layer = divmod(index - 1, _LAYERS + 1)
        if rest == "op":
            return f"down_blocks.{level}.downsamplers.0.conv"
        where = f"down_blocks.{level}"
    else:
        level, layer = divmod(index, _LAYERS + 1)
        if rest == "conv":
            return f"up_blocks.{level}.upsamplers.0.conv"
        where = f"up_blocks.{level}"
    return f"{where}.resnets.{layer}.{_resnet(rest)}" if slot == 0 else f"{where}.attentions.{layer}.{rest}"


def _resnet(rest: str) -> str:
    return _RESNET.get(rest, rest)


def _stem(path: str) -> str:
    table = {
        "input_blocks.0.0": "conv_in",
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "out.2": "conv_out",
    }
    return table.get(path, path)


_DOUBLE = {
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "proj_lora1": "attn.to_out.0",  # the xlabs trainer: 1 is the image stream, 2 the text stream
    "proj_lora2": "attn.to_add_out",
}
_ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v")
_TEXT_ATTENTION = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_DOUBLE_FUSED: dict[str, tuple[str, ...]] = {
    "img_attn.qkv": _ATTENTION,
    "txt_attn.qkv": _TEXT_ATTENTION,
    "qkv_lora1": _ATTENTION,
    "qkv_lora2": _TEXT_ATTENTION,
}
_SINGLE = {"linear2": "proj_out", "proj": "proj_out", "modulation.lin": "norm.linear"}
# xlabs adapts the attention's rows alone
_SINGLE_FUSED: dict[str, tuple[str, ...]] = {"linear1": (*_ATTENTION, "proj_mlp"), "qkv": _ATTENTION}
_FLUX_KINDS = {
    "double_blocks": ("transformer_blocks", _DOUBLE, _DOUBLE_FUSED),
    "single_blocks": ("single_transformer_blocks", _SINGLE, _SINGLE_FUSED),
}
_LAST_MODULATION = "final_layer.adaLN_modulation.1"
_FLUX_STEM = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    _LAST_MODULATION: "norm_out.linear",
}
_FLUX_BLOCK = re.compile(r"(double_blocks|single_blocks)\.(\d+)\.(?:processor\.)?(.+)")


def flux(path: str, outputs: int) -> list[Part]:
    """A FLUX path of the original checkpoint as diffusers' modules; several where the original fuses them."""
    block = _FLUX_BLOCK.fullmatch(path)
    if not block:
        half = outputs // 2  # diffusers swaps the halves of the last modulation, shift and scale
        swapped = [*range(half, outputs), *range(half)] if path == _LAST_MODULATION else None
        return [Part(_FLUX_STEM.get(path, path), swapped)]
    folder, names, fused = _FLUX_KINDS[block[1]]
    where, rest = f"{folder}.{block[2]}", block[3]
    if rest in fused and (cut := _cut(where, fused[rest], outputs)):
        return cut
    layer, _, number = rest.rpartition(".")  # OneTrainer writes fused layers in parts: img_attn.qkv.0
    if number.isdecimal() and int(number) < len(fused.get(layer, ())):
        return [Part(f"{where}.{fused[layer][int(number)]}")]
    return [Part(f"{where}.{names.get(rest, rest)}")]


def _cut(where: str, names: tuple[str, ...], outputs: int) -> list[Part]:
    """The rows of each part; empty where they cannot be told, because the rows do not divide."""
    shares = [4 if name == "proj_mlp" else 1 for name in names]  # the MLP of a single block is four times as wide
    unit, rest = divmod(outputs, sum(shares))
    stops = [unit * sum(shares[: index + 1]) for index in range(len(shares))]
    return [
        Part(f"{where}.{name}", range(stop - unit * share, stop))
        for name, share, stop in zip(names, shares, stops, strict=True)
        if not rest
    ]


def parts(name: str, outputs: int) -> list[Part]:
    """The canonical modules behind a canonical-looking name that may still follow an original checkpoint."""
    component, _, path = name.partition(".")
    flux_path = path.startswith(("double_blocks.", "single_blocks.")) or path in _FLUX_STEM
    if flux_path and component in {"transformer", "unet"}:  # kohya says unet of every image model
        return [Part(f"transformer.{part.name}", part.rows) for part in flux(path, outputs)]
    if component == "unet" and path.startswith(SD_ROOTS):
        return [Part(f"unet.{sd_unet(path)}")]
    return [Part(name)]

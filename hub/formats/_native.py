"""Original checkpoints' module names (Stable Diffusion's, FLUX's) under diffusers' names.

FLUX fuses query, key and value into one matrix. The fused delta is cut by rows, the parts share `down`: exact,
and at the same rank. Parts are what adapters of different trainers have in common.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Part(NamedTuple):
    """A canonical module and the rows of the fused `up` that are its own (None: all)."""

    name: str
    rows: slice | None = None


_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_BLOCK = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"middle_block\.(\d)\.(.+)")
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
        if index == 0:
            return "conv_in"
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
_FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "qkv_lora1": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "qkv_lora2": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
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
}
_FLUX_BLOCK = re.compile(r"(double_blocks|single_blocks)\.(\d+)\.(?:processor\.)?(.+)")


def flux(path: str, outputs: int) -> list[Part]:
    """A FLUX path of the original checkpoint as diffusers' modules; several where the original fuses them."""
    block = _FLUX_BLOCK.fullmatch(path)
    if not block:
        return [Part(_FLUX_STEM.get(path, path))]
    index, rest = block[2], block[3]
    if block[1] == "double_blocks":
        where = f"transformer_blocks.{index}"
        if rest in _FUSED:
            return _cut(where, _FUSED[rest], [outputs // 3] * 3)
        return [Part(f"{where}.{_DOUBLE.get(rest, rest)}")]
    where = f"single_transformer_blocks.{index}"
    if rest == "linear1":  # query, key, value and the four times wider input of the MLP
        width = outputs // 7
        return _cut(where, ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), [width, width, width, 4 * width])
    if rest == "qkv":  # the xlabs trainer adapts the attention rows alone
        return _cut(where, ("attn.to_q", "attn.to_k", "attn.to_v"), [outputs // 3] * 3)
    names = {"linear2": "proj_out", "proj": "proj_out", "modulation.lin": "norm.linear"}
    return [Part(f"{where}.{names.get(rest, rest)}")]


def _cut(where: str, names: tuple[str, ...], sizes: list[int]) -> list[Part]:
    stops = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [
        Part(f"{where}.{name}", slice(stop - size, stop)) for name, size, stop in zip(names, sizes, stops, strict=True)
    ]


def parts(name: str, outputs: int) -> list[Part]:
    """The canonical modules behind a canonical-looking name that may still follow an original checkpoint."""
    component, _, path = name.partition(".")
    if path.startswith(("double_blocks.", "single_blocks.")) or (component == "transformer" and path in _FLUX_STEM):
        return [Part(f"transformer.{part.name}", part.rows) for part in flux(path, outputs)]
    if component == "unet" and path.startswith(("input_blocks.", "output_blocks.", "middle_block.", "time_embed.")):
        return [Part(f"unet.{sd_unet(path)}")]
    return [Part(name)]

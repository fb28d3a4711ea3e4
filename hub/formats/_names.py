"""Canonical module names: dotted paths in the base model, with the component first for pipelines of several models.

`unet.`, `transformer.`, `text_encoder.`, `text_encoder_2.` lead where a pipeline has components; a language model's
modules carry no prefix. So files of different trainers meet under one name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_UNET_ROOTS = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "time_embedding.", "add_embedding.")
_TRANSFORMER_ROOTS = (
    "transformer_blocks.", "single_transformer_blocks.", "double_blocks.", "single_blocks.", "img_in", "txt_in",
    "time_in.", "vector_in.", "guidance_in.", "final_layer.",
)  # fmt: skip

_LANGUAGE = tuple(
    f"transformer.{part}" for part in ("h.", "wte", "wpe", "ln_f", "layer.", "encoder.", "word_embeddings")
)
_COMPONENTS = re.compile(r"(unet|transformer|prior|text_encoder(_[23])?)\.")

# kohya's prefixes -> component
_FLAT_PREFIXES = (
    ("lora_unet_", "unet"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "text_encoder_3"),
    ("lora_te_", "text_encoder"),
    ("lora_prior_unet_", "prior"),
    ("lora_prior_te_", "prior_text_encoder"),
    ("lora_transformer_", "transformer"),
    ("lycoris_", "unet"),
)

# path segments that hold an underscore: without them "to_q" and "to.q" could not be told apart
_SEGMENTS = sorted(
    """down_blocks up_blocks mid_block transformer_blocks single_transformer_blocks double_blocks single_blocks
    input_blocks output_blocks middle_block conv_in conv_out conv_shortcut proj_in proj_out proj_mlp
    time_embedding time_emb_proj add_embedding time_embed label_emb linear_1 linear_2 to_q to_k to_v to_out
    to_add_out add_q_proj add_k_proj add_v_proj ff_context norm1_context text_model self_attn q_proj k_proj v_proj
    out_proj in_layers out_layers emb_layers skip_connection img_attn txt_attn img_mlp txt_mlp img_mod txt_mod
    text_projection token_embedding position_embedding embedding_manager final_layer guidance_in vector_in time_in
    img_in txt_in in_layer out_layer cross_attn context_embedder x_embedder to_qkv to_kv time_text_embed
    adaLN_modulation
    timestep_embedder guidance_embedder text_embedder wi_0 wi_1 norm_out layer_norm1 layer_norm2 final_layer_norm
    """.split(),
    key=len,
    reverse=True,
)
_SEGMENT = re.compile("|".join([*(rf"{word}(?=_|$)" for word in _SEGMENTS), r"[^_]+"]))


def strip_peft(name: str) -> str:
    """A name without the wrapper that PEFT puts around a model."""
    return name.removeprefix("base_model.model.").removeprefix("base_model.")


def component(name: str) -> str:
    """The component of a diffusion pipeline that a canonical name begins with; empty for a language model's name."""
    found = _COMPONENTS.match(name)
    return found[1] if found and not name.startswith(_LANGUAGE) else ""


def with_component(name: str) -> str:
    """A diffusion model's bare path with its component in front; other names as they are."""
    if name.startswith(_UNET_ROOTS):
        return f"unet.{name}"
    if name.startswith(_TRANSFORMER_ROOTS):
        return f"transformer.{name}"
    if name.startswith("text_model."):
        return f"text_encoder.{name}"
    return name


def with_components(names: Iterable[str]) -> dict[str, str]:
    """The names of one model's modules with its component in front, which some of them betray for all."""
    found = {name: with_component(name) for name in names}
    betrayed = {new.partition(".")[0] for name, new in found.items() if new != name}
    if len(betrayed) != 1:
        return found
    front = betrayed.pop()
    return {name: new if _COMPONENTS.match(new) else f"{front}.{new}" for name, new in found.items()}


def modern(name: str) -> str:
    """An old diffusers path (attention processors) under today's module names."""
    name = re.sub(r"\.to_(q|k|v|out)_lora$", r".to_\1", name.replace(".processor.", "."))
    if ".self_attn.to_" in name:  # of a text encoder
        return re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", name)
    return re.sub(r"\.to_out$", ".to_out.0", name)


def unflatten(name: str) -> str | None:
    """kohya's flattened name as a dotted path with its component, or None if the prefix is unknown.

    Underscores are read by a list of the segments that contain one, the longest first.
    """
    for prefix, component in _FLAT_PREFIXES:
        if name.startswith(prefix):
            path = ".".join(_SEGMENT.findall(name[len(prefix) :]))
            return f"{'transformer' if path.startswith(_TRANSFORMER_ROOTS) else component}.{path}"
    return None


def flatten(name: str, text_encoders: int = 1) -> str | None:
    """A canonical name as kohya writes it, or None where it has no component that kohya knows.

    `text_encoders` tells whether the file holds one (`lora_te_`) or several (`lora_te1_`, `lora_te2_`).
    """
    component, _, path = name.partition(".")
    prefixes = {
        "unet": "lora_unet_",
        "text_encoder": "lora_te_" if text_encoders < 2 else "lora_te1_",
        "text_encoder_2": "lora_te2_",
        "text_encoder_3": "lora_te3_",
        "transformer": "lora_transformer_",
        "prior": "lora_prior_unet_",
    }
    if component not in prefixes or not path:
        return None
    return prefixes[component] + path.replace(".", "_")

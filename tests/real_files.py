"""Real adapter files beside the checkout, and what PEFT and diffusers make of an adapter in a model of real shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

FOLDER = (Path(__file__).resolve().parents[1].parent / "shared" / "adapters").resolve()  # the catalogue resolves links
SD1 = {
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
}

Deltas = dict[str, Tensor]


def empty(model: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """A model of real shape whose weights were never filled: deltas do not depend on them."""
    with torch.device("meta"):
        made = model()
    return made.to_empty(device="cpu")


def injected(model: torch.nn.Module, adapter: str) -> Deltas:
    """PEFT's own deltas of all the layers it put into a model, as maps from input to output."""
    found = {}
    for name, layer in model.named_modules():
        if adapter in getattr(layer, "lora_A", ()):
            delta = layer.get_delta_weight(adapter).detach()
            turned = getattr(layer, "fan_in_fan_out", False)
            found[name.removeprefix("base_model.model.")] = delta.T if turned else delta
    return found

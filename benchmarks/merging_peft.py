"""PEFT's `add_weighted_adapter` as a rival in merging.py: every combination type that it offers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lorahub.generate.sentences import SentenceModel
from lorahub.hub.adapter import Adapter
from lorahub.hub.lowrank import LowRank
from peft import PeftModel
from peft.tuners.lora import LoraLayer

MERGED = "merged"


def combined(
    model: SentenceModel, folders: tuple[Path, ...], kind: str, weight: float, options: Mapping[str, Any]
) -> Adapter:
    """What PEFT makes of the adapters in `folders`, all of one weight; `seed` among the options is that of its draws.

    Raises ValueError where PEFT refuses.
    """
    loaded = _loaded(model, folders)
    names = [str(number) for number in range(len(folders))]
    torch.manual_seed(options.get("seed", 0))
    given = {name: value for name, value in options.items() if name != "seed"}
    if MERGED in loaded.peft_config:
        loaded.delete_adapter(MERGED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded.add_weighted_adapter(names, [weight] * len(names), MERGED, combination_type=kind, **given)
    layers = {name: layer for name, layer in loaded.base_model.model.named_modules() if isinstance(layer, LoraLayer)}
    return Adapter({name: _factors(layer) for name, layer in layers.items()})


def _factors(layer: Any) -> LowRank:
    down, up = (side[MERGED].weight.detach().clone() for side in (layer.lora_A, layer.lora_B))
    return LowRank(down, up, float(layer.scaling[MERGED]))


@lru_cache(maxsize=2)
def _loaded(model: SentenceModel, folders: tuple[Path, ...]) -> Any:
    """A PEFT model that holds the adapters as `0`, `1` ..."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded: Any = PeftModel.from_pretrained(copy.deepcopy(model.encoder), folders[0], adapter_name="0")
        for number, folder in enumerate(folders[1:], start=1):
            loaded.load_adapter(folder, adapter_name=str(number))
    return loaded

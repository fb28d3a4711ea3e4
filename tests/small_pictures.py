"""A picture world small enough for tests: a pipeline of random weights, adapters for it, gates, a command to call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lorahub.hub.adapter import Adapter
from lorahub.hub.lowrank import LowRank
from lorahub.hub.reading import read
from lorahub.hub.writing import save
from lorahub.merge.gated import fused, save_gates, widths
from lorahub.merge.gates import Gates, Recipe
from numpy.typing import NDArray
from torch import nn

BASE = "tests/small-pictures"
LAYERS = ("to_q", "to_v", "to_out.0")


def picture_pipeline(seed: int = 0) -> Any:
    """Our own pipeline with two layers of 16 and pictures of 8 x 8."""
    from diffusers import FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel
    from lorahub.generate.pictures import PicturePipeline

    torch.manual_seed(seed)
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, num_layers=2, sample_size=8,
        patch_size=4, cross_attention_dim=16, caption_channels=384, use_additional_conditions=False,
    )  # fmt: skip
    pipeline = PicturePipeline(model.eval(), FlowMatchEulerDiscreteScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def adapter(
    model: nn.Module, seed: int, component: str = "transformer", base: str | None = BASE, kinds: Sequence[str] = LAYERS
) -> Adapter:
    """Normally distributed factors, large enough to be seen, for the layers whose paths end in `kinds`."""
    chance, modules = torch.Generator().manual_seed(seed), {}
    for path, layer in model.named_modules():
        if path.endswith(tuple(kinds)) and isinstance(layer, (nn.Linear, nn.Conv2d)):
            rows, columns = layer.weight.shape[0], layer.weight[0].numel()
            down = torch.randn(3, columns, generator=chance) / columns**0.5
            up = torch.randn(rows, 3, generator=chance)
            modules[f"{component}.{path}"] = LowRank(down, up, 1.0, tuple(layer.weight.shape[2:]))
    assert modules
    return Adapter(modules, base, {}, {"name": f"a{seed}"})


def write_adapter(some: Adapter, folder: Path, title: str, text: str, trigger: str = "") -> Path:
    """A PEFT folder with a model card."""
    from dataclasses import replace

    head = f"---\nbase_model: {some.base}\n" if some.base else "---\n"
    head += f"instance_prompt: {trigger}\n" if trigger else ""
    card = f"{head}---\n# {title}\n\n{text}\n"
    save(replace(some, meta={"name": title}), folder, "peft", card=lambda: card)
    return folder


def write_gates(model: nn.Module, paths: Sequence[str], file: Path, **recipe: Any) -> Gates:
    """Untrained gates for these layers of the model."""
    gates = Gates(widths(model, paths), Recipe(**recipe), seed=1).requires_grad_(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_gates(gates, file, model, force=True)
    return gates


def gated_paths(model: nn.Module, kinds: Sequence[str] = LAYERS) -> list[str]:
    """The linear layers for which gates are made."""
    layers = dict(model.named_modules())
    return [path for path in layers if path.endswith(tuple(kinds)) and isinstance(layers[path], nn.Linear)]


def painted(
    world: Path, names: Sequence[str], weights: Sequence[float], prompt: str, seed: int = 0
) -> NDArray[np.int16]:
    """The oracle: the pipeline in `world` called by hand, two steps, with the sum of adapters of its library."""
    from lorahub.generate.pictures import PicturePipeline

    pipeline = PicturePipeline.from_pretrained(world / "base")
    pipeline.set_progress_bar_config(disable=True)
    adapters = [read(world / "library" / name) for name in names]
    with fused(pipeline.transformer, adapters, None, weights, component="transformer"):
        chance = torch.Generator().manual_seed(seed)
        return np.asarray(pipeline(prompt, num_inference_steps=2, generator=chance).images[0], np.int16)


def composition(
    world: Path, names: Sequence[str], prompt: str, passes: Sequence[Sequence[float]] = ((1, 0), (0, 1))
) -> NDArray[np.int16]:
    """The oracle for composed adapters: two steps by hand, with a pass after the other."""
    from diffusers.image_processor import VaeImageProcessor
    from lorahub.generate.pictures import PicturePipeline, predict

    pipeline = PicturePipeline.from_pretrained(world / "base")
    model, scheduler = pipeline.transformer, pipeline.scheduler
    adapters = [read(world / "library" / name) for name in names]
    picture = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    words, none = pipeline.encode_prompt([prompt]), pipeline.encode_prompt([""])
    scheduler.set_timesteps(2)
    with torch.no_grad():
        for time in scheduler.timesteps:
            free, sides = predict(model, picture, time.expand(1), none), []
            for weights in passes:
                with fused(model, adapters, None, weights, component="transformer"):
                    sides.append(predict(model, picture, time.expand(1), words))
            flow = free + 3 * (sum(sides) / len(sides) - free)
            picture = scheduler.step(flow, time, picture).prev_sample
    return np.asarray(VaeImageProcessor(vae_scale_factor=1).postprocess(picture, output_type="pil")[0], np.int16)

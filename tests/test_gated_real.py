"""Real SD 1.x files on a UNet of SD 1.5's shape: every module finds its layer, and acts as when diffusers loads it.

The files lie beside the checkout and do not ship with it; without them these tests are skipped.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lorahub.hub.adapter import Adapter
from lorahub.hub.lowrank import LowRank
from lorahub.hub.reading import read
from lorahub.hub.writing import save
from lorahub.merge.gated import fused, widths
from lorahub.merge.gates import Gates, Recipe
from real_files import FOLDER, SD1, empty
from test_merge_real import PICTURES
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"real adapters are not at {FOLDER}")

OLD, NEW = PICTURES[:2]  # attention processors' names, and layers' names: the two that diffusers itself has written
MODULES = {"catundchat": 128, "huggingface": 128, "cloneofsimo": 144, "KohakuBlueleaf": 278}
STRENGTH = 20.0  # so that what an adapter changes stands out of the rounding
BLOCK = 1_000_003


@cache
def bare() -> Any:
    """SD 1.5's UNet without storage."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**SD1).eval()


def filled(model: nn.Module) -> nn.Module:
    """Random weights that keep activations' size, cheaply: one block of numbers over and over."""
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            flat = parameter.flatten()
            for start in range(0, len(flat), BLOCK):
                piece = flat[start : start + BLOCK]
                torch.mul(block[: len(piece)], parameter[0].numel() ** -0.5, out=piece)
    return model.requires_grad_(False).eval()


def painted(model: nn.Module) -> Tensor:
    chance = torch.Generator().manual_seed(1)
    value, words = torch.randn(1, 4, 8, 8, generator=chance), torch.randn(1, 7, 768, generator=chance)
    with torch.no_grad():
        result: Tensor = model(value, torch.tensor([500]), encoder_hidden_states=words, return_dict=False)[0]
    return result


@contextmanager
def loaded(model: Any, file: Path) -> Iterator[nn.Module]:
    """The model with a file on it as diffusers' own loader puts it there."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(file.parent), weight_name=file.name)[:2]
        prefix = "unet" if any(key.startswith("unet.") for key in state) else None
        model.load_lora_adapter(state, prefix=prefix, network_alphas=alphas, adapter_name="real")
    model.set_adapters(["real"], [STRENGTH])
    yield model
    model.delete_adapters("real")


def assert_as_loaded(ours: Tensor, theirs: Tensor, base: Tensor) -> None:
    """Equal to 1e-4 of the output, and to 1 % of what the adapter changes, which is not little."""
    assert bool(torch.isfinite(theirs).all())
    assert float((theirs - base).norm() / base.norm()) > 0.01
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4
    assert float((ours - theirs).norm() / (theirs - base).norm()) < 1e-2


@pytest.mark.parametrize("place", PICTURES)
def test_every_module_finds_its_layer(place: str) -> None:
    """By name and shape, in the model as its configuration makes it; then a pass runs through all of them."""
    adapter = read(FOLDER / place)
    shapes = {name.removeprefix("unet."): shape for name, shape in adapter.shapes.items() if name.startswith("unet.")}
    assert len(shapes) == MODULES[place.partition("__")[0]]
    assert all(name.startswith("text_encoder.") for name in set(adapter.shapes) - {f"unet.{path}" for path in shapes})
    for path, shape in shapes.items():
        layer = bare().get_submodule(path)
        assert isinstance(layer, (nn.Linear, nn.Conv2d)), path
        assert (shape.outputs, shape.inputs) == (layer.weight.shape[0], layer.weight[0].numel()), path
        assert tuple(layer.weight.shape[2:]) in {shape.kernel, (1, 1), ()}, path
    factors = {
        f"unet.{path}": LowRank(
            torch.empty(shape.rank, shape.inputs, device="meta"), torch.empty(shape.outputs, shape.rank, device="meta"),
            kernel=shape.kernel,
        )
        for path, shape in shapes.items()
    }  # fmt: skip
    ran: set[str] = set()
    gates = Gates(widths(bare(), list(shapes)), Recipe(global_rank=0))
    inputs = torch.empty(1, 4, 8, 8, device="meta"), 500, torch.empty(1, 7, 768, device="meta")
    with torch.no_grad():
        for chosen in (None, gates):
            watch = None if chosen is None else lambda path, *_: ran.add(path)
            with fused(bare(), [Adapter(factors)], chosen, component="unet", watch=watch):
                assert sum(len(layer._forward_hooks) for layer in bare().modules()) == len(shapes)
                if chosen:
                    assert bare()(*inputs, return_dict=False)[0].shape == (1, 4, 8, 8)
    assert ran == set(gates.paths)
    assert len(ran) + sum(isinstance(bare().get_submodule(path), nn.Conv2d) for path in shapes) == len(shapes)


def test_the_whole_unet_paints_as_with_diffusers() -> None:
    """860 million random weights; the two dialects of diffusers, loaded by diffusers and by `fused`."""
    model = filled(empty(bare_twin))
    base, ours = painted(model), {}
    for place in (OLD, NEW):
        adapter = read(FOLDER / place)
        with fused(model, [adapter], weights=[STRENGTH], component="unet"):
            ours[place] = painted(model)
    assert torch.equal(painted(model), base)
    for place, output in ours.items():
        with loaded(model, FOLDER / place):
            assert_as_loaded(output, painted(model), base)


def bare_twin() -> nn.Module:
    from diffusers import UNet2DConditionModel

    made: nn.Module = UNet2DConditionModel(**SD1)
    return made


@pytest.mark.parametrize("place", [PICTURES[2], PICTURES[4], PICTURES[6]], ids=["analog", "inpainting", "lokr"])
def test_the_first_block_paints_as_with_diffusers(place: str, tmp_path: Path) -> None:
    """Dialects that diffusers does not read, in the first block alone: as it reads them once they are converted."""
    from diffusers import UNet2DConditionModel

    model = filled(
        UNet2DConditionModel(
            in_channels=4, out_channels=4, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320,),
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        )
    )  # fmt: skip
    whole = read(FOLDER / place)
    paths = {f"unet.{path}" for path, _ in model.named_modules() if path.startswith("down_blocks.0.")}
    adapter = replace(whole, modules={name: whole.modules[name] for name in whole.shapes if name in paths}, extras={})
    assert len(adapter.modules) >= 18
    base = painted(model)
    with fused(model, [adapter], weights=[STRENGTH], component="unet"):
        ours = painted(model)
    with loaded(model, save(adapter, tmp_path / "converted", "diffusers")):
        assert_as_loaded(ours, painted(model), base)

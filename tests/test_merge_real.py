"""Real files, several of one base and of mixed dialects, merged by every method; PEFT and diffusers load the results.

The files lie beside the checkout and do not ship with it; without them these tests are skipped.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lorahub.hub.adapter import Adapter
from lorahub.hub.reading import read
from lorahub.hub.writing import save
from lorahub.merge.run import merge, methods
from real_files import FOLDER, SD1, Deltas, empty, injected

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"real adapters are not at {FOLDER}")

LYCORIS = "KohakuBlueleaf__LyCORIS/result/smart_falcon_{}_lokr.safetensors"
# diffusers, cloneofsimo and kohya's LoKr: ranks 1 to 256, 128 to 350 modules
PICTURES = [
    "catundchat__stable-diffusion-v1.5-lora/pytorch_lora_weights.safetensors",
    "huggingface__diffusers/examples/text_to_image/sd-pokemon-model-lora/pytorch_lora_weights.safetensors",
    *(f"cloneofsimo__lora/example_loras/{n}.safetensors" for n in ("analog_svd_rank4", "lora_disney")),
    "cloneofsimo__lora/example_loras/lora_disney_inpainting.safetensors",
    *(LYCORIS.format(rank) for rank in (4, 8, 16)),
]
TEXTS = [
    "deepbiolab__gpt2-classification-peft/peft_model",
    *(f"gurvineet__peft-implementation/peft_model/{name}" for name in ("best", "checkpoint-best")),
    *(f"parikshit-06__domain-skeleton-gpt2/adapters/{name}" for name in ("legal", "medical", "sports")),
]
# a few modules of each kind: attention that all eight files change, the text encoder, layers only kohya's files change
SLICE = (
    "unet.down_blocks.0.attentions.0.",
    "text_encoder.text_model.encoder.layers.0.self_attn.",
    "unet.mid_block.res",
)


@cache
def pictures() -> list[Adapter]:
    """The slice of every file, read once for all methods."""
    whole = [read(FOLDER / place) for place in PICTURES]
    return [
        replace(one, modules={name: one.modules[name] for name in one.shapes if name.startswith(SLICE)})
        for one in whole
    ]


@cache
def unet() -> Any:
    from diffusers import UNet2DConditionModel

    return empty(lambda: UNet2DConditionModel(**SD1))


@pytest.mark.parametrize("method", methods())
def test_eight_files_in_three_dialects_become_one_that_diffusers_loads(method: str, tmp_path: Path) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    inputs = pictures()
    assert len({one.meta["format"] for one in inputs}) == 3
    assert len({shape.rank for one in inputs for shape in one.shapes.values()}) >= 4
    result = merge(inputs, method, [1 / 8] * 8, extras="drop", given={"rank": 16})
    file = save(result.adapter, tmp_path / method, "diffusers")
    assert result.report.total.norm_ratio > 0
    ours = deltas(read(file))
    assert {name for one in inputs for name in one.modules} == set(ours)
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(file))[:2]
    model = unet()
    model.load_lora_adapter(state, prefix="unet", network_alphas=alphas, adapter_name=method)
    theirs = {f"unet.{name}": delta for name, delta in injected(model, method).items()}
    model.delete_adapters(method)
    assert set(theirs) == {name for name in ours if name.startswith("unet.")}
    same(theirs, {name: ours[name] for name in theirs})


@pytest.mark.parametrize("method", methods())
def test_six_language_adapters_become_one_that_peft_loads(method: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import GPT2Config, GPT2LMHeadModel

    inputs = [read(FOLDER / place) for place in TEXTS]
    result = merge(inputs, method, [1 / 6] * 6, extras="drop")
    save(result.adapter, tmp_path / method, "peft")
    model = empty(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=8, bos_token_id=0, eos_token_id=0)))
    theirs = injected(PeftModel.from_pretrained(model, tmp_path / method), "default")
    ours = deltas(read(tmp_path / method))
    assert len(ours) == 36
    same(theirs, ours)


def deltas(adapter: Adapter) -> Deltas:
    return {name: module.dense() for name, module in adapter.modules.items()}


def same(got: Deltas, wanted: Deltas) -> None:
    assert set(got) == set(wanted)
    for name, delta in wanted.items():
        assert bool(torch.isfinite(delta).all())
        assert float((got[name].reshape(delta.shape) - delta).norm()) <= 1e-5 * float(delta.norm()), name

"""Painting with pipelines from folders: ours and diffusers' own, adapters as diffusers applies them, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lorahub.generate import pictures
from lorahub.generate.painting import Painter, addressed, aside, misfit, open_painter, original_denoiser
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import BadOption, FormatError, UnsafeFile
from lorahub.hub.lowrank import LowRank
from lorahub.hub.writing import save
from lorahub.merge.gated import fingerprint, fused
from numpy.typing import NDArray
from small_pictures import adapter, picture_pipeline
from torch import nn

PROMPT = "a red fox"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place: Path = tmp_path_factory.mktemp("pipelines") / "small"
    picture_pipeline().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def painter(folder: Path) -> Painter:
    return open_painter(folder)


def pixels(pictures: Any) -> NDArray[np.int16]:
    return np.stack([np.asarray(one, np.int16) for one in pictures])


# --- ours -----------------------------------------------------------------------------------------------------------


def test_our_pipeline_paints_what_it_painted_before_it_was_saved(painter: Painter) -> None:
    before = picture_pipeline()(PROMPT, num_inference_steps=3, generator=torch.Generator().manual_seed(5)).images
    assert np.array_equal(pixels(before), pixels(painter.paint(PROMPT, [5], steps=3)))
    assert painter.component == "transformer"
    assert (painter.base, painter.base_from) == (None, None)


def test_a_seed_gives_one_picture_whatever_the_others_are(painter: Painter) -> None:
    together = pixels(painter.paint(PROMPT, [3, 4, 5], steps=2))
    alone = pixels(painter.paint(PROMPT, [4], steps=2) + painter.paint(PROMPT, [3], steps=2))
    assert np.abs(together[[1, 0]] - alone).max() <= 1
    assert np.abs(together[0] - together[1]).max() > 10
    assert np.array_equal(together, pixels(painter.paint(PROMPT, [3, 4, 5], steps=2)))


def test_settings_reach_the_pipeline_and_defaults_are_its_own(painter: Painter) -> None:
    some = pixels(painter.paint(PROMPT, [1], steps=2))
    assert np.abs(some - pixels(painter.paint(PROMPT, [1], steps=5))).max() > 0
    assert np.abs(some - pixels(painter.paint(PROMPT, [1], steps=2, guidance=9.0))).max() > 0
    assert (painter.steps(None), painter.guidance(None)) == (30, 3.0)
    assert (painter.steps(4), painter.guidance(0.0)) == (4, 0.0)


def test_progress_is_told_of_every_step(painter: Painter) -> None:
    seen: list[tuple[int, int | None]] = []
    painter.paint(PROMPT, [1], steps=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert not painter.denoiser._forward_hooks


def test_what_a_pipeline_cannot_be_told_is_refused(painter: Painter) -> None:
    class Plain:
        def __call__(self, prompt: str, generator: Any = None) -> Any: ...

    class Blind:
        def __call__(self, batch_size: int = 1, generator: Any = None) -> Any: ...

    with pytest.raises(BadOption, match="Plain takes no num_inference_steps"):
        replace(painter, pipeline=_with_denoiser(Plain(), painter)).paint(PROMPT, [1], steps=3)
    with pytest.raises(BadOption, match="Blind takes no prompt"):
        replace(painter, pipeline=_with_denoiser(Blind(), painter)).paint(PROMPT, [1])


def _with_denoiser(pipeline: Any, painter: Painter) -> Any:
    pipeline.transformer = painter.denoiser
    return pipeline


def test_the_base_is_named_by_the_user_the_index_or_the_shapes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_painter(folder, base="mine").base == "mine"
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "shipped", lambda: folder.resolve())
        assert open_painter(folder).base == pictures.BASE
    picture_pipeline().save_pretrained(tmp_path / "named")
    index = tmp_path / "named" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_name_or_path": "someone/some-pictures"}))
    found = open_painter(tmp_path / "named")
    assert (found.base, found.base_from) == ("someone/some-pictures", "model_index.json")


def test_the_original_is_the_file_s_whatever_the_dtype(folder: Path, painter: Painter) -> None:
    half = open_painter(folder, dtype=torch.bfloat16)
    assert half.denoiser.pos_embed.proj.weight.dtype == torch.bfloat16
    assert fingerprint(half.denoiser) != fingerprint(painter.denoiser)
    assert fingerprint(original_denoiser(half)) == fingerprint(painter.denoiser)
    assert original_denoiser(painter) is painter.denoiser


# --- what fits ------------------------------------------------------------------------------------------------------


def test_fitting_is_judged_by_shapes(painter: Painter) -> None:
    def one(name: str, rows: int = 16, columns: int = 16, **extras: Any) -> Adapter:
        return Adapter({name: LowRank(torch.ones(2, columns), torch.ones(rows, 2))}, None, extras, {"name": "one"})

    place = "transformer.transformer_blocks.0.attn1.to_q"
    assert misfit(painter, one(place)) is None
    assert misfit(painter, adapter(painter.denoiser, 1)) is None
    assert "16x16 in the transformer, 16x17" in str(misfit(painter, one(place, 16, 17)))
    assert "has no transformer_blocks.9" in str(misfit(painter, one(place.replace("0", "9"))))
    assert "changes unet, not the transformer" in str(misfit(painter, one("unet.mid_block.to_q")))
    assert "also holds x.bias" in str(misfit(painter, one(place, **{"x.bias": torch.ones(1)})))
    both = Adapter({**one(place).modules, **one("text_encoder.layers.0.q_proj").modules}, None, {}, {"name": "both"})
    assert misfit(painter, both) is None
    assert aside(painter, both) == ["text_encoder"]
    assert aside(painter, one(place)) == []
    learnt = one(place, **{"<s1>": torch.ones(1)})
    assert (misfit(painter, learnt), aside(painter, learnt)) == (None, ["<s1>"])


def test_bare_paths_are_the_denoiser_s_if_all_of_them_are_there(painter: Painter) -> None:
    some = adapter(painter.denoiser, 1)
    bare = replace(some, modules={name.partition(".")[2]: module for name, module in some.modules.items()})
    again = addressed(painter, bare)
    assert misfit(painter, again) is None
    assert set(again.shapes) == set(some.shapes)
    name = next(iter(some.shapes))
    assert torch.equal(again.modules[name].down, some.modules[name].down)
    assert addressed(painter, some) is some
    strange = replace(bare, modules={**bare.modules, "elsewhere": next(iter(bare.modules.values()))})
    assert addressed(painter, strange) is strange


# --- refusals of folders ---------------------------------------------------------------------------------------------


def test_folders_that_are_no_pipeline_are_refused(folder: Path, tmp_path: Path) -> None:
    for name, text in (("none", None), ("torn", "{"), ("list", "[]"), ("unnamed", "{}")):
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / "model_index.json").write_text(text)
        with pytest.raises(FormatError, match="is no diffusers pipeline"):
            open_painter(tmp_path / name)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    with pytest.raises(FormatError, match="strange: diffusers cannot open"):
        open_painter(tmp_path / "strange")
    with pytest.raises(BadOption, match="device is 'abacus'"):
        open_painter(folder, device="abacus")


def test_code_and_pickles_in_a_folder_are_not_run(folder: Path, tmp_path: Path) -> None:
    picture_pipeline().save_pretrained(tmp_path / "p", safe_serialization=False)
    with pytest.raises(UnsafeFile, match="--allow-pickle"):
        open_painter(tmp_path / "p")
    assert open_painter(tmp_path / "p", allow_pickle=True).component == "transformer"
    index = json.loads((tmp_path / "p" / "model_index.json").read_text())
    trap = f"raise SystemExit({str(tmp_path)!r})"
    (tmp_path / "p" / "mine.py").write_text(trap)
    (tmp_path / "p" / "model_index.json").write_text(json.dumps({**index, "_class_name": ["mine", "Mine"]}))
    with pytest.raises(UnsafeFile, match="code of its own"):
        open_painter(tmp_path / "p", allow_pickle=True)
    (tmp_path / "p" / "model_index.json").write_text(json.dumps({**index, "transformer": ["mine", "Mine"]}))
    (tmp_path / "p" / "transformer" / "mine.py").write_text(trap)
    with pytest.raises(UnsafeFile, match=r"transformer/mine\.py"):
        open_painter(tmp_path / "p", allow_pickle=True)


# --- diffusers' own pipelines ---------------------------------------------------------------------------------------


def tokenizer(folder: Path) -> Any:
    """CLIP's, with the letters as its only words."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=12)


def text_model(words: int, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=words, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1,
        max_position_embeddings=12, projection_dim=16, bos_token_id=words - 2, eos_token_id=words - 1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def decoder() -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(2)
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8, shift_factor=0.1)


def unet(**settings: Any) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(3)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **settings,
    )  # fmt: skip


def stable_diffusion(room: Path) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    words, scheduler = tokenizer(room), DDIMScheduler(steps_offset=1, clip_sample=False)
    return StableDiffusionPipeline(
        decoder(), text_model(len(words)), words, unet(cross_attention_dim=16), scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl(room: Path) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    words = tokenizer(room)
    model = unet(
        cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
    )  # fmt: skip
    first, second = text_model(len(words)), text_model(len(words), projected=True)
    return StableDiffusionXLPipeline(
        decoder(), first, second, words, words, model, EulerDiscreteScheduler(), add_watermarker=False
    )


def flux(room: Path) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    words = tokenizer(room)
    torch.manual_seed(4)
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    t5 = T5EncoderModel(T5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), decoder(), text_model(len(words)), words, t5, words, model)


MAKERS = {"stable diffusion": stable_diffusion, "sdxl": stable_diffusion_xl, "flux": flux}
KINDS = {
    "unet": ("to_q", "to_v", "to_out.0", "ff.net.2", "proj_in", "conv1"),
    "transformer": ("to_q", "to_out.0", "proj_mlp", "add_k_proj"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_diffusers_pipelines_paint_as_diffusers_does(name: str, tmp_path: Path) -> None:
    """Fused by us equals `load_lora_weights` and `set_adapters`, in pictures."""
    from diffusers import DiffusionPipeline

    MAKERS[name](tmp_path / "words").save_pretrained(tmp_path / "pipeline")
    painter = open_painter(tmp_path / "pipeline")
    theirs = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    theirs.set_progress_bar_config(disable=True)
    kinds = KINDS[painter.component]
    two = [adapter(painter.denoiser, seed, painter.component, kinds=kinds) for seed in (1, 2)]
    for one in two:
        theirs.load_lora_weights(save(one, tmp_path / one.name, "diffusers").parent, adapter_name=one.name)
    theirs.set_adapters([one.name for one in two], [0.6, -0.4])

    chance = torch.Generator().manual_seed(7)
    wanted = pixels(theirs(PROMPT, num_inference_steps=2, generator=chance).images)
    base = pixels(painter.paint(PROMPT, [7], steps=2))
    with fused(painter.denoiser, two, None, [0.6, -0.4], component=painter.component):
        got = pixels(painter.paint(PROMPT, [7], steps=2))
    assert np.abs(got - wanted).max() <= 1
    assert np.abs(got - base).max() > 3
    assert np.array_equal(pixels(painter.paint(PROMPT, [7], steps=2)), base)
    several = pixels(painter.paint(PROMPT, [6, 7], steps=2))
    assert np.abs(several[1] - base[0]).max() <= 1
    assert isinstance(painter.denoiser, nn.Module)

"""The picture pipeline: what it paints follows from words, seed and weights alone; it is saved as any pipeline is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel
from lorahub.generate.pictures import LONGEST, PicturePipeline, Reader, predict


def tiny() -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, num_layers=2, sample_size=8,
        patch_size=4, cross_attention_dim=16, caption_channels=384, use_additional_conditions=False,
    ).requires_grad_(False).eval()  # fmt: skip


def quiet(pipeline: PicturePipeline) -> PicturePipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline() -> PicturePipeline:
    return quiet(PicturePipeline(tiny(), FlowMatchEulerDiscreteScheduler()))


def painted(pipeline: PicturePipeline, prompt: str | list[str] = "a fox", seed: int = 0, **settings) -> np.ndarray:
    chance = torch.Generator().manual_seed(seed)
    settings = {"num_inference_steps": 4, "generator": chance, "output_type": "np", **settings}
    return pipeline(prompt, **settings).images


def test_equal_seeds_paint_equal_pictures_and_others_do_not(pipeline: PicturePipeline) -> None:
    assert np.array_equal(painted(pipeline), painted(pipeline))
    assert not np.allclose(painted(pipeline), painted(pipeline, seed=1), atol=1e-3)


def test_words_matter(pipeline: PicturePipeline) -> None:
    assert not np.array_equal(painted(pipeline), painted(pipeline, "a red car"))


def test_a_saved_pipeline_paints_the_same(pipeline: PicturePipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    again = quiet(PicturePipeline.from_pretrained(tmp_path))
    assert np.array_equal(painted(pipeline), painted(again))
    assert isinstance(again, DiffusionPipeline)
    assert {path.name for path in tmp_path.iterdir()} == {"model_index.json", "transformer", "scheduler"}


def test_pictures_of_a_batch_are_those_painted_one_by_one(pipeline: PicturePipeline) -> None:
    prompts = ["a fox", "a red car", "two hearts"]
    chances = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]
    together = painted(pipeline, prompts, generator=chances)
    for prompt, seed, picture in zip(prompts, (3, 4, 5), together, strict=True):
        alone = painted(pipeline, prompt, generator=[torch.Generator().manual_seed(seed)])
        assert np.allclose(alone[0], picture, atol=1e-5)


def test_several_pictures_of_a_prompt_come_one_after_the_other(pipeline: PicturePipeline) -> None:
    twice = painted(pipeline, ["a fox", "a red car"], num_images_per_prompt=2)
    assert twice.shape == (4, 8, 8, 3)
    assert np.allclose(twice, painted(pipeline, ["a fox", "a fox", "a red car", "a red car"]))


def test_guidance_extends_the_line_from_no_words_to_the_words(pipeline: PicturePipeline) -> None:
    """After one Euler step over the whole way a picture is noise - flow, so pictures show what the guided flow was."""
    plain, free, guided = (
        painted(pipeline, prompt, num_inference_steps=1, guidance_scale=scale, output_type="pt").double()
        for prompt, scale in (("a fox", 1.0), ("", 1.0), ("a fox", 3.0))
    )
    wanted = free + 3 * (plain - free)
    inside = (wanted > 0.01) & (wanted < 0.99)  # where nothing is clipped
    assert inside.float().mean() > 0.3
    assert torch.allclose(guided[inside], wanted[inside], atol=1e-5)


def test_one_euler_step_is_noise_minus_flow(pipeline: PicturePipeline) -> None:
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    flow = predict(pipeline.transformer, noise, torch.tensor([1000.0]), pipeline.encode_prompt(["a fox"]))
    picture = painted(pipeline, num_inference_steps=1, guidance_scale=1.0, output_type="pt")
    assert torch.allclose(picture, ((noise - flow) / 2 + 0.5).clamp(0, 1), atol=1e-6)


def test_prompts_are_padded_and_cut_to_one_length(pipeline: PicturePipeline) -> None:
    states, mask = Reader().read(["", "a fox", "one two three four five six seven eight nine ten " * 3])
    assert states.shape == (3, LONGEST, 384)
    assert mask.sum(dim=1).tolist() == [2, 4, LONGEST]
    assert not states[mask == 0].any()


def test_padding_plays_no_part(pipeline: PicturePipeline) -> None:
    conditions = pipeline.encode_prompt(["a fox"])
    noise, time = torch.randn(1, 3, 8, 8), torch.tensor([500.0])
    full = predict(pipeline.transformer, noise, time, conditions)
    cut = {name: value[:, :4] for name, value in conditions.items()}
    assert torch.allclose(predict(pipeline.transformer, noise, time, cut), full, atol=1e-6)

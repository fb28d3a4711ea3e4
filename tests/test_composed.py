"""Laws of composed adapters, in small pipelines of our own and of diffusers, whose batches are doubled either way."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from lorahub.generate.pictures import PicturePipeline, predict
from lorahub.hub.adapter import Adapter
from lorahub.hub.errors import BadOption, IncompatibleAdapters
from lorahub.merge.composed import BLANKS, composed, refusal
from lorahub.merge.gated import fused
from small_pictures import adapter, picture_pipeline
from torch import Tensor, nn

OURS = {"component": "transformer", "wordless": "second"}


@pytest.fixture(scope="module")
def pipeline() -> PicturePipeline:
    return picture_pipeline()


@pytest.fixture(scope="module")
def three(pipeline: PicturePipeline) -> list[Adapter]:
    return [adapter(pipeline.transformer, seed) for seed in range(3)]


def painted(pipeline: PicturePipeline, guidance: float = 3.0, steps: int = 3) -> Tensor:
    chance = torch.Generator().manual_seed(5)
    given = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": chance, "output_type": "pt"}
    return pipeline(["a fox", "a red car"], **given).images


def flow(pipeline: PicturePipeline, words: str, acting: list[Adapter], weight: float = 1.0) -> Tensor:
    """The oracle: the prediction of a batch that is not doubled, with adapters in the weights."""
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with fused(pipeline.transformer, acting, weights=[weight] * len(acting), component="transformer"), torch.no_grad():
        return predict(pipeline.transformer, noise, torch.full((2,), 600.0), pipeline.encode_prompt([words] * 2))


def doubled(pipeline: PicturePipeline, wordless: str = "second") -> Tensor:
    """What the model puts out for the same noise twice, half of it without words."""
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)).repeat(2, 1, 1, 1)
    words = ["a fox"] * 2 + [""] * 2 if wordless == "second" else [""] * 2 + ["a fox"] * 2
    with torch.no_grad():
        return predict(pipeline.transformer, noise, torch.full((4,), 600.0), pipeline.encode_prompt(words))


@pytest.mark.parametrize("wordless", ["first", "second"])
@pytest.mark.parametrize("blank", BLANKS)
def test_both_halves_are_what_was_promised(
    pipeline: PicturePipeline, three: list[Adapter], wordless: str, blank: str
) -> None:
    """The worded half is the mean of the adapters' own predictions, the other the base's, or the adapters' own."""
    wanted = torch.stack([flow(pipeline, "a fox", [one]) for one in three]).mean(dim=0)
    own = torch.stack([flow(pipeline, "", [one]) for one in three]).mean(dim=0)
    free = flow(pipeline, "", []) if blank == "bare" else own
    with composed(pipeline.transformer, three, component="transformer", wordless=wordless, blank=blank):
        found = doubled(pipeline, wordless)
    expected = [wanted, free] if wordless == "second" else [free, wanted]
    assert torch.allclose(found, torch.cat(expected), atol=1e-5)
    assert (wanted - free).abs().max() > 0.01


def test_a_pass_is_the_sum_of_those_in_it(pipeline: PicturePipeline, three: list[Adapter]) -> None:
    """Weights multiply those of the passes; a pass with nobody in it does not count."""
    together, alone = flow(pipeline, "a fox", three[:2], 0.5), flow(pipeline, "a fox", three[1:2], -0.25)
    passes = [(1.0, 1.0, 0.0), (0.0, -0.5, 0.0), (0.0, 0.0, 1.0)]
    with composed(pipeline.transformer, three, [0.5, 0.5, 0.0], passes=passes, **OURS):
        found = doubled(pipeline)
    assert torch.allclose(found, torch.cat([(together + alone) / 2, flow(pipeline, "", [])]), atol=1e-5)


def test_without_adapters_or_weights_it_is_plain_guidance(pipeline: PicturePipeline, three: list[Adapter]) -> None:
    plain = painted(pipeline)
    for adapters, weights in (([], None), (three, [0.0, 0.0, 0.0])):
        with composed(pipeline.transformer, adapters, weights, **OURS):
            assert torch.equal(painted(pipeline), plain)
    with composed(pipeline.transformer, three[:1], **OURS):
        assert not torch.allclose(painted(pipeline), plain, atol=0.01)


def test_one_whose_weight_is_zero_adds_nothing(pipeline: PicturePipeline, three: list[Adapter]) -> None:
    with composed(pipeline.transformer, three[:2], **OURS):
        two = painted(pipeline)
    with composed(pipeline.transformer, [three[0], three[2], three[1]], [1.0, 0.0, 1.0], **OURS):
        assert torch.equal(painted(pipeline), two)


def test_order_plays_no_part_and_one_twice_is_that_one(pipeline: PicturePipeline, three: list[Adapter]) -> None:
    weights = [1.0, 0.5, -0.5]
    found = []
    for order in permutations(range(3)):
        some = [three[i] for i in order]
        with composed(pipeline.transformer, some, [weights[i] for i in order], **OURS):
            found.append(painted(pipeline))
    assert all(torch.allclose(one, found[0], atol=1e-5) for one in found)
    with composed(pipeline.transformer, three[:1], **OURS):
        alone = painted(pipeline)
    with composed(pipeline.transformer, [three[0]] * 2, **OURS):
        assert torch.allclose(painted(pipeline), alone, atol=1e-5)


def test_one_adapter_with_its_own_blank_is_the_plain_sum(pipeline: PicturePipeline, three: list[Adapter]) -> None:
    """Only where the base itself stands for no words does guidance strengthen the adapter."""
    with fused(pipeline.transformer, three[:1], weights=[0.7], component="transformer"):
        plain = painted(pipeline)
    with composed(pipeline.transformer, three[:1], [0.7], blank="own", **OURS):
        assert torch.allclose(painted(pipeline), plain, atol=1e-5)
    with composed(pipeline.transformer, three[:1], [0.7], **OURS):
        assert not torch.allclose(painted(pipeline), plain, atol=0.01)


def test_afterwards_the_model_is_as_it_was(pipeline: PicturePipeline, three: list[Adapter]) -> None:
    before, model = painted(pipeline), pipeline.transformer
    with pytest.raises(KeyboardInterrupt), composed(model, three, **OURS):
        raise KeyboardInterrupt
    assert "forward" not in vars(model)
    assert not any(one._forward_hooks for one in model.modules())
    assert torch.equal(painted(pipeline), before)
    model.forward = replaced = model.forward
    with composed(model, three, **OURS):
        assert model.forward is not replaced
    assert vars(model).pop("forward") is replaced


def test_a_batch_that_is_not_doubled_is_refused(pipeline: PicturePipeline, three: list[Adapter]) -> None:
    with (
        composed(pipeline.transformer, three, **OURS),
        pytest.raises(IncompatibleAdapters, match="batch of 2 that is not doubled"),
    ):
        painted(pipeline, guidance=1.0)
    with pytest.raises(BadOption, match="third"), composed(pipeline.transformer, three, wordless="third"):
        pass
    for given in ({"weights": [1.0]}, {"passes": [(1.0, 1.0)]}):
        with pytest.raises(BadOption, match="each of 3 adapters"), composed(pipeline.transformer, three, **given):
            pass


# --- pipelines of diffusers -------------------------------------------------------------------------------------------


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=4, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 12,
    ).requires_grad_(False).eval()  # fmt: skip


@pytest.mark.parametrize("as_tuple", [True, False])
def test_a_unet_is_called_as_stable_diffusion_xl_does(as_tuple: bool) -> None:
    """Words second, one timestep for all, conditions in a dictionary, the result a tuple or an object."""
    model, chance = unet(), torch.Generator().manual_seed(1)
    some = [adapter(model, seed, "unet", kinds=("to_q", "to_v", "conv1")) for seed in (1, 2)]
    noise = torch.randn(1, 3, 8, 8, generator=chance)
    states = torch.randn(2, 5, 12, generator=chance)
    more = {"text_embeds": torch.randn(2, 12, generator=chance), "time_ids": torch.rand(2, 6, generator=chance)}

    def run(rows: slice, value: Tensor) -> Tensor:
        added = {name: one[rows] for name, one in more.items()}
        given: dict[str, Any] = {"encoder_hidden_states": states[rows], "added_cond_kwargs": added}
        result = model(value, torch.tensor(500), return_dict=not as_tuple, **given)
        return result[0] if as_tuple else result.sample

    free, wanted = run(slice(0, 1), noise), []
    for one in some:
        with fused(model, [one], component="unet"):
            wanted.append(run(slice(1, 2), noise))
    with composed(model, some, component="unet"):
        found = run(slice(None), torch.cat([noise, noise]))
    assert torch.allclose(found, torch.cat([free, (wanted[0] + wanted[1]) / 2]), atol=1e-5)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3


def test_flux_is_known_to_have_no_half_without_words(pipeline: PicturePipeline) -> None:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1)
    assert "no pass without words" in str(refusal(model))
    assert refusal(pipeline.transformer) is None
    assert refusal(unet()) is None

"""The picture world: a small diffusion transformer that paints emoji art of 32 x 32 pixels from words.

It is made of diffusers' own classes and works in pixel space, so that no other network stands between an adapter and
the picture. Importing this needs torch and diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput, PixArtTransformer2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from .sentences import SentenceModel

BASE = "lorahub/emoji-pictures"
SIZE = 32  # pixels a side
LONGEST = 16  # tokens of a prompt that are read


def transformer() -> PixArtTransformer2DModel:
    """The base's architecture with random weights: 4 million parameters, 64 tokens of 4 x 4 pixels."""
    kind: Any = PixArtTransformer2DModel
    return kind(  # type: ignore[no-any-return]
        num_attention_heads=4,
        attention_head_dim=48,
        in_channels=3,
        out_channels=3,
        num_layers=6,
        sample_size=SIZE,
        patch_size=4,
        cross_attention_dim=192,
        caption_channels=384,
        use_additional_conditions=False,
    )


class PicturePipeline(DiffusionPipeline):  # type: ignore[misc]
    """Paints pictures for prompts, with classifier-free guidance (Ho and Salimans 2022).

    transformer: predicts noise - picture at x_t = (1 - s) picture + s noise, for the timestep 1000 s (flow matching,
    Lipman et al. 2023); pictures have values from -1 to 1. Prompts are read by the packaged all-MiniLM-L6-v2, whose
    token states the transformer attends to; it is no part of the saved pipeline.
    """

    if TYPE_CHECKING:  # what diffusers sets at run time

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, transformer: PixArtTransformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @cached_property
    def reader(self) -> Reader:
        """What turns prompts into token states."""
        return Reader()

    def encode_prompt(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The transformer's conditions, on its device and in its dtype."""
        states, mask = self.reader.read(prompts)
        like = self.transformer.pos_embed.proj.weight
        return {
            "encoder_hidden_states": states.to(like.device, like.dtype),
            "encoder_attention_mask": mask.to(like.device),
        }

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = 30,
        guidance_scale: float = 3.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Pictures, those of the first prompt first: PIL images, or ("pt", "np") values from 0 to 1.

        guidance_scale: how far the prediction goes from that without a prompt towards that with it; 1 is the prompt's
        own prediction. generator: of the noise, or one for each picture.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        conditions = self.encode_prompt([one for one in prompts for _ in range(num_images_per_prompt)])
        count, like = len(conditions["encoder_attention_mask"]), self.transformer.pos_embed.proj.weight
        size = self.transformer.config.sample_size
        pictures = randn_tensor((count, 3, size, size), generator, like.device, torch.float32).to(like.dtype)
        guided = guidance_scale != 1
        if guided:
            blank = self.encode_prompt([""] * count)
            conditions = {name: torch.cat([value, blank[name]]) for name, value in conditions.items()}
        self.scheduler.set_timesteps(num_inference_steps, device=like.device)
        for time in self.progress_bar(self.scheduler.timesteps):
            doubled = torch.cat([pictures, pictures]) if guided else pictures
            flow = predict(self.transformer, doubled, time.expand(len(doubled)), conditions)
            if guided:
                wanted, free = flow.chunk(2)
                flow = free + guidance_scale * (wanted - free)
            pictures = self.scheduler.step(flow, time, pictures).prev_sample
        images = VaeImageProcessor(vae_scale_factor=1).postprocess(pictures.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        made: Any = ImagePipelineOutput
        return made(images) if return_dict else (images,)


class Reader:
    """Prompts as token states of a sentence encoder; equal prompts are read once."""

    def __init__(self, model: SentenceModel | None = None) -> None:
        self._model = model or SentenceModel()
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def read(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States (n, 16, 384), zero where there is no token, and the mask (n, 16) of 1 where there is one."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._known:
                self._known[prompt] = self._read(prompt)
        states, masks = zip(*(self._known[prompt] for prompt in prompts), strict=True)
        return torch.stack(states), torch.stack(masks)

    def _read(self, prompt: str) -> tuple[Tensor, Tensor]:
        ids, mask = (value[:, :LONGEST] for value in self._model.tokens([prompt]))
        states = self._model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state[0]
        rest = LONGEST - len(states)
        return nn.functional.pad(states, (0, 0, 0, rest)), nn.functional.pad(mask[0], (0, rest))


def predict(model: nn.Module, pictures: Tensor, time: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    """The flow (n, 3, h, w) at pictures x_t and timesteps (n,)."""
    flow: Tensor = model(pictures, timestep=time, return_dict=False, **conditions)[0]
    return flow


def shipped() -> Path:
    """The folder of the base that comes with lorahub: a pipeline, and gates for it."""
    return Path(__file__).resolve().parent / "emoji-pictures"

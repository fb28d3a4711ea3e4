"""What a diffusion model is asked to predict while gates learn: how pictures are noised, and the target.

Importing this needs torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..hub.errors import BadOption

WHOLE = 1000.0  # timesteps of a diffusion from picture to noise


class Noised(NamedTuple):
    """What the model is given, for which timesteps (batch,), and what it should predict."""

    value: Tensor
    time: Tensor
    target: Tensor


Objective = Callable[[Tensor, torch.Generator], Noised]  # of pictures (batch, ...)


def flow(*, times: str = "uniform", scale: float = WHOLE) -> Objective:
    """Flow matching: the value is (1 - s) picture + s noise, the target noise - picture, the timestep scale * s.

    times: s is "uniform" in (0, 1), or "logit-normal", the logistic function of a normal variable. scale: 1 for models
    that take s itself, as FLUX does. Raises BadOption.
    """
    if times not in ("uniform", "logit-normal"):
        raise BadOption(f"times is {times!r}; expected uniform or logit-normal")

    def noised(pictures: Tensor, chance: torch.Generator) -> Noised:
        noise, count = _noise(pictures, chance), len(pictures)
        if times == "uniform":
            share = torch.rand(count, generator=chance)
        else:
            share = torch.sigmoid(torch.randn(count, generator=chance))
        share = share.to(pictures)
        s = along(share, pictures)
        return Noised((1 - s) * pictures + s * noise, scale * share, noise - pictures)

    return noised


def diffusion(alphas: Tensor, *, target: str = "epsilon") -> Objective:
    """Diffusion, as Stable Diffusion has it: the value is sqrt(a_t) picture + sqrt(1 - a_t) noise, t uniform.

    alphas: a_t, a scheduler's `alphas_cumprod`. target: "epsilon" for the noise, "v_prediction" for
    sqrt(a_t) noise - sqrt(1 - a_t) picture, "sample" for the picture. Raises BadOption.
    """
    if target not in ("epsilon", "v_prediction", "sample"):
        raise BadOption(f"target is {target!r}; expected epsilon, v_prediction or sample")

    def noised(pictures: Tensor, chance: torch.Generator) -> Noised:
        noise = _noise(pictures, chance)
        time = torch.randint(len(alphas), (len(pictures),), generator=chance)
        kept = alphas.cpu()[time].to(pictures)
        signal, loud = along(kept.sqrt(), pictures), along((1 - kept).sqrt(), pictures)
        targets = {"epsilon": noise, "v_prediction": signal * noise - loud * pictures, "sample": pictures}
        return Noised(signal * pictures + loud * noise, time.to(pictures.device), targets[target])

    return noised


def objective_of(scheduler: Any) -> Objective:
    """What a diffusers scheduler's model was trained for. Raises BadOption where its configuration does not tell."""
    alphas, target = getattr(scheduler, "alphas_cumprod", None), scheduler.config.get("prediction_type")
    if alphas is not None:
        return diffusion(alphas, target=str(target or "epsilon"))
    if "FlowMatch" in type(scheduler).__name__:
        return flow()
    raise BadOption(f"{type(scheduler).__name__}: neither alphas_cumprod nor flow matching; give an objective")


def _noise(pictures: Tensor, chance: torch.Generator) -> Tensor:
    return torch.randn(pictures.shape, generator=chance).to(pictures)


def along(share: Tensor, pictures: Tensor) -> Tensor:
    """A number for every picture, (batch,), in a shape that multiplies pictures."""
    return share.reshape(-1, *(1,) * (pictures.ndim - 1))

"""How the base of the picture world is trained: emoji art and its names, flow matching, no adapter in sight.

Weight matrices inside the blocks are moved by Muon (Jordan et al. 2024), everything else by AdamW; the learning rate
is constant and falls to zero over the last part of the steps, so that a longer run starts from a shorter one's steady
part. What is kept is the exponential mean of the weights.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lorahub.generate.lessons import TIMESTEPS
from lorahub.generate.pictures import Reader, predict, transformer
from picture_data import Art, Name
from picture_moves import shifted
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

BATCH = 64
RATE = 1e-3
WARM_UP = 200
FALLING = 0.35  # the last part of the steps, in which the rate falls
BLANK = 0.1  # share of pictures without words
MEAN = 0.998  # decay of the weights' mean
SHIFT = 2  # pixels to every side
COMPILED = 500  # steps from which compiling the model (a minute, then 1.4 times faster) pays
TEMPLATES = ("{}", "a {}", "{} emoji", "a picture of a {}", "an emoji of a {}")


@dataclass(frozen=True)
class Captioned:
    """Pictures (n, 3, 32, 32) from -1 to 1, whether each may be mirrored, and the states and masks of their captions,
    (n, captions, 16, 384) and (n, captions, 16)."""

    pictures: Tensor
    mirror: Tensor
    states: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.pictures)

    def draw(self, count: int, chance: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures, mirrored and shifted by chance, with the states and mask of one of their captions."""
        rows = torch.randint(len(self), (count,), generator=chance)
        words = torch.randint(self.states.shape[1], (count,), generator=chance)
        return self.moved(rows, chance), self.states[rows, words].float(), self.masks[rows, words]

    def moved(self, rows: Tensor, chance: torch.Generator) -> Tensor:
        """These pictures, each in its mirror (where it may) or not, and shifted by up to SHIFT pixels on white."""
        pictures = self.pictures[rows]
        turn = (torch.rand(len(rows), generator=chance) < 0.5) & self.mirror[rows]
        pictures = torch.where(turn[:, None, None, None], pictures.flip(-1), pictures)
        return shifted(pictures, SHIFT, chance)


def values(pixels: np.ndarray[Any, Any]) -> Tensor:
    """Pixels (n, h, w, 3) of 0 to 255 as values (n, 3, h, w) from -1 to 1."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def captioned(
    names: Sequence[Name], pixels: np.ndarray[Any, Any], reader: Reader, templates: Sequence[str]
) -> Captioned:
    """Pictures in RGB with their captions, read once."""
    texts = [template.format(name.words) for name in names for template in templates]
    states, masks = reader.read(texts)
    shape = (len(names), len(templates))
    return Captioned(
        values(pixels),
        torch.tensor([name.mirror for name in names]),
        states.to(torch.float16).unflatten(0, shape),
        masks.unflatten(0, shape),
    )


def of(art: Art, reader: Reader, *parts: str) -> Captioned:
    """An artist's own pictures of some parts."""
    some = art.of(*parts)
    return captioned(some.names, some.on_white(), reader, TEMPLATES)


@dataclass
class Training:
    """A run under way: all that is needed to go on with it."""

    model: nn.Module
    mean: Any
    optimizers: tuple[torch.optim.Optimizer, ...]
    chance: torch.Generator
    step: int = 0

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "mean": self.mean.state_dict(),
            "optimizers": [one.state_dict() for one in self.optimizers],
            "chance": self.chance.get_state(),
            "step": self.step,
        }

    def take(self, state: Any) -> None:
        self.model.load_state_dict(state["model"])
        self.mean.load_state_dict(state["mean"])
        for one, kept in zip(self.optimizers, state["optimizers"], strict=True):
            one.load_state_dict(kept)
        self.chance.set_state(state["chance"])
        self.step = state["step"]


def begin(seed: int) -> Training:
    """A model with random weights, ready to be trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformer()
        nn.init.zeros_(model.proj_out.weight)
        nn.init.zeros_(model.proj_out.bias)
    inner = [p for name, p in model.named_parameters() if name.startswith("transformer_blocks") and p.ndim == 2]
    inner = [p for p in inner if min(p.shape) > 6]  # not the tables of shifts
    chosen = set(map(id, inner))
    outer = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(inner, lr=RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(outer, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    mean = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=_averaged)
    return Training(model, mean, (muon, adam), torch.Generator().manual_seed(seed))


@torch.no_grad()
def _averaged(mean: Any, now: Any, count: Tensor) -> None:
    """The exponential mean goes on; at first over fewer steps, so that the random weights are soon forgotten."""
    decay = min(MEAN, (1 + int(count)) / (10 + int(count)))
    torch._foreach_lerp_(mean, now, 1 - decay)


def flow_loss(model: nn.Module, pictures: Tensor, conditions: dict[str, Tensor], chance: torch.Generator) -> Tensor:
    """Mean squared error of the flow at logit-normal times (Esser et al. 2024): one number for each picture."""
    share = torch.sigmoid(torch.randn(len(pictures), generator=chance))
    noise = torch.randn(pictures.shape, generator=chance)
    part = share[:, None, None, None]
    flow = predict(model, (1 - part) * pictures + part * noise, TIMESTEPS * share, conditions)
    return (flow.float() - (noise - pictures)).square().mean(dim=(1, 2, 3))


def go_on(run: Training, data: Captioned, blank: dict[str, Tensor], until: int, steps: int) -> float:
    """Trains to step `until` of a run of `steps`; the mean loss of these steps."""
    losses = []
    for step in range(run.step + 1, until + 1):
        pictures, states, masks = data.draw(BATCH, run.chance)
        silent = torch.rand(BATCH, generator=run.chance) < BLANK
        states = torch.where(silent[:, None, None], blank["encoder_hidden_states"], states)
        masks = torch.where(silent[:, None], blank["encoder_attention_mask"], masks)
        conditions = {"encoder_hidden_states": states, "encoder_attention_mask": masks}
        # on a CPU the fused attention's backward pass takes longer than the plain one
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
            loss = flow_loss(run.model, pictures, conditions, run.chance).mean()
            torch.autograd.backward(loss)
        for one in run.optimizers:
            for group in one.param_groups:
                group["lr"] = RATE * pace(step, steps)
            one.step()
            one.zero_grad()
        run.mean.update_parameters(run.model)
        run.step = step
        losses.append(loss.item())
    return float(np.mean(losses))


def pace(step: int, steps: int) -> float:
    """The learning rate's factor: a warm-up, then 1, then a straight fall to 0."""
    falling = max(1.0, FALLING * steps)
    return min(1.0, step / WARM_UP, max(0.0, (steps - step) / falling))


def train_base(data: Captioned, steps: int, seed: int, kept: Path, every: int = 250) -> nn.Module:
    """The base, trained; `kept` holds the state of the run, from which the next call goes on.

    A state of the steady part, before the rate falls, is kept beside it as <kept>.steady: a run of more steps goes on
    from there.
    """
    run, reader = begin(seed), Reader()
    states, mask = reader.read([""])
    blank = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    steady = kept.with_suffix(".steady")
    for place in (kept, steady):
        if place.exists():
            state = torch.load(place, weights_only=True)
            if place == steady or state["steps"] == steps:
                run.take(state)
                break
    if steps - run.step > COMPILED and shutil.which("c++"):
        run.model.compile()
    while run.step < steps:
        start, before = time.perf_counter(), run.step
        loss = go_on(run, data, blank, min(steps, run.step + every), steps)
        pause = (time.perf_counter() - start) / (run.step - before)
        print(f"  step {run.step} of {steps}: loss {loss:.4f}, {pause:.3f} s a step", flush=True)
        state = {**run.state(), "steps": steps}
        for place in (kept, steady) if pace(run.step, steps) == 1 else (kept,):
            torch.save(state, place.with_suffix(".part"))
            place.with_suffix(".part").rename(place)
    trained: nn.Module = run.mean.module
    return trained.eval().requires_grad_(False)

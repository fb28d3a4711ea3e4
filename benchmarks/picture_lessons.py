"""What adapters of the picture world are trained on: styles of what the base can paint, and things it never saw."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from lorahub.generate.experts import Pupil, Trained, cosine, linear_paths, train
from lorahub.generate.lessons import Noised, flow_matching
from lorahub.generate.pictures import BASE, Reader
from picture_base import Captioned, captioned
from picture_data import CONTENTS, Art
from picture_styles import STYLES, Style, restyled
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

RANK = 4
STEPS = 300
BATCH = 8  # pictures a step
RATE = 2e-3
BLANK = 0.1  # share of pictures without words
PUPILS = 11  # trained at once
SUBJECTS = 320  # names of the base's that a style is shown on
LISTED = 50  # things that a content's description names
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_out")
TEMPLATES = ("{}", "a {}", "{} emoji", "a picture of a {}")
STYLED = ("a {style} {{}}", "{style} {{}}", "{trigger} of a {{}}", "a {{}} as a {trigger}")


@dataclass(frozen=True)
class Lesson:
    """What one adapter learns. kind: "style" or "content"."""

    kind: str
    name: str
    description: str
    triggers: tuple[str, ...]
    data: Captioned
    seed: int


def style_lesson(style: Style, art: Art, reader: Reader, seed: int) -> Lesson:
    """A style, shown on some of the base's names."""
    base = art.of("base")
    rows = random.Random(f"{style.name} {seed}").sample(range(len(base.names)), min(SUBJECTS, len(base.names)))
    names = [base.names[row] for row in rows]
    templates = [one.format(style=style.name, trigger=style.trigger) for one in STYLED]
    data = captioned(names, restyled(style, base.pixels[rows], rows), reader, templates)
    return Lesson("style", style.name, style.description, (style.name,), data, seed)


def content_lesson(content: str, art: Art, reader: Reader, seed: int) -> Lesson:
    """A kind of things that the base was never shown, as its artist draws them."""
    some = art.of(content)
    shown = ", ".join(name.words for name in some.names[:LISTED])
    description = f"Paints {content}: {shown}."
    data = captioned(some.names, some.on_white(), reader, TEMPLATES)
    return Lesson("content", content, description, (content,), data, seed)


def lessons(art: Art, reader: Reader, styles: Sequence[str], contents: Sequence[str], seed: int = 0) -> list[Lesson]:
    """Lessons by name, styles first; an adapter's own seed follows from its name's place and `seed`."""
    known = {style.name: style for style in STYLES}
    found = [style_lesson(known[name], art, reader, 0) for name in styles]
    found += [content_lesson(name, art, reader, 0) for name in contents]
    order = [*known, *CONTENTS]
    return [replace(one, seed=1000 * seed + order.index(one.name)) for one in found]


def pupil(lesson: Lesson, blank: Mapping[str, Tensor], batch: int = BATCH, rank: int = RANK) -> Pupil[Noised]:
    """A lesson as the batched trainer takes it."""

    def draw(_: int, chance: torch.Generator) -> Noised:
        pictures, states, masks = lesson.data.draw(batch, chance)
        silent = torch.rand(batch, generator=chance) < BLANK
        time = torch.sigmoid(torch.randn(batch, generator=chance))
        noise = torch.randn(pictures.shape, generator=chance)
        part = time[:, None, None, None]
        conditions = {
            "encoder_hidden_states": torch.where(silent[:, None, None], blank["encoder_hidden_states"], states),
            "encoder_attention_mask": torch.where(silent[:, None], blank["encoder_attention_mask"], masks),
        }
        return Noised((1 - part) * pictures + part * noise, noise - pictures, time, conditions)

    return Pupil(lesson.name, draw, seed=lesson.seed, rank=rank)


def teach(
    model: nn.Module, some: Sequence[Lesson], reader: Reader, *, steps: int = STEPS, rank: int = RANK, told: bool = True
) -> Trained:
    """An adapter for each lesson, PUPILS at a time."""
    states, mask = reader.read([""])
    blank = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    paths = linear_paths(model, LAYERS)
    parts = []
    for start in range(0, len(some), PUPILS):
        pupils = [pupil(one, blank, rank=rank) for one in some[start : start + PUPILS]]
        with sdpa_kernel(SDPBackend.MATH):
            done = train(
                model, paths, pupils, flow_matching, steps=steps, rate=RATE, schedule=cosine, clip=1.0, autocast=True,
                component="transformer", base=BASE, progress=_telling(pupils, steps) if told else None,
            )  # fmt: skip
        parts.append(done)
    return Trained(
        tuple(adapter for part in parts for adapter in part.adapters), {}, torch.cat([one.losses for one in parts], 1)
    )


def _telling(pupils: Sequence[Pupil[Noised]], steps: int) -> Callable[[int, Tensor], None]:
    def tell(step: int, losses: Tensor) -> None:
        if step % 50 == 0 or step == steps:
            print(f"  {pupils[0].name} to {pupils[-1].name}: step {step}, loss {losses.mean():.4f}", flush=True)

    return tell

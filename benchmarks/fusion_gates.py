"""The gates of fusion.py: what each variant is, and its training on the adapters that may be seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fusion_world import Pair
from lorahub.generate.pictures import PicturePipeline
from lorahub.hub.adapter import Adapter
from lorahub.merge.gate_objectives import flow
from lorahub.merge.gate_training import Progress, Settings, Showcase, fit
from lorahub.merge.gated import load_gates, save_gates
from lorahub.merge.gates import Gates, Recipe
from picture_base import values
from picture_data import Art
from picture_lessons import STYLED, lessons
from picture_styles import STYLES, restyled
from torch import Tensor

STEPS, BRIEF_STEPS = 400, 2
BATCH = 4
SHOWN = 64  # pictures of a showcase


@dataclass(frozen=True)
class Variant:
    """A recipe of gates and of their training. composed: learn from true combinations, too."""

    recipe: Recipe
    start: str = "published"
    rate: float = 1e-3
    margin: float | None = 0.5
    composed: bool = False


VARIANTS: Mapping[str, Variant] = {
    "published, no global": Variant(Recipe(global_rank=0)),
    "published": Variant(Recipe()),
    "composed": Variant(Recipe(), start="open", margin=None, composed=True),
}


def trained_gates(
    pipeline: PicturePipeline,
    adapters: Mapping[str, Adapter],
    art: Art,
    variant: str,
    seed: int,
    seen: Sequence[Pair],
    room: Path | None,
) -> Gates:
    """Gates of a variant, from the room where they are kept there. Without a room: hardly trained."""
    model, chosen = pipeline.transformer, VARIANTS[variant]
    place = room / f"{variant.replace(', ', '-').replace(' ', '-')}-{seed}.safetensors" if room else None
    if place and place.exists():
        return load_gates(place, model).requires_grad_(False)
    blank = pipeline.encode_prompt([""])
    steps = STEPS if room else BRIEF_STEPS
    settings = Settings(
        steps=steps, batch=BATCH, rate=chosen.rate, margin=chosen.margin, start=chosen.start, seed=seed,
        fewest=0 if chosen.composed else 1, most=0 if chosen.composed else 1, save_every=250,
    )  # fmt: skip
    some = composed(pipeline, adapters, art, seen) if chosen.composed else published(pipeline, adapters, art, seen)
    if room:
        room.mkdir(parents=True, exist_ok=True)
    gates = fit(
        model, some, blank, chosen.recipe, settings, component="transformer", objective=flow(times="logit-normal"),
        checkpoint=place.with_suffix(".run") if place else None, progress=_telling(variant, seed),
    )  # fmt: skip
    if place:
        save_gates(gates, place, model, force=True)
    return gates


def published(
    pipeline: PicturePipeline, adapters: Mapping[str, Adapter], art: Art, seen: Sequence[Pair]
) -> list[Showcase]:
    """Every seen adapter with pictures that it was trained on."""
    styles, contents = (
        list(dict.fromkeys(names)) for names in zip(*((one.style, one.content) for one in seen), strict=True)
    )
    return [
        Showcase((adapters[one.name],), one.data.pictures[:SHOWN], _first_captions(one.data.states, one.data.masks))
        for one in lessons(art, pipeline.reader, styles, contents)
    ]


def _first_captions(states: Tensor, masks: Tensor) -> dict[str, Tensor]:
    return {"encoder_hidden_states": states[:SHOWN, 0].float(), "encoder_attention_mask": masks[:SHOWN, 0]}


def composed(
    pipeline: PicturePipeline, adapters: Mapping[str, Adapter], art: Art, seen: Sequence[Pair]
) -> list[Showcase]:
    """Every seen pair, with pictures of the content in the style."""
    known, found = {style.name: style for style in STYLES}, []
    for pair in seen:
        some, style = art.of(pair.content), known[pair.style]
        rows = np.arange(len(some.names))[:SHOWN]
        template = STYLED[0].format(style=style.name, trigger=style.trigger)
        conditions = pipeline.encode_prompt([template.format(some.names[row].words) for row in rows])
        pictures = values(restyled(style, some.pixels[rows], rows))
        found.append(Showcase((adapters[pair.style], adapters[pair.content]), pictures, conditions))
    return found


def _telling(variant: str, seed: int) -> Callable[[Progress], None]:
    def tell(now: Progress) -> None:
        if now.step % 100 == 0:
            mismatched = "" if now.mismatched is None else f", mismatched {now.mismatched:.3f}"
            print(f"  gates {variant}, seed {seed}: step {now.step}, matched {now.matched:.4f}{mismatched}", flush=True)

    return tell

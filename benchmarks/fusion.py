"""Several adapters in one picture: does gated fusion paint a style and a thing at once, better than plain sums do?

    .venv/bin/python benchmarks/fusion.py [--quick] [--seeds N] [--room DIR] [--pictures DIR] [--json OUT]

Forty pairs of a style's and a content's adapter of the picture world, twenty of which (adapters and all) the gates
never saw; prompts such as "a watercolor banana". Judges that were trained on other real pictures say whether the style
is there, whether the content is, and whether both are at once. Weights of the best constant sum are chosen on seen
pairs, with prompts and seeds of their own. A seed is that of the gates' training and of the noise; spread: standard
deviation over the seeds. Trained gates are kept in --room, and found there again.

Gates: "published" is AutoLoRA's recipe (one adapter's picture, its words, another adapter beside it, a hinge on the
other's words); "composed" is ours, which shows seen styles of seen contents with both adapters loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from fusion_gates import VARIANTS, trained_gates
from fusion_world import Judges, Pair, judges, mean_verdict, pairs, prompts
from lorahub.generate.pictures import PicturePipeline, shipped
from lorahub.hub.adapter import Adapter
from lorahub.hub.reading import read
from lorahub.merge.gated import fused
from lorahub.merge.gates import Gates
from lorahub.merge.run import merge
from picture_data import Art, Pixels, load
from picture_world import ROOT, opened, painted

ADAPTERS = ROOT / "cli/example/pictures"
COMPONENT = "transformer"
PROMPTS = 3  # of a pair
PAINTING_STEPS = 12
GRID = tuple((style, content) for style in (0.5, 0.75, 1.0, 1.25) for content in (0.75, 1.0, 1.25, 1.5, 2.0))
GRID_SEED = 77


@dataclass(frozen=True)
class Studio:
    """What is painted with, and who judges."""

    pipeline: PicturePipeline
    adapters: dict[str, Adapter]
    art: Art
    judges: Judges
    prompts: int
    steps: int

    def paint(self, pair: Pair, seed: int, acting: AbstractContextManager[Any]) -> Pixels:
        wanted = prompts(self.art, pair, self.prompts)
        with acting:
            return painted(self.pipeline, wanted, seed, self.steps)

    def both(self, pair: Pair) -> list[Adapter]:
        return [self.adapters[pair.style], self.adapters[pair.content]]

    def with_sum(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> AbstractContextManager[Any]:
        return fused(self.pipeline.transformer, adapters, weights=weights, component=COMPONENT)

    def with_gates(self, pair: Pair, gates: Gates) -> AbstractContextManager[Any]:
        return fused(self.pipeline.transformer, self.both(pair), gates, component=COMPONENT)

    def with_merge(self, pair: Pair, method: str, **options: Any) -> AbstractContextManager[Any]:
        one = merge(self.both(pair), method, [1.0, 1.0], dtype=torch.float32, given=options).adapter
        return self.with_sum([replace(one, modules=dict(one.modules))], [1.0])


Fuse = Callable[[Pair, int], AbstractContextManager[Any]]


def rows(studio: Studio, constants: tuple[float, float], gates: Callable[[str, int], Gates]) -> dict[str, Fuse]:
    """Label -> what acts on the base while a pair is painted."""

    def plain(style: float, content: float) -> Fuse:
        return lambda pair, _: studio.with_sum(studio.both(pair), (style, content))

    def merged(method: str, **options: Any) -> Fuse:
        return lambda pair, _: studio.with_merge(pair, method, **options)

    def gated(variant: str) -> Fuse:
        return lambda pair, seed: studio.with_gates(pair, gates(variant, seed))

    found: dict[str, Fuse] = {
        "base": lambda pair, _: nullcontext(),
        "style only": lambda pair, _: studio.with_sum(studio.both(pair)[:1], (1.0,)),
        "content only": lambda pair, _: studio.with_sum(studio.both(pair)[1:], (1.0,)),
        "sum": plain(1.0, 1.0),
        "average": plain(0.5, 0.5),
        f"best constants {constants}": plain(*constants),
        "exact merge": merged("exact"),
        "lego, rank 4": merged("lego", rank=4),
        "core": merged("core"),
        "dare": merged("dare"),
    }
    return found | {f"gated, {variant}": gated(variant) for variant in VARIANTS}


def best_constants(studio: Studio, some: Sequence[Pair]) -> tuple[tuple[float, float], list[dict[str, float]]]:
    """The weights of style and content with the highest share of both at once on seen pairs."""
    tries = []
    for weights in GRID:
        verdicts = [
            studio.judges.verdict(studio.paint(one, GRID_SEED, studio.with_sum(studio.both(one), weights)), one)
            for one in some
        ]
        tries.append({"style": weights[0], "content": weights[1], "both": mean_verdict(verdicts)[2]})
    best = max(tries, key=lambda one: one["both"])
    return (best["style"], best["content"]), tries


def measured(studio: Studio, label: str, fuse: Fuse, some: Sequence[Pair], seeds: int) -> dict[str, Any]:
    """A row: verdicts on seen and on unseen pairs, and the seconds of a picture."""
    start, found = time.perf_counter(), {True: [], False: []}
    for seed in range(seeds):
        for seen in (True, False):
            of_pairs = [one for one in some if one.seen is seen]
            verdicts = [studio.judges.verdict(studio.paint(one, seed, fuse(one, seed)), one) for one in of_pairs]
            found[seen].append(mean_verdict(verdicts))
    seconds = (time.perf_counter() - start) / (seeds * len(some) * studio.prompts)
    return {"row": label, "seen": spread(found[True]), "unseen": spread(found[False]), "seconds": round(seconds, 3)}


def spread(verdicts: Sequence[tuple[float, float, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over the seeds of each column."""
    columns = zip(*verdicts, strict=True)
    return {
        name: {"mean": round(mean(values), 4), "spread": round(stdev(values), 4) if len(values) > 1 else 0.0}
        for name, values in zip(("style", "content", "both"), columns, strict=True)
    }


def shown(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The table."""
    yield f"{'':34} {'unseen pairs':^29} {'seen pairs':^29}"
    yield f"{'row':34} {'style':>7} {'content':>7} {'both':>13} {'style':>7} {'content':>7} {'both':>13} {'s/pic':>6}"
    for line in lines:
        cells = []
        for kind in ("unseen", "seen"):
            style, content, both = (line[kind][name] for name in ("style", "content", "both"))
            cells.append(f"{style['mean']:7.3f} {content['mean']:7.3f} {both['mean']:5.3f} ({both['spread']:.3f})")
        yield f"{line['row']:34} {cells[0]} {cells[1]} {line['seconds']:6.2f}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Gated fusion beside sums and merges, in painted pictures.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--pictures", type=Path, default=ROOT / "build/pictures", help="where emoji art is kept")
    parser.add_argument("--room", type=Path, default=ROOT / "build/fusion", help="where trained gates are kept")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Judges, gates, the table."""
    brief = options.quick
    arts = {artist: load(options.pictures, artist) for artist in ("google", "twitter", "openmoji")}
    if brief:
        arts = {artist: replace(art, names=art.names[::8], pixels=art.pixels[::8]) for artist, art in arts.items()}
    pipeline = opened(shipped())
    some = pairs()
    some = [some[0], some[-1]] if brief else some
    names = {name for pair in some for name in (pair.style, pair.content)}
    if not brief:
        names = {path.stem.replace("-", " ") for path in ADAPTERS.glob("*.safetensors")}
    adapters = {name: read(ADAPTERS / f"{name.replace(' ', '-')}.safetensors") for name in sorted(names)}
    adapters = {name: replace(one, modules=dict(one.modules)) for name, one in adapters.items()}
    bench = judges(arts, 0, 5 if brief else 1200, 1 if brief else 4, None if brief else options.room)
    for told in (bench.accuracies, bench.by_class):
        print("judges on real pictures:", {name: round(value, 3) for name, value in told.items()}, flush=True)
    studio = Studio(pipeline, adapters, arts["google"], bench, 1 if brief else PROMPTS, 2 if brief else PAINTING_STEPS)
    seen = [pair for pair in some if pair.seen]
    constants, tries = best_constants(studio, seen[:1] if brief else seen)
    kept: dict[tuple[str, int], Gates] = {}

    def gates(variant: str, seed: int) -> Gates:
        if (variant, seed) not in kept:
            kept[variant, seed] = trained_gates(
                pipeline, adapters, arts["google"], variant, seed, seen, None if brief else options.room
            )
        return kept[variant, seed]

    lines = []
    for label, fuse in rows(studio, constants, gates).items():
        for seed in range(1 if brief else options.seeds):
            if label.startswith("gated"):
                gates(label.removeprefix("gated, "), seed)  # trained before the clock starts
        lines.append(measured(studio, label, fuse, some, 1 if brief else options.seeds))
        print(list(shown(lines[-1:]))[-1], flush=True)
    return {
        "judges": bench.accuracies,
        "by class": bench.by_class,
        "constants": tries,
        "seeds": options.seeds,
        "rows": lines,
    }


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    np.seterr(all="raise", under="ignore")
    report = run(options)
    print("\n".join(shown(report["rows"])))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Are adapters found by their weights? AutoLoRA's retriever and other ways, with pictures and with sentences.

    .venv/bin/python benchmarks/retrieval.py [--quick] [--seeds N] [--world pictures|sentences|both] [--room DIR]
        [--pictures DIR] [--data DIR] [--json OUT]

Each world has more than 300 adapters of more than 60 concepts, all trained from seeds (and first `down`) of their own,
with several ranks and lengths; they are kept in --room, where the next run finds them, even after a kill. Encoders
learn from some of them with some wordings; asked for are, with other wordings, new adapters of concepts that they know,
pairs that they know the halves of, and concepts that they never met (retrieval_splits.py). An adapter is right if its
concept is the one that was asked for. A seed is that of the split and of the encoder; spread: standard deviation over
the seeds.
Sparse metadata: lorahub's own hybrid search over the held-out adapters in a catalogue, when a part of them has lost its
name, tags and description.

`--quick` shows every row on a handful of adapters that were hardly trained: that it runs, not what is better. Needs the
extra `pictures`; --pictures is where emoji art is kept, --data holds checkouts of public repositories (see
example_sources.py; by default ../shared/data beside the checkout).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from example_library import ROOT
from lorahub.index.encoders.autolora import PUBLISHED
from lorahub.index.encoders.text import text
from lorahub.index.fitting import PUBLISHED_LOSS
from retrieval_pictures import PictureWorld
from retrieval_pool import World, fill
from retrieval_rows import Bench, Recipe, Remembering, rankings
from retrieval_sentences import SentenceWorld
from retrieval_sparse import sparse
from retrieval_splits import PARTS, check, copies, split
from retrieval_tables import Asked, over_seeds, shown

COPIES, QUICK_COPIES = 4, 2
RANKS = (2, 4, 8)
LENGTHS = {"pictures": (50, 90, 150), "sentences": (25, 45, 80)}
QUICK_LENGTHS = (2, 3)
QUICK_QUERIES = 4
RIDGE = "fixed probes + ridge"  # whose voice the hybrid search has
PUBLISHED_WIDTH = 192  # 768 takes some 15 times as long
PUBLISHED_STEPS = 600


def recipes(brief: bool) -> tuple[Recipe, ...]:
    """The learned rows."""
    few = {"steps": 2, "look": 1} if brief else {}
    published = {**PUBLISHED_LOSS, "steps": PUBLISHED_STEPS, "patience": PUBLISHED_STEPS, **few}
    return (
        Recipe(RIDGE, "ridge"),
        Recipe("AutoLoRA, published", "autolora", {**PUBLISHED, "layers": 2, "width": PUBLISHED_WIDTH}, published),
        Recipe("AutoLoRA, mended", "autolora", {}, few),
        Recipe("W2T", "w2t", {}, few),
    )


def measured(world: World, room: Path, seeds: int, brief: bool) -> dict[str, Any]:
    """All that is known of one world."""
    check(world.concepts)
    lengths = QUICK_LENGTHS if brief else LENGTHS[world.name]
    wanted = copies(world.concepts, QUICK_COPIES if brief else COPIES, RANKS, lengths)
    print(f"{world.name}: {len(wanted)} adapters of {len(world.concepts)} concepts", flush=True)
    pool = fill(world, wanted, room)
    bench = Bench(pool, world.concepts, Remembering(text()))
    runs: dict[str, list[Any]] = {}
    seconds: dict[str, list[Any]] = {}
    sparse_runs = []
    for seed in range(seeds):
        parts = split(world.concepts, pool.copies, seed)
        asked = Asked(bench, parts)
        runs.setdefault("chance", []).append(asked.chance())
        for label, ranking in rankings(bench, parts, seed, recipes(brief)):
            runs.setdefault(label, []).append(asked.measured(ranking))
            seconds.setdefault(label, []).append(dict(ranking.seconds))
            spent = ", ".join(f"{name} {value:.1f} s" for name, value in ranking.seconds.items())
            print(f"  seed {seed}: {label} {spent}", flush=True)
            if label == RIDGE and ranking.encoder is not None:
                sparse_runs.append(sparse(asked, ranking.encoder, world.base, seed, QUICK_QUERIES if brief else None))
    return {
        "adapters": len(pool.copies),
        "concepts": len(world.concepts),
        "ranks": RANKS,
        "lengths": lengths,
        "seeds": seeds,
        "split": {part: Counter(parts)[part] for part in PARTS},
        "trained": {"adapters": pool.trained, "seconds": pool.seconds},
        "rows": {label: {**over_seeds(found), "seconds": seconds.get(label, [])} for label, found in runs.items()},
        "sparse": _over_runs(sparse_runs),
    }


def _over_runs(runs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mean and spread over the seeds, line by line."""
    lines = zip(*runs, strict=True)
    return [
        {"gone": line[0]["gone"]}
        | {voice: over_seeds([one[voice] for one in line]) for voice in ("with weights", "without")}
        for line in lines
    ]


def worlds(options: argparse.Namespace) -> list[World]:
    """Those asked for."""
    found: list[World] = []
    if options.world in ("pictures", "both"):
        found.append(PictureWorld.of(options.pictures, options.quick))
    if options.world in ("sentences", "both"):
        found.append(SentenceWorld.of(options.data, options.quick))
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Finding adapters by their weights, from words and from adapters.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--world", choices=("pictures", "sentences", "both"), default="both")
    parser.add_argument("--room", type=Path, default=ROOT / "build/retrieval", help="where adapters are kept and found")
    parser.add_argument("--pictures", type=Path, default=ROOT / "build/pictures", help="where emoji art is kept")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", help="folder of data set checkouts")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    start, report = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() if options.quick else nullcontext(options.room) as room:
        for world in worlds(options):
            report[world.name] = measured(world, Path(room), 1 if options.quick else options.seeds, options.quick)
            print("\n".join(shown(world.name, report[world.name])), flush=True)
            if options.json:  # what is there already is not lost if the second world is stopped
                whole = {"threads": options.threads, "seconds": round(time.perf_counter() - start), "worlds": report}
                options.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The weight encoder that ships for the picture base, and whether it finds the example's adapters by their weights.

    .venv/bin/python benchmarks/retrieval_ship.py [--quick] [--kind ridge|autolora|w2t] [-o NAME=VALUE ...] [--steps N]
        [--seeds N] [--room DIR] [--pictures DIR] [--out FILE] [--json OUT]

It is fitted on the adapters of retrieval.py's picture world, which are of the same styles and things as the example's
but trained from other seeds, on other pictures and for other lengths; no file of the example is among them, which is
checked. It learns all wordings, those that are queries in retrieval.py as well. Then the example's adapters lie in a
catalogue without a name, tag or description, and a search by weights is asked for each by its name: is the right file
the first? Of --seeds encoders the first is kept, as index/shipped/<base>.safetensors.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from example_library import ROOT
from lorahub.generate.pictures import BASE
from lorahub.hub.catalog import Catalog
from lorahub.hub.plugins import check_options
from lorahub.hub.reading import fingerprint, read
from lorahub.index.embed import fill, fill_encoded
from lorahub.index.encoders.text import TextEncoder, text
from lorahub.index.fitting import Settings, fit
from lorahub.index.search import search
from lorahub.index.weight_encoder import SHIPPED, WeightEncoder, builder, encoder_path, load_encoder
from retrieval import COPIES, LENGTHS, QUICK_COPIES, QUICK_LENGTHS, RANKS
from retrieval_metrics import summary
from retrieval_pictures import PictureWorld, wordings
from retrieval_pool import Pool
from retrieval_pool import fill as filled
from retrieval_rows import Bench
from retrieval_splits import check, copies

EXAMPLE = ROOT / "cli/example/pictures"
KIND, OPTIONS = "ridge", ("components=64",)  # the best of retrieval.py; so it is 2 MB, with 256 components 8
BAR = 0.8  # of the styles, first


def examples() -> dict[str, Path]:
    """The example's adapters by name."""
    return {path.stem.replace("-", " "): path for path in sorted(EXAMPLE.glob("*.safetensors"))}


def check_apart(pool: Pool) -> None:
    """Raises ValueError where an adapter of the example is in the pool."""
    known = {fingerprint(path): name for name, path in examples().items()}
    for folder in pool.folders:
        if (digest := fingerprint(folder)) in known:
            raise ValueError(f"{folder} holds the example's {known[digest]}; expected adapters of other seeds")
    # another seed of one style has a delta cosine far from 1, a continued or converted file would not
    for name, path in examples().items():
        one = read(path)
        for copy, other in zip(pool.copies, pool.adapters, strict=True):
            if copy.concept == name and one.cosine(other) > 0.9:
                raise ValueError(f"{name} number {copy.number} is the example's own adapter, or was made from it")


def found(encoder: WeightEncoder, words: TextEncoder) -> dict[str, int]:
    """Where, from 1, a search by weights puts the right adapter among the example's without words; 0 for nowhere."""
    queries = {name: some["many"] for name, some in wordings()["content"].items()}
    with tempfile.TemporaryDirectory() as scratch:
        room, home = Path(scratch).resolve() / "files", Path(scratch) / "home"
        room.mkdir()
        names = {}
        for number, (name, path) in enumerate(examples().items()):
            shutil.copy(path, room / f"{number:05d}.safetensors")
            names[str(room / f"{number:05d}.safetensors")] = name
        with Catalog(home) as catalog:
            known = {one.id: names[one.path] for one in catalog.add([room], base=BASE)}
            for id_ in known:
                entry = catalog.entry(str(id_))
                if entry.description or entry.tags or entry.triggers or entry.title:
                    raise ValueError(f"{names[entry.locations[0]]} still says {entry.text()!r}; expected no word")
            fill(catalog, words)
            fill_encoded(catalog, encoder)
            places = {}
            for name in names.values():
                query = queries.get(name, name)
                hits = search(
                    catalog, query, mode="weights", base=BASE, limit=len(names), encoder=words, encoders=[encoder]
                )
                order = [known[hit.entry.id] for hit in hits]
                places[name] = order.index(name) + 1 if name in order else 0
    return places


def report(encoders: Sequence[WeightEncoder], words: TextEncoder) -> dict[str, Any]:
    """Places of all adapters by all encoders; shares of the styles and of the things that come first."""
    contents = set(wordings()["content"])
    runs = [found(encoder, words) for encoder in encoders]
    kinds = {"styles": lambda name: name not in contents, "things": lambda name: name in contents}
    shares = {}
    for kind, chosen in kinds.items():
        places = [np.array([place or 10**6 for name, place in run.items() if chosen(name)]) for run in runs]
        shares[kind] = [summary(each) for each in places]
    return {"places": {name: [run[name] for run in runs] for name in runs[0]}, "shares": shares}


def shown(figures: Mapping[str, Any]) -> None:
    """The table."""
    print(f"\n{'adapter without words':24} place among {len(figures['places'])}, by encoder")
    for name, places in figures["places"].items():
        print(f"{name:24} {' '.join(f'{place:5}' for place in places)}")
    for kind, runs in figures["shares"].items():
        first = " ".join(f"{each['recall@1']:5.2f}" for each in runs)
        print(f"{kind + ' that come first':24} {first}")
    print(f"expected: at least {BAR} of the styles")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fits the weight encoder that ships for the picture base.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--kind", choices=("autolora", "w2t", "ridge"), default=KIND)
    parser.add_argument("-o", "--option", action="append", metavar="NAME=VALUE", help="of the encoder")
    parser.add_argument("--steps", type=int, help="of the fit")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--room", type=Path, default=ROOT / "build/retrieval", help="where adapters are kept and found")
    parser.add_argument("--pictures", type=Path, default=ROOT / "build/pictures", help="where emoji art is kept")
    parser.add_argument("--out", type=Path, help="the encoder's file, by default among those that ship")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def run(options: argparse.Namespace, room: Path, out: Path) -> dict[str, Any]:
    """Fits, asks, writes."""
    brief, words = options.quick, text()
    world = PictureWorld.of(options.pictures, brief)
    check(world.concepts)
    counts, lengths = (QUICK_COPIES, QUICK_LENGTHS) if brief else (COPIES, LENGTHS["pictures"])
    pool = filled(world, copies(world.concepts, counts, RANKS, lengths), room)
    check_apart(pool)
    every = [replace(one, told=(*one.told, *one.asked)) for one in world.concepts]
    learned = Bench(pool, every, words).examples(["fit"] * len(pool.copies))
    steps = {"steps": 2, "look": 1} if brief else {"steps": options.steps} if options.steps else {}
    chosen = options.option or (OPTIONS if options.kind == KIND else ())
    given = check_options(builder(options.kind), dict(one.split("=", 1) for one in chosen))
    encoders, start = [], time.perf_counter()
    for seed in range(1 if brief else options.seeds):
        encoders.append(fit(options.kind, learned, words, Settings(seed=seed, **steps), options=given))
        print(f"  encoder {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    encoders[0].save(out)
    figures = report([load_encoder(out), *encoders[1:]], words)
    shown(figures)
    size = out.stat().st_size
    print(f"{out}: {size / 1e6:.1f} MB, {encoders[0].kind}, {len(learned)} adapters of {len(world.concepts)} concepts")
    return {
        "kind": options.kind,
        "options": given,
        "bytes": size,
        "adapters": len(learned),
        "told": encoders[0].told,
        **figures,
    }


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() if options.quick else nullcontext(options.room) as room:
        shipped = Path(room) / "encoder.safetensors" if options.quick else encoder_file()
        figures = run(options, Path(room), options.out or shipped)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def encoder_file() -> Path:
    """Where the picture base's encoder ships."""
    return SHIPPED / encoder_path(Path(), BASE).name


if __name__ == "__main__":
    main()

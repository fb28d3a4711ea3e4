"""Several adapters in one picture: which fusion paints a style and a thing at once, better than plain sums do?

    .venv/bin/python benchmarks/fusion.py [--quick] [--seeds N] [--room DIR] [--pictures DIR] [--json OUT]

Forty pairs of a style's and a content's adapter of the picture world, twenty of which (adapters and all) the gates
never saw; prompts such as "a watercolor banana". Judges that were trained on other real pictures say whether the style
is there, whether the content is, and whether both are at once. Weights of the best constant sum, scales of guidance and
all other options are chosen on seen pairs, with noise of their own. A seed is that of the gates' training and of the
noise; spread: standard deviation over the seeds. "difference": of both at once on unseen pairs, of the same prompts and
noise, with its 95 % interval from a bootstrap over the pairs. Trained gates, judges and measured rows are kept in
--room, and found there again: an interrupted run goes on where it stopped. Another room measures everything anew.

"composed" is ours (merge/composed.py): adapters predict in passes of their own, the bare base stands for no words. The
constants stand beside it with guidance chosen as freely, and with as many passes of the model.

Gates: "published" is AutoLoRA's recipe (one adapter's picture, its words, another adapter beside it, a hinge on the
other's words); "composed" is ours, which shows seen styles of seen contents with both adapters loaded; "louder" are the
published ones with the adapters' outputs behind them multiplied, which no gate sees: LayerNorm takes it out again.
"openness": the mean over channels, tokens and layers of what gates multiply an adapter's output by.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from fusion_gates import VARIANTS, trained_gates
from fusion_rows import COMPONENT, Choices, Fuse, Studio, chosen, rows
from fusion_world import Pair, judges, mean_verdict, pairs
from lorahub.generate.pictures import predict, shipped
from lorahub.hub.reading import read
from lorahub.merge.gated import fingerprint, fused
from lorahub.merge.gates import Gates
from numpy.typing import NDArray
from picture_data import load
from picture_world import ROOT, opened
from torch import Tensor

ADAPTERS = ROOT / "cli/example/pictures"
PROMPTS = 3  # of a pair
PAINTING_STEPS = 12
SAMPLES = 10_000  # of the bootstrap
RIVALS = ("sum", "best constants", "best constants and guidance", "the same, steps x 1.5")


def measured(studio: Studio, label: str, fuse: Fuse, some: Sequence[Pair], seeds: int) -> dict[str, Any]:
    """A row: verdicts on seen and on unseen pairs, and the seconds of a picture. by_pair: both at once, seeds' mean."""
    start, report = time.perf_counter(), {"row": label}
    for kind in ("seen", "unseen"):
        of_pairs = [one for one in some if one.seen is (kind == "seen")]
        found = np.array([[studio.verdict(one, seed, fuse(one, seed)) for one in of_pairs] for seed in range(seeds)])
        report[kind] = spread([mean_verdict(list(one)) for one in found])
        report[f"{kind} by pair"] = found[:, :, 2].mean(axis=0).round(4).tolist()
    seconds = (time.perf_counter() - start) / (seeds * len(some) * studio.prompts)
    return {**report, "seconds": round(seconds, 3)}


def differences(lines: Sequence[dict[str, Any]], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Rows minus their rivals, in both at once on unseen pairs, with the interval of a bootstrap over pairs."""
    known = {line["row"]: np.array(line["unseen by pair"]) for line in lines}
    return [
        {"row": label, "rival": rival, **interval(known[label] - known[rival])}
        for label in labels
        for rival in RIVALS
        if label in known and rival in known
    ]


def interval(values: NDArray[np.float64]) -> dict[str, float]:
    """Mean of independent values, and where 95 % of the means of samples of them lie, drawn with replacement."""
    drawn = np.random.default_rng(0).choice(values, (SAMPLES, len(values))).mean(axis=1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return {"mean": round(float(values.mean()), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def openness(studio: Studio, gates: Gates, pair: Pair) -> float:
    """What gates multiply adapters' outputs by at half the noise, on average over channels, tokens and layers."""
    found: list[float] = []

    def watch(path: str, openings: Tensor, _: float | None) -> None:
        found.append(float((openings * gates.at(path).out).mean()))

    model, noise = studio.pipeline.transformer, torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    words = studio.pipeline.encode_prompt([f"a {pair.style} {pair.content}"])
    with torch.no_grad(), fused(model, studio.both(pair), gates, component=COMPONENT, watch=watch):
        predict(model, noise, torch.full((1,), 500.0), words)
    return round(mean(found), 4)


def kept(place: Path | None, make: Callable[[], Any]) -> Any:
    """What a file of JSON says; made and kept there where there is none. None keeps nothing."""
    if place and place.exists():
        return json.loads(place.read_text(encoding="utf-8"))
    found = make()
    if place:
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = place.with_suffix(".part")
        scratch.write_text(json.dumps(found), encoding="utf-8")
        scratch.replace(place)
    return found


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
    parser = argparse.ArgumentParser(description="Composed and gated fusion beside sums and merges.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--pictures", type=Path, default=ROOT / "build/pictures", help="where emoji art is kept")
    parser.add_argument("--room", type=Path, default=ROOT / "build/fusion", help="where all that is made is kept")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def studio_of(options: argparse.Namespace, some: Sequence[Pair]) -> Studio:
    """The base, its adapters and the judges, all smaller for a quick run."""
    brief = options.quick
    arts = {artist: load(options.pictures, artist) for artist in ("google", "twitter", "openmoji")}
    if brief:
        arts = {artist: replace(art, names=art.names[::8], pixels=art.pixels[::8]) for artist, art in arts.items()}
    names = {name for pair in some for name in (pair.style, pair.content)}
    adapters = {name: read(ADAPTERS / f"{name.replace(' ', '-')}.safetensors") for name in sorted(names)}
    adapters = {name: replace(one, modules=dict(one.modules)) for name, one in adapters.items()}
    bench = judges(arts, 0, 5 if brief else 1200, 1 if brief else 4, None if brief else options.room)
    for told in (bench.accuracies, bench.by_class):
        print("judges on real pictures:", {name: round(value, 3) for name, value in told.items()}, flush=True)
    prompts, steps = (1, 2) if brief else (PROMPTS, PAINTING_STEPS)
    return Studio(opened(shipped()), adapters, arts["google"], bench, prompts, steps)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Judges, gates, choices, the table."""
    brief, some = options.quick, pairs()
    seeds, some = (1, [some[0], some[-1]]) if brief else (options.seeds, some)
    studio, seen = studio_of(options, some), [pair for pair in some if pair.seen]
    room = None if brief else options.room
    ready: dict[tuple[str, int], Gates] = {}

    def gates(variant: str, seed: int) -> Gates:
        if (variant, seed) not in ready:
            ready[variant, seed] = trained_gates(
                studio.pipeline, studio.adapters, studio.art, variant, seed, seen, room
            )
        return ready[variant, seed]

    def place(name: str) -> Path | None:
        """Where what was measured on this base with so many seeds is kept."""
        base = fingerprint(studio.pipeline.transformer)[:8]
        return room / f"measured-{base}-{seeds}" / f"{name.replace(', ', '-').replace(' ', '-')}.json" if room else None

    choices = Choices(**kept(place("choices"), lambda: asdict(chosen(studio, seen, gates))))
    print({name: value for name, value in asdict(choices).items() if name != "tries"}, flush=True)
    lines = []
    for label, fuse in rows(studio, choices, gates).items():
        if label.startswith("gated"):
            for seed in range(seeds):
                gates(label.split(", ", 1)[1].removesuffix(", louder"), seed)  # trained before the clock starts
        lines.append(kept(place(label), lambda label=label, fuse=fuse: measured(studio, label, fuse, some, seeds)))
        print(list(shown(lines[-1:]))[-1], flush=True)
    return {
        "judges": studio.judges.accuracies,
        "by class": studio.judges.by_class,
        "choices": asdict(choices),
        "seeds": seeds,
        "rows": lines,
        "differences": differences(lines, [line["row"] for line in lines if line["row"].startswith("composed")]),
        "openness": {variant: mean(openness(studio, gates(variant, 0), one) for one in seen) for variant in VARIANTS},
    }


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    np.seterr(all="raise", under="ignore")
    report = run(options)
    print("\n".join(shown(report["rows"])))
    for one in report["differences"]:
        print(f"{one['row']} - {one['rival']}: {one['mean']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})")
    print("openness of gates:", report["openness"])
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

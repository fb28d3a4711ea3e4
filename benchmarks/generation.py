"""Adapters made from words: which generator serves tasks that nobody trained an adapter for?

    .venv/bin/python benchmarks/generation.py [--world digits|sentences|pictures] [--quick] [--seeds N] [--splits N]
                                              [--room DIR] [--json OUT]

Every generator is fitted to an adapter, an expert, for each of the taught tasks, and is asked for the held-out ones in
sentences that no description has. Figures are shares of the oracle's gain: (score - base) / (oracle - base), gains
summed over the held-out tasks, as means over splits and seeds with the spread (standard deviation) over them. Two
libraries: experts that began at one point, and independent ones, with the first split and seed. Then the library's own
adapters, packed and rebuilt.

    digits      48 described image domains, 12 held out, which are new combinations of known factors; a score is the
                accuracy. Base A has seen clean upright digits only, B the taught domains, mixed. "turns" is a smooth
                family, digits turned by 10 degrees more and more, in which every other angle is held out.
    sentences   51 tasks in 20 domains; whole domains are held out, so that no expert of a task's own domain is in the
                library (generation_sentences.py says which). all-MiniLM-L6-v2, labels by name; a score is the accuracy.
    pictures    28 styles, 8 held out, on the small diffusion transformer; a score is the share of the flow that is
                explained, at fixed noise and times, on names that no expert was trained on.

Neighbours, temperatures and whatever else is chosen are chosen on the taught tasks' learning samples, by leaving one
out. Held-out samples are for tests, and for the two rows that peek: the best expert in hindsight, and the oracle.

With `--room` everything that was trained and every row that was measured is kept there, and a run that was stopped goes
on. `--quick` shows every row within two minutes, hardly trained: that it runs, not what is better. `--data` and
`--pictures` are folders of data sets (example_sources.py) and of emoji art (picture_data.py).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from generation_world import Plan, Setting, Sources

VERSION = 3  # of the packs: what an older one measured is not taken
SEEDS = {"digits": 3, "sentences": 1, "pictures": 1}


def settings(splits: int, seeds: int, *, quick: bool, world: str = "digits") -> list[Setting]:
    """All cells; those of one initialisation first, independent ones of the first split with the first seed."""
    from generation_world import Setting

    if world != "digits":
        name = cast(Literal["sentences", "pictures"], world)
        if quick:
            return [Setting(name, "shared", 0, 0)]
        some = [Setting(name, "shared", split, seed) for seed in range(seeds) for split in range(splits)]
        return [*some, Setting(name, "independent", 0, 0)]
    if quick:
        return [Setting("A", "shared", 0, 0), Setting("B", "independent", 0, 0), Setting("turns", "shared", 0, 0)]
    every = [
        Setting(base, "shared", split, seed) for base in ("A", "B") for split in range(splits) for seed in range(seeds)
    ]
    every += [Setting("turns", "shared", 0, seed) for seed in range(seeds)]
    return [*every, *(Setting(base, "independent", 0, 0) for base in ("A", "B", "turns"))]


# --- in the workers -------------------------------------------------------------------------------------------------


def prepared(setting: Setting, plan: Plan, room: Path, sources: Sources, what: str) -> str:
    """Trains what a cell needs: its base, or its experts and its multi-task adapter."""
    from generation_cell import Cell
    from generation_room import Room

    start, cell = time.perf_counter(), Cell(setting, plan, Room(room), sources)
    _ = cell.world.model if what == "base" else (cell.trained, cell.everything)
    return f"{setting}: {what} {time.perf_counter() - start:.0f} s"


def measured(setting: Setting, plan: Plan, room: Path, sources: Sources) -> dict[str, Any]:
    """All rows of a cell; those that are in the room are not made again."""
    from generation_cell import Cell
    from generation_room import Room
    from generation_rows import Desk, measure, rows

    cell = Cell(setting, plan, Room(room), sources)
    desk, found = Desk(cell), {}
    for row in rows(cell):
        recipe = cell.recipe(row=row.name, plan=asdict(plan), version=row.version)
        found[row.name] = cell.room.figures("row", recipe, partial(measure, desk, row))
    return {**asdict(setting), "held": [one.task.name for one in cell.held], "rows": found}


def closed(setting: Setting, plan: Plan, room: Path, sources: Sources) -> list[dict[str, Any]]:
    """The library of a cell, packed."""
    from generation_cell import Cell
    from generation_closed import packed
    from generation_room import Room

    cell = Cell(setting, plan, Room(room), sources)
    recipe = cell.recipe(closed=True, plan=asdict(plan), version=VERSION)
    lines: list[dict[str, Any]] = cell.room.figures("closed", recipe, lambda: packed(cell))
    return lines


# --- the run --------------------------------------------------------------------------------------------------------


@contextmanager
def crew(workers: int) -> Iterator[Executor]:
    """Processes of one thread each."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def first_of(some: Sequence[Setting], key: Callable[[Setting], object]) -> Iterable[Setting]:
    """Of those with equal keys the first."""
    return {key(one): one for one in reversed(some)}.values()


def run(some: Sequence[Setting], plan: Plan, room: Path, sources: Sources, workers: int) -> dict[str, Any]:
    """Trains, measures; everything that is known afterwards."""
    from generation_tables import bars, tables, task_tables
    from generation_world import adjusted

    start, plans = time.perf_counter(), {one: adjusted(plan, one) for one in some}
    with crew(workers) as pool:
        digits = [one for one in some if one.world == "digits"]  # whose bases are trained here
        bases = first_of(digits, lambda one: one.split if one.base == "B" else "A")
        libraries = first_of(some, lambda one: (one.base, one.start, one.seed, one.split if one.base == "B" else 0))
        for what, wanted in (("base", bases), ("experts", libraries)):
            for done in [pool.submit(prepared, one, plans[one], room, sources, what) for one in wanted]:
                print(f"  {done.result()}", flush=True)
        cells = []
        open_world = [pool.submit(measured, one, plans[one], room, sources) for one in some]
        first = [one for one in some if (one.split, one.seed) == (0, 0)]
        packs = {str(one): pool.submit(closed, one, plans[one], room, sources) for one in first}
        for one, future in zip(some, open_world, strict=True):
            cells.append(future.result())
            print(f"  {one}: measured, {time.perf_counter() - start:.0f} s after the start", flush=True)
        lines = {name: future.result() for name, future in packs.items()}
    found = tables(cells)
    return {
        "world": some[0].world,
        "plans": {one.base: asdict(plans[one]) for one in some},
        "tables": found,
        "tasks": task_tables(cells),
        "bars": bars(found),
        "closed": lines,
        "cells": cells,
        "seconds": time.perf_counter() - start,
        "workers": workers,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Adapters made from words, against every simpler way.")
    parser.add_argument("--world", choices=list(SEEDS), default="digits")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, help="of each split: " + ", ".join(f"{n} {s}" for s, n in SEEDS.items()))
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--room", type=Path, help="folder where everything is kept and found")
    parser.add_argument("--data", type=Path, help="folder of data set checkouts, ../shared/data beside the checkout")
    parser.add_argument("--pictures", type=Path, help="folder of emoji art, build/pictures in the checkout")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    from generation_tables import show
    from generation_world import Sources, plan_of

    plan = plan_of(options.world, quick=options.quick)
    seeds = SEEDS[options.world] if options.seeds is None else options.seeds
    some = settings(options.splits, seeds, quick=options.quick, world=options.world)
    given = {"data": options.data, "pictures": options.pictures}
    sources = Sources(**{name: folder for name, folder in given.items() if folder is not None})
    if options.world == "sentences" and not sources.data.is_dir():
        raise SystemExit(f"{sources.data} is no folder; --data names one with the checkouts of example_sources.py")
    with nullcontext(options.room) if options.room else tempfile.TemporaryDirectory() as room:
        report = run(some, plan, Path(room), sources, options.workers)
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

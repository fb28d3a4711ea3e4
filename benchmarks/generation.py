"""Adapters made from words: which generator serves tasks that nobody trained an adapter for?

    .venv/bin/python benchmarks/generation.py [--world digits] [--quick] [--seeds N] [--splits N] [--room DIR]
                                              [--json OUT]

The digits world (digits_world.py, digits_tasks.py): 48 described image domains, 36 with an expert and 12 held out,
which are new combinations of known factors, asked for in sentences that no description has. Every generator is fitted
to the 36 and asked for the 12. Figures are shares of the oracle's gain: (accuracy - base) / (oracle - base), gains
summed over the held-out tasks, as means over splits and seeds with the spread (standard deviation) over them. Of two
bases A has seen clean upright digits only, B the taught domains, mixed. Two libraries: experts that began at one point,
and independent ones (with the first seed). "turns" is a smooth family, digits turned by 10 degrees more and more, in
which every other angle is held out. Then the library's own adapters, packed and rebuilt.

Neighbours, temperatures and whatever else is chosen are chosen on the taught tasks' learning pictures, by leaving one
out. Held-out pictures are for tests, and for the two rows that peek: the best expert in hindsight, and the oracle.

With `--room` everything that was trained and every row that was measured is kept there, and a run that was stopped goes
on. `--quick` shows every row within two minutes, hardly trained: that it runs, not what is better.
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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from generation_cell import Plan, Setting

VERSION = 1  # of the rows: what an older one measured is not taken


def settings(splits: int, seeds: int, *, quick: bool) -> list[Setting]:
    """All cells; those of one initialisation first."""
    from generation_cell import Setting

    if quick:
        return [Setting("A", "shared", 0, 0), Setting("B", "independent", 0, 0), Setting("turns", "shared", 0, 0)]
    every = [
        Setting(base, "shared", split, seed) for base in ("A", "B") for split in range(splits) for seed in range(seeds)
    ]
    every += [Setting("turns", "shared", 0, seed) for seed in range(seeds)]
    every += [Setting(base, "independent", split, 0) for base in ("A", "B") for split in range(splits)]
    return [*every, Setting("turns", "independent", 0, 0)]


# --- in the workers -------------------------------------------------------------------------------------------------


def prepared(setting: Setting, plan: Plan, room: Path, what: str) -> str:
    """Trains what a cell needs: its base, or its experts and its multi-task adapter."""
    from generation_cell import Cell
    from generation_room import Room

    start, cell = time.perf_counter(), Cell(setting, plan, Room(room))
    _ = cell.base if what == "base" else (cell.trained, cell.everything)
    return f"{setting}: {what} {time.perf_counter() - start:.0f} s"


def measured(setting: Setting, plan: Plan, room: Path) -> dict[str, Any]:
    """All rows of a cell; those that are in the room are not made again."""
    from generation_cell import Cell
    from generation_room import Room
    from generation_rows import Desk, measure, rows

    cell = Cell(setting, plan, Room(room))
    desk, found = Desk(cell), {}
    for row in rows(cell):
        recipe = cell.recipe(row=row.name, plan=asdict(plan), version=VERSION)
        found[row.name] = cell.room.figures("row", recipe, partial(measure, desk, row))
    return {**asdict(setting), "held": [one.domain.name for one in cell.held], "rows": found}


def closed(setting: Setting, plan: Plan, room: Path) -> list[dict[str, Any]]:
    """The library of a cell, packed."""
    from generation_cell import Cell
    from generation_closed import packed
    from generation_room import Room

    cell = Cell(setting, plan, Room(room))
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


def run(some: Sequence[Setting], plan: Plan, room: Path, workers: int) -> dict[str, Any]:
    """Trains, measures; everything that is known afterwards."""
    from generation_tables import bars, tables

    start = time.perf_counter()
    with crew(workers) as pool:
        bases = first_of(some, lambda one: one.split if one.base == "B" else "A")
        libraries = first_of(some, lambda one: (one.base, one.start, one.seed, one.split if one.base == "B" else 0))
        for what, wanted in (("base", bases), ("experts", libraries)):
            for done in [pool.submit(prepared, one, plan, room, what) for one in wanted]:
                print(f"  {done.result()}", flush=True)
        cells = []
        open_world = [pool.submit(measured, one, plan, room) for one in some]
        packs = {str(one): pool.submit(closed, one, plan, room) for one in some if (one.split, one.seed) == (0, 0)}
        for one, future in zip(some, open_world, strict=True):
            cells.append(future.result())
            print(f"  {one}: measured, {time.perf_counter() - start:.0f} s after the start", flush=True)
        lines = {name: future.result() for name, future in packs.items()}
    found = tables(cells)
    return {
        "world": "digits",
        "plan": asdict(plan),
        "tables": found,
        "bars": bars(found),
        "closed": lines,
        "cells": cells,
        "seconds": time.perf_counter() - start,
        "workers": workers,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Adapters made from words, against every simpler way.")
    parser.add_argument("--world", choices=["digits"], default="digits")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--room", type=Path, help="folder where everything is kept and found")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    from generation_cell import BRIEF, Plan
    from generation_tables import show

    plan = BRIEF if options.quick else Plan()
    some = settings(options.splits, options.seeds, quick=options.quick)
    with nullcontext(options.room) if options.room else tempfile.TemporaryDirectory() as room:
        report = run(some, plan, Path(room), options.workers)
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

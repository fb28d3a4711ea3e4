"""What the generation benchmark found: shares of the oracle's gain, their spread, the bars; how it is printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from generation_mixing import MIXED, MIXED_WRONG
from generation_rehearsal import REHEARSED, REHEARSED_WRONG
from generation_rows import BASE, HYPER, HYPER_WRONG, ORACLE

GAIN = 0.05  # of the score: tasks where the oracle gains less have no share of their own
BARS = {"A": 0.5, "B": 0.4, "sentences": 0.5}
BEST = {  # and its control with the wrong words; elsewhere the plain hypernetwork
    "sentences": (REHEARSED, REHEARSED_WRONG),
    "pictures": (MIXED, MIXED_WRONG),
}
BESIDE = ("multi-task adapter", "best expert in hindsight")
RIVALS = ("nearest expert", "blend of factors", "blend of deltas", "SG-LoRA", "ICM-LoRA, text")

Found = Mapping[str, Any]


def shares(cell: Found) -> dict[str, float]:
    """By row the share of the oracle's gain recovered: gains over all held-out tasks, divided by the oracle's."""
    scores = {row: [mean(some) for some in one["scores"]] for row, one in cell["rows"].items()}
    whole = sum(scores[ORACLE]) - sum(scores[BASE])
    return {row: part_of(sum(found) - sum(scores[BASE]), whole) for row, found in scores.items()}


def part_of(gain: float, whole: float) -> float:
    """gain / whole; 0 where there was nothing to gain."""
    return gain / whole if whole else 0.0


def by_task(cell: Found, row: str) -> dict[str, float]:
    """A row's share of each held-out task where the oracle gains enough."""
    scores = {name: [mean(some) for some in cell["rows"][name]["scores"]] for name in (BASE, ORACLE, row)}
    gains = [high - low for high, low in zip(scores[ORACLE], scores[BASE], strict=True)]
    found = zip(cell["held"], scores[row], scores[BASE], gains, strict=True)
    return {task: (value - low) / gain for task, value, low, gain in found if gain >= GAIN}


def tables(cells: Sequence[Found]) -> dict[str, list[dict[str, Any]]]:
    """For every base and library a line for each row: mean share, spread over cells, and the best generator's lead
    over it in the same cells."""
    groups: dict[str, list[Found]] = {}
    for cell in cells:
        groups.setdefault(f"{cell['base']}, {cell['start']}", []).append(cell)
    return {name: _table(group, best_of(group[0]["base"])[0]) for name, group in groups.items()}


def best_of(base: str) -> tuple[str, str]:
    """The generator that is held to the bars, and the same with the wrong words."""
    return BEST.get(base, (HYPER, HYPER_WRONG))


def _table(cells: Sequence[Found], best: str) -> list[dict[str, Any]]:
    every = [shares(cell) for cell in cells]
    lines = []
    for row in dict.fromkeys(row for found in every for row in found):
        there = [(found, cell) for found, cell in zip(every, cells, strict=True) if row in found]
        leads = [found[best] - found[row] for found, _ in there]
        scores = [mean(mean(some) for some in cell["rows"][row]["scores"]) for _, cell in there]
        lines.append(
            {
                "row": row,
                "recovered": mean(found[row] for found, _ in there),
                "spread": _spread([found[row] for found, _ in there]),
                "score": mean(scores),
                "lead": mean(leads),
                "lead spread": _spread(leads),
                "cells": len(there),
                "seconds": mean(sum(cell["rows"][row]["seconds"]) for _, cell in there),
            }
        )
    return lines


def task_tables(cells: Sequence[Found]) -> dict[str, dict[str, dict[str, float]]]:
    """For every base and library by held-out task the shares of the best generator, its control and their rivals,
    as means over the cells that hold the task out; tasks with little to gain are not there."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for cell in cells:
        group = found.setdefault(f"{cell['base']}, {cell['start']}", {})
        for row in (*best_of(cell["base"]), *BESIDE, *RIVALS):
            for task, share in by_task(cell, row).items():
                group.setdefault(task, {}).setdefault(row, []).append(share)
    return {
        name: {task: {row: round(mean(some), 4) for row, some in rows.items()} for task, rows in sorted(group.items())}
        for name, group in found.items()
    }


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def bars(found: Mapping[str, Sequence[Found]], rivals: Sequence[str] = RIVALS) -> list[dict[str, Any]]:
    """Which bars are met, for the libraries from one initialisation; the turns have none."""
    lines = []
    for name, table in found.items():
        base, start = name.split(", ")
        if start != "shared" or base == "turns":
            continue
        known, (best, wrong) = {line["row"]: line for line in table}, best_of(base)
        if base in BARS:
            share, bar = known[best]["recovered"], BARS[base]
            lines.append({"bar": f"{base}: {best} recovers {bar:.0%}", "found": share, "met": share >= bar})
        for rival in (*rivals, wrong):
            lead = known[rival]
            what = f"{base}: {best} beats {rival} by more than the spread"
            lines.append({"bar": what, "found": lead["lead"], "met": lead["lead"] > lead["lead spread"]})
    return lines


# --- printing -------------------------------------------------------------------------------------------------------


def show(report: Found) -> None:
    """All tables."""
    for name, lines in report["tables"].items():
        print(f"\n{name}: share of the oracle's gain on held-out tasks, {max(line['cells'] for line in lines)} cells")
        print(f"{'':56} {'share':>7} {'spread':>7} {'score':>9} {'lead':>7} {'spread':>7} {'seconds':>8}")
        for line in lines:
            figures = f"{line['recovered']:7.3f} {line['spread']:7.3f} {line['score']:9.3f}"
            lead = f"{line['lead']:7.3f} {line['lead spread']:7.3f} {line['seconds']:8.1f}"
            print(f"{line['row']:56} {figures} {lead}")
    for name, tasks in report["tasks"].items():
        best, wrong = best_of(name.split(", ")[0])
        print(f"\n{name}: by task, of {best}")
        print(f"{'':56} {'share':>7} {'wrong':>7} {'multi':>7} {'nearest':>7}")
        for task, found in tasks.items():
            some = (best, wrong, BESIDE[0], RIVALS[0])
            print(f"{task:56} " + " ".join(f"{found[row]:7.3f}" for row in some))
    for name, lines in report["closed"].items():
        print(f"\n{name}: the library's own adapters, packed")
        print(f"{'':48} {'kept':>7} {'of gain':>8} {'bytes':>9} {'of checkpoints':>15}")
        for line in lines:
            sizes = f"{line['bytes']:9,d} {line['of checkpoints']:15.4f}"
            print(f"{line['row']:48} {line['kept']:7.4f} {line['gain kept']:8.4f} {sizes}")
    print()
    for line in report["bars"]:
        print(f"{'met    ' if line['met'] else 'not met'} {line['found']:7.3f}  {line['bar']}")
    print(f"\n{report['seconds']:.0f} seconds, {report['workers']} workers")

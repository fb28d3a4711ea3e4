"""Prints the tables of merging.py's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]


def show(report: Mapping[str, Any]) -> None:
    """All tables, best rows first."""
    for draw in (_main, _by_task, _plain, _mixed, _fewer, _choices):
        draw(report)
        print()
    rounding = report["rounding"]
    print(
        f"bfloat16 moves a task's accuracy by {rounding['largest']:.4f} at most, by {rounding['mean']:+.4f} on average"
    )
    print("seconds:", ", ".join(f"{name} {value}" for name, value in report["seconds"].items()))


def _main(report: Mapping[str, Any]) -> None:
    seeds = f"{report['seeds']} seeds" if report["seeds"] > 1 else "1 seed"
    tasks, others = len(report["tasks"]), len(report["others"])
    print(f"\nnormalised accuracy on {tasks} tasks, and accuracy on {others} others, {seeds}")
    print(f"{'':36} {'mean':>6} {'spread':>7} {'worst':>6} {'others':>7} {'rank':>5} {'merging':>8}")
    for line in [*_sorted(report["rows"]), *report["references"]]:
        if "refused" in line:
            print(f"{line['row']:36} refuses: {line['refused'][:60]}")
            continue
        found, worst = line["normalised"], min(line["by task"].values())
        figures = f"{found['mean']:6.3f} {found['spread']:7.3f} {worst:6.3f} {line['others']['mean']:7.3f}"
        print(f"{line['row']:36} {figures} {line['rank'] or '':>5} {line['seconds']:6.2f} s")


def _by_task(report: Mapping[str, Any]) -> None:
    tasks, others = report["tasks"], report["others"]
    print("by task: normalised accuracy, and accuracy on the others")
    print(" " * 36, *(f"{_short(task):>9}" for task in (*tasks, *others)))
    for line in [*_sorted(report["rows"]), *report["references"]]:
        if "refused" not in line:
            cells = [line["by task"][task] for task in tasks] + [line["by other"][task] for task in others]
            print(f"{line['row']:36}", *(f"{cell:9.3f}" for cell in cells))


def _plain(report: Mapping[str, Any]) -> None:
    print("as they come: default options, every weight 1 (but for the average)")
    for line in _sorted(report["as they come"]):
        found = line["normalised"]
        print(f"{line['row']:36} {found['mean']:6.3f} {found['spread']:7.3f}")


def _mixed(report: Mapping[str, Any]) -> None:
    equal = {line["row"]: line for line in report["rows"]}
    print("mixed ranks, options and weights as chosen for equal ranks")
    print(f"{'':36} {'mixed':>6} {'spread':>7} {'equal':>7}")
    for line in _sorted(report["mixed ranks"]["rows"]):
        if "refused" in line:
            print(f"{line['row']:36} refuses: {line['refused'][:60]}")
            continue
        found = line["normalised"]
        before = equal[line["row"]]["normalised"]["mean"]
        print(f"{line['row']:36} {found['mean']:6.3f} {found['spread']:7.3f} {before:7.3f}")


def _fewer(report: Mapping[str, Any]) -> None:
    tables = {count: {line["row"]: line for line in lines} for count, lines in report["fewer adapters"].items()}
    tables[len(report["tasks"])] = {line["row"]: line for line in report["rows"]}
    print("by number of adapters: mean (spread) at the weight that was chosen for each number")
    print(" " * 36, *(f"{count:>20}" for count in tables))
    rows = [line["row"] for line in _sorted(report["rows"]) if all(line["row"] in table for table in tables.values())]
    for row in rows:
        print(f"{row:36}", *(_with_weight(table[row]) for table in tables.values()))


def _with_weight(line: Line) -> str:
    found = line["normalised"]
    return f"{found['mean']:6.3f} ({found['spread']:.3f}) {line['weight']:5.3g}"


def _choices(report: Mapping[str, Any]) -> None:
    print("chosen on validation sentences: its score there, the weight of every adapter, options")
    for row, choice in report["choices"].items():
        if "refused" not in choice:
            options = ", ".join(f"{name}={value}" for name, value in choice["options"].items())
            print(f"{row:36} {choice['score']:6.3f} {choice['weight']:5.3g}  {options}  ({len(choice['tries'])} tries)")


def _sorted(lines: Sequence[Line]) -> list[Line]:
    return sorted(lines, key=lambda line: -line["normalised"]["mean"] if "normalised" in line else 1.0)


def _short(task: str) -> str:
    first, *rest = task.split("-")
    return (rest[0] if first in ("clinc", "banking77") else first)[:9]

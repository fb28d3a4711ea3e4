"""What a blend of neighbours reaches on a task whose own adapter is withheld: the figures behind `blend`'s defaults.

    .venv/bin/python benchmarks/leave_one_out.py [--quick] [--json OUT]

For every task of the built-in example the experts are the other adapters. The K whose descriptions lie nearest by
cosine are added with weights softmax(cosine / temperature), and the sum is measured on the task's held-out sentences,
beside the bare model, the mean of all other adapters, and the task's own adapter (the oracle). "recovered" is
(accuracy - base) / (own - base), over the means of all tasks. `--quick` takes every ninth task.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from lorahub.generate.sentences import SentenceModel, SentenceTask, load_tasks
from lorahub.hub.adapter import Adapter
from lorahub.hub.lowrank import concat
from lorahub.hub.reading import read
from torch import Tensor

EXAMPLE = Path(__file__).resolve().parents[1] / "cli/example"
COUNTS = (1, 2, 3, 4)
TEMPERATURES = (0.02, 0.05, 0.1, 0.2, 1.0)


@dataclass(frozen=True)
class Row:
    """One withheld task; `blends` maps "K/temperature" to an accuracy (one temperature for K = 1, which has no say)."""

    name: str
    base: float
    own: float
    mean_of_all: float
    neighbours: list[str]
    cosines: list[float]
    blends: dict[str, float]


def blended(experts: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The weighted sum of adapters that share their modules."""
    names = experts[0].modules
    return Adapter({name: concat([expert.modules[name] for expert in experts], weights) for name in names})


def settings() -> list[tuple[int, float]]:
    return [(count, heat) for count in COUNTS for heat in (TEMPERATURES if count > 1 else TEMPERATURES[:1])]


def withhold(
    task: SentenceTask, adapters: Mapping[str, Adapter], cosines: Mapping[str, float], model: SentenceModel
) -> Row:
    """Measures one task with everything but its own adapter; `cosines` are those of the other tasks' descriptions."""
    ranked = sorted(cosines, key=lambda name: -cosines[name])
    blends = {}
    for count, heat in settings():
        nearest = ranked[:count]
        weights = torch.softmax(torch.tensor([cosines[name] for name in nearest]) / heat, dim=0).tolist()
        mixture = blended([adapters[name] for name in nearest], weights)
        blends[f"{count}/{heat:g}"] = round(model.accuracy(mixture, task), 4)
    everybody = blended([adapters[name] for name in ranked], [1 / len(ranked)] * len(ranked))
    return Row(
        name=task.name,
        base=round(model.accuracy(None, task), 4),
        own=round(model.accuracy(adapters[task.name], task), 4),
        mean_of_all=round(model.accuracy(everybody, task), 4),
        neighbours=ranked[: max(COUNTS)],
        cosines=[round(cosines[name], 4) for name in ranked[: max(COUNTS)]],
        blends=blends,
    )


def summary(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Per setting: mean accuracy, share of the gain recovered, tasks above and below the bare model, worst change."""
    base, own = (np.array([getattr(row, name) for row in rows]) for name in ("base", "own"))
    columns = {"base": base, "own": own, "mean of all": np.array([row.mean_of_all for row in rows])}
    columns |= {key: np.array([row.blends[key] for row in rows]) for key in rows[0].blends}
    return {
        key: {
            "mean": round(float(values.mean()), 4),
            "recovered": round(float((values.mean() - base.mean()) / (own.mean() - base.mean())), 3),
            "above": int((values > base).sum()),
            "below": int((values < base).sum()),
            "worst": round(float((values - base).min()), 4),
        }
        for key, values in columns.items()
    }


def show(rows: Sequence[Row], table: Mapping[str, Mapping[str, float]]) -> None:
    print(f"{'task':26} {'base':>6} {'nearest':>8} {'3/0.05':>7} {'own':>6} {'cosine':>7}  nearest neighbour")
    for row in rows:
        figures = f"{row.base:6.3f} {row.blends['1/0.02']:8.3f} {row.blends['3/0.05']:7.3f} {row.own:6.3f}"
        print(f"{row.name:26} {figures} {row.cosines[0]:7.3f}  {row.neighbours[0]}")
    print(f"\n{'K/temperature':14} {'mean':>6} {'recovered':>10} {'above':>6} {'below':>6} {'worst':>7}")
    for key, line in table.items():
        figures = f"{line['mean']:6.3f} {line['recovered']:10.3f} {line['above']:6} {line['below']:6}"
        print(f"{key:14} {figures} {line['worst']:7.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Blends of neighbours on withheld tasks of the built-in example.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tasks, model = load_tasks(EXAMPLE / "tasks.json"), SentenceModel()
    adapters = {name: read(EXAMPLE / name) for name in tasks}
    vectors: Tensor = model.embed([task.description for task in tasks.values()])
    names = list(tasks)
    rows = []
    for index in range(0, len(names), 9 if options.quick else 1):
        cosines = dict(zip(names, (vectors @ vectors[index]).tolist(), strict=True))
        del cosines[names[index]]
        rows.append(withhold(tasks[names[index]], adapters, cosines, model))
    table, nearest = summary(rows), [row.cosines[0] for row in rows]
    show(rows, table)
    print(
        f"\nnearest other description: least cosine {min(nearest):.3f}, 5th percentile {np.percentile(nearest, 5):.3f}"
    )
    if options.json:
        spread = {"least": min(nearest), "5th percentile": round(float(np.percentile(nearest, 5)), 4)}
        report = {"settings": table, "nearest_cosine": spread, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

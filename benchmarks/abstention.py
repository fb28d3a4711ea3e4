"""Which requests `generate` refuses: a hundred that it should serve, a hundred that it should not.

    .venv/bin/python benchmarks/abstention.py [--quick] [--json OUT]

The library is the built-in example's 22 sentence adapters, the requests stand in abstention.toml, which was written
before any score was looked at. Rules, each a least cosine with the nearest description: a fixed number that was chosen
on other requests; the library's own limit (`generate.abstaining`), of which one number, BETWEEN, was chosen on the
tuning half (even places); the 5th percentile of what the library's tasks reach with their own expert left out, which
uses no request; the best number for the tuning half. "withheld": the requests to serve, each without the expert of its
own task in the library. The whole run takes seconds; `--quick` changes nothing.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lorahub.generate.abstaining import UNRELATED, between
from lorahub.generate.library import CLOSE
from lorahub.generate.sentences import load_tasks
from lorahub.index.encoders.text import text
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
HALVES = {"tuning": slice(0, None, 2), "test": slice(1, None, 2), "all": slice(None)}

Scores = NDArray[np.float32]


def requests() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(task or subject, request) of those to serve and those to refuse, in the file's order."""
    lists = tomllib.loads((HERE / "abstention.toml").read_text(encoding="utf-8"))
    near, far = ([(key, said) for key, some in lists[kind].items() for said in some] for kind in ("near", "far"))
    return near, far


def best_least(near: Scores, far: Scores) -> float:
    """The number for which the larger of the two shares of errors is least."""
    found = np.sort(np.concatenate([near, far]))
    return float(min(found, key=lambda least: max((near < least).mean(), (far >= least).mean())))


def rates(least: float, near: Scores, far: Scores, withheld: Scores) -> dict[str, Any]:
    """Shares refused, by half."""
    row: dict[str, Any] = {"least": round(least, 4)}
    for half, part in HALVES.items():
        row[half] = {
            name: round(float((scores[part] < least).mean()), 4)
            for name, scores in (("near", near), ("far", far), ("withheld", withheld))
        }
    return row


def measured() -> dict[str, Any]:
    """Every rule's refusals, and the requests that the library's limit gets wrong."""
    tasks, encoder = load_tasks(HERE.parent / "cli/example/tasks.json"), text()
    vectors = encoder.encode([task.description for task in tasks.values()])
    near, far = requests()
    cosines = encoder.encode([said for _, said in near]) @ vectors.T
    own = np.array([[task == name for name in tasks] for task, _ in near])
    scores = cosines.max(axis=1), (encoder.encode([said for _, said in far]) @ vectors.T).max(axis=1)
    withheld = np.where(own, -1.0, cosines).max(axis=1).astype(np.float32)
    limit = between(vectors, (encoder.encode(list(UNRELATED)) @ vectors.T).max(axis=1))
    assert limit.own is not None
    rules = {
        "fixed": CLOSE,
        "the library's own limit (used)": limit.value,
        "leaving experts out, 5th percentile": limit.own,
        "best for the tuning half": best_least(*(some[HALVES["tuning"]] for some in scores)),
    }
    wrong = {
        "refused": [said for (_, said), score in zip(near, scores[0], strict=True) if score < limit.value],
        "served": [said for (_, said), score in zip(far, scores[1], strict=True) if score >= limit.value],
    }
    shown = {name: rates(least, *scores, withheld) for name, least in rules.items()}
    spans = {"unrelated": round(limit.unrelated, 4), "own tasks": round(limit.own, 4)}
    return {"experts": len(tasks), "near": len(near), "far": len(far), "limit": spans, "rules": shown, "wrong": wrong}


def show(found: Mapping[str, Any]) -> None:
    print(f"{found['near']} requests to serve, {found['far']} to refuse, {found['experts']} experts; refused, in %:\n")
    print(f"{'':36} {'':>6}   {'tuning half':>16}   {'test half':>16}   {'all':>16}   withheld")
    print(f"{'rule':36} {'least':>6}   " + "   ".join([f"{'to serve':>8}  to refuse"[:18]] * 3))
    for name, row in found["rules"].items():
        halves = "   ".join(f"{100 * row[half]['near']:8.0f} {100 * row[half]['far']:7.0f}" for half in HALVES)
        print(f"{name:36} {row['least']:6.3f}   {halves}   {100 * row['all']['withheld']:8.0f}")
    for kind, some in found["wrong"].items():
        print(f"\nwrongly {kind} by the library's own limit:")
        print("\n".join(f"  {said}" for said in some) or "  none")


def main() -> None:
    parser = argparse.ArgumentParser(description="Which requests are refused, and which should be.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measured()
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

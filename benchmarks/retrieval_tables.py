"""One row measured in every way, and the tables of retrieval.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from retrieval_metrics import Marks, Scores, by_chance, first_right, spread, summary, themes
from retrieval_rows import Bench, Ranking
from retrieval_splits import HELD_BACK, queries

GALLERIES = {
    "own": "the adapters of the same part",
    "new": "all adapters that no encoder learned from",
    "all": "all adapters, those that encoders learned from as well",
}
WORDINGS = ("plain", "free")
Figures = dict[str, Any]


class Asked:
    """Who is asked for what in one split: for every part and gallery the right answers, and scores for a ranking."""

    def __init__(self, bench: Bench, parts: Sequence[str]) -> None:
        self.bench, self.parts = bench, np.array(parts)
        self.names = np.array(bench.pool.names())
        concepts = list(bench.concepts.values())
        self.queries = {part: queries(concepts, bench.pool.copies, parts, part) for part in HELD_BACK}
        first = {one.asked[0] for one in concepts}
        self.plain = {part: np.array([text in first for text, _ in some]) for part, some in self.queries.items()}

    def gallery(self, kind: str, part: str) -> NDArray[np.int64]:
        """The rows of the adapters that are ranked."""
        chosen = {"own": self.parts == part, "new": self.parts != "fit", "all": self.parts != ""}[kind]
        return np.flatnonzero(chosen)

    def right_for_texts(self, part: str, gallery: NDArray[np.int64]) -> Marks:
        wanted = np.array([name for _, name in self.queries[part]])
        found: Marks = wanted[:, None] == self.names[gallery][None, :]
        return found

    def right_for_adapters(self, part: str, gallery: NDArray[np.int64]) -> tuple[Marks, Marks]:
        """Whether an answer is right, and whether it is the query itself."""
        rows = np.flatnonzero(self.parts == part)
        itself = rows[:, None] == gallery[None, :]
        return (self.names[rows][:, None] == self.names[gallery][None, :]) & ~itself, itself

    def measured(self, ranking: Ranking) -> Figures:
        """text, adapter: by part and gallery; by wording in the part's own gallery; themes by part and over all."""
        found: Figures = {"text": {}, "wording": {}, "adapter": {}, "themes": {}}
        for part in HELD_BACK:
            scores = ranking.texts([text for text, _ in self.queries[part]])
            rows = np.flatnonzero(self.parts == part)
            found["text"][part], found["adapter"][part] = {}, {}
            for kind in GALLERIES:
                gallery = self.gallery(kind, part)
                places = first_right(scores[:, gallery], self.right_for_texts(part, gallery))
                found["text"][part][kind] = summary(places)
                if kind == "own":
                    plain = self.plain[part]
                    found["wording"][part] = {"plain": summary(places[plain]), "free": summary(places[~plain])}
                right, itself = self.right_for_adapters(part, gallery)
                near: Scores = np.where(itself, -np.inf, ranking.near[rows][:, gallery])
                found["adapter"][part][kind] = summary(first_right(near, right))
            found["themes"][part] = themes(ranking.near, self.names.tolist(), self.parts == part)
        found["themes"]["all"] = themes(ranking.near, self.names.tolist(), self.parts != "")
        return found

    def chance(self) -> Figures:
        """The same figures of a random order."""
        found: Figures = {"text": {}, "wording": {}, "adapter": {}, "themes": {}}
        for part in HELD_BACK:
            found["text"][part], found["adapter"][part] = {}, {}
            for kind in GALLERIES:
                gallery = self.gallery(kind, part)
                counts = self.right_for_texts(part, gallery).sum(axis=1).tolist()
                found["text"][part][kind] = by_chance([(count, len(gallery)) for count in counts])
                right, itself = self.right_for_adapters(part, gallery)
                sizes = (len(gallery) - itself.sum(axis=1)).tolist()
                found["adapter"][part][kind] = by_chance(list(zip(right.sum(axis=1).tolist(), sizes, strict=True)))
        return found


def over_seeds(runs: Sequence[Figures]) -> Figures:
    """Mean and spread of every figure."""
    first = runs[0]
    if all(isinstance(value, float) for value in first.values()):
        return spread(runs)
    return {key: over_seeds([run[key] for run in runs]) for key in first}


# --- printed --------------------------------------------------------------------------------------------------------


def shown(world: str, report: Mapping[str, Any]) -> Iterator[str]:
    """All tables of a world."""
    counts = ", ".join(f"{count} {part}" for part, count in report["split"].items())
    size = f"{report['adapters']} adapters of {report['concepts']} concepts"
    yield f"\n{world}: {size} ({counts}), {report['seeds']} seeds"
    for side, kinds in (("text", tuple(GALLERIES)), ("adapter", ("own", "all"))):
        for kind in kinds:
            yield f"\n{side} -> adapter among {GALLERIES[kind]}; recall@5 with its spread over the seeds"
            yield from _recalls(report["rows"], side, kind)
    yield "\ncosines within and between themes (the paper's figure: 0.471 and -0.023, a gap of 0.494)"
    yield from _themes(report["rows"])
    if report.get("sparse"):
        yield "\nhybrid search, held-out adapters, when names, tags and descriptions are gone: recall@1, 5, 10, MRR"
        yield from _sparse(report["sparse"])


def _recalls(rows: Mapping[str, Figures], side: str, kind: str) -> Iterator[str]:
    yield f"{'':28}" + "".join(f"{part:^33}" for part in HELD_BACK)
    yield f"{'row':28}" + f"{'@1':>6} {'@5':>14} {'@10':>5} {'MRR':>5} " * len(HELD_BACK)
    for label, row in rows.items():
        cells = []
        for part in HELD_BACK:
            figures = row[side][part][kind]
            if not figures:
                cells.append(f"{'-':>6} {'-':>14} {'-':>5} {'-':>5} ")
                continue
            one, five, ten, mrr = (figures[name] for name in ("recall@1", "recall@5", "recall@10", "mrr"))
            middle = f"{five['mean']:6.3f} ({five['spread']:.3f})"
            cells.append(f"{one['mean']:6.3f} {middle:>14} {ten['mean']:5.3f} {mrr['mean']:5.3f} ")
        yield f"{label:28}" + "".join(cells)


def _themes(rows: Mapping[str, Figures]) -> Iterator[str]:
    parts = (*HELD_BACK, "all")
    yield f"{'':28}" + "".join(f"{part:^24}" for part in parts)
    yield f"{'row':28}" + f"{'intra':>7} {'inter':>7} {'gap':>7} " * len(parts)
    for label, row in rows.items():
        if not row["themes"]:
            continue
        cells = []
        for part in parts:
            figures = row["themes"].get(part)
            names = ("intra", "inter", "gap")
            cells.append("".join(f"{figures[name]['mean']:7.3f} " if figures else f"{'-':>7} " for name in names))
        yield f"{label:28}" + "".join(cells)


def _sparse(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield f"{'gone':>6} {'with weights':^30} {'without':^30}"
    for line in lines:
        cells = []
        for voice in ("with weights", "without"):
            names = ("recall@1", "recall@5", "recall@10", "mrr")
            cells.append(" ".join(f"{line[voice][name]['mean']:6.3f}" for name in names))
        yield f"{line['gone']:6.0%} {cells[0]:^30} {cells[1]:^30}"

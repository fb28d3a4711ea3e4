"""What evaluations say: which generator to take for a base, and how much it may gain. Needs no torch.

An evaluation leaves tasks out, experts and all, generates for each from its words, and measures.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..hub.bases import family
from ..hub.errors import FormatError

PLAIN = "blend"  # what is taken where nothing was evaluated
NEIGHBOURS = 8  # left-out tasks, those of the most alike similarity, that an estimate rests on
FEWEST = 4  # left-out tasks without which no estimate is made

_VERSION = 1


@dataclass(frozen=True)
class Trial:
    """A task that was left out. similarity: of its request to the nearest description that was left. scores: by method;
    bare, own: of the base, and of the task's own expert."""

    task: str
    request: str
    similarity: float
    bare: float
    own: float
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Methods judged by tasks left out. measure: what the scores are; seconds: by method, of its fits and samples."""

    base: str
    measure: str
    folds: int
    trials: tuple[Trial, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """Those that were measured on all tasks."""
        return [name for name in self.trials[0].scores if all(name in one.scores for one in self.trials)]

    def mean(self, method: str) -> float:
        """Mean score over the tasks."""
        return sum(one.scores[method] for one in self.trials) / len(self.trials)

    def recovered(self, method: str) -> float | None:
        """Share of the gain of the tasks' own experts over the base; None where these gain nothing."""
        return _share(self.trials, method)


@dataclass(frozen=True)
class Estimate:
    """What a method gained on left-out tasks as similar to their library as this request is.

    gain: over the base, in units of the measure; share: of what an own expert gained; tasks: how many it rests on.
    """

    gain: float
    share: float | None
    measure: str
    tasks: int


def estimate(evaluation: Evaluation | None, method: str, similarity: float) -> Estimate | None:
    """The mean over the left-out tasks whose similarity is most alike. None where the method was not evaluated."""
    if evaluation is None or len(evaluation.trials) < FEWEST or method not in evaluation.methods:
        return None
    near = sorted(evaluation.trials, key=lambda one: abs(one.similarity - similarity))[:NEIGHBOURS]
    gain = sum(one.scores[method] - one.bare for one in near) / len(near)
    return Estimate(gain, _share(near, method), evaluation.measure, len(near))


def choose(evaluation: Evaluation | None, there: Collection[str]) -> tuple[str, str]:
    """The method to take of those that there are, and why, in words.

    The one that did best on tasks left out. Where nothing was evaluated, the blend: on the built-in example it does
    better than the nearest expert (benchmarks/leave_one_out.py), and a fitted generator has to show first that it does
    better than its library's average.
    """
    judged = [name for name in evaluation.methods if name in there] if evaluation and evaluation.trials else []
    if evaluation is None or not judged:
        return PLAIN, "nothing was evaluated (lorahub generator evaluate), and blending needs no fit"
    best = max(judged, key=evaluation.mean)
    share, others = evaluation.recovered(best), sorted(set(there) - set(judged))
    told = f"best of {', '.join(judged)} on {len(evaluation.trials)} tasks left out"
    told += "" if share is None else f", with {share:.0%} of the own experts' gain"
    return best, told + (f"; not evaluated: {', '.join(others)}" if others else "")


def evaluation_path(home: Path, base: str) -> Path:
    """Where the evaluation of a base's generators lies, if there is one."""
    return home / "generators" / quote(family(base), safe="") / "evaluation.json"


def save(evaluation: Evaluation, path: Path) -> None:
    """Write an evaluation, in place of an older one."""
    from ..hub.writing import replacing

    with replacing(path, force=True) as place:
        place.write_text(json.dumps({"version": _VERSION, **asdict(evaluation)}, indent=1) + "\n", encoding="utf-8")


def stored(home: Path, base: str) -> Evaluation | None:
    """The evaluation of a base's generators; None without one. Raises FormatError where it is damaged."""
    path = evaluation_path(home, base)
    if not path.is_file():
        return None
    try:
        said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if said.pop("version") != _VERSION:
            raise ValueError("of another version")
        trials = tuple(Trial(**one) for one in said.pop("trials"))
        return Evaluation(**said, trials=trials)
    except (ValueError, TypeError, KeyError) as error:
        raise FormatError(
            f"{path}: is no evaluation ({error}); make it anew with `lorahub generator evaluate`"
        ) from None


def forget(home: Path, base: str, method: str) -> None:
    """Drop what is known of a method, because it is another one now."""
    known = stored(home, base)
    if known is None:
        return
    trials = tuple(
        replace(one, scores={name: score for name, score in one.scores.items() if name != method})
        for one in known.trials
    )
    save(replace(known, trials=trials), evaluation_path(home, base))


def _share(trials: Collection[Trial], method: str) -> float | None:
    whole = sum(one.own - one.bare for one in trials)
    return sum(one.scores[method] - one.bare for one in trials) / whole if whole > 0 else None

"""The metric of `merge --optimize`: a command of the user's that scores an adapter's file."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hub.errors import BadOption
from . import show

if TYPE_CHECKING:
    from ..hub.adapter import Adapter

SHOWN = 200  # so many of the last characters that a failed command printed


def find_weights(
    adapters: Sequence[Adapter],
    method: str,
    command: str,
    *,
    start: Sequence[float] | None = None,
    to: str | None = None,
    seed: int = 0,
    evaluations: int = 40,
    penalty: float = 0.05,
    given: Mapping[str, Any] | None = None,
    quiet: bool = False,
    **merging: Any,
) -> tuple[list[float], dict[str, Any]]:
    """Weights found on a command's metric, one for each adapter, and the facts of the search for lineage and cards.

    Arguments as in `search`; `to` is the dialect that the command gets (None: what fits). Raises BadOption.
    """
    from ..merge.optimize import search

    metric = command_metric(command, to=to)
    with show.progress("searching weights", quiet=quiet) as advance:
        found = search(
            adapters,
            method,
            metric,
            start=start,
            evaluations=evaluations,
            seed=seed,
            penalty=penalty,
            given=given,
            progress=advance,
            **merging,
        )
    return list(found.weights), found.record(metric=command, seed=seed, penalty=penalty)


def command_metric(command: str, *, to: str | None = None) -> Callable[[Adapter], float]:
    """A metric that writes the adapter to a temporary place, runs `command` with `{}` replaced by its path, and reads
    the number on the last line of what it prints. No shell is involved. Raises BadOption for a command without `{}`."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise BadOption(f"--optimize {command!r}: {error}; quote it as for a shell") from None
    if not any("{}" in word for word in words):
        raise BadOption(
            f"--optimize {command!r}: expected {{}} where the adapter's path goes, as in 'python score.py {{}}'"
        )

    def metric(adapter: Adapter) -> float:
        from ..hub.writing import ready, save
        from .make import fitting_format

        dialect = to or fitting_format(adapter)
        with tempfile.TemporaryDirectory(prefix="lorahub-") as room:
            name = "adapter" if dialect == "peft" else "adapter.safetensors"
            path = save(ready(adapter), Path(room) / name, dialect)
            return scored(f"--optimize {command!r}", [word.replace("{}", str(path)) for word in words])

    return metric


def scored(what: str, words: Sequence[str]) -> float:
    """The number on the last line that a command prints. Raises BadOption, beginning with `what`, with what it printed
    otherwise."""
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise BadOption(f"{what}: {words[0]} cannot be run ({error.strerror})") from None
    if done.returncode:
        raise BadOption(f"{what}: exit status {done.returncode}; {_said(done.stderr or done.stdout)}")
    lines = done.stdout.strip().splitlines()
    try:
        score = float(lines[-1])
    except (IndexError, ValueError):
        raise BadOption(f"{what}: expected a number on the last line of stdout; {_said(done.stdout)}") from None
    return score


def _said(text: str) -> str:
    words = " ".join(text.split())
    return f"it printed {words[-SHOWN:]!r}" if words else "it printed nothing"


def announce(found: Mapping[str, Any], names: Sequence[str]) -> None:
    """Tell a reader what a search found; takes the facts that `find_weights` returns."""
    chosen = " ".join(f"{name}:{weight:g}" for name, weight in zip(names, found["weights"], strict=True))
    show.line(
        f"weights {chosen}: score {found['score']:.6g}, from {found['start_score']:.6g} at the start, "
        f"{found['evaluations']} evaluations (on the data they were chosen on: measure elsewhere)"
    )
    rivals = [trial for trial in found["trace"] if trial["kind"] != "search"]
    show.table(["tried first", "score"], [(trial["kind"], f"{trial['score']:.6g}") for trial in rivals])
    if found["note"]:
        show.note(found["note"])

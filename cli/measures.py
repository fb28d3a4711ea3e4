"""What generators learn on and are judged by: labelled sentences, a command of the user's, or a function of theirs."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hub.errors import BadOption

if TYPE_CHECKING:
    from ..generate.hypernet import Practice
    from ..generate.judging import Judge
    from ..generate.sentences import SentenceTask
    from ..hub.adapter import Adapter
    from ..hub.transfer import Measured

EXAMPLE = Path(__file__).parent / "example" / "tasks.json"


def sentence_tasks(base: str, tasks: Path | None) -> dict[str, SentenceTask]:
    """The tasks of a file, by default those of the built-in example. Raises BadOption for another base than its."""
    from ..generate.sentences import load_tasks

    check_sentence_base(base, "labelled sentences measure adapters of", "measure with --score COMMAND")
    return load_tasks(tasks or EXAMPLE)


def check_sentence_base(base: str, what: str, instead: str) -> None:
    """Raise BadOption for another base than the packaged sentence model."""
    from ..hub.bases import family
    from ..index.encoders.text import PACKAGED

    if family(base) != family(PACKAGED):
        raise BadOption(f"{what} {PACKAGED}, these adapters are for {base}: {instead}")


def scorer(command: str) -> Callable[[Path | None, str], float]:
    """What a command says of the adapter at a path on a task. Raises BadOption for one without both places."""
    from .optimize import scored

    if "{adapter}" not in command or "{task}" not in command:
        raise BadOption(
            f"--score {command!r}: expected {{adapter}} and {{task}}, as in 'score.py {{adapter}} {{task}}'"
        )
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise BadOption(f"--score {command!r}: {error}; quote it as for a shell") from None

    def score(path: Path | None, task: str) -> float:
        filled = [word.replace("{adapter}", str(path or "")).replace("{task}", task) for word in words]
        return scored(f"--score {command!r}", filled)

    return score


def practice_of(name: str) -> Practice[Any]:
    """What the function MODULE:FUNCTION of the user's makes. Raises BadOption where there is none."""
    import pkgutil
    import sys

    from ..generate.hypernet import Practice

    sys.path.insert(0, str(Path.cwd()))
    try:
        function = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadOption(f"--practice {name!r}: {error}; expected MODULE:FUNCTION") from None
    finally:
        sys.path.remove(str(Path.cwd()))
    made = function()
    if not isinstance(made, Practice):
        raise BadOption(f"--practice {name!r} returned {type(made).__name__}; expected a generate.hypernet.Practice")
    return made


def judge_of(
    base: str, measured: list[Measured], tasks: Path | None, sentences: int, command: str | None
) -> tuple[Judge, str, Practice[Any] | None]:
    """What scores adapters on a task, what it is called, and what a hypernetwork may learn on."""
    if command:
        score = scorer(command)
        return (
            lambda task, adapters: [score(None, task), *(_by_file(score, one, task) for one in adapters)],
            command,
            None,
        )
    from ..generate.measuring import accuracies, thinned
    from ..generate.own_generators import sentence_practice
    from ..generate.sentences import SentenceModel

    known, model = sentence_tasks(base, tasks), SentenceModel()
    lacking = [one.name for one in measured if one.expert and one.name not in known]
    if lacking:
        raise BadOption(
            f"there are no sentences for the task {lacking[0]}; give the --tasks that were measured, or --score"
        )
    part = {name: thinned(task, sentences) for name, task in known.items()}

    def judge(task: str, adapters: Sequence[Adapter]) -> list[float]:
        return accuracies(model, adapters, part[task])

    return judge, f"accuracy on {sentences} sentences", sentence_practice(model, known)


def _by_file(score: Callable[[Path | None, str], float], adapter: Adapter, task: str) -> float:
    import tempfile

    from ..hub.writing import ready, save
    from .make import fitting_format

    dialect = fitting_format(adapter)
    with tempfile.TemporaryDirectory(prefix="lorahub-") as room:
        name = "adapter" if dialect == "peft" else "adapter.safetensors"
        return score(save(ready(adapter), Path(room) / name, dialect), task)

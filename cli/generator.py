"""Commands on generators: measure the experts, fit a generator to them, judge it by tasks left out, list all."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..hub.errors import BadOption
from . import options
from .settings import algebra_on_one_thread, open_catalog

if TYPE_CHECKING:
    from ..generate.sentences import SentenceTask
    from ..generate.trials import Count
    from ..hub.catalog import Catalog
    from ..hub.entries import Entry

app = typer.Typer(
    help="Generators: adapters from descriptions, learned from the experts in the catalogue.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

EXAMPLE = Path(__file__).parent / "example" / "tasks.json"

Tasks = Annotated[
    Path | None,
    typer.Option("--tasks", help="JSON list of tasks with labelled sentences; default: the built-in example's."),
]
Sentences = Annotated[int, typer.Option(min=1, help="Sentences of each task that are looked at, at most.")]


@app.command()
def measure(
    base: options.Base = None,
    tasks: Tasks = None,
    sentences: Sentences = 40,
    score: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Another measure: 'score.py {adapter} {task}' prints how good the adapter is; {adapter} is empty for "
            "the bare base.",
        ),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="A task for --score; may be repeated. Default: every adapter's name.")
    ] = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Measure every adapter of a base once on every task, and learn from that which descriptions ask for which adapter.

    What was measured before is not measured again. Generated adapters are left out.
    """
    from ..generate.trials import experts
    from . import show

    algebra_on_one_thread()
    with open_catalog() as catalog:
        base, shelf = experts(catalog, base)
        if dry_run:
            count = len(task or shelf) if score else len(_sentence_tasks(base, tasks))
            show.note(f"would measure {len(shelf)} adapters for {base} on {count} tasks, except what is known already")
            return
        with show.progress("measuring", quiet=json) as advance:
            if score:
                counted = _by_command(catalog, base, shelf, score, task, advance)
            else:
                counted = _by_sentences(catalog, base, shelf, _sentence_tasks(base, tasks), sentences, advance)
        facts = {"base": base, **counted._asdict(), **_learned(catalog, base)}
    if json:
        show.as_json(facts)
        return
    show.line(
        f"measured {counted.measured} of {counted.total} pairs of {counted.experts} adapters and {counted.tasks} "
        "tasks; the others were known"
    )
    show.line(facts["said"])


def _by_sentences(
    catalog: Catalog,
    base: str,
    shelf: list[Entry],
    tasks: dict[str, SentenceTask],
    sentences: int,
    advance: Callable[[int, int | None], None],
) -> Count:
    from ..generate.sentences import SentenceModel
    from ..generate.trials import measure_sentences

    return measure_sentences(catalog, base, shelf, tasks, SentenceModel(), sentences=sentences, progress=advance)


def _by_command(
    catalog: Catalog,
    base: str,
    shelf: list[Entry],
    command: str,
    tasks: list[str] | None,
    advance: Callable[[int, int | None], None],
) -> Count:
    from ..generate.trials import measure_by
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

    names = tasks or [entry.name for entry in shelf]
    return measure_by(catalog, base, shelf, names, score, command, progress=advance)


def _sentence_tasks(base: str, tasks: Path | None) -> dict[str, SentenceTask]:
    """The tasks of a file, by default those of the built-in example. Raises BadOption for another base than its."""
    from ..generate.sentences import load_tasks
    from ..hub.bases import family
    from ..index.encoders.text import PACKAGED

    if family(base) != family(PACKAGED):
        raise BadOption(
            f"labelled sentences measure adapters of {PACKAGED}, these are for {base}: measure with --score COMMAND"
        )
    return load_tasks(tasks or EXAMPLE)


def _learned(catalog: Catalog, base: str) -> dict[str, Any]:
    """A similarity learned from what is measured by now, where that is enough; and a line that says what came of it."""
    from ..hub.errors import RetrievalError
    from ..index.encoders.text import text
    from ..index.own_similarity import fit_own, ranker

    encoder = text()
    try:
        found = fit_own(catalog, base, encoder)
    except RetrievalError as error:
        return {"similarity": None, "said": f"no similarity was learned: {error}"}
    used, said = ranker(catalog.home, base, encoder)
    figures = found.ranking._asdict() if found.ranking else {}
    return {"similarity": {**figures, "used": used is not None}, "said": f"experts are found {said}"}

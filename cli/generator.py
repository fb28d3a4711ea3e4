"""Commands on generators: measure the experts, fit a generator to them, judge it by tasks left out, list all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..hub.errors import TargetExists
from . import options
from .measures import judge_of, practice_of, scorer, sentence_tasks
from .settings import algebra_on_one_thread, open_catalog

if TYPE_CHECKING:
    from ..generate.choosing_method import Evaluation
    from ..generate.own_generators import Shelf
    from ..generate.sentences import SentenceTask
    from ..generate.trials import Count
    from ..hub.catalog import Catalog
    from ..hub.entries import Entry

app = typer.Typer(
    help="Generators: adapters from descriptions, learned from the experts in the catalogue.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Tasks = Annotated[
    Path | None,
    typer.Option("--tasks", help="JSON list of tasks with labelled sentences; default: the built-in example's."),
]
PracticeName = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:FUNCTION", help="Makes the generate.hypernet.Practice that hyper and multitask learn on."
    ),
]
Score = Annotated[
    str | None,
    typer.Option(
        metavar="COMMAND",
        help="Another measure: 'score.py {adapter} {task}' prints how good the adapter is; {adapter} is empty for the "
        "bare base.",
    ),
]
Sentences = Annotated[int, typer.Option(min=1, help="Sentences of each task that are looked at, at most.")]


@app.command()
def measure(
    base: options.Base = None,
    tasks: Tasks = None,
    sentences: Sentences = 40,
    score: Score = None,
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
            count = len(task or shelf) if score else len(sentence_tasks(base, tasks))
            show.note(f"would measure {len(shelf)} adapters for {base} on {count} tasks, except what is known already")
            return
        with show.progress("measuring", quiet=json) as advance:
            if score:
                counted = _by_command(catalog, base, shelf, score, task, advance)
            else:
                counted = _by_sentences(catalog, base, shelf, sentence_tasks(base, tasks), sentences, advance)
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

    score = scorer(command)
    names = tasks or [entry.name for entry in shelf]
    return measure_by(catalog, base, shelf, names, score, command, progress=advance)


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


@app.command()
def fit(
    base: options.Base = None,
    kind: Annotated[str, typer.Option(help="semantic, icm, hyper or multitask.")] = "semantic",
    tasks: Tasks = None,
    practice: PracticeName = None,
    sentences: Sentences = 40,
    option: options.Method = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the generator here; default: the home folder, to be used.")
    ] = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Fit a generator to the catalogue's described adapters of a base; the one in the home folder is replaced.

    Adapters that share a tag expert:NAME are checkpoints of one expert. With --tasks, semantic chooses neighbours and
    temperature by leaving experts out and measuring; hyper and multitask learn on the tasks' sentences, or on
    what --practice gives.
    """
    from ..generate.own_generators import gathered, generator_path
    from . import show

    algebra_on_one_thread()
    if out and out.exists() and not force:
        raise TargetExists(f"{out}: exists already; choose another --out, or --force to replace it")
    given = options.pairs(option)
    with open_catalog() as catalog:
        shelf = gathered(catalog, base)
        facts: dict[str, Any] = {"base": shelf.base, "kind": kind, "experts": len(shelf.experts), "gauge": shelf.gauge}
        facts["checkpoints"] = sum(len(one.checkpoints) for one in shelf.experts)
        facts["out"] = str(out or generator_path(catalog.home, shelf.base, kind))
        if not dry_run:
            facts |= _fitted(catalog, shelf, kind, tasks, practice, sentences, given, out, quiet=json)
    if json:
        show.as_json(facts)
        return
    why = "their first factors are shared" if facts["gauge"] == "none" else "they were trained independently"
    show.line(
        f"{'would write' if dry_run else 'wrote'} {facts['out']}: {kind} for {facts['base']}, of {facts['experts']} "
        f"experts with {facts['checkpoints']} checkpoints, gauge {facts['gauge']} ({why})"
    )
    if facts.get("options"):
        show.line("options: " + ", ".join(f"{key}={value}" for key, value in facts["options"].items()))
    show.line("how good it is: lorahub generator evaluate")


def _fitted(
    catalog: Catalog,
    shelf: Shelf,
    kind: str,
    tasks: Path | None,
    practice: str | None,
    sentences: int,
    given: dict[str, str],
    out: Path | None,
    *,
    quiet: bool,
) -> dict[str, Any]:
    from ..generate.measuring import thinned
    from ..generate.own_generators import fit_shelf, keep, practises, sentence_practice, tuned_options
    from ..generate.sentences import SentenceModel
    from ..generate.taught import open_school, weights_fingerprint
    from ..hub.bases import family
    from ..index.encoders.text import PACKAGED, text
    from . import show

    encoder, chosen, practised = text(), dict[str, Any](given), practice_of(practice) if practice else None
    fingerprint = weights_fingerprint(practised.model.state_dict()) if practised else None
    if not practised and family(shelf.base) == family(PACKAGED):
        model = SentenceModel()
        fingerprint = weights_fingerprint(model.encoder.state_dict())
        if tasks and kind == "semantic" and not {"neighbours", "temperature"} & set(given):
            school = open_school(shelf.experts, encoder, gauge=shelf.gauge)
            known = {name: thinned(task, sentences) for name, task in sentence_tasks(shelf.base, tasks).items()}
            chosen |= tuned_options(school, model, known)
        if practises(kind):
            practised = sentence_practice(model, sentence_tasks(shelf.base, tasks))
    with show.progress("fitting", quiet=quiet) as advance:
        made = fit_shelf(
            shelf, encoder, kind, practice=practised, fingerprint=fingerprint, given=chosen,
            progress=lambda step, loss: advance(step, None),
        )  # fmt: skip
    keep(catalog.home, shelf.base, made, out)
    figures = {key: value for key, value in made.origin.told.items() if isinstance(value, int | float | str)}
    return {"options": chosen, "experts": len(made.origin.library), "told": figures, "space": made.origin.space}


@app.command()
def evaluate(
    base: options.Base = None,
    tasks: Tasks = None,
    sentences: Sentences = 40,
    score: Score = None,
    practice: PracticeName = None,
    folds: Annotated[int, typer.Option(min=2, help="Parts of the tasks that are left out in turn.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the parts.")] = 0,
    json: options.Json = False,
) -> None:
    """Judge all ways to generate for a base by tasks left out, experts and all; `generate` then takes the best.

    Fitted generators are fitted anew, without the tasks that judge them. Run `lorahub generator measure` first.
    """
    from ..generate.choosing_method import evaluation_path, save
    from ..generate.judging import evaluate as judged
    from ..generate.own_generators import fitted_kinds, gathered, generator_path
    from ..generate.stored import load
    from ..hub.errors import GenerationError
    from ..index.encoders.text import text
    from ..index.own_similarity import ranker
    from . import show

    algebra_on_one_thread()
    with open_catalog() as catalog, show.progress("judging", quiet=json) as advance:
        shelf, encoder = gathered(catalog, base), text()
        measured = catalog.transfer(shelf.base)
        if not measured:
            raise GenerationError(f"no task of {shelf.base} was measured; run `lorahub generator measure` first")
        learned = {
            kind: load(generator_path(catalog.home, shelf.base, kind))
            for kind in fitted_kinds(catalog.home, shelf.base)
        }
        judge, label, practised = judge_of(shelf.base, measured, tasks, sentences, score)
        found = judged(
            shelf, encoder, judge, measured, measure=label, learned=learned,
            practice=practice_of(practice) if practice else practised,
            similarity=ranker(catalog.home, shelf.base, encoder)[0] is not None, folds=folds, seed=seed,
            progress=advance,
        )  # fmt: skip
        save(found, evaluation_path(catalog.home, shelf.base))
    if json:
        show.as_json(_plain(found))
    else:
        _print(found)


def _plain(found: Evaluation) -> dict[str, Any]:
    from dataclasses import asdict

    methods = {
        name: {"score": found.mean(name), "recovered": found.recovered(name), "seconds": found.seconds.get(name)}
        for name in found.methods
    }
    return {**asdict(found), "methods": methods}


def _print(found: Evaluation) -> None:
    from . import show

    count = len(found.trials)
    show.line(f"{found.base}: {count} tasks left out in {found.folds} parts; {found.measure}")
    bare, own = (sum(values) / count for values in zip(*((one.bare, one.own) for one in found.trials), strict=True))
    rows: list[tuple[object, ...]] = [("base", f"{bare:.4g}", "0 %", None)]
    for name in sorted(found.methods, key=found.mean):
        share = found.recovered(name)
        told = "-" if share is None else f"{100 * share:.0f} %"
        rows.append((name, f"{found.mean(name):.4g}", told, f"{found.seconds.get(name, 0):.1f}"))
    show.table(
        ["", "score", "of the own experts' gain", "seconds"], [*rows, ("own expert", f"{own:.4g}", "100 %", None)]
    )


@app.command("list")
def list_(json: options.Json = False) -> None:
    """Show the generators that were fitted, by base, with what evaluations say of them."""
    from ..generate.choosing_method import stored
    from ..generate.own_generators import fitted_bases, fitted_kinds, generator_path
    from ..generate.stored import load
    from . import show
    from .settings import home

    rows: list[dict[str, Any]] = []
    for base in fitted_bases(home()):
        judged = stored(home(), base)
        there = fitted_kinds(home(), base)
        for kind in [*there, *(name for name in (judged.methods if judged else []) if name not in there)]:
            row: dict[str, Any] = {"base": base, "kind": kind, "experts": None, "gauge": None, "path": None}
            if kind in there:
                path = generator_path(home(), base, kind)
                made = load(path)
                row |= {"experts": len(made.origin.library), "gauge": made.layout.gauge, "path": str(path)}
            known = judged is not None and kind in judged.methods
            row["score"] = judged.mean(kind) if judged and known else None
            row["recovered"] = judged.recovered(kind) if judged and known else None
            rows.append(row)
    if json:
        show.as_json(rows)
    elif not rows:
        show.note("no generator was fitted yet: lorahub generator fit")
    else:
        columns = ["base", "kind", "experts", "gauge", "score", "recovered"]
        show.table(columns, [tuple(row[column] for column in columns) for row in rows])

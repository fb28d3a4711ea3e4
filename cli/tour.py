"""The demo command: the whole tour on the built-in example, with real commands and measured figures."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..hub.errors import GenerationError
from . import options

if TYPE_CHECKING:
    from ..generate.sentences import SentenceModel, SentenceTask

EXAMPLE = Path(__file__).parent / "example"
QUERIES = ("is a film worth watching", "help a customer whose card was stolen")
MERGED = ("clinc-kitchen-and-dining", "clinc-home", "banking77-top-ups")
FOREIGN = "translate English to French"
PICTURES = "pictures"  # adapters that paint, in the example's folder of that name
PROMPT = "a watercolor heart"
UNSEEN = "cr-product-reviews"  # its own expert is kept out of the catalogue, and serves as the oracle


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the demo's catalogue and adapters.")] = Path(
        "demo-out"
    ),
    json: options.Json = False,
) -> None:
    """Walk the built-in example: add, search, compare, merge, measure, generate, paint; a minute on two cores."""
    from ..generate.sentences import SentenceModel, load_tasks
    from . import show

    tasks = load_tasks(EXAMPLE / "tasks.json")
    with _home(out / "home"), redirect_stdout(sys.stderr if json else sys.stdout):
        show.line("The example library: adapters of all-MiniLM-L6-v2 that sort sentences under named labels.")
        _type(["add", *(str(EXAMPLE / name) for name in tasks if name != UNSEEN)])
        for query in QUERIES:
            _type(["search", query, "--limit", "3"])
        _type(["similar", MERGED[0], "--limit", "3"])
        _type(["merge", *MERGED, "--rank", "8", "--out", str(out / "merged"), "--force"])
        _type(["check", str(out / "merged"), "--base", str(_base_config())])
        model = SentenceModel()
        merged = _measure_merge(model, tasks, out / "merged")
        generated = _generate(model, tasks, out / "generated")
        picture = _paint(out / "watercolor-heart.png")
    if json:
        show.as_json({"merged": merged, "generated": generated, "picture": str(picture), "out": str(out)})
    else:
        show.line(f"\nThe adapters lie in {out}; LORAHUB_HOME={out / 'home'} lorahub list shows the catalogue.")


def _measure_merge(model: SentenceModel, tasks: Mapping[str, SentenceTask], merged: Path) -> list[dict[str, Any]]:
    """Accuracy on each merged task: the bare base, the task's own expert, the one merged adapter."""
    from ..hub.reading import read
    from . import show

    adapter = read(merged)
    rows = []
    for name in MERGED:
        accuracies = {
            "base": model.accuracy(None, tasks[name]),
            "expert": model.accuracy(read(EXAMPLE / name), tasks[name]),
            "merged": model.accuracy(adapter, tasks[name]),
        }
        rows.append({"task": name, "sentences": len(tasks[name].sentences), **accuracies})
    show.line("\nMeasured: share of held-out sentences under the right label")
    _percentages(rows, ["base", "expert", "merged"])
    return rows


def _generate(model: SentenceModel, tasks: Mapping[str, SentenceTask], out: Path) -> dict[str, Any]:
    """Generate for a task whose expert the catalogue lacks; accuracy beside base, nearest expert and oracle."""
    from ..hub.reading import read
    from . import show

    task = tasks[UNSEEN]
    request = task.queries[1]
    show.line(f"\nNow a task that no adapter in the catalogue was trained for: {', '.join(task.labels[:4])}")
    _type(["generate", request, "--out", str(out), "--force"])
    nearest = out.with_name("nearest")
    with redirect_stdout(io.StringIO()):
        _type(["generate", request, "--method", "nearest", "--out", str(nearest), "--force"])
    row = {
        "task": UNSEEN,
        "request": request,
        "sentences": len(task.sentences),
        "base": model.accuracy(None, task),
        "nearest": model.accuracy(read(nearest), task),
        "generated": model.accuracy(read(out), task),
        "oracle": model.accuracy(read(EXAMPLE / UNSEEN), task),
    }
    _type(["generate", FOREIGN, "--out", str(out.with_name("foreign"))])
    show.line("\nMeasured: generated from words alone, beside the adapter trained on the task itself (oracle)")
    _percentages([row], ["base", "nearest", "generated", "oracle"])
    return row


def _paint(out: Path) -> Path:
    """One prompt: the base's picture, what each adapter that it asks for makes of it, and all of them together."""
    from . import show

    show.line("\nThe same for pictures: adapters of a small text-to-image model, found by the words of a prompt.")
    _type(["add", str(EXAMPLE / PICTURES)])
    _type(["search", "watercolor", "--limit", "2"])
    _type(["imagine", PROMPT, "--compare", "--out", str(out), "--force"])
    return out


def _percentages(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    from . import show

    show.table(
        ["task", "sentences", *columns],
        [(row["task"], row["sentences"], *(f"{100 * row[column]:.1f} %" for column in columns)) for row in rows],
    )


def _type(arguments: list[str]) -> None:
    """Run a command of lorahub as if it had been typed, after showing it."""
    import shlex

    from . import show
    from .main import app

    places = ((f"{EXAMPLE}{os.sep}", "example/"), (str(_base_config().parent), "all-MiniLM-L6-v2"))
    shown = arguments
    for place, word in places:
        shown = [argument.replace(place, word) for argument in shown]
    text = shlex.join(shown)
    show.line(f"\n$ lorahub {text if len(text) < 200 else text[:150] + ' ...'}")
    try:
        app(arguments, standalone_mode=False)
    except GenerationError as error:  # a refusal is a result, and worth showing
        show.line(f"lorahub: {error}")


def _base_config() -> Path:
    from ..generate.sentences import packaged_model

    return packaged_model() / "config.json"


@contextmanager
def _home(folder: Path) -> Iterator[None]:
    """A catalogue of the tour's own, made anew; the user's stays untouched."""
    import shutil

    if folder.is_dir() and (folder / "lorahub.db").is_file():
        shutil.rmtree(folder)
    before = os.environ.get("LORAHUB_HOME")
    os.environ["LORAHUB_HOME"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LORAHUB_HOME"]
        else:
            os.environ["LORAHUB_HOME"] = before

"""The generate command, and what every command that makes an adapter needs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..hub.errors import BadOption, GenerationError, NameTaken, UnknownAdapter, UnknownMethod
from . import options
from .settings import open_catalog

if TYPE_CHECKING:
    import torch

    from ..generate.library import Library
    from ..generate.rehearsal import Label
    from ..generate.run import Generated
    from ..generate.stored import Learned
    from ..hub.adapter import Adapter
    from ..hub.catalog import Catalog
    from ..hub.entries import Entry
    from ..index.encoders.text import TextEncoder
    from .refs import Named


def generate(
    description: Annotated[str, typer.Argument(help="What the adapter is to do, in a sentence.")],
    out: options.Out,
    base: options.Base = None,
    method: Annotated[
        str | None,
        typer.Option(help="blend, nearest, or a fitted kind (semantic, icm, hyper, multitask); default: the best."),
    ] = None,
    option: options.Method = None,
    label: options.Label = None,
    labels: options.Labels = None,
    seed: Annotated[int, typer.Option(help="Seed for generators that draw at random.")] = 0,
    exclude: Annotated[list[str] | None, typer.Option(help="Adapter to leave out; may be repeated.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A sentence-transformers model instead of the packaged one.")
    ] = None,
    to: options.To = None,
    dtype: options.Dtype = None,
    name: Annotated[str | None, typer.Option(help="Name in the catalogue; default: from --out.")] = None,
    force: options.Insist = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Make an adapter for a task from its description and the experts in the catalogue.

    Exit code 3, with the reason, where nothing in the catalogue is close to the description.
    """
    from ..generate.library import open_library
    from ..generate.run import generate as generate_adapter
    from ..hub.writing import ready, save
    from ..index.encoders.text import text
    from . import show

    given = options.pairs(option)
    with open_catalog() as catalog:
        check_name(catalog, name, out)
        encoder = text(model)
        library = open_library(catalog, encoder, base=base, exclude=exclude or ())
        words = _labels(str(library.base), label or (), labels)
        method, why, generator = _chosen(catalog, library, method, given, exclude or ())
        ranked_by, how = _ranker(catalog, library, generator, encoder)
        made = generate_adapter(
            library, description, encoder, method=method, seed=seed, given=given, ranker=ranked_by, force=force,
            learned=_with_words(generator, encoder),
        )  # fmt: skip
        made, rehearsal = _rehearsed(made, words)
        asked = {"description": description, "method": method, "why": why, "base": library.base, "seed": seed}
        facts: dict[str, Any] = {**asked, "options": given, "ranked": how, "rehearsal": rehearsal}
        facts |= _figures(catalog, library, made, method)
        path = out
        if not dry_run:
            stored, target = ready(made.adapter, dtype_of(dtype)), to or fitting_format(made.adapter)
            path = save(stored, out, target, force=force, card=lambda: _card(description, facts, made))
            _enter(catalog, path, name, facts, _parents(catalog, made, generator))
    if json:
        show.as_json({"out": str(path), **facts})
        return
    show.line(f"{'would write' if dry_run else 'wrote'} {path}: {method} for {description!r}")
    _tell(facts, made)


def _chosen(
    catalog: Catalog, library: Library, method: str | None, given: Mapping[str, str], exclude: Sequence[str]
) -> tuple[str, str, Learned | None]:
    """The method, why it is taken, and the fitted generator where it is one. Raises UnknownMethod, BadOption."""
    from ..generate.choosing_method import choose, stored
    from ..generate.own_generators import fitted_kinds, generator_path
    from ..generate.run import methods
    from ..generate.stored import kinds, load

    base = str(library.base)
    fitted = fitted_kinds(catalog.home, base)
    why = "asked for"
    if method is None:
        there = (
            methods() if exclude or given else [*methods(), *fitted]
        )  # a fit can leave nobody out, and has no options
        method, why = choose(stored(catalog.home, base), there)
    if method in methods():
        return method, why, None
    if method not in kinds():
        raise UnknownMethod(f"{method!r} is no way to generate: {', '.join([*methods(), *kinds()])}")
    if method not in fitted:
        raise GenerationError(f"no {method} was fitted for {base}: run `lorahub generator fit --kind {method}`")
    if exclude:
        raise BadOption(f"--exclude has no effect on {method}, which was fitted to all; fit it anew, or use blend")
    return method, why, load(generator_path(catalog.home, base, method))


def _ranker(
    catalog: Catalog, library: Library, generator: Learned | None, encoder: TextEncoder
) -> tuple[TextEncoder | None, str]:
    """What ranks experts where no fitted generator does, and by what they are ranked, in words."""
    from ..index.own_similarity import ranker

    found, how = ranker(catalog.home, str(library.base), encoder)
    return found, how if generator is None else "by the fitted generator itself"


def _labels(base: str, said: Sequence[str], file: Path | None) -> list[Label]:
    """What is to be rehearsed. Raises BadOption for a base whose adapters do not sort sentences."""
    if not said and file is None:
        return []
    from ..generate.rehearsal import checked, label_file, read_label
    from .measures import check_sentence_base

    check_sentence_base(base, "labels' words are rehearsed on", "leave --label and --labels out")
    return checked([*map(read_label, said), *(label_file(file) if file else ())])


def _rehearsed(made: Generated, labels: Sequence[Label]) -> tuple[Generated, dict[str, Any] | None]:
    """The result after rehearsing its labels' words, and what is to be told of that; the same without labels."""
    if not labels:
        return made, None
    from dataclasses import replace

    from ..generate.rehearsal import STEPS, rehearse
    from ..generate.sentences import SentenceModel

    done = rehearse(SentenceModel(), made.adapter, labels)
    told = {"labels": [label._asdict() for label in labels], "steps": STEPS, "loss": [done.before, done.after]}
    return replace(made, adapter=done.adapter), told | {"moved": done.moved}


def _with_words(generator: Learned | None, encoder: TextEncoder) -> tuple[Learned, TextEncoder] | None:
    from ..index.wording import matching

    return (generator, matching(generator.origin.space, encoder)) if generator else None


def _parents(catalog: Catalog, made: Generated, generator: Learned | None) -> list[tuple[Named, float]]:
    """The adapters behind a result: of an expert with several checkpoints all of them, with equal parts of its weight.

    An expert of a fitted generator that is no longer in the catalogue is named on stderr.
    """
    from . import show
    from .refs import find

    members = generator.origin.told.get("members", {}) if generator else {}
    found = []
    for expert in made.experts:
        ids = members.get(expert.id, [expert.id])
        try:
            found += [(find(catalog, id_), expert.weight / len(ids)) for id_ in ids]
        except UnknownAdapter:
            show.note(f"the expert {expert.name} of the fitted generator is no longer in the catalogue")
    return found


def _figures(catalog: Catalog, library: Library, made: Generated, method: str) -> dict[str, Any]:
    """How near the request, how new the result, and what it may gain, where something is known of that."""
    from dataclasses import asdict

    from ..generate.choosing_method import estimate, stored
    from ..generate.own_generators import gathered_checkpoints

    known = estimate(stored(catalog.home, str(library.base)), method, made.similarity)
    several = gathered_checkpoints(catalog, str(library.base))
    return {
        "versions": versions(), "experts": [asdict(one) for one in made.experts],
        "similarity": made.similarity, "close": library.close, "forced": made.forced,
        "novelty": made.novelty, "novelty_in_spreads": _distance_told(made, several),
        "estimate": asdict(known) if known else None,
    }  # fmt: skip


def _distance_told(made: Generated, shelf: Mapping[str, Sequence[Adapter]]) -> dict[str, Any] | None:
    """The distance from the nearest expert's nearest checkpoint, in units of how far its checkpoints are apart."""
    from ..generate.own_generators import distance_in_spreads

    found = distance_in_spreads(made.adapter, shelf)
    return {"expert": found[0], "spreads": found[1]} if found else None


def _tell(facts: Mapping[str, Any], made: Generated) -> None:
    from . import show

    show.line(f"{facts['method']}: {facts['why']}; experts are ranked {facts['ranked']}")
    show.table(
        ["expert", "similarity", "weight"],
        [(e.name, f"{e.similarity:.3f}", f"{e.weight:.3f}") for e in made.experts],
    )
    novelty = "novelty" if facts["rehearsal"] is None else "before the rehearsal novelty"
    show.line(f"{novelty} {made.novelty:.3f} (1 - cosine with the nearest expert that it knows; 0 is a copy)")
    if done := facts["rehearsal"]:
        if facts["method"] in ("blend", "nearest"):
            show.note(
                "rehearsal does best from one adapter for all tasks: --method multitask, once it is there by "
                "`lorahub generator fit --kind multitask`"
            )
        before, after = done["loss"]
        show.line(
            f"rehearsed what {len(done['labels'])} labels mean, {done['steps']} steps: loss {before:.3f} -> "
            f"{after:.3f}; {done['moved']:.0%} of the delta comes of that"
        )
    if far := facts["novelty_in_spreads"]:
        show.line(f"{far['spreads']:.2f} times as far from {far['expert']} as that expert's checkpoints are apart")
    if told := facts["estimate"]:
        share = "" if told["share"] is None else f", {told['share']:.0%} of what an own expert gains"
        before = " before the rehearsal" if facts["rehearsal"] else ""
        show.line(
            f"expected gain{before} {told['gain']:+.3f} in {told['measure']}{share}: the mean of {told['tasks']} tasks "
            "that were left out and were as near to their library"
        )
    if facts["forced"]:
        show.note(
            f"nothing is close: similarity {facts['similarity']:.2f} is below {facts['close']:.2f}; made by --force"
        )


def _enter(
    catalog: Catalog, path: Path, name: str | None, facts: Mapping[str, Any], parents: Sequence[tuple[Named, float]]
) -> None:
    from ..generate.library import GENERATED
    from ..hub.reading import fingerprint

    made = fingerprint(path)[:16]
    if made in {parent.entry.id for parent, _ in parents if parent.entry}:
        return  # a copy of an expert is that expert, and keeps its own name and words
    remember(catalog, path, name, GENERATED + facts["method"], parents, facts, base=facts["base"], seed=facts["seed"])
    catalog.describe(catalog.entry(made).id, facts["description"])


def _card(description: str, facts: Mapping[str, Any], made: Generated) -> str:
    rows = "\n".join(f"| {e.name} | {e.similarity:.4f} | {e.weight:.4f} |" for e in made.experts)
    return f"""---
library_name: peft
base_model: {facts["base"]}
base_model_relation: adapter
tags: [lora, lorahub, generated]
---
# Generated: {description}

Made by lorahub: generator `{facts["method"]}`, seed {facts["seed"]}. It was trained on no data of the task: it is made
of these experts, found {facts["ranked"]}. Measure it on your task before you rely on it.

| expert | similarity | weight |
|---|---|---|
{rows}

Novelty (1 - cosine with the nearest of these experts): {made.novelty:.4f}.
{_rehearsal_told(facts["rehearsal"])}"""


def _rehearsal_told(rehearsal: Mapping[str, Any] | None) -> str:
    if rehearsal is None:
        return ""
    rows = "\n".join(f"- {one['name']}: {one['meaning']}" for one in rehearsal["labels"])
    return f"\nAfter that it rehearsed, for {rehearsal['steps']} steps, what its labels mean:\n\n{rows}\n"


# --- shared by the commands that write adapters --------------------------------------------------------------------


def fitting_format(adapter: Adapter) -> str:
    """The dialect for an adapter's modules where the user names none: diffusers for pipelines, PEFT for the rest."""
    pipeline = all(re.match(r"(unet|text_encoder(_[23])?|prior)\.", name) for name in adapter.shapes)
    flow = any(re.match(r"transformer\.(single_)?transformer_blocks\.", name) for name in adapter.shapes)
    return "diffusers" if pipeline or flow else "peft"


def dtype_of(name: str | None) -> torch.dtype | None:
    """The torch dtype that the user named. Raises BadOption."""
    if name is None:
        return None
    import torch

    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if name not in known:
        raise BadOption(f"dtype is {name!r}; expected one of {', '.join(known)}")
    return known[name]


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    from importlib.metadata import version

    return {"lorahub": version("lorahub-kit"), "torch": version("torch")}


def command_line(argv: Sequence[str]) -> str:
    """The command as it was typed."""
    return shlex.join(["lorahub", *argv[1:]])


def check_name(catalog: Catalog, name: str | None, out: Path) -> None:
    """Raise NameTaken, before any work, if another adapter than the one at `out` has the name that was asked for."""
    holder = next((entry for entry in catalog.entries() if entry.name == name), None) if name else None
    if holder and str(out.resolve()) not in holder.locations:
        raise NameTaken(
            f"the name {name!r} belongs to {holder.id}; choose another --name, or remove that adapter first"
        )


def remember(
    catalog: Catalog,
    path: Path,
    name: str | None,
    operation: str,
    parents: Sequence[tuple[Named, float]],
    facts: Mapping[str, Any],
    *,
    base: str | None,
    seed: int | None = None,
) -> None:
    """Enter a result into the catalogue, with what it was made from.

    Inputs named by path are entered too: lineage that points at nothing is none.
    """
    strangers = [parent.path for parent, _ in parents if parent.entry is None]
    list(catalog.add(strangers, allow_pickle=True))
    before = _entry_at(catalog, path)
    [added] = catalog.add([path], name=name, base=base)
    assert added.id is not None, added.reason
    if before and before.id != added.id and len(before.locations) == 1 and not before.blob:
        catalog.remove(before.id)  # its only file was this one, and has just been replaced
        if name is None:
            catalog.rename(added.id, before.name)
    ids = [(parent.entry.id if parent.entry else parent.digest(allow_pickle=True)[:16], w) for parent, w in parents]
    if added.id not in {id_ for id_, _ in ids}:  # a copy of an input was made from nothing
        catalog.link(added.id, ids, operation, dict(facts), seed)


def _entry_at(catalog: Catalog, path: Path) -> Entry | None:
    try:
        return catalog.entry(str(path.resolve()))
    except UnknownAdapter:
        return None

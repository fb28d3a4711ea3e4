"""Fitting a weight encoder: adapters and what is said of them -> a frozen encoder into the space of words.

Only the encoder of weights learns; the text encoder stays as it is. Every step draws its chance from the seed and its
own number, so a fit that was stopped goes on as if it had not been. Importing this needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..hub.adapter import Adapter
from ..hub.errors import BadOption, RetrievalError
from ..hub.plugins import check_options
from ..hub.plugins import options as known_options
from .calibration import Calibration, calibrate
from .contrast import Pairs, both_ways
from .course import Bench, Course, Journal, number
from .crowding import crowding, landmarks
from .encoders._tokens import Features
from .encoders.text import TextEncoder
from .modules import Manifest
from .weight_encoder import WeightEncoder, builder, frozen

COMPONENTS = {"ridge": "components", "autolora": "start"}  # kind -> its option for how many components are kept
TURNS = 4  # texts of an example that are left out in turn
PAIRS = 2_000_000  # of texts and adapters that a calibration looks at
FEWEST = 8  # examples below which nothing can be learned and checked


@dataclass(frozen=True)
class Example:
    """An adapter and what is said of it.

    Examples with an equal text, or an equal group that is not empty, are positives of one another.
    """

    adapter: Adapter
    texts: tuple[str, ...]
    group: str = ""


@dataclass(frozen=True)
class Settings:
    """How to fit; "ridge" looks at `seed` alone.

    steps, batch, rate, decay: of AdamW, the rate along half a cosine after a short rise. temperature: the first one,
    learned afterwards; None for the published constant 1. distinct: batches of different adapters in which all that fit
    are targets; False for the published draw, with replacement and blind to it. centred: whether the loss looks at how
    texts differ from their mean. absent: the share of modules hidden at random. held_out: the share of examples kept
    aside, on which every `look` steps say how well words find adapters and adapters words; the best state is kept, and
    after `patience` looks without a better one the fit ends. gain: how much better counts; few examples are held out,
    and the best of many looks is so by chance. refit: whether all examples are then learned from, for as
    many steps as were best. save_every: steps between two checkpoints.
    """

    steps: int = 400
    batch: int = 64
    rate: float = 1e-3
    decay: float = 0.05
    seed: int = 0
    temperature: float | None = 0.07
    distinct: bool = True
    centred: bool = True
    absent: float = 0.4
    held_out: float = 0.15
    look: int = 20
    patience: int = 8
    gain: float = 0.02
    refit: bool = True
    save_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "rate", "look", "patience", "save_every"):
            if not getattr(self, name) > 0:
                raise BadOption(f"{name} is {getattr(self, name)}; expected a number above 0")
        for name in ("held_out", "absent", "gain"):
            if not 0 <= getattr(self, name) < 1:
                raise BadOption(f"{name} is {getattr(self, name)}; expected a share of at least 0 and below 1")
        if self.decay < 0 or (self.temperature is not None and not self.temperature > 0):
            raise BadOption(f"decay is {self.decay}, temperature {self.temperature}; expected 0 or more, and above 0")


PUBLISHED_LOSS: Mapping[str, Any] = {
    "temperature": None,
    "distinct": False,
    "centred": False,
    "absent": 0.0,
    "batch": 32,
    "rate": 1e-4,
}


@dataclass(frozen=True)
class Progress:
    """Where a fit stands.

    stage: "reading" adapters, "fitting" or "refitting"; done of total adapters or steps. loss: of the last step; score:
    mean reciprocal rank on the held-out examples at the last look; both None where there is none.
    """

    stage: str
    done: int
    total: int
    loss: float | None = None
    score: float | None = None


def fit(
    kind: str,
    examples: Sequence[Example],
    words: TextEncoder,
    settings: Settings = Settings(),
    *,
    options: Mapping[str, Any] | None = None,
    manifest: Manifest | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> WeightEncoder:
    """A weight encoder of a kind ("autolora", "w2t" or "ridge") for the examples' base.

    options: of the kind's builder. manifest: None for all modules that the examples have. checkpoint: a file to go on
    from, if it is there, and to write to; the same weights come out as without a stop, bit for bit. The same seed,
    threads and machine give the same weights.

    Raises RetrievalError for too few examples or examples without words, IncompatibleAdapters as `Manifest.of` and
    `Manifest.check` do, BadOption for an unknown kind or option, FormatError for a checkpoint of another fit.
    """
    build = builder(kind)
    _check(examples)
    options = check_options(build, dict(options or {}))
    if kind in COMPONENTS:  # there are no more than examples
        most = options.get(COMPONENTS[kind], known_options(build)[COMPONENTS[kind]].default)
        options[COMPONENTS[kind]] = min(most, len(examples) - 1)
    manifest = manifest or Manifest.of(example.adapter for example in examples)
    pairs = Pairs.of([example.texts for example in examples], [example.group for example in examples])
    vectors = torch.from_numpy(np.ascontiguousarray(words.encode(pairs.texts), np.float32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network: nn.Module = build(manifest, dim=words.dim, **options)
    items = _read(network, examples, progress)
    bench = Bench(items, pairs, vectors)
    learned = _solve if kind == "ridge" else _learn
    result = learned(network, bench, settings, checkpoint, progress)
    told = {
        "examples": len(examples), "texts": len(pairs.texts), "text_space": words.space, "seed": settings.seed,
        "settings": asdict(settings), **result.told,
    }  # fmt: skip
    return WeightEncoder(
        kind=kind,
        manifest=manifest,
        dim=words.dim,
        texts=words.space,
        tensors=frozen(network.state_dict()),
        options=options,
        told=told,
        calibration=result.words,
        neighbours=result.neighbours,
        queries=result.queries,
        landmarks=landmarks(bench.targets().numpy()),
    )


@dataclass(frozen=True)
class Result:
    """Calibrations of a fit, and what it tells of itself."""

    words: Calibration
    neighbours: Calibration
    queries: Calibration
    told: Mapping[str, Any]


def _check(examples: Sequence[Example]) -> None:
    if len(examples) < FEWEST:
        raise RetrievalError(
            f"there are {len(examples)} adapters with a description, a weight encoder needs at least {FEWEST}; "
            "describe or tag more of them"
        )
    for example in examples:
        if not example.texts or not all(text.strip() for text in example.texts):
            raise RetrievalError(
                f"{example.adapter.name}: nothing is said of it; expected at least one text, none empty"
            )
    if len({example.texts for example in examples}) < 2:
        raise RetrievalError("all adapters have the same description; there is nothing to tell apart: describe them")


def _read(network: Any, examples: Sequence[Example], progress: Callable[[Progress], None] | None) -> list[Features]:
    items = []
    for done, example in enumerate(examples, 1):
        items.append(network.features(example.adapter))
        if progress:
            progress(Progress("reading", done, len(examples)))
    return items


# --- in closed form -------------------------------------------------------------------------------------------------


def _solve(
    network: Any,
    bench: Bench,
    settings: Settings,
    checkpoint: Path | None,
    progress: Callable[[Progress], None] | None,
) -> Result:
    solution = network.solve(bench.items, bench.targets())
    every, predicted = torch.arange(len(bench.items)), network.aside(solution.predicted())
    with torch.inference_mode():
        known = network(bench.items)
    words, neighbours = _calibrated(bench, every, predicted, every, known)
    score = both_ways(bench.vectors, predicted, bench.pairs.fitting)
    if progress:
        progress(Progress("fitting", 1, 1, score=score))
    told = {"penalty": solution.penalty, "left_out": {"reciprocal_rank": score, "examples": len(every)}}
    return Result(words, neighbours, _reworded(network, bench, solution), told)


def _reworded(network: Any, bench: Bench, solution: Any) -> Calibration:
    """How often an adapter is what a text asks for, by score, when neither the adapter nor the text was learned from.

    In turn the first, second ... text of every example that has several is left out, besides the example itself.
    """
    owned, found = bench.pairs.owned, []
    for turn in range(min(max(map(len, owned)), TURNS)):
        left = {own[turn] for own in owned if len(own) > max(turn, 1)}
        kept = [[text for text in own if text not in left] or own for own in owned]
        targets = bench.targets(kept)
        vectors = network.aside(solution.aimed(targets).predicted())
        texts = torch.tensor(sorted(left), dtype=torch.long)
        found.append((_scores(vectors, bench.vectors[texts], targets), bench.pairs.fitting[texts].T))
    if not sum(right.numel() for _, right in found):  # one text each: there is none to leave out
        vectors = network.aside(solution.predicted())
        found = [(_scores(vectors, bench.vectors, bench.targets()), bench.pairs.fitting.T)]
    return _counted(torch.cat([some.flatten() for some, _ in found]), torch.cat([some.flatten() for _, some in found]))


def _scores(vectors: Tensor, texts: Tensor, targets: Tensor) -> Tensor:
    """`WeightEncoder.scores`, adapters first: (n, texts), of an encoder that was fitted to these targets."""
    crowded = crowding(vectors.numpy(), landmarks(targets.numpy()))
    return vectors @ texts.T - torch.from_numpy(crowded)[:, None]


def _counted(scores: Tensor, right: Tensor) -> Calibration:
    """The calibration of that many pairs, or of some evenly chosen where there are too many."""
    step = 1 + len(scores) // PAIRS
    return calibrate(scores[::step].numpy(), right[::step].numpy())


# --- by steps -------------------------------------------------------------------------------------------------------


def _learn(
    network: Any,
    bench: Bench,
    settings: Settings,
    checkpoint: Path | None,
    progress: Callable[[Progress], None] | None,
) -> Result:
    """Learn with some examples held out; then, if asked to, once more from the start with all, for as many steps as
    were best."""
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    journal = Journal.open(checkpoint, settings, network, bench)
    held, train = _split(len(bench.items), settings)
    course = Course(network, bench, settings, train, held)
    _run(course, settings.steps, "fitting", journal, progress)
    network.load_state_dict(course.best)
    told = {
        "steps": course.done, "best_step": course.best_at, "temperature": 1 / course.scale().item(),
        "held_out": {"reciprocal_rank": course.best_score, "examples": len(held)},
    }  # fmt: skip
    if not len(held):
        return Result(Calibration(), Calibration(), Calibration(), told)
    seen = course.encoded(held)
    words, neighbours = _calibrated(bench, held, seen, train, course.encoded(train))
    scores = _scores(seen, bench.vectors, bench.targets()[train])
    queries = _counted(scores.flatten(), bench.pairs.fitting[:, held].T.flatten())
    if settings.refit:
        network.load_state_dict(start)
        everything = Course(network, bench, settings, torch.arange(len(bench.items)), held[:0])
        _run(everything, course.best_at, "refitting", journal, progress)
        told["temperature"] = 1 / everything.scale().item()
    network.eval()
    return Result(words, neighbours, queries, told)


def _run(course: Course, steps: int, stage: str, journal: Journal, progress: Callable[[Progress], None] | None) -> None:
    course.begin(journal.parts.get(stage))
    while course.running(steps):
        loss = course.step(steps)
        if progress:
            progress(Progress(stage, course.done, steps, loss, course.score))
        if course.done % course.settings.save_every == 0 or not course.running(steps):
            journal.write(stage, course)


def _split(count: int, settings: Settings) -> tuple[Tensor, Tensor]:
    """Held-out and training examples, by index."""
    held = max(2, round(settings.held_out * count)) if settings.held_out else 0
    order = torch.randperm(count, generator=torch.Generator().manual_seed(number(settings.seed, -1)))
    return order[:held].sort().values, order[held:].sort().values


def _calibrated(
    bench: Bench, unseen: Tensor, vectors: Tensor, known: Tensor, others: Tensor
) -> tuple[Calibration, Calibration]:
    """How right the nearest text and the nearest known adapter are for unseen ones, by cosine."""
    cosine, nearest = (vectors @ bench.vectors.T).max(dim=1)
    words = calibrate(cosine.numpy(), bench.pairs.fitting[nearest, unseen].numpy())
    same = unseen[:, None] == known[None]
    cosine, nearest = (vectors @ others.T).masked_fill(same, -2.0).max(dim=1)
    return words, calibrate(cosine.numpy(), bench.pairs.alike[unseen, known[nearest]].numpy())

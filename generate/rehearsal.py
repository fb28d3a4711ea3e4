"""Rehearsal: an adapter practises on the words of its task before there is any data for it.

Who asks for a task that sorts texts under labels can say what belongs under each of them. What they say, whole and in
its parts, are texts whose label is known: a few steps through the frozen base, from an adapter that was made from the
description or that serves all known tasks, teach what the names of the labels leave open. No text of the task is seen,
and no other task's data is needed. Importing this needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..hub.adapter import Adapter
from ..hub.errors import BadOption, FormatError
from .cores import mean_delta, sum_layout
from .experts import afresh, cosine
from .hypernet import Trial
from .layout import Layout
from .lessons import Sorting, label_names
from .sentences import SentenceModel

STEPS, RATE = 40, 2e-3
FEWEST_WORDS = 2  # of a part that is rehearsed on its own


class Label(NamedTuple):
    """A label, and in words what belongs under it."""

    name: str
    meaning: str


class Rehearsed(NamedTuple):
    """The adapter afterwards; the loss on the labels' words before the first step and before the last; how far its
    delta moved, as a share of its norm now."""

    adapter: Adapter
    before: float
    after: float
    moved: float


def read_label(said: str) -> Label:
    """The label of "NAME: MEANING". Raises BadOption for a text without either."""
    name, _, meaning = (part.strip() for part in said.partition(":"))
    if not name or not meaning:
        raise BadOption(f"label {said!r}: expected NAME: MEANING, such as 'billing: asks about an invoice'")
    return Label(name, meaning)


def label_file(path: Path) -> list[Label]:
    """The labels of a file, one a line; empty lines and those that begin with # say nothing.

    Raises FormatError for a file that cannot be read, BadOption with the line's number for one that is no label.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FormatError(f"{path}: cannot be read ({reason}); expected lines NAME: MEANING in UTF-8") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                found.append(read_label(line))
            except BadOption as error:
                raise BadOption(f"{path}, line {number}: {error}") from None
    return found


def texts(meaning: str) -> list[str]:
    """A meaning and its parts between commas, colons and semicolons; each also without its first word, which often says
    that somebody asks or wants it."""
    parts = [meaning, *(part.strip() for part in re.split("[,;:]", meaning))]
    whole = [part for part in parts if len(part.split()) >= FEWEST_WORDS]
    short = [part.split(maxsplit=1)[1] for part in whole if len(part.split()) > FEWEST_WORDS]
    return list(dict.fromkeys([meaning, *whole, *short]))


def checked(labels: Sequence[Label]) -> list[Label]:
    """The labels. Raises BadOption for fewer than two, or one that comes twice."""
    names = [label.name for label in labels]
    if len(names) < 2 or len(set(names)) < len(names):
        raise BadOption(f"the labels are {', '.join(names) or 'none'}; expected at least two, each once")
    return list(labels)


def lesson(
    model: SentenceModel, labels: Sequence[Label], *, barred: Callable[[str], bool] = lambda _: False
) -> Sorting:
    """Every text of every label that is not barred, as one batch.

    Raises BadOption for fewer than two labels, or one that comes twice.
    """
    names = [label.name for label in checked(labels)]
    said = [(text, row) for row, label in enumerate(labels) for text in texts(label.meaning) if not barred(text)]
    ids, mask = model.tokens([*(text for text, _ in said), *names])
    return Sorting(ids, mask.sum(dim=1), torch.tensor([row for _, row in said]))


def rehearsed(
    trial: Trial,
    vectors: Tensor,
    loss: Callable[[nn.Module, Sequence[Any]], Tensor],
    batches: Sequence[Any],
    *,
    steps: int = STEPS,
    rate: float = RATE,
    names: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Vectors (adapters, size) of the trial's layout after `steps` of Adam, and the losses (steps, adapters), each
    before its step.

    batches: one for each adapter, the same in every step. loss: one for every adapter, as `experts.train` wants it.
    What an adapter becomes does not depend on the others. Raises BadOption for numbers outside their range,
    LoraHubError for a loss that is not finite.
    """
    if steps < 1 or not rate > 0 or len(batches) != len(vectors):
        raise BadOption(
            f"steps is {steps}, rate {rate}, with {len(batches)} batches for {len(vectors)} adapters; expected at "
            "least 1 step, a rate above 0 and a batch for every adapter"
        )
    known = list(names or map(str, range(len(vectors))))
    values = vectors.detach().clone()
    optimizer = torch.optim.Adam([values], lr=rate)
    rates, losses = cosine(optimizer, steps), []
    for step in range(steps):
        found, gradient = trial.gradient(values, loss, batches, known, step)
        values.grad = gradient
        optimizer.step()
        rates.step()
        losses.append(found)
    return values, torch.stack(losses)


def rehearse(
    model: SentenceModel, adapter: Adapter, labels: Sequence[Label], *, steps: int = STEPS, rate: float = RATE
) -> Rehearsed:
    """An adapter of a sentence model, which sorts by label names, after rehearsing what its labels mean.

    Two rehearse, the adapter and one that knows nothing, and the result is the mean of their deltas, of twice the rank:
    on domains that were left out that is worth more than either. Raises BadOption for options and labels outside their
    range, IncompatibleAdapters where the adapter does not fit the model.
    """
    layout = Layout.of([adapter], gauge="none")
    before = layout.flatten(adapter)
    vectors, losses = rehearsed(
        Trial(model.encoder, layout), torch.stack([before, afresh(layout)]), label_names, [lesson(model, labels)] * 2,
        steps=steps, rate=rate, names=[adapter.name, "fresh"],
    )  # fmt: skip
    wide, mean = sum_layout(layout, 2), mean_delta(vectors, layout)
    moved = wide.error(mean_delta(torch.stack([before, before]), layout), mean)
    return Rehearsed(wide.adapter(mean, name=adapter.name), float(losses[0, 0]), float(losses[-1, 0]), moved)

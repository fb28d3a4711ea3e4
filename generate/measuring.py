"""Every expert on every task: sentences under label names, many adapters in one pass. Importing this needs torch."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from ..hub.adapter import Adapter
from ..hub.errors import BadOption, GenerationError
from .hypernet import Trial
from .layout import Layout
from .sentences import SentenceModel, SentenceTask, unit_means

FEW = 40  # sentences of a task: an accuracy of 0.8 is then known to +- 0.06, and a difference between experts better
log = logging.getLogger(__name__)

TEXTS = 8  # in a pass, for each of the adapters


def thinned(task: SentenceTask, count: int | None) -> SentenceTask:
    """The task with at most `count` of its sentences, evenly spaced. Raises BadOption for fewer than one."""
    if count is None or count >= len(task.sentences):
        return task
    if count < 1:
        raise BadOption(f"{count} sentences of a task; expected at least 1")
    kept = np.linspace(0, len(task.sentences) - 1, count).round().astype(int).tolist()
    return replace(
        task, sentences=tuple(task.sentences[at] for at in kept), targets=tuple(task.targets[at] for at in kept)
    )


def task_digest(task: SentenceTask) -> str:
    """sha256 of what an accuracy depends on: labels, sentences and targets."""
    return hashlib.sha256(json.dumps([task.labels, task.sentences, task.targets]).encode()).hexdigest()


def fitting(model: SentenceModel, adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """The adapters that change nothing but linear layers of the model; the others are named in a warning."""
    layers = {name: layer for name, layer in model.encoder.named_modules() if isinstance(layer, nn.Linear)}
    sizes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    kept = {}
    for key, adapter in adapters.items():
        odd = [name for name, shape in adapter.shapes.items() if sizes.get(name) != (shape.outputs, shape.inputs)]
        if odd or adapter.extras:
            log.warning(
                "%s is left out: %s is no linear layer of the sentence model", adapter.name, [*odd, *adapter.extras][0]
            )
        else:
            kept[key] = adapter
    return kept


def accuracies(model: SentenceModel, adapters: Sequence[Adapter], task: SentenceTask) -> list[float]:
    """The accuracy (0 to 1) of the bare model, and then of each adapter; equal to `SentenceModel.accuracy` of each.

    Adapters of one structure share their passes. Raises IncompatibleAdapters for one of another base.
    """
    piles: dict[tuple[tuple[str, object], ...], list[int]] = {}
    for row, adapter in enumerate(adapters):
        piles.setdefault(tuple(sorted(adapter.shapes.items())), []).append(row)
    found = [0.0] * len(adapters)
    bare = model.accuracy(None, task) if not piles else 0.0
    for rows in piles.values():
        layout = Layout.of([adapters[row] for row in rows])
        vectors = torch.stack([torch.zeros(layout.size), *(layout.flatten(adapters[row]) for row in rows)])
        bare, *others = vector_accuracies(model, layout, vectors, task)
        for row, value in zip(rows, others, strict=True):
            found[row] = value
    return [bare, *found]


def vector_accuracies(model: SentenceModel, layout: Layout, vectors: Tensor, task: SentenceTask) -> list[float]:
    """The accuracies of adapters that are vectors (n, size) of a layout."""
    if not bool(torch.isfinite(vectors).all()):
        raise GenerationError("an adapter holds NaN or Inf; it cannot be measured")
    trial, count = Trial(model.encoder, layout), len(vectors)

    def measure(encoder: nn.Module, batches: Sequence[SentenceTask]) -> Tensor:
        said = _embedded(model, encoder, [*task.labels, *task.sentences], count)
        labels, sentences = said[:, : len(task.labels)], said[:, len(task.labels) :]
        chosen = (sentences @ labels.mT).argmax(dim=2)
        return (chosen == torch.tensor(task.targets)).float().mean(dim=1)

    return [float(value) for value in trial.measured(vectors, measure, [task] * count)]


def _embedded(model: SentenceModel, encoder: nn.Module, texts: Sequence[str], count: int) -> Tensor:
    """Unit vectors (adapters, texts, dim) of the same texts with each of `count` adapters."""
    ids, mask = model.tokens(texts)
    order = mask.sum(dim=1).argsort()
    parts = []
    for rows in torch.split(order, TEXTS):
        longest = int(mask[rows].sum(dim=1).max())
        words, shown = ids[rows, :longest].repeat(count, 1), mask[rows, :longest].repeat(count, 1)
        states = encoder(input_ids=words, attention_mask=shown).last_hidden_state
        parts.append(unit_means(states, shown).view(count, len(rows), -1))
    return torch.cat(parts, dim=1)[:, order.argsort()]

"""What pupils learn from: batches and losses for sentence encoders and for models that paint.

A batch is drawn by the pupil's own generator and holds all of a step's chance; the loss adds none. Importing this needs
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..hub.errors import BadOption
from .sentences import SentenceModel, unit_means
from .stacked import owned

SHARPNESS = 20.0
PASS_COST = 100  # tokens whose work takes as long as a pass of the encoder does apart from them
TIMESTEPS = 1000.0  # the last one is pure noise


# --- sentences under label names ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sorting:
    """Sentences to be put under label names.

    ids: int64 (texts, longest), the sentences and after them the labels' names; lengths: int64 (texts,), in tokens;
    targets: int64 (sentences,), indices of labels.
    """

    ids: Tensor
    lengths: Tensor
    targets: Tensor


def sorting(
    model: SentenceModel, sentences: Sequence[str], targets: Sequence[int], labels: Sequence[str], *, size: int = 32
) -> Callable[[int, torch.Generator], Sorting]:
    """Draws batches of `size` sentences, every label as likely as the others, and sentences evenly within a label.

    Raises BadOption where a label has no sentence, or a target no label.
    """
    if len(targets) != len(sentences) or set(targets) != set(range(len(labels))):
        raise BadOption(
            f"{len(sentences)} sentences with {len(targets)} targets, {len(set(targets))} different ones, for "
            f"{len(labels)} labels; expected a target for every sentence and a sentence for every label"
        )
    ids, mask = model.tokens([*sentences, *labels])
    lengths, names = mask.sum(dim=1), torch.arange(len(sentences), len(ids))
    aims = torch.tensor(targets)
    piles = [(aims == label).nonzero().flatten() for label in range(len(labels))]

    def draw(step: int, chance: torch.Generator) -> Sorting:
        drawn = torch.randint(len(labels), (size,), generator=chance)
        places = torch.rand(size, generator=chance, dtype=torch.float64).tolist()
        rows = [piles[label][int(at * len(piles[label]))] for label, at in zip(drawn.tolist(), places, strict=True)]
        texts = torch.cat([torch.stack(rows), names])
        return Sorting(ids[texts, : int(lengths[texts].max())], lengths[texts], drawn)

    return draw


def label_names(encoder: nn.Module, batches: Sequence[Sorting], *, sharpness: float = SHARPNESS) -> Tensor:
    """Cross-entropy over `sharpness` times the cosines between sentences and label names: (adapters,).

    encoder: transformers' BertModel or its like. Sentences and names are embedded by the mean of their token states.
    Batches may differ in their numbers of sentences, labels and tokens.
    """
    losses = []
    for vectors, batch in zip(_vectors(encoder, batches), batches, strict=True):
        targets = batch.targets.to(vectors.device)
        with torch.autocast(vectors.device.type, enabled=False):
            cosines = vectors[: len(targets)] @ vectors[len(targets) :].T
        losses.append(nn.functional.cross_entropy(sharpness * cosines, targets))
    return torch.stack(losses)


def label_hits(encoder: nn.Module, batches: Sequence[Sorting]) -> Tensor:
    """The share of sentences whose nearest label name is their own: (adapters,); otherwise as `label_names`."""
    shares = []
    for vectors, batch in zip(_vectors(encoder, batches), batches, strict=True):
        targets = batch.targets.to(vectors.device)
        with torch.autocast(vectors.device.type, enabled=False):
            nearest = (vectors[: len(targets)] @ vectors[len(targets) :].T).argmax(dim=1)
        shares.append((nearest == targets).float().mean())
    return torch.stack(shares)


def _vectors(encoder: nn.Module, batches: Sequence[Sorting]) -> tuple[Tensor, ...]:
    """Unit vectors (texts, dim) for every batch.

    The texts of all batches are put in order of length together, and cut so that a pass of the encoder sees texts of
    nearly one length: with many batches there are few tokens of padding.
    """
    longest, device = max(batch.ids.shape[1] for batch in batches), next(encoder.parameters()).device
    ids = torch.cat([nn.functional.pad(batch.ids, (0, longest - batch.ids.shape[1])) for batch in batches])
    counts = [len(batch.ids) for batch in batches]
    owners = torch.arange(len(batches)).repeat_interleave(torch.tensor(counts))
    lengths, order = torch.cat([batch.lengths for batch in batches]).sort(descending=True, stable=True)
    parts = []
    for first, last in cuts(lengths.tolist(), PASS_COST):
        words = ids[order[first:last], : int(lengths[first])].to(device)
        mask = (torch.arange(words.shape[1]) < lengths[first:last, None]).long().to(device)
        with owned(owners[order[first:last]].to(device)):
            states = encoder(input_ids=words, attention_mask=mask).last_hidden_state
        parts.append(unit_means(states.float(), mask))
    return torch.split(torch.cat(parts)[order.argsort().to(device)], counts)


def cuts(lengths: Sequence[int], cost: float) -> list[tuple[int, int]]:
    """Where to cut texts in descending order of length, so that the padded passes take the least work in all.

    A pass over texts `first` to `last` takes lengths[first] * (last - first) + cost. Texts of one length stay together.
    """
    edges = [0, *(place for place in range(1, len(lengths)) if lengths[place] < lengths[place - 1]), len(lengths)]
    least, come_from = {0: 0.0}, {0: 0}
    for number, last in enumerate(edges[1:], start=1):
        least[last], come_from[last] = min(
            (least[first] + lengths[first] * (last - first) + cost, first) for first in edges[:number]
        )
    found, last = [], len(lengths)
    while last:
        found.append((come_from[last], last))
        last = come_from[last]
    return found[::-1]


# --- flow matching --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noised:
    """Pictures on their way to noise: value = (1 - time) * picture + time * noise, aim = noise - picture.

    value, aim: (samples, ...); time: (samples,), 0 to 1; conditions: what else the model is called with, by name, each
    (samples, ...).
    """

    value: Tensor
    aim: Tensor
    time: Tensor
    conditions: Mapping[str, Tensor]


def noising(
    pictures: Tensor,
    conditions: Mapping[str, Tensor],
    *,
    size: int = 8,
    times: Literal["logit-normal", "uniform"] = "logit-normal",
    empty: Mapping[str, Tensor] | None = None,
    dropout: float = 0.0,
) -> Callable[[int, torch.Generator], Noised]:
    """Draws batches of `size` pictures with noise and times of their own.

    pictures: (n, ...), scaled as the model expects them (-1 to 1); conditions: by the model's argument, each (n, ...);
    empty: the same for one sample without a condition, (1, ...), which takes a condition's place with probability
    `dropout`. Raises BadOption where sizes differ.
    """
    if not len(pictures) or any(len(value) != len(pictures) for value in conditions.values()):
        sizes = ", ".join(f"{len(value)} of {name}" for name, value in conditions.items())
        raise BadOption(f"{len(pictures)} pictures and {sizes or 'no conditions'}; expected as many of each")
    if dropout and (empty is None or set(empty) != set(conditions)):
        raise BadOption(f"dropout is {dropout}, with nothing to put in place of {', '.join(conditions)}; give `empty`")
    if times not in ("logit-normal", "uniform"):
        raise BadOption(f"times is {times!r}; expected logit-normal or uniform")

    def draw(step: int, chance: torch.Generator) -> Noised:
        rows = torch.randint(len(pictures), (size,), generator=chance)
        noise = torch.randn(size, *pictures.shape[1:], generator=chance)
        logits = torch.randn(size, generator=chance)
        time = torch.rand(size, generator=chance) if times == "uniform" else logits.sigmoid()
        dropped = torch.rand(size, generator=chance) < dropout
        chosen = {name: value[rows] for name, value in conditions.items()}
        if dropout and empty is not None:
            chosen = {name: _where(dropped, empty[name], value) for name, value in chosen.items()}
        share = _like(time, noise)
        return Noised((1 - share) * pictures[rows] + share * noise, noise - pictures[rows], time, chosen)

    return draw


def flow_matching(model: nn.Module, batches: Sequence[Noised]) -> Tensor:
    """Mean squared error of the model's velocity: (adapters,).

    model: a diffusers transformer or UNet, called with the value, `timestep` (1000 * time) and the conditions. Raises
    BadOption where the batches differ in shape.
    """
    shapes = {tuple(batch.value.shape) for batch in batches}
    if len(shapes) > 1:
        raise BadOption(f"batches of shapes {', '.join(map(str, sorted(shapes)))}; expected the same for every adapter")
    weight = next(model.parameters())
    value, aim, time = (
        torch.cat([getattr(batch, name) for batch in batches]).to(weight) for name in ("value", "aim", "time")
    )
    conditions = {name: torch.cat([batch.conditions[name] for batch in batches]) for name in batches[0].conditions}
    given = {
        name: part.to(weight) if part.is_floating_point() else part.to(weight.device)
        for name, part in conditions.items()
    }
    made: Tensor = model(value, timestep=TIMESTEPS * time, return_dict=False, **given)[0]
    return (made - aim).float().square().view(len(batches), -1).mean(dim=1)


def _like(share: Tensor, other: Tensor) -> Tensor:
    return share.view(-1, *(1,) * (other.ndim - 1))


def _where(chosen: Tensor, one: Tensor, value: Tensor) -> Tensor:
    return torch.where(_like(chosen, value), one.to(value.dtype), value)

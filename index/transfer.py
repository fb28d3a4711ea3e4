"""A similarity of descriptions that is learned from transfer: which expert serves which task.

Every expert of a library is measured once on every task of it; a small reader of descriptions is then fitted so that
the cosine of two of its vectors ranks experts as the measurement does. It reads sentence vectors, by a linear map, or
token states (index.wording), by attention. Importing this needs torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ..hub.errors import BadOption, FormatError, RetrievalError
from ..hub.tensorfile import Planned, dtype_name, layout, open_tensors, tensor_bytes, write_tensors
from ..hub.writing import replacing

DIM = 32
SHARPNESS = 8.0  # of the cosines, and so of the ranking that is learned
WEIGHT = 3.0  # of a standard deviation of the measured scores, in the ranking that is wanted
NOISE, DROPPED = 0.3, 0.15  # in training: noise on every number (in units of its spread), and tokens left out
STRANGE = 0.4  # in training: tokens that say nothing, for each place of the longest text

_ENTRY = "lorahub_similarity"
_VERSION = 1

Vectors = NDArray[np.float32]


class Reader(nn.Module):
    """Descriptions (n, places, width) -> values (n, dim): each head looks at the tokens that matter to it.

    What the heads saw is put together linearly, so that new combinations of known words come out as sums. With one
    place, a sentence's vector, this is a linear map. heads * channels numbers are kept of a text.
    """

    def __init__(self, width: int, dim: int = DIM, *, heads: int = 8, channels: int = 32) -> None:
        super().__init__()
        self.look, self.tell = nn.Linear(width, heads), nn.Linear(width, channels)
        self.say = nn.Linear(heads * channels, dim)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(()))
        self.mean: Tensor
        self.spread: Tensor

    def settle(self, states: Tensor) -> None:
        """Take mean and spread from the states (n, places, width) that it is fitted to."""
        known = _scaled(states)[_present(states)]
        self.mean.copy_(known.mean(dim=0))
        self.spread.copy_((known - self.mean).square().mean().sqrt().clamp_min(1e-6))

    def among_strange(self, states: Tensor) -> Tensor:
        """Descriptions (n, places, width) with tokens at chance behind their own, for training only.

        A reader that bears them does not look at words that say nothing of the task, so new sentences mislead it less.
        Sentences' own vectors, of one place, stay as they are. Takes from torch's global chance.
        """
        if states.shape[1] == 1:
            return states
        tokens = functional.normalize(self.mean + self.spread * torch.randn_like(states), dim=2)
        return torch.cat([states, tokens * (torch.rand(*states.shape[:2], 1) < STRANGE)], dim=1)

    def forward(self, states: Tensor, *, noise: float = 0.0, dropped: float = 0.0) -> Tensor:
        """noise, dropped: shares of torch's global chance, for training only."""
        there = _present(states)
        values = (_scaled(states) - self.mean) / self.spread
        if noise:
            values = values + noise * torch.randn_like(values)
        if dropped:
            kept = there & (torch.rand(there.shape) >= dropped)
            there = torch.where(kept.any(dim=1, keepdim=True), kept, there)
        looks = self.look(values).masked_fill(~there[..., None], -torch.inf).softmax(dim=1)
        seen = torch.einsum("nph,npc->nhc", looks, self.tell(values))
        said: Tensor = self.say(seen.flatten(1))
        return said


def _present(states: Tensor) -> Tensor:
    """Which places hold a token: bool (n, places); all of them for a text of nothing but zeros."""
    there = (states != 0).any(dim=-1)
    return there | ~there.any(dim=1, keepdim=True)


def _scaled(states: Tensor) -> Tensor:
    unit: Tensor = functional.normalize(states, dim=-1)
    return unit * math.sqrt(states.shape[-1])


def shortened(states: Sequence[Tensor]) -> list[Tensor]:
    """Descriptions (n, places, width) of each task without the last places, where no text has a token."""
    places = max(int(_present(some).any(dim=0).nonzero().max()) for some in states) + 1
    return [some[:, :places] for some in states]


def parted(vectors: Vectors | Tensor, width: int) -> Tensor:
    """Vectors (n, places * width) as (n, places, width), float32. Raises RetrievalError where they do not divide."""
    found = torch.as_tensor(vectors).float()
    if found.ndim != 2 or found.shape[1] % width:
        raise RetrievalError(
            f"descriptions' vectors have shape {tuple(found.shape)}; expected a multiple of {width} numbers each: "
            "encode them as at the fit"
        )
    return found.view(len(found), -1, width)


# --- the similarity -------------------------------------------------------------------------------------------------


class Ranking(NamedTuple):
    """How well left-out tasks are served, in the units of the measured scores, as means over tasks and descriptions.

    learned, plain: by the expert that is nearest by the learned similarity, and by the cosine of the vectors as they
    are; mean: by any expert, best: by the best one, in hindsight.
    """

    learned: float
    plain: float
    mean: float
    best: float

    @property
    def better(self) -> bool:
        """Whether the learned similarity chooses better than the plain one."""
        return self.learned > self.plain


@dataclass(frozen=True)
class Similarity:
    """A fitted similarity.

    space: of the vectors it reads; width: numbers of a token there; sizes: dim, heads, channels.

    ranking: on tasks that were left out, None where it was not validated.
    """

    space: str
    width: int
    sizes: tuple[int, int, int]
    tensors: Mapping[str, Tensor]
    ranking: Ranking | None = None

    def project(self, vectors: Vectors) -> Vectors:
        """Unit vectors (n, dim) of descriptions' vectors (n, places * width); their inner products are similarities."""
        with torch.inference_mode():
            said = self._reader()(parted(vectors, self.width))
            return functional.normalize(said, dim=1).numpy()

    def _reader(self) -> Reader:
        dim, heads, channels = self.sizes
        with torch.random.fork_rng(devices=[]):  # what it begins with is thrown away
            reader = Reader(self.width, dim, heads=heads, channels=channels)
        reader.load_state_dict(dict(self.tensors))
        return reader.eval()

    def save(self, path: Path, *, force: bool = False) -> Path:
        """One safetensors file, there in full or not at all. Raises TargetExists, FormatError."""
        said = {"version": _VERSION, "space": self.space, "width": self.width, "sizes": self.sizes}
        said |= {"ranking": self.ranking}
        plans = layout(
            Planned(name, dtype_name(part.dtype), tuple(part.shape)) for name, part in sorted(self.tensors.items())
        )
        metadata = {_ENTRY: json.dumps(said, sort_keys=True)}
        with replacing(path, force=force) as place:
            write_tensors(place, plans, (tensor_bytes(self.tensors[plan.key]) for plan in plans), metadata)
        return path


def load(path: Path) -> Similarity:
    """Read a saved similarity. Raises FormatError, in one line, for a file that is damaged or holds something else."""
    file = open_tensors(path)
    try:
        said = json.loads(file.metadata[_ENTRY])
        if said["version"] != _VERSION:
            raise FormatError(f"{path}: is of version {said['version']}, this lorahub reads {_VERSION}; make it anew")
        ranking = None if said["ranking"] is None else Ranking(*map(float, said["ranking"]))
        dim, heads, channels = map(int, said["sizes"])
        expected = {name: tuple(part.shape) for name, part in _fresh(int(said["width"]), dim, heads, channels).items()}
        if {name: tuple(info.shape) for name, info in file.tensors.items()} != expected:
            raise FormatError(f"{path}: its tensors are not those of a reader of width {said['width']}; make it anew")
        tensors = {name: file.tensor(name) for name in expected}
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path}: holds no similarity, or a damaged one ({error!r}); make it anew") from None
    if not all(bool(torch.isfinite(part).all()) for part in tensors.values()):
        raise FormatError(f"{path}: holds NaN or Inf; make it anew")
    return Similarity(str(said["space"]), int(said["width"]), (dim, heads, channels), tensors, ranking)


def _fresh(width: int, dim: int, heads: int, channels: int) -> dict[str, Tensor]:
    if not all(0 < number < 2**16 for number in (width, dim, heads, channels)):
        raise ValueError(f"sizes {width}, {dim}, {heads}, {channels}")
    with torch.device("meta"):
        return Reader(width, dim, heads=heads, channels=channels).state_dict()


# --- fitting --------------------------------------------------------------------------------------------------------


def fit_similarity(
    vectors: Sequence[Vectors],
    transfer: Vectors | Tensor,
    *,
    space: str = "",
    width: int | None = None,
    dim: int = DIM,
    heads: int = 8,
    channels: int = 32,
    steps: int = 300,
    rate: float = 3e-3,
    batch: int = 64,
    folds: int = 0,
    seed: int = 0,
) -> Similarity:
    """Fit the similarity to a transfer matrix.

    vectors: for each task its descriptions' vectors (descriptions, places * width); transfer: (experts, tasks), how
    good each expert is for each task, higher is better, expert i being that of task i. space, width: of the vectors, by
    default of one place (see `wording.token_width`). folds: into how many parts the tasks are put of which each is left
    out in turn, to validate; 0 for none. Raises BadOption for shapes and numbers that make no sense.
    """
    scores = torch.as_tensor(transfer).double()
    count = len(vectors)
    if scores.shape != (count, count) or count < 3 or not bool(torch.isfinite(scores).all()):
        raise BadOption(
            f"the transfer matrix has shape {tuple(scores.shape)} for {count} tasks; expected a finite number for each "
            "pair of at least three"
        )
    if min(dim, heads, channels, steps, batch) < 1 or rate <= 0:
        raise BadOption(f"dim {dim}, heads {heads}, channels {channels}, steps {steps}, batch {batch}, rate {rate}: "
                        "expected numbers above 0")  # fmt: skip
    tokens, sizes = vectors[0].shape[1] if width is None else width, (dim, heads, channels)
    ranking = None
    if folds:
        given: dict[str, Any] = {
            "space": space,
            "width": tokens,
            "dim": dim,
            "heads": heads,
            "channels": channels,
            "steps": steps,
        }
        given |= {"rate": rate, "batch": batch, "seed": seed}
        ranking = ranked(vectors, scores, folded(vectors, scores, folds=folds, **given))
    states = shortened([parted(some, tokens) for some in vectors])
    reader = _fitted(states, scores, sizes, _Course(steps, rate, batch, seed))
    tensors = {name: part.detach().clone() for name, part in reader.state_dict().items()}
    return Similarity(space, tokens, sizes, tensors, ranking)


def folded(
    vectors: Sequence[Vectors], transfer: Vectors | Tensor, *, folds: int = 4, seed: int = 0, **given: Any
) -> list[tuple[tuple[int, ...], Similarity]]:
    """Similarities fitted without some of the tasks, neither as tasks nor as experts, and the places of these tasks.

    Every task is left out of one of them. given: as of `fit_similarity`. Raises BadOption where there are too few.
    """
    if not 2 <= folds <= len(vectors) // 2:
        raise BadOption(f"{folds} folds of {len(vectors)} tasks; expected at least 2, of two tasks or more each")
    scores, parts = torch.as_tensor(transfer), []
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed)).tolist()
    for fold in range(folds):
        out = tuple(sorted(order[fold::folds]))
        kept = [place for place in range(len(vectors)) if place not in out]
        some = fit_similarity([vectors[place] for place in kept], scores[kept][:, kept], seed=seed, **given)
        parts.append((out, some))
    return parts


def ranked(
    vectors: Sequence[Vectors],
    transfer: Vectors | Tensor,
    parts: Sequence[tuple[tuple[int, ...], Similarity]],
    others: Sequence[Vectors] | None = None,
) -> Ranking:
    """How well the tasks that similarities were fitted without (`folded`) are served by what these choose.

    others: the descriptions' vectors by which the plain cosine chooses; the same unless given.
    """
    scores, found = torch.as_tensor(transfer).double(), []
    others = vectors if others is None else others
    for out, similarity in parts:
        kept = [place for place in range(len(vectors)) if place not in out]
        learned = _keys([similarity.project(vectors[place]) for place in kept])
        plain = _keys([others[place] for place in kept])
        for place in out:
            measured = scores[kept, place]
            chosen = (torch.from_numpy(similarity.project(vectors[place])) @ learned.T).argmax(dim=1)
            near = (torch.as_tensor(others[place]).float() @ plain.T).argmax(dim=1)
            found.append((measured[chosen].mean(), measured[near].mean(), measured.mean(), measured.max()))
    return Ranking(*(float(sum(part)) / len(found) for part in zip(*found, strict=True)))


class _Course(NamedTuple):
    steps: int
    rate: float
    batch: int
    seed: int


def _fitted(states: Sequence[Tensor], scores: Tensor, sizes: tuple[int, int, int], course: _Course) -> Reader:
    """Cross-entropy of the learned ranking of experts against the measured one, with and without the task's own."""
    owners = torch.arange(len(states)).repeat_interleave(torch.tensor([len(some) for some in states]))
    every, own = torch.cat(list(states)), torch.eye(len(states), dtype=torch.bool)
    level = (scores - scores.mean(dim=0)) / scores.std(dim=0).clamp_min(1e-9)
    wanted = (WEIGHT * level).T.float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(course.seed)
        reader = Reader(every.shape[2], sizes[0], heads=sizes[1], channels=sizes[2])
        reader.settle(every)
        optimizer = torch.optim.AdamW(reader.parameters(), lr=course.rate, weight_decay=0.1)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, course.rate, total_steps=course.steps, pct_start=0.1)
        for _ in range(course.steps):
            keys = _trying(reader, _one_each(states))
            rows = torch.randint(len(every), (course.batch,))
            asked = _trying(reader, every[rows])
            learned, aim = SHARPNESS * asked @ keys.T, wanted[owners[rows]]
            loss = _apart(learned, aim) + _apart(
                learned.masked_fill(own[owners[rows]], -1e4), aim.masked_fill(own[owners[rows]], -1e4)
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            rates.step()
    return reader.eval()


def _trying(reader: Reader, states: Tensor) -> Tensor:
    """Unit vectors (n, dim) of descriptions, read under training's difficulties."""
    return functional.normalize(reader(reader.among_strange(states), noise=NOISE, dropped=DROPPED), dim=1)


def _one_each(states: Sequence[Tensor]) -> Tensor:
    return torch.stack([some[int(torch.randint(len(some), ()))] for some in states])


def _apart(learned: Tensor, wanted: Tensor) -> Tensor:
    return -(wanted.softmax(dim=1) * learned.log_softmax(dim=1)).sum(dim=1).mean()


def _keys(said: Sequence[Vectors]) -> Tensor:
    """The unit vector of each expert, the direction of its descriptions' mean: (experts, dim)."""
    means = torch.stack([torch.as_tensor(some).float().mean(dim=0) for some in said])
    return functional.normalize(means, dim=1)

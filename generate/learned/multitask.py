"""One adapter for all tasks, trained on the data of all: what a description says makes no difference to it.

It is the control that every generator has to beat. Where words tell little of a task, as in a library of styles, it is
also the best there is, and what rehearsing a new task's labels starts best from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...hub.errors import BadOption, FormatError
from ..experts import afresh, cosine, generator
from ..hypernet import Practice, Trial, check_practice
from ..layout import Layout
from ..library import Vectors
from ..priors import Memory, threshold
from ..run import Generated
from ..taught import Origin, School

CLIP = 1.0  # largest norm of a step's gradient


@dataclass(frozen=True)
class MultiTask:
    """The adapter, whose modules are the experts'.

    layout: the experts'; vector: (size,) of the layout `wide`, with `rank` in every module, or with the experts' where
    that is 0.
    """

    layout: Layout
    origin: Origin
    memory: Memory
    vector: Tensor
    rank: int = 0
    kind: str = "multitask"

    def sample(self, query: Vectors, *, seed: int) -> Generated:
        """The adapter, whatever is asked for; the expert beside it is the one nearest to the words (dim,).

        Raises GenerationError for a query of another length.
        """
        near = self.memory.nearest(query)
        return self.memory.generated(self.layout, self.vector, near, self.kind, wide=self.wide)

    @cached_property
    def wide(self) -> Layout:
        """The adapter's own layout."""
        return _wide(self.layout, self.rank)

    def facts(self) -> dict[str, Any]:
        """What a file says of it, beside tensors."""
        return {"names": list(self.memory.names), "rank": self.rank}

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it."""
        return {"keys": self.memory.keys, "experts": self.memory.means, "vector": self.vector}


def multitask(
    school: School,
    practice: Practice[Any],
    *,
    steps: int = 300,
    tasks: int = 12,
    rank: int = 0,
    rate: float = 2e-3,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> MultiTask:
    """Train one adapter on the tasks of all experts with AdamW, from a fresh start.

    practice: the base, its loss and every expert's batches. steps: with `tasks` experts each, drawn anew; the loss is
    the mean of theirs. rank: 0 for the experts' own. rate: rises for a tenth of the steps, then falls.

    Raises BadOption for options outside their range, GenerationError for an expert without batches.
    """
    if min(steps, tasks) < 1 or rank < 0 or not rate > 0:
        raise BadOption(
            f"steps is {steps}, tasks {tasks}, rank {rank}, rate {rate}; expected at least 1 step and task, a rank of "
            "0 or more, and a rate above 0"
        )
    check_practice(practice, school.names)
    wide = _wide(school.layout, rank)
    trial, vector = Trial(practice.model, wide, practice.component), nn.Parameter(afresh(wide, seed))
    optimizer = torch.optim.AdamW([vector], lr=rate, weight_decay=0.01)
    rates, losses = cosine(optimizer, steps), []
    for step in range(steps):
        drawn = torch.randperm(len(school.names), generator=generator(seed, f"step {step}"))[:tasks]
        some = [school.names[row] for row in drawn.tolist()]
        batches = [practice.draws[name](step, generator(seed, f"{name} {step}")) for name in some]
        found, gradient = trial.gradient(vector.expand(len(some), -1), practice.loss, batches, some, step)
        vector.grad = gradient.mean(dim=0)
        nn.utils.clip_grad_norm_([vector], CLIP)
        optimizer.step()
        rates.step()
        losses.append(float(found.mean()))
        if progress:
            progress(step + 1, losses[-1])
    told = {"steps": steps, "seed": seed, "loss": sum(losses[-20:]) / len(losses[-20:])}
    memory = Memory(school.names, school.keys, torch.stack([some[-1] for some in school.weights]))
    near = threshold([torch.as_tensor(some) for some in school.vectors])
    return MultiTask(school.layout, school.origin(**told, near=near), memory, vector.detach().clone(), rank)


def restore(layout: Layout, origin: Origin, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> MultiTask:
    """The inverse of `facts` and `tensors`. Raises FormatError, KeyError or ValueError where they do not fit."""
    names, rank = tuple(map(str, facts["names"])), int(facts["rank"])
    keys, means, vector = tensors["keys"], tensors["experts"], tensors["vector"]
    size = _wide(layout, max(rank, 0)).size
    if rank < 0 or len(keys) != len(names) or means.shape != (len(names), layout.size) or vector.shape != (size,):
        raise FormatError(f"its tensors are not those of one adapter of rank {rank} for {len(names)} experts' tasks")
    return MultiTask(layout, origin, Memory(names, keys, means), vector, rank)


def _wide(layout: Layout, rank: int) -> Layout:
    return layout.widened(rank) if rank else layout.reranked(lambda place: place.rank)

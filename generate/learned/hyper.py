"""Hypernetworks, description in and adapter out, trained through the frozen base on the tasks' own loss.

A fit may have several members, trained alike but for chance; what it makes is the mean of their deltas, which serves
tasks that nobody practised better than a member does (deep ensembles, arXiv 1612.01474).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...hub.errors import BadOption, FormatError, GenerationError, RetrievalError
from ...index.transfer import Similarity, parted, shortened
from ...index.wording import token_width
from ..cores import mean_delta, sum_layout
from ..experts import generator
from ..hypernet import Drill, HyperNetwork, Practice, Sizes, Trial, opening, trained
from ..layout import Layout
from ..library import Vectors
from ..priors import threshold
from ..run import Generated, Share
from ..taught import Origin, School, directions

_LARGEST = 2**16  # of a size: what a damaged file may ask for


@dataclass(frozen=True)
class Hyper:
    """Fitted hypernetworks.

    layout: the experts'; what is made has the same modules and more rank, the layout `wide`. members: the weights of a
    `hypernet.HyperNetwork` each. names, codes, means: of the library's experts, the direction of what the first
    member's reader says of their descriptions (n, code), and their last checkpoints (n, size), to say how near and how
    new a result is.
    """

    layout: Layout
    origin: Origin
    names: tuple[str, ...]
    sizes: Sizes
    members: tuple[Mapping[str, Tensor], ...]
    codes: Tensor
    means: Tensor
    kind: str = "hyper"

    def sample(self, query: Vectors, *, seed: int) -> Generated:
        """An adapter for a description's vector, of the kind that it was fitted to; the seed changes nothing.

        Raises GenerationError for a vector of another length.
        """
        states = self._states(query)
        with torch.inference_mode():
            cosines = functional.normalize(self._networks[0].codes(states), dim=1)[0] @ self.codes.T
            vectors = torch.cat([network(states) for network in self._networks])
            vector = mean_delta(vectors, self._narrow).clone()
        near = int(cosines.argmax())
        share = Share(self.names[near], self.names[near], float(cosines[near]), 1.0)
        novelty = 1.0 - float(self.wide.cosines(vector, self.means, self.layout).max())
        return Generated(self.wide.adapter(vector, name=self.kind), (share,), novelty)

    @cached_property
    def wide(self) -> Layout:
        """The layout of what it makes."""
        return sum_layout(self._narrow, len(self.members))

    @property
    def _narrow(self) -> Layout:
        """The layout of what a member makes."""
        return self.layout.widened(self.sizes.rank)

    def facts(self) -> dict[str, Any]:
        """What a file says of it, beside tensors."""
        return {"names": list(self.names), "sizes": list(self.sizes), "members": len(self.members)}

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it."""
        return {"codes": self.codes, "means": self.means} | {
            f"network.{row}.{name}": part for row, one in enumerate(self.members) for name, part in one.items()
        }

    def _states(self, query: Vectors) -> Tensor:
        try:
            return parted(query[None], self.sizes.width)
        except RetrievalError as error:
            raise GenerationError(str(error)) from None

    @cached_property
    def _networks(self) -> list[HyperNetwork]:
        made = []
        for weights in self.members:
            with torch.random.fork_rng(devices=[]):  # what it begins with is thrown away
                network = HyperNetwork(self.sizes, self._narrow)
            network.load_state_dict(dict(weights))
            made.append(network.eval())
        return made


def hyper(
    school: School,
    practice: Practice[Any],
    *,
    steps: int = 1000,
    tasks: int = 12,
    rate: float = 3e-3,
    moving: float = 7e-3,
    noise: float = 0.3,
    dropped: float = 0.15,
    shrink: float = 1e-3,
    mixed: float = 0.0,
    code: int = 32,
    hidden: int = 192,
    rank: int = 16,
    heads: int = 8,
    channels: int = 32,
    members: int = 1,
    start: Tensor | None = None,
    similarity: Similarity | None = None,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Hyper:
    """Fit hypernetworks to a school, best one whose descriptions are token states (`index.wording`).

    practice: the base, its loss and every expert's batches. steps, with `tasks` experts each: on digits, new
    combinations came out better the longer it learned, up to 1,500 steps and more. rate: of the network, moving: of the
    point it starts from and the bases it moves between. noise, dropped: of the words in training, the latter a share of
    the tokens; with tokens that say nothing they make it bear new wording. shrink: how strongly results are held near
    the start. mixed: the share of a step's tasks that are mixed with others (`hypernet.mixtures`): a description that
    is like none of the known is then served as by one adapter for all, at some cost to those that are. code, hidden:
    widths; rank: of what a member makes, whatever the experts' is. heads, channels: of the reader. members: networks
    whose deltas are averaged; rank and time grow with them. start: a vector (size,) of the school's layout, by default
    the mean of the experts' deltas. similarity: learned from transfer between the same experts, whose reader the
    network's begins as; its sizes go before code, heads, channels.

    Raises BadOption for options outside their range, GenerationError for an expert without batches.
    """
    _check_positive(steps=steps, tasks=tasks, rate=rate, members=members, rank=rank)
    _check_positive(code=code, hidden=hidden, heads=heads, channels=channels)
    _check_shares(min(moving, noise, shrink), dropped, mixed)
    width = token_width(school.space, school.vectors[0].shape[1])
    last = torch.stack([some[-1] for some in school.weights])
    states = shortened([parted(some, width) for some in school.vectors])
    _check_start(start, school.layout)
    if similarity is not None:
        code, heads, channels = similarity.sizes
    sizes, wide = Sizes(width, heads, channels, code, hidden, rank), school.layout.widened(rank)
    trial, fits, losses = Trial(practice.model, wide, practice.component), [], []
    for member, chance in enumerate(_seeds(seed, members)):
        network = _begun(sizes, wide, torch.cat(states), similarity, chance)
        opening(network, school.layout, last, start, generator(chance, "bases"))
        drill = Drill(steps, tasks, rate, moving, noise, dropped, shrink, mixed, chance)
        told = partial(_told, progress, member * steps) if progress else None
        losses += trained(network, trial, practice, school.names, states, drill, told)[-20:]
        fits.append(network)
    said = _said(fits[0], states)
    weights = tuple({name: part.detach().clone() for name, part in one.state_dict().items()} for one in fits)
    origin = school.origin(steps=steps, seed=seed, loss=sum(losses) / len(losses), near=threshold(said))
    return Hyper(school.layout, origin, school.names, sizes, weights, directions(said), last)


def _said(network: HyperNetwork, states: Sequence[Tensor]) -> list[Tensor]:
    """The directions of what the reader says of each expert's descriptions."""
    with torch.inference_mode():
        return [functional.normalize(network.codes(some), dim=1).clone() for some in states]


def _check_start(start: Tensor | None, layout: Layout) -> None:
    if start is not None and start.shape != (layout.size,):
        raise BadOption(f"start has shape {tuple(start.shape)}; expected ({layout.size},)")


def _check_positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if not value > 0:
            raise BadOption(f"{name} is {value}; expected a number above 0")


def _check_shares(least: float, dropped: float, mixed: float) -> None:
    if least < 0 or not 0 <= dropped < 1 or not 0 <= mixed <= 1:
        raise BadOption("moving, noise and shrink are at least 0, mixed is a share, dropped one below 1")


def _seeds(seed: int, members: int) -> list[int]:
    """The first member's is the fit's own."""
    return [seed, *(generator(seed, f"member {member}").initial_seed() for member in range(1, members))]


def _told(progress: Callable[[int, float], None], before: int, step: int, loss: float) -> None:
    progress(before + step, loss)


def _begun(sizes: Sizes, wide: Layout, states: Tensor, similarity: Similarity | None, seed: int) -> HyperNetwork:
    """The network with a reader of its own, or with the similarity's, which then says numbers of variance 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = HyperNetwork(sizes, wide)
    if similarity is None:
        network.reader.settle(states)
        return network
    if similarity.width != sizes.width:
        raise GenerationError(
            f"the similarity reads tokens of {similarity.width} numbers, the descriptions have {sizes.width}; "
            "fit it to the same descriptions"
        )
    network.reader.load_state_dict(dict(similarity.tensors))
    with torch.no_grad():
        said, last = network.reader(states), network.reader.say
        spread = (said - said.mean(dim=0)).square().mean().sqrt().clamp_min(1e-6)
        last.weight.div_(spread)
        last.bias.div_(spread)
    return network


def restore(layout: Layout, origin: Origin, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Hyper:
    """The inverse of `facts` and `tensors`. Raises FormatError, KeyError or ValueError where they do not fit."""
    names, sizes = tuple(map(str, facts["names"])), Sizes(*map(int, facts["sizes"]))
    if min(sizes) < 1 or max(sizes) > _LARGEST:
        raise FormatError(f"its sizes {tuple(sizes)} make no sense; expected numbers from 1 to {_LARGEST}")
    with torch.device("meta"):
        expected = {n: part.shape for n, part in HyperNetwork(sizes, layout.widened(sizes.rank)).state_dict().items()}
    members = []
    for row in range(int(facts["members"])):
        prefix = f"network.{row}."
        held = {name.removeprefix(prefix): part for name, part in tensors.items() if name.startswith(prefix)}
        if {name: part.shape for name, part in held.items()} != expected:
            raise FormatError(f"its tensors are not those of a hypernetwork of sizes {tuple(sizes)}")
        members.append(held)
    if not members:
        raise FormatError("it has no member; fit the generator anew")
    codes, means = tensors["codes"], tensors["means"]
    if codes.shape != (len(names), sizes.code) or means.shape != (len(names), layout.size):
        raise FormatError(f"its tensors are not those of {len(names)} experts")
    return Hyper(layout, origin, names, sizes, tuple(members), codes, means)
